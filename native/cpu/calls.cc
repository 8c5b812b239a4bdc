// The two custom calls on the CPU: how each is cut into blocks, and in which order they run.
//
// Forms without W sweep x and y (or g, x and dx) once: a block is a range of rows. With W, a block
// is one of the product, and the low-rank part its last step. For few rows a block is a part of W,
// read contiguously, and the low-rank part is added to the sum of the blocks.
//
// The elements of a batch are more ranges of rows.

#include "native/calls.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>

#include "native/backend.h"
#include "native/cpu/kernels.h"
#include "native/cpu/parallel.h"
#include "native/cpu/product.h"
#include "native/cpu/workspace.h"

namespace jax_fused_lora {
namespace {

constexpr int64_t kRowBlock = 36;  // rows of a sweep, whole tiles that share a second cache
constexpr int64_t kFew = Scratch::kFew;
// Rows up to which A is better read again for each than transposed, or multiplied by several at
// once (float32, 16×1024, rank 16, Zen 4: 22 → 19 µs with 8, not 16).
constexpr int64_t kFewToShrink = 8;
// The same where A's rows are whole panels, which several rows can be multiplied by as they lie
// (float32, 4×512, rank 64, Zen 4: 1.18 → 0.76 to 0.86 of XLA's time).
constexpr int64_t kFewWithPanels = 2;

// Columns of W in a block of x·W for few rows: as long a read as can be, the sums of 16 KiB a row
// being near enough.
constexpr int64_t kFewColumns = 4096;
static_assert(Scratch::kFew * kFewColumns <= Scratch::kRows * Scratch::kColumns, "their sums");

// Below this many multiplications a second thread costs more than it brings: waking one takes
// 5 to 10 µs, in which a core multiplies some 500,000 times. Reading W counts for more, since
// that is memory's time.
constexpr int64_t kWorthAThread = 400'000;

// Below this many, claiming a block costs about as much as doing it.
constexpr int64_t kWorthABlock = 20'000;

// Multiplications, as a float: a batch of nothing may be longer than integers go.
double Work(int64_t times, int64_t size, int64_t rows) {
  return static_cast<double>(times) * static_cast<double>(size) * static_cast<double>(rows);
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

// Calls body(phases, phase, unit) for every unit of every phase. A unit is a block of its own but
// in a batch, where small ones are handed out several at a time. `work` is the call's, in
// multiplications.
template <class Body>
void RunUnits(ffi::ThreadPool& pool, const Batch& batch, const Phases::Sizes& units, double work,
              bool backwards, const Body& body) {
  Phases::Sizes each, blocks;
  for (int phase = 0; phase < Phases::kMax; ++phase) {
    const double worth = kWorthABlock * static_cast<double>(units[phase]);
    each[phase] =
        batch.count == 1 || worth <= work ? 1 : static_cast<int64_t>(worth / std::max(work, 1.0));
    blocks[phase] = Blocks(units[phase], each[phase]);
  }
  const int64_t threads = work < kWorthAThread ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  RunPhases(pool, threads, blocks, backwards, [&](const Phases& phases, int phase, int64_t block) {
    const int64_t end = std::min((block + 1) * each[phase], units[phase]);
    for (int64_t unit = block * each[phase]; unit < end; ++unit) body(phases, phase, unit);
  });
}

class Forward {
 public:
  Forward(const ForwardCall& call, int64_t threads, Workspace* space) : c_(call) {
    if (!few_to_shrink_ && c_.r % static_cast<int64_t>(kernels_.panel) != 0) {
      at_ = Widened(c_.a, c_.dtype, true, c_.r, c_.k, Widened::kRowMajor, space);
    }
    if (!few_ || c_.b_dtype != ffi::DataType::F32) {
      b_ = Widened(c_.b, c_.b_dtype, false, c_.r, c_.n,
                   few_ ? Widened::kRowMajor : Widened::kPacked, space);
    }
    if (c_.bias && c_.dtype != ffi::DataType::F32) {
      bias_ = Widened(c_.bias, c_.dtype, false, 1, c_.n, Widened::kRowMajor, space,
                      /*block=*/std::max<int64_t>(c_.n, 1));
    }
    if (!product_) return;
    blocks_.emplace(c_.batch, c_.x, c_.kernel, c_.m, c_.n, static_cast<int64_t>(kernels_.columns),
                    threads);
    if (blocks_->rows() <= kFew) {
      parts_ = c_.slices * blocks_->products() * column_ranges_;
      partial_ = space->Take({c_.slices, blocks_->products(), blocks_->rows(), c_.n});
    }
  }

  void Run(ffi::ThreadPool& pool) const {
    double work = Work(c_.batch.count, (c_.k + c_.n) * c_.r, std::max<int64_t>(c_.m, 1));
    if (product_) {
      work += Work(blocks_->products(), c_.k * c_.n, std::max<int64_t>(blocks_->rows(), 8));
    } else if (c_.batch.count * sweep_ranges_ == 1) {
      work = 0;  // a second thread would have nothing to do
    }
    const Phases::Sizes units = {at_.blocks() + b_.blocks() + bias_.blocks() + parts_,
                                 c_.batch.count * sweep_ranges_,
                                 !product_    ? 0
                                 : parts_ > 0 ? c_.batch.count * column_ranges_
                                              : blocks_->count()};
    RunUnits(pool, c_.batch, units, work, !product_ && Backwards(c_.x, c_.y),
             [this](const Phases& phases, int phase, int64_t unit) {
               if (phase == 0) return Prepare(unit);
               if (phase == 2 && parts_ == 0) return Multiply(phases, unit);
               // A shrink alone, of an A that is read as it lies, waits for nothing.
               if (phase == 2 || at_ || !product_) phases.WaitBefore(phase);
               return phase == 1 ? Sweep(unit) : Finish(unit);
             });
  }

 private:
  // What needs nothing but operands.
  void Prepare(int64_t unit) const {
    for (const Widened* operand : {&at_, &b_, &bias_}) {
      if (unit < operand->blocks()) return operand->Make(unit);
      unit -= operand->blocks();
    }
    Stream(unit);
  }

  // A part of x·W for few rows: a slice of k and a range of columns.
  void Stream(int64_t unit) const {
    const int64_t j0 = unit % column_ranges_ * kFewColumns;
    unit /= column_ranges_;
    const int64_t slice = unit % c_.slices, product = unit / c_.slices;
    const int64_t depth = Blocks(c_.k, c_.slices), rows = blocks_->rows();
    float* to = partial_ + (slice * blocks_->products() + product) * rows * c_.n;
    kernels_.stream(RowsOf(product), rows, c_.k, std::min(slice * depth, c_.k),
                    std::min((slice + 1) * depth, c_.k), c_.kernel.At(c_.batch, product), c_.n, j0,
                    std::min(kFewColumns, c_.n - j0), to + j0, c_.n, ThreadScratch());
  }

  // A block of x·W for more rows, and of y.
  void Multiply(const Phases& phases, int64_t unit) const {
    const ProductBlocks::Block block = blocks_->At(unit);
    const void* x = At(RowsOf(block.product), block.m0 * c_.k, c_.dtype);
    const void* w = c_.kernel.At(c_.batch, block.product);
    Scratch* scratch = ThreadScratch();
    if (const auto part = blocks_->OneElement(block)) {
      phases.WaitBefore(2);
      const auto [element, m0] = *part;
      const LowRank low_rank = {c_.h.At(c_.batch, element) + m0 * c_.r, static_cast<size_t>(c_.r),
                                b_.At(c_.batch, element).From(block.j0).Read(), c_.scaling};
      return kernels_.layer(x, block.rows, c_.k, w, c_.n, block.j0, block.columns, low_rank,
                            Bias(element, block.j0), Y(element, m0, block.j0), c_.n, scratch);
    }
    kernels_.product(x, block.rows, c_.k, w, c_.n, block.j0, block.columns, scratch->sums, scratch);
    phases.WaitBefore(2);
    blocks_->ForEachElement(block, [&](int64_t element, int64_t m0, int64_t rows, int64_t first) {
      Expand(element, m0, rows, block.j0, block.columns, scratch->sums + first * block.columns,
             block.columns);
    });
  }

  const void* RowsOf(int64_t product) const {
    return blocks_->shared() ? c_.x.data : c_.x.At(c_.batch, product);
  }

  // Rows of a sweep's block: half of them where all are fewer than a block, if a second thread is
  // worth it (float32, 16×2048, rank 16, Zen 4: 68 → 45 µs).
  int64_t RowBlock() const {
    const bool two = c_.m <= kRowBlock && Work(c_.m, c_.k + c_.n, c_.r) >= 2.0 * kWorthAThread;
    return two ? Blocks(c_.m, 2) : kRowBlock;
  }

  // h, and where W is not ours to multiply y too: one sweep.
  void Sweep(int64_t unit) const {
    const int64_t element = unit / sweep_ranges_, m0 = unit % sweep_ranges_ * row_block_;
    const int64_t rows = std::min(row_block_, c_.m - m0);
    const void* from = At(c_.x.At(c_.batch, element), m0 * c_.k, c_.dtype);
    float* h = c_.h.At(c_.batch, element) + m0 * c_.r;
    if (at_) {
      const float* at = at_.At(c_.batch, element).data;
      kernels_.shrink(from, rows, c_.k, at, c_.r, 1.0f, h, ThreadScratch());
    } else {
      const auto shrink = few_to_shrink_ ? kernels_.shrink_few : kernels_.shrink_panels;
      shrink(from, rows, c_.k, c_.a.At(c_.batch, element), c_.r, h, ThreadScratch());
    }
    if (product_) return;
    const float* base = c_.base ? c_.base.At(c_.batch, element) + m0 * c_.n : nullptr;
    Expand(element, m0, rows, 0, c_.n, base, c_.n);
  }

  // The sum of the slices, bias and low-rank part of few rows of y, rounded once.
  void Finish(int64_t unit) const {
    const int64_t element = unit / column_ranges_, j0 = unit % column_ranges_ * kFewColumns;
    const int64_t columns = std::min(kFewColumns, c_.n - j0);
    const int64_t row = (blocks_->shared() ? c_.x.Index(c_.batch, element) : element) * c_.m;
    float* sums = ThreadScratch()->sums;
    kernels_.gather(partial_ + row * c_.n + j0, c_.slices,
                    blocks_->products() * blocks_->rows() * c_.n, c_.m, c_.n, columns, sums);
    Expand(element, 0, c_.m, j0, columns, sums, columns);
  }

  // A block of an element's y, of the columns from j0 on.
  void Expand(int64_t element, int64_t m0, int64_t rows, int64_t j0, int64_t columns,
              const float* init, int64_t init_row) const {
    const float* h = c_.h.At(c_.batch, element) + m0 * c_.r;
    const float* bias = Bias(element, j0);
    void* y = Y(element, m0, j0);
    if (few_) {
      kernels_.expand_few(h, rows, c_.r, Floats(c_.b, b_, c_.batch, element) + j0, c_.n, columns,
                          c_.scaling, init, init_row, bias, y, c_.n, ThreadScratch());
    } else {
      kernels_.expand(h, rows, c_.r, b_.At(c_.batch, element).From(j0).Read(), columns, c_.scaling,
                      init, init_row, bias, y, c_.n);
    }
  }

  // An element's bias from column j0 on; null where it has none.
  const float* Bias(int64_t element, int64_t j0) const {
    return c_.bias ? Floats(c_.bias, bias_, c_.batch, element) + j0 : nullptr;
  }
  void* Y(int64_t element, int64_t m0, int64_t j0) const {
    return At(c_.y.At(c_.batch, element), m0 * c_.n + j0, c_.dtype);
  }

  const ForwardCall& c_;
  const Kernels& kernels_ = KernelsFor(c_.dtype);
  const bool few_ = c_.m <= kFew;
  const bool few_to_shrink_ =
      c_.m <= (c_.r % static_cast<int64_t>(kernels_.panel) == 0 ? kFewWithPanels : kFewToShrink);
  const bool product_ = c_.form == Form::kKernel;

  const int64_t row_block_ = RowBlock();
  const int64_t sweep_ranges_ = Blocks(c_.m, row_block_);

  Widened at_, b_, bias_;  // Aᵀ, B
  std::optional<ProductBlocks> blocks_;

  // For few rows.
  const int64_t column_ranges_ = Blocks(c_.n, kFewColumns);
  int64_t parts_ = 0;
  float* partial_ = nullptr;  // (slices, products, rows of each, n)
};

class Backward {
  // dA and dB are summed in parts of so many ranks, and rows at a time.
  static constexpr int64_t kSumRanks = 256, kSumRows = Scratch::kPanelDepth;
  static constexpr int64_t kSumSize = 8192;  // elements of a part, at most

  // Columns of a part.
  int64_t SumColumns(int64_t columns) const {
    const int64_t most =
        std::max<int64_t>(kSumSize / std::clamp<int64_t>(c_.r, 1, kSumRanks) / 64 * 64, 64);
    return std::min(Padded(std::max<int64_t>(columns, 1)), most);
  }

 public:
  Backward(const BackwardCall& call, int64_t threads, Workspace* space) : c_(call) {
    if (product_) {
      blocks_.emplace(c_.batch, c_.g, c_.kernel, c_.m, c_.k, static_cast<int64_t>(kernels_.columns),
                      threads);
    }
    if (c_.dx) at_ = Widened(c_.a, c_.dtype, true, c_.r, c_.k, Widened::kPacked, space);
    if (need_t_ && c_.b_dtype != ffi::DataType::F32) {
      b_ = Widened(c_.b, c_.b_dtype, false, c_.r, c_.n, Widened::kRowMajor, space);
    }
    const int64_t count = c_.batch.count;
    if (need_t_) t_ = space->Take({count, c_.m, c_.r});
    if (!sliced_) return;
    if (c_.da) da_slices_ = space->Take({count, c_.slices, c_.r, c_.k});
    if (c_.db) db_slices_ = space->Take({count, c_.slices - first_in_db_, c_.r, c_.n});
  }

  void Run(ffi::ThreadPool& pool) const {
    double work = Work(c_.batch.count, (c_.k + c_.n) * c_.r, std::max<int64_t>(c_.m, 1)) * 2;
    if (product_) {
      work += Work(blocks_->products(), c_.k * c_.n, std::max<int64_t>(blocks_->rows(), 8));
    }
    const int64_t dx_units = product_ ? blocks_->count() : 0;
    const int64_t da_units = c_.da ? c_.batch.count * da_ranges_ : 0;
    const int64_t db_units = c_.db ? c_.batch.count * db_ranges_ : 0;
    const Phases::Sizes units = {at_.blocks() + b_.blocks(), c_.batch.count * sweep_ranges_,
                                 dx_units + da_units + db_units};
    RunUnits(pool, c_.batch, units, work, /*backwards=*/false,
             [&](const Phases& phases, int phase, int64_t unit) {
               if (phase == 0) {
                 return unit < at_.blocks() ? at_.Make(unit) : b_.Make(unit - at_.blocks());
               }
               if (phase == 2 && unit < dx_units) return Multiply(phases, unit);
               phases.WaitBefore(phase);
               if (phase == 1) return Sweep(unit);
               unit -= dx_units;
               return unit < da_units ? GradientOfA(unit) : GradientOfB(unit - da_units);
             });
  }

 private:
  // A range of rows makes one sweep over its g and x. A slice of rows sums its own dA and dB, so
  // that the result does not depend on which thread ran when.
  void Sweep(int64_t unit) const {
    const int64_t element = unit / sweep_ranges_, range = unit % sweep_ranges_;
    const int64_t range_rows = Blocks(c_.m, sweep_ranges_);
    const int64_t begin = std::min(range * range_rows, c_.m);
    const int64_t end = std::min(begin + range_rows, c_.m);
    const void* x = c_.x.At(c_.batch, element);
    const void* g = c_.g.At(c_.batch, element);
    const float* h = c_.h.At(c_.batch, element);
    const float* base = c_.base.At(c_.batch, element);
    const float* b = Floats(c_.b, b_, c_.batch, element);
    void* dx = c_.dx.At(c_.batch, element);
    float* da = da_slices_ ? da_slices_ + unit * c_.r * c_.k : nullptr;
    float* db = SliceOfB(element, range);
    if (begin == end) {
      if (da) std::fill_n(da, c_.r * c_.k, 0.0f);
      if (db) std::fill_n(db, c_.r * c_.n, 0.0f);
    }
    Scratch* scratch = ThreadScratch();
    for (int64_t m0 = begin; m0 < end; m0 += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - m0);
      const bool add = m0 > begin;
      const float* hm = h + m0 * c_.r;
      const void* gm = At(g, m0 * c_.n, c_.dtype);
      const void* xm = At(x, m0 * c_.k, c_.dtype);
      float* tm = t_ ? t_ + (element * c_.m + m0) * c_.r : nullptr;
      if (need_t_) kernels_.shrink(gm, rows, c_.n, b, c_.r, c_.scaling, tm, scratch);
      if (db) {
        kernels_.outer(hm, c_.r, rows, c_.r, gm, c_.n, c_.n, c_.scaling, add, db, c_.n, scratch);
      }
      if (da) kernels_.outer(tm, c_.r, rows, c_.r, xm, c_.k, c_.k, 1.0f, add, da, c_.k, scratch);
      if (c_.dx && !product_) {
        kernels_.expand(tm, rows, c_.r, at_.At(c_.batch, element).Read(), c_.k, 1.0f,
                        base ? base + m0 * c_.k : nullptr, c_.k, nullptr,
                        At(dx, m0 * c_.k, c_.dtype), c_.k);
      }
    }
  }

  // A block of dx = g·Wᵀ + t·Aᵀ where W is ours to multiply.
  void Multiply(const Phases& phases, int64_t unit) const {
    const ProductBlocks::Block block = blocks_->At(unit);
    const void* g = At(blocks_->shared() ? c_.g.data : c_.g.At(c_.batch, block.product),
                       block.m0 * c_.n, c_.dtype);
    const void* w = c_.kernel.At(c_.batch, block.product);
    Scratch* scratch = ThreadScratch();
    if (const auto part = blocks_->OneElement(block)) {
      phases.WaitBefore(2);
      const auto [element, m0] = *part;
      const LowRank low_rank = {t_ + (element * c_.m + m0) * c_.r, static_cast<size_t>(c_.r),
                                at_.At(c_.batch, element).From(block.j0).Read(), 1.0f};
      return kernels_.layer_transposed(g, block.rows, c_.n, w, block.j0, block.columns, low_rank,
                                       Dx(element, m0, block.j0), c_.k, scratch);
    }
    kernels_.product_transposed(g, block.rows, c_.n, w, block.j0, block.columns, scratch->sums,
                                scratch);
    phases.WaitBefore(2);
    blocks_->ForEachElement(block, [&](int64_t element, int64_t m0, int64_t rows, int64_t first) {
      kernels_.expand(t_ + (element * c_.m + m0) * c_.r, rows, c_.r,
                      at_.At(c_.batch, element).From(block.j0).Read(), block.columns, 1.0f,
                      scratch->sums + first * block.columns, block.columns, nullptr,
                      Dx(element, m0, block.j0), c_.k);
    });
  }

  void* Dx(int64_t element, int64_t m0, int64_t k0) const {
    return At(c_.dx.At(c_.batch, element), m0 * c_.k + k0, c_.dtype);
  }

  // Where a slice sums dB: the first in the result, if that is float32.
  float* SliceOfB(int64_t element, int64_t slice) const {
    if (!sliced_ || !c_.db) return nullptr;
    if (slice < first_in_db_) return static_cast<float*>(c_.db.At(c_.batch, element));
    const int64_t index = element * (c_.slices - first_in_db_) + slice - first_in_db_;
    return db_slices_ + index * c_.r * c_.n;
  }

  // A part of dA: the sum of the slices, or the product itself.
  void GradientOfA(int64_t unit) const {
    const int64_t element = unit / da_ranges_, k0 = unit % da_ranges_ * da_columns_;
    const int64_t columns = std::min(da_columns_, c_.k - k0);
    void* da = At(c_.da.At(c_.batch, element), k0 * c_.r, c_.dtype);
    if (sliced_) {
      const int64_t size = c_.r * c_.k;
      const float* slices = da_slices_ + element * c_.slices * size + k0;
      return kernels_.sum_transposed(slices, c_.slices, size, c_.k, c_.r, columns, da, c_.r);
    }
    const float* t = t_ + element * c_.m * c_.r;
    const void* x = At(c_.x.At(c_.batch, element), k0, c_.dtype);
    Scratch* scratch = ThreadScratch();
    for (int64_t r0 = 0; r0 < c_.r; r0 += kSumRanks) {
      const int64_t ranks = std::min(kSumRanks, c_.r - r0);
      SumRows(t + r0, ranks, x, c_.k, columns, 1.0f, scratch->sums, columns, scratch);
      kernels_.sum_transposed(scratch->sums, 1, 0, columns, ranks, columns, At(da, r0, c_.dtype),
                              c_.r);
    }
  }

  // The same of dB.
  void GradientOfB(int64_t unit) const {
    const int64_t element = unit / db_ranges_, j0 = unit % db_ranges_ * db_columns_;
    const int64_t columns = std::min(db_columns_, c_.n - j0);
    const Kernels& store = KernelsFor(c_.b_dtype);
    void* db = c_.db.At(c_.batch, element);
    if (sliced_) {
      const int64_t size = c_.r * c_.n;
      for (int64_t p = 0; p < c_.r; ++p) {
        const int64_t i0 = p * c_.n + j0;
        store.sum(SliceOfB(element, 0), SliceOfB(element, 1), c_.slices - 1, size, i0, i0 + columns,
                  db);
      }
      return;
    }
    const float* h = c_.h.At(c_.batch, element);
    const void* g = At(c_.g.At(c_.batch, element), j0, c_.dtype);
    Scratch* scratch = ThreadScratch();
    if (c_.b_dtype == ffi::DataType::F32) {
      float* to = static_cast<float*>(db) + j0;
      return SumRows(h, c_.r, g, c_.n, columns, c_.scaling, to, c_.n, scratch);
    }
    for (int64_t r0 = 0; r0 < c_.r; r0 += kSumRanks) {
      const int64_t ranks = std::min(kSumRanks, c_.r - r0);
      SumRows(h + r0, ranks, g, c_.n, columns, c_.scaling, scratch->sums, columns, scratch);
      for (int64_t p = 0; p < ranks; ++p) {
        store.sum(scratch->sums + p * columns, nullptr, 0, 0, 0, columns,
                  At(db, (r0 + p) * c_.n + j0, c_.b_dtype));
      }
    }
  }

  // out (ranks, columns) = scale · tᵀ · x over an element's rows, t's being r apart.
  void SumRows(const float* t, int64_t ranks, const void* x, int64_t x_row, int64_t columns,
               float scale, float* out, int64_t out_row, Scratch* scratch) const {
    for (int64_t m0 = 0; m0 < c_.m; m0 += kSumRows) {
      kernels_.outer(t + m0 * c_.r, c_.r, std::min(kSumRows, c_.m - m0), ranks,
                     At(x, m0 * x_row, c_.dtype), x_row, columns, scale, m0 > 0, out, out_row,
                     scratch);
    }
    if (c_.m > 0) return;
    for (int64_t p = 0; p < ranks; ++p) std::fill_n(out + p * out_row, columns, 0.0f);
  }

  const BackwardCall& c_;
  const Kernels& kernels_ = KernelsFor(c_.dtype);
  const bool product_ = c_.dx && c_.form == Form::kKernel;
  const bool need_t_ = c_.dx || c_.da;
  const bool sliced_ = c_.slices > 1;  // else whoever has columns of dA or dB sums all rows
  const int64_t first_in_db_ = c_.b_dtype == ffi::DataType::F32;  // of the slices, 0 or 1

  const int64_t sweep_ranges_ = sliced_ ? c_.slices : Blocks(c_.m, kRowBlock);
  const int64_t da_columns_ = SumColumns(c_.k), da_ranges_ = Blocks(c_.k, da_columns_);
  const int64_t db_columns_ = SumColumns(c_.n), db_ranges_ = Blocks(c_.n, db_columns_);

  std::optional<ProductBlocks> blocks_;
  Widened at_, b_;                                     // Aᵀ, B
  float* t_ = nullptr;                                 // (batch, m, r)
  float *da_slices_ = nullptr, *db_slices_ = nullptr;  // (batch, slices, r, k or n)
};

ffi::Error LoraForward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                       float scaling, std::string_view form, int64_t slices) {
  ForwardCall c;
  ffi::Error error = ReadForward(x, a, b, rest, y, h, workspace, scaling, form, slices, &c);
  if (error.failure() || c.batch.count == 0) return error;
  Workspace space(c.workspace, c.workspace_size);
  const Forward forward(c, pool.num_threads(), &space);
  error = space.Check("lora_forward");
  if (error.success()) forward.Run(pool);
  return error;
}

ffi::Error LoraBackward(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                        ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                        ffi::RemainingRets results, float scaling, std::string_view form,
                        std::string_view grads, int64_t slices) {
  BackwardCall c;
  ffi::Error error = ReadBackward(g, x, a, b, h, rest, results, scaling, form, grads, slices, &c);
  if (error.failure() || c.batch.count == 0) return error;
  Workspace space(c.workspace, c.workspace_size);
  const Backward backward(c, pool.num_threads(), &space);
  error = space.Check("lora_backward");
  if (error.success()) backward.Run(pool);
  return error;
}

XLA_FFI_DEFINE_HANDLER(kForward, LoraForward, BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, LoraBackward,
                       BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Backend ThisBackend() {
  return {reinterpret_cast<void*>(kForward), reinterpret_cast<void*>(kBackward), InstructionSet()};
}

}  // namespace jax_fused_lora
