// lora_forward on the CPU.
//
// Without W, x and y are swept once: a block is a range of rows. With W, a block is one of the
// product, and the low-rank part its last step. For few rows a block is a slice of W, read
// contiguously, and the low-rank part is added to the sum of the slices.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_FORWARD_H_
#define JAX_FUSED_LORA_NATIVE_CPU_FORWARD_H_

#include <algorithm>
#include <cstdint>
#include <optional>

#include "native/calls.h"
#include "native/cpu/kernels.h"
#include "native/cpu/parallel.h"
#include "native/cpu/product.h"
#include "native/cpu/units.h"
#include "native/cpu/workspace.h"

namespace jax_fused_lora {

constexpr int64_t kFew = Scratch::kFew, kStreamed = Scratch::kStreamed;
// Rows up to which A is better read again for each than transposed, or multiplied by several at
// once (float32, 16×1024, rank 16, Zen 4: 22 → 19 µs with 8, not 16).
constexpr int64_t kFewToShrink = 8;
// The same where A's rows are whole panels, which several rows can be multiplied by as they lie
// (float32, 4×512, rank 64, Zen 4: 1.18 → 0.76 to 0.86 of XLA's time).
constexpr int64_t kFewWithPanels = 2;

// Rows of a sweep's block: whole tiles of A's panels, whose x and y leave room in a second cache
// for what is asked for and written back meanwhile (two threads, rank 16, Zen 4, 36 rows and 16:
// 512×1024 197 → 165 µs, 512×2048 403 → 344, 512×4096 842 → 703; with AVX2's kernels the same).
constexpr int64_t kForwardRows = 16;

// Columns of W in a block of x·W for few rows: as long a read as can be, the sums of 16 KiB a row
// being near enough.
constexpr int64_t kFewColumns = 4096;
static_assert(kStreamed * kFewColumns <= Scratch::kRows * Scratch::kColumns, "their sums");

// Numbers, beside a row of y, that keep the rows of a slice's sums from being a power of two apart:
// 8 rows of 1024 would share eight of twelve ways of a first cache.
constexpr int64_t kRowGap = 16;

class Forward {
 public:
  Forward(const ForwardCall& call, int64_t threads, Workspace* space) : c_(call) {
    if (!few_to_shrink_ && !panels_) {
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
    blocks_.emplace(c_.batch, c_.x, c_.kernel, c_.m, c_.n, kernels_, threads);
    if (blocks_->rows() <= kStreamed) {
      parts_ = c_.slices * blocks_->products() * column_ranges_;
      partial_ = space->Take({c_.slices, blocks_->products(), blocks_->rows(), partial_row_});
    }
  }

  void Run(ffi::ThreadPool& pool) const {
    double work = SweepWork(c_.batch.count, c_.k + c_.n, c_.r, c_.m);
    if (product_) {
      work += Work(blocks_->products(), c_.k * c_.n, std::max<int64_t>(blocks_->rows(), 8));
    } else if (c_.batch.count * sweep_ranges_ == 1 || work < SweepWorthAThread()) {
      work = 0;  // one thread's
    }
    const int64_t sweeps = c_.batch.count * sweep_ranges_;
    const Phases::Sizes units = {at_.blocks() + b_.blocks() + bias_.blocks(), sweeps + parts_,
                                 !product_    ? 0
                                 : parts_ > 0 ? c_.batch.count * finish_ranges_
                                              : blocks_->count()};
    RunUnits(pool, c_.batch, units, work, !product_ && Backwards(c_.x, c_.y),
             [this, sweeps](const Phases& phases, int phase, int64_t unit) {
               if (phase == 0) return Prepare(unit);
               if (phase == 1 && unit >= sweeps) return Stream(unit - sweeps);
               if (phase == 2 && parts_ == 0) return Multiply(phases, unit);
               // A shrink alone, of an A that is read as it lies, waits for nothing.
               if (phase == 2 || at_ || !product_) phases.WaitBefore(phase);
               return phase == 1 ? Sweep(unit) : Finish(unit);
             });
  }

 private:
  void Prepare(int64_t unit) const {
    for (const Widened* operand : {&at_, &b_, &bias_}) {
      if (unit < operand->blocks()) return operand->Make(unit);
      unit -= operand->blocks();
    }
  }

  // A part of x·W for few rows, which needs nothing but operands: a slice of k and a range of
  // columns.
  void Stream(int64_t unit) const {
    const int64_t j0 = unit % column_ranges_ * kFewColumns;
    unit /= column_ranges_;
    const int64_t slice = unit % c_.slices, product = unit / c_.slices;
    const int64_t depth = Blocks(c_.k, c_.slices), rows = blocks_->rows();
    float* to = partial_ + (slice * blocks_->products() + product) * rows * partial_row_;
    kernels_.stream(RowsOf(product), rows, c_.k, std::min(slice * depth, c_.k),
                    std::min((slice + 1) * depth, c_.k), c_.kernel.At(c_.batch, product), c_.n, j0,
                    std::min(kFewColumns, c_.n - j0), to + j0, partial_row_, ThreadScratch());
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

  // Rows of a sweep's block, near kForwardRows: an even number of blocks, if a second thread is
  // worth it (float32, 16×2048, rank 16, Zen 4: 68 → 45 µs).
  int64_t RowBlock() const {
    const bool two = SweepWork(1, c_.k + c_.n, c_.r, c_.m) >= SweepWorthAThread();
    const int64_t pairs = (c_.m + kForwardRows) / (2 * kForwardRows);
    return two ? Blocks(c_.m, 2 * std::max<int64_t>(pairs, 1)) : kForwardRows;
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
    const int64_t element = unit / finish_ranges_, j0 = unit % finish_ranges_ * finish_columns_;
    const int64_t columns = std::min(finish_columns_, c_.n - j0);
    const int64_t row = (blocks_->shared() ? c_.x.Index(c_.batch, element) : element) * c_.m;
    float* sums = ThreadScratch()->sums;
    kernels_.gather(partial_ + row * partial_row_ + j0, c_.slices,
                    blocks_->products() * blocks_->rows() * partial_row_, c_.m, partial_row_,
                    columns, sums);
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
  const bool product_ = c_.form == Form::kKernel;
  // Whether B is read as it lies: by few rows, and by as many as one sweep has where that takes no
  // more time than to pack it (float32, 1024→1024, Sapphire Rapids, one thread, packed and so: 8
  // rows, rank 64, 24 → 14 µs, 16 rows 30 → 22, rank 16 7.4 → 5.2).
  const bool few_ = c_.m <= kFew || (!product_ && c_.b_dtype == ffi::DataType::F32 &&
                                     c_.m <= std::min<int64_t>(kernels_.in_place, kForwardRows));
  const bool panels_ = c_.r % static_cast<int64_t>(kernels_.ranks) == 0;  // whole ones, in A
  const bool few_to_shrink_ = c_.m <= (panels_ ? kFewWithPanels : kFewToShrink);

  const int64_t row_block_ = RowBlock();
  const int64_t sweep_ranges_ = Blocks(c_.m, row_block_);

  Widened at_, b_, bias_;  // Aᵀ, B
  std::optional<ProductBlocks> blocks_;

  // For few rows.
  const int64_t column_ranges_ = Blocks(c_.n, kFewColumns);
  const int64_t partial_row_ = c_.n + kRowGap;
  int64_t parts_ = 0;
  float* partial_ = nullptr;  // (slices, products, rows of each, partial_row_)
  // Columns of y whose slices are summed at once: 8192 numbers, for a second thread to have some.
  const int64_t finish_columns_ =
      std::min(kFewColumns, Padded(8192 / std::clamp<int64_t>(c_.m, 1, kStreamed)));
  const int64_t finish_ranges_ = Blocks(c_.n, finish_columns_);
};

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_FORWARD_H_
