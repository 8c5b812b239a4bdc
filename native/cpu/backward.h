// lora_backward on the CPU.
//
// First t, a block being a range of rows, and without W dx in the same sweep; then a block is one
// of the product, or a range of columns of dA or dB, for which all rows are read again, from the
// second cache where they are few. Many rows may be cut into slices instead (the caller says into
// how many), each of which sums a dA and a dB of its own while it sweeps.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_BACKWARD_H_
#define JAX_FUSED_LORA_NATIVE_CPU_BACKWARD_H_

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

constexpr int64_t kBackwardRows = 36;  // of a sweep, whole tiles that share a second cache

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
      blocks_.emplace(c_.batch, c_.g, c_.kernel, c_.m, c_.k, kernels_, threads,
                      /*one_factor=*/c_.a.count == 1);
    }
    // A product's blocks turn as much of A as they need.
    if (c_.dx && !product_) {
      at_ = Widened(c_.a, c_.dtype, true, c_.r, c_.k, Widened::kPacked, space);
    }
    // Its place is there though it is read as it lies: programs may be compiled on other CPUs.
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
    // Factors and their gradients are memory's time, as W is.
    double work = SweepWork(c_.batch.count, c_.k + c_.n, c_.r, std::max<int64_t>(c_.m, 8)) * 2;
    if (product_) {
      work += Work(blocks_->products(), c_.k * c_.n, std::max<int64_t>(blocks_->rows(), 8));
    } else if (work < SweepWorthAThread()) {
      work = 0;
    }
    const int64_t dx_units = product_ ? blocks_->count() : 0;
    const int64_t da_units = c_.da ? c_.batch.count * da_ranges_ : 0;
    const int64_t db_units = c_.db ? c_.batch.count * db_ranges_ : 0;
    const Phases::Sizes units = {at_.blocks() + (b_as_is_ ? 0 : b_.blocks()),
                                 c_.batch.count * sweep_ranges_, dx_units + da_units + db_units};
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
  // An even number, if a second thread is worth it (float32, 2048→2048, rank 64, forward and
  // backward, Sapphire Rapids: 16 rows 497 → 440 µs, 33 rows 730 → 634).
  int64_t SweepRanges() const {
    const int64_t ranges = Blocks(c_.m, kBackwardRows);
    return ranges + (SweepWork(1, c_.k + c_.n, c_.r, c_.m) >= SweepWorthAThread() ? ranges % 2 : 0);
  }

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
    void* dx = c_.dx.At(c_.batch, element);
    float* da = da_slices_ ? da_slices_ + unit * c_.r * c_.k : nullptr;
    float* db = SliceOfB(element, range);
    if (begin == end) {
      if (da) std::fill_n(da, c_.r * c_.k, 0.0f);
      if (db) std::fill_n(db, c_.r * c_.n, 0.0f);
    }
    Scratch* scratch = ThreadScratch();
    for (int64_t m0 = begin; m0 < end; m0 += kBackwardRows) {
      const int64_t rows = std::min(kBackwardRows, end - m0);
      const bool add = m0 > begin;
      const float* hm = h + m0 * c_.r;
      const void* gm = At(g, m0 * c_.n, c_.dtype);
      const void* xm = At(x, m0 * c_.k, c_.dtype);
      float* tm = t_ ? t_ + (element * c_.m + m0) * c_.r : nullptr;
      if (b_as_is_) {
        kernels_.shrink_as_is(gm, rows, c_.n, c_.b.At(c_.batch, element), c_.r, c_.scaling, tm);
      } else if (need_t_) {
        const float* b = Floats(c_.b, b_, c_.batch, element);
        kernels_.shrink(gm, rows, c_.n, b, c_.r, c_.scaling, tm, scratch);
      }
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
      return kernels_.layer_transposed(g, block.rows, c_.n, w, block.j0, block.columns,
                                       T(element, m0), c_.r, c_.a.At(c_.batch, element),
                                       Dx(element, m0, block.j0), c_.k, scratch);
    }
    kernels_.product_transposed(g, block.rows, c_.n, w, block.j0, block.columns, scratch->sums,
                                scratch);
    phases.WaitBefore(2);
    blocks_->ForEachElement(block, [&](int64_t element, int64_t m0, int64_t rows, int64_t first) {
      kernels_.expand_transposed(T(element, m0), rows, c_.r, c_.a.At(c_.batch, element), block.j0,
                                 block.columns, scratch->sums + first * block.columns,
                                 Dx(element, m0, block.j0), c_.k, scratch);
    });
  }

  const float* T(int64_t element, int64_t m0) const { return t_ + (element * c_.m + m0) * c_.r; }
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
  const bool b_as_is_ = need_t_ && kernels_.shrink_as_is && c_.b_dtype == c_.dtype;
  const bool sliced_ = c_.slices > 1;  // else whoever has columns of dA or dB sums all rows
  const int64_t first_in_db_ = c_.b_dtype == ffi::DataType::F32;  // of the slices, 0 or 1

  const int64_t sweep_ranges_ = sliced_ ? c_.slices : SweepRanges();
  const int64_t da_columns_ = SumColumns(c_.k), da_ranges_ = Blocks(c_.k, da_columns_);
  const int64_t db_columns_ = SumColumns(c_.n), db_ranges_ = Blocks(c_.n, db_columns_);

  std::optional<ProductBlocks> blocks_;
  Widened at_, b_;                                     // Aᵀ where dx is no product, B
  float* t_ = nullptr;                                 // (batch, m, r)
  float *da_slices_ = nullptr, *db_slices_ = nullptr;  // (batch, slices, r, k or n)
};

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_BACKWARD_H_
