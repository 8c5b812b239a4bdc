// The two custom calls on the CPU: how each is cut into blocks, and in which order they run.
//
// Forms without W sweep x and y (or g, x and dx) once: a block is a range of rows. With W, a block
// is a part of W, read once and contiguously, and the low-rank part is added to the sum of the
// blocks as the product's last step.

#include "native/calls.h"

#include <algorithm>
#include <memory>

#include "native/backend.h"
#include "native/cpu/kernels.h"
#include "native/cpu/parallel.h"

namespace jax_fused_lora {
namespace {

constexpr int64_t kRowBlock = 36;  // rows of a sweep, whole tiles that share a second cache
constexpr int64_t kFew = Scratch::kFew;
constexpr int64_t kFewToShrink = 16;  // rows up to which transposing A costs more than it saves
constexpr int64_t kProductRows = Scratch::kRows;
constexpr int64_t kPackBlock = 256;  // rows of A, columns of B, brought to float32 at a time

// Columns of W in a block of x·W: as long a read as can be for few rows, whose sums of 16 KiB a
// row are near enough; for many rows their sums (64 × 256) shall stay in the second cache.
constexpr int64_t kFewColumns = 4096;
constexpr int64_t kManyColumns = 256;

// Below this many multiplications a second thread costs more than it brings: waking one takes
// 5 to 10 µs, in which a core multiplies some 500,000 times. Reading W counts for more, since
// that is memory's time.
constexpr int64_t kWorthAThread = 400'000;

int64_t Blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Columns of a packed factor, whole panels.
int64_t Padded(int64_t columns) { return Blocks(columns, 64) * 64; }

const Kernels& KernelsFor(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return KernelsFor(Storage::kBfloat16);
    case ffi::DataType::F16:
      return KernelsFor(Storage::kFloat16);
    default:
      return KernelsFor(Storage::kFloat32);
  }
}

size_t Width(ffi::DataType dtype) { return dtype == ffi::DataType::F32 ? 4 : 2; }

// `elements` further on.
template <class T>
T* At(T* data, int64_t elements, ffi::DataType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + elements * static_cast<int64_t>(Width(dtype));
}

// Whether a sweep from one buffer to another begins at their ends. In a chain of layers XLA lets
// two buffers take turns, so each sweep goes the other way than the one before and begins with the
// rows that this one left in the second cache (float32, 512×2048, rank 16: 281 → 268 µs).
bool Backwards(const void* from, const void* to) {
  return reinterpret_cast<uintptr_t>(from) > reinterpret_cast<uintptr_t>(to);
}

// A thread's working memory, allocated the first time the thread takes a block.
Scratch* ThreadScratch() {
  thread_local std::unique_ptr<Scratch> scratch(new Scratch);
  return scratch.get();
}

// Hands out the parts of the call's workspace.
class Workspace {
 public:
  Workspace(float* data, int64_t size) : data_(data), size_(size) {}

  // Null where the workspace is too small, which Check then reports.
  float* Take(int64_t floats) {
    used_ += floats;
    return used_ <= size_ ? data_ + (used_ - floats) : nullptr;
  }

  ffi::Error Check(const char* call) const {
    if (used_ <= size_) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string(call) + ": workspace has " +
                                       std::to_string(size_) + " floats, needed " +
                                       std::to_string(used_));
  }

 private:
  float* data_;
  int64_t size_, used_ = 0;
};

// A and B in float32, as the passes read them, made of blocks that any thread may take. Null data
// stands for a factor that is read where it lies, or not at all.
struct Factors {
  Panels<float> at = {}, b = {};  // (r, k), (r, n)

  int64_t a_blocks(const Call& c) const { return at.data ? Blocks(c.k, kPackBlock) : 0; }
  int64_t blocks(const Call& c) const {
    return a_blocks(c) + (b.data ? Blocks(c.n, kPackBlock) : 0);
  }
  void Make(const Call& c, int64_t block) const {
    const bool a_block = block < a_blocks(c);
    const int64_t size = a_block ? c.k : c.n;
    const int64_t begin = (a_block ? block : block - a_blocks(c)) * kPackBlock;
    const int64_t end = std::min(begin + kPackBlock, size);
    if (a_block) {
      KernelsFor(c.dtype).transpose(c.a, c.r, begin, end, at);
    } else {
      KernelsFor(c.b_dtype).pack(c.b, c.r, c.n, begin, end, b);
    }
  }
};

ffi::Error LoraForward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                       float scaling, std::string_view form, int64_t slices) {
  ForwardCall c;
  ffi::Error error = ReadForward(x, a, b, rest, y, h, workspace, scaling, form, slices, &c);
  if (error.failure()) return error;

  const Kernels& kernels = KernelsFor(c.dtype);
  const bool few = c.m <= kFew, few_to_shrink = c.m <= kFewToShrink;
  const bool product = c.form == Form::kKernel;
  Workspace space(c.workspace, c.workspace_size);
  const bool b_in_place = few && c.b_dtype == ffi::DataType::F32;
  const int64_t width = kernels.panel;
  const bool whole_panels = c.r % width == 0;  // then A is read as it lies
  Factors factors;
  if (!few_to_shrink && !whole_panels) {
    factors.at = Panels<float>::RowMajor(space.Take(c.k * c.r), c.k, width);
  }
  if (!b_in_place) {
    factors.b = few ? Panels<float>::RowMajor(space.Take(c.r * c.n), c.n, width)
                    : Panels<float>::Packed(space.Take(c.r * Padded(c.n)), c.r, width);
  }
  float* wide_bias = !c.bias || c.dtype == ffi::DataType::F32 ? nullptr : space.Take(c.n);
  float* partial = product ? space.Take(c.slices * c.m * c.n) : nullptr;
  error = space.Check("lora_forward");
  if (error.failure()) return error;
  const float* bias = wide_bias ? wide_bias : static_cast<const float*>(c.bias);

  const int64_t work = (c.k + c.n) * c.r * std::max<int64_t>(c.m, 1) +
                       (product ? c.k * c.n * std::max<int64_t>(c.m, 8) : 0);
  const int64_t threads = work < kWorthAThread ? 1 : std::max<int64_t>(pool.num_threads(), 1);

  // What needs nothing but operands: A, B and bias in float32, and x·W in blocks of a slice of k, a
  // range of columns and a range of rows.
  const int64_t factor_blocks = factors.blocks(c), bias_blocks = wide_bias ? 1 : 0;
  const int64_t row_ranges = Blocks(c.m, kProductRows);
  const int64_t columns = few ? kFewColumns : kManyColumns;
  const int64_t column_ranges = Blocks(c.n, columns);
  const int64_t depth = Blocks(c.k, c.slices);
  const auto prepare = [&](int64_t index) {
    if (index < factor_blocks) return factors.Make(c, index);
    index -= factor_blocks;
    if (index < bias_blocks) {
      return kernels.pack(c.bias, 1, c.n, 0, c.n, Panels<float>::RowMajor(wide_bias, c.n, width));
    }
    index -= bias_blocks;
    const int64_t m0 = index % row_ranges * kProductRows;
    const int64_t j0 = index / row_ranges % column_ranges * columns;
    const int64_t slice = index / row_ranges / column_ranges;
    kernels.product(At(c.x, m0 * c.k, c.dtype), std::min(kProductRows, c.m - m0), c.k,
                    std::min(slice * depth, c.k), std::min((slice + 1) * depth, c.k), c.kernel, c.n,
                    j0, std::min(columns, c.n - j0), partial + (slice * c.m + m0) * c.n + j0, c.n,
                    ThreadScratch());
  };

  // A block of y, of the columns from j0 on.
  const auto expand = [&](int64_t m0, int64_t rows, int64_t j0, int64_t block, const float* init,
                          int64_t init_row) {
    const float* h_rows = c.h + m0 * c.r;
    const float* bias_block = bias ? bias + j0 : nullptr;
    void* to = At(c.y, m0 * c.n + j0, c.dtype);
    if (few) {
      const float* b_rows = b_in_place ? static_cast<const float*>(c.b) : factors.b.data;
      kernels.expand_few(h_rows, rows, c.r, b_rows + j0, c.n, block, c.scaling, init, init_row,
                         bias_block, to, c.n, ThreadScratch());
    } else {
      kernels.expand(h_rows, rows, c.r, factors.b.From(j0).Read(), block, c.scaling, init, init_row,
                     bias_block, to, c.n);
    }
  };

  // h, and where W is not ours to multiply y too: one sweep.
  const auto sweep = [&](int64_t index) {
    const int64_t m0 = index * kRowBlock;
    const int64_t rows = std::min(kRowBlock, c.m - m0);
    const void* from = At(c.x, m0 * c.k, c.dtype);
    float* to = c.h + m0 * c.r;
    if (few_to_shrink) {
      kernels.shrink_few(from, rows, c.k, c.a, c.r, to, ThreadScratch());
    } else if (whole_panels) {
      kernels.shrink_panels(from, rows, c.k, c.a, c.r, to, ThreadScratch());
    } else {
      kernels.shrink(from, rows, c.k, factors.at.data, c.r, 1.0f, to, ThreadScratch());
    }
    if (product) return;
    expand(m0, rows, 0, c.n, c.base ? c.base + m0 * c.n : nullptr, c.n);
  };

  // The sum of the slices, bias and low-rank part of a block of y, rounded once.
  const int64_t finish_rows = few ? kFew : kProductRows;
  const int64_t finish_columns = Scratch::kSums / finish_rows;
  const int64_t finish_ranges = Blocks(c.m, finish_rows);
  const auto finish = [&](int64_t index) {
    const int64_t m0 = index % finish_ranges * finish_rows;
    const int64_t j0 = index / finish_ranges * finish_columns;
    const int64_t rows = std::min(finish_rows, c.m - m0);
    const int64_t block = std::min(finish_columns, c.n - j0);
    float* sums = ThreadScratch()->sums;
    kernels.gather(partial + m0 * c.n + j0, c.slices, c.m * c.n, rows, c.n, block, sums);
    expand(m0, rows, j0, block, sums, block);
  };

  RunPhases(pool, threads,
            {factor_blocks + bias_blocks + (product ? c.slices * column_ranges * row_ranges : 0),
             Blocks(c.m, kRowBlock), product ? finish_ranges * Blocks(c.n, finish_columns) : 0},
            !product && Backwards(c.x, c.y), [&](const Phases& phases, int phase, int64_t index) {
              if (phase == 0) return prepare(index);
              // A shrink alone, of an A that is read as it lies, waits for nothing.
              if (phase > 1 || factors.at.data || !product) phases.WaitBefore(phase);
              return phase == 1 ? sweep(index) : finish(index);
            });
  return ffi::Error::Success();
}

ffi::Error LoraBackward(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                        ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                        ffi::RemainingRets results, float scaling, std::string_view form,
                        std::string_view grads, int64_t slices) {
  BackwardCall c;
  ffi::Error error = ReadBackward(g, x, a, b, h, rest, results, scaling, form, grads, slices, &c);
  if (error.failure()) return error;

  const Kernels& kernels = KernelsFor(c.dtype);
  const bool product = c.dx && c.form == Form::kKernel;
  const bool need_t = c.dx || c.da;
  Workspace space(c.workspace, c.workspace_size);
  const int64_t width = kernels.panel;
  const bool b_in_place = c.b_dtype == ffi::DataType::F32;
  Factors factors;
  if (c.dx) factors.at = Panels<float>::Packed(space.Take(c.r * Padded(c.k)), c.r, width);
  if (need_t && !b_in_place) {
    factors.b = Panels<float>::RowMajor(space.Take(c.r * c.n), c.n, width);
  }
  float* t = need_t ? space.Take(c.m * c.r) : nullptr;
  float* da_slices = c.da ? space.Take(c.slices * c.r * c.k) : nullptr;
  float* db_slices = c.db ? space.Take(c.slices * c.r * c.n) : nullptr;
  error = space.Check("lora_backward");
  if (error.failure()) return error;
  const float* bf = b_in_place ? static_cast<const float*>(c.b) : factors.b.data;

  const int64_t work = (c.k + c.n) * c.r * std::max<int64_t>(c.m, 1) * 2 +
                       (product ? c.k * c.n * std::max<int64_t>(c.m, 8) : 0);
  const int64_t threads = work < kWorthAThread ? 1 : std::max<int64_t>(pool.num_threads(), 1);

  // Phase 1: a slice of rows makes one sweep over its g and x. Each slice sums its own dA and dB,
  // so that the result does not depend on which thread ran when.
  const int64_t slice_rows = Blocks(std::max<int64_t>(c.m, 1), c.slices);
  const auto sweep = [&](int64_t slice) {
    const int64_t end = std::min((slice + 1) * slice_rows, c.m);
    float* da = da_slices ? da_slices + slice * c.r * c.k : nullptr;
    float* db = db_slices ? db_slices + slice * c.r * c.n : nullptr;
    if (da) std::fill_n(da, c.r * c.k, 0.0f);
    if (db) std::fill_n(db, c.r * c.n, 0.0f);
    for (int64_t m0 = slice * slice_rows; m0 < end; m0 += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - m0);
      const void* gm = At(c.g, m0 * c.n, c.dtype);
      const void* xm = At(c.x, m0 * c.k, c.dtype);
      float* tm = t ? t + m0 * c.r : nullptr;
      if (need_t) kernels.shrink(gm, rows, c.n, bf, c.r, c.scaling, tm, ThreadScratch());
      if (db) kernels.outer(c.h + m0 * c.r, rows, c.r, gm, c.n, c.scaling, db, ThreadScratch());
      if (da) kernels.outer(tm, rows, c.r, xm, c.k, 1.0f, da, ThreadScratch());
      if (c.dx && !product) {
        kernels.expand(tm, rows, c.r, factors.at.Read(), c.k, 1.0f,
                       c.base ? c.base + m0 * c.k : nullptr, c.k, nullptr,
                       At(c.dx, m0 * c.k, c.dtype), c.k);
      }
    }
  };

  // Phase 2: the slices' sums, and dx = g·Wᵀ + t·Aᵀ where W is ours to multiply.
  constexpr int64_t kSumBlock = 1024, kSumRanks = 8;  // columns of dAᵀ; elements of dB
  const int64_t da_blocks = c.da ? Blocks(c.k, kSumBlock) : 0;
  const int64_t db_blocks = c.db ? Blocks(c.r * c.n, kSumBlock * kSumRanks) : 0;
  const int64_t columns = Scratch::kPanel;
  const int64_t product_blocks = Blocks(c.m, Scratch::kRows);
  const int64_t dx_blocks = product ? product_blocks * Blocks(c.k, columns) : 0;

  RunPhases(pool, threads, {factors.blocks(c), c.slices, dx_blocks + da_blocks + db_blocks},
            /*backwards=*/false, [&](const Phases& phases, int phase, int64_t index) {
              if (phase == 0) return factors.Make(c, index);
              if (phase == 1) {
                phases.WaitBefore(1);
                return sweep(index);
              }
              if (index < dx_blocks) {
                const int64_t m0 = index % product_blocks * int64_t{Scratch::kRows};
                const int64_t k0 = index / product_blocks * columns;
                const int64_t rows = std::min<int64_t>(Scratch::kRows, c.m - m0);
                const int64_t block = std::min(columns, c.k - k0);
                Scratch* scratch = ThreadScratch();
                kernels.product_transposed(At(c.g, m0 * c.n, c.dtype), rows, c.n, c.kernel, k0,
                                           block, scratch->sums, scratch);
                phases.WaitBefore(2);
                kernels.expand(t + m0 * c.r, rows, c.r, factors.at.From(k0).Read(), block, 1.0f,
                               scratch->sums, block, nullptr, At(c.dx, m0 * c.k + k0, c.dtype),
                               c.k);
                return;
              }
              phases.WaitBefore(2);
              index -= dx_blocks;
              if (index < da_blocks) {
                const int64_t k0 = index * kSumBlock;
                kernels.sum_transposed(da_slices, c.slices, c.r * c.k, c.k, c.r, k0,
                                       std::min(k0 + kSumBlock, c.k), c.da);
              } else {
                const int64_t i0 = (index - da_blocks) * kSumBlock * kSumRanks;
                KernelsFor(c.b_dtype).sum(db_slices, c.slices, c.r * c.n, i0,
                                          std::min(i0 + kSumBlock * kSumRanks, c.r * c.n), c.db);
              }
            });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kForward, LoraForward, BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, LoraBackward,
                       BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Backend ThisBackend() {
  return {reinterpret_cast<void*>(kForward), reinterpret_cast<void*>(kBackward), InstructionSet()};
}

}  // namespace jax_fused_lora
