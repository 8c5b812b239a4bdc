// How the product of a call, x·W or g·Wᵀ, is cut into blocks.
//
// A batch that shares W is one product with the rows of all its elements, so that W is read no more
// often than for one; else each element has a product of its own. (An x that some elements share
// and not all is so rare that it may be multiplied for each.)
#ifndef JAX_FUSED_LORA_NATIVE_CPU_PRODUCT_H_
#define JAX_FUSED_LORA_NATIVE_CPU_PRODUCT_H_

#include <algorithm>
#include <cstdint>
#include <optional>

#include "native/calls.h"
#include "native/cpu/kernels.h"
#include "native/cpu/workspace.h"

namespace jax_fused_lora {

// Of a product (rows, columns), done `times` times: blocks as large as one thread's memory holds,
// since W is packed once for each range of rows and the rows for each range of columns, but two or
// more for each thread, and of more than two threads up to four: they are not equally fast, and all
// wait for the last (16 threads, float32, rank 16, four over two for each: 2048×2048 0.81, with the
// backward pass 0.85, 512×2048 0.86, 512×1024 with it 0.97; 8 threads 1.00, 512×1024 0.83; 4
// threads 1.00 to 0.92; but 2 threads, 12 shapes, 0.98 to 1.03).
struct Tiling {
  int64_t rows, columns;  // of a block
  int64_t row_ranges, column_ranges;

  Tiling(int64_t m, int64_t n, int64_t times, const Kernels& kernels, int64_t threads)
      : tile_(static_cast<int64_t>(kernels.rows)) {
    constexpr int64_t kLeastRows = 48, kLeastColumns = Scratch::kPanel;
    const int64_t most_rows = Scratch::kRows / tile_ * tile_;
    const auto most_columns = static_cast<int64_t>(kernels.columns);
    const int64_t enough = threads * std::clamp<int64_t>(threads, 2, 4);
    for (int64_t by_rows = Blocks(m, most_rows), by_columns = Blocks(n, most_columns);;) {
      Cut(m, n, by_rows, by_columns);
      if (Product({row_ranges, column_ranges, times}) >= enough) break;
      if (columns > kLeastColumns && columns >= rows) {
        by_columns *= 2;
      } else if (rows >= 2 * kLeastRows) {
        by_rows *= 2;
      } else if (columns > kLeastColumns) {
        by_columns *= 2;
      } else {
        break;
      }
    }
  }

 private:
  // Even ranges of whole tiles and panels.
  void Cut(int64_t m, int64_t n, int64_t by_rows, int64_t by_columns) {
    rows = Whole(m, by_rows, tile_), columns = Whole(n, by_columns, Scratch::kPanel);
    row_ranges = Blocks(m, rows), column_ranges = Blocks(n, columns);
  }
  static int64_t Whole(int64_t size, int64_t ranges, int64_t unit) {
    return std::max<int64_t>(Blocks(size, std::max<int64_t>(ranges, 1) * unit), 1) * unit;
  }

  int64_t tile_;  // rows
};

class ProductBlocks {
 public:
  struct Block {
    int64_t product, m0, rows, j0, columns;
  };

  // `x` is what W multiplies, m rows of it for each element. `one_factor`: the low-rank part has
  // the same factor for all elements, so that those whose rows follow each other count as one.
  ProductBlocks(const Batch& batch, const Batched<const void>& x, const Batched<const void>& kernel,
                int64_t m, int64_t columns, const Kernels& kernels, int64_t threads,
                bool one_factor = false)
      : m_(m),
        columns_(columns),
        shared_(kernel.count == 1 && (x.count == batch.count || x.count == 1)),
        sharing_(shared_ && x.count == 1 ? batch.count : 1),
        products_(shared_ ? 1 : batch.count),
        rows_(shared_ ? x.count * m : m),
        tiling_(rows_, columns, products_, kernels, threads) {
    if (one_factor && sharing_ == 1) m_ = rows_;
  }

  bool shared() const { return shared_; }
  int64_t products() const { return products_; }
  int64_t rows() const { return rows_; }  // of a product
  int64_t count() const { return products_ * tiling_.row_ranges * tiling_.column_ranges; }

  // Ranges of columns follow each other, so that a thread has rows of its own: those that it swept,
  // and those of the layer before that it wrote, are in its caches (AVX-512, 512×1024, float32,
  // forward and backward: 0.965 of what it takes with columns of its own).
  Block At(int64_t index) const {
    const int64_t j0 = index % tiling_.column_ranges * tiling_.columns;
    index /= tiling_.column_ranges;
    const int64_t m0 = index % tiling_.row_ranges * tiling_.rows;
    return {index / tiling_.row_ranges, m0, std::min(tiling_.rows, rows_ - m0), j0,
            std::min(tiling_.columns, columns_ - j0)};
  }

  // Where the rows are those of one element alone, and so many that one pass for the whole layer is
  // worth waiting for h: that element, and which of its rows is the first.
  struct Part {
    int64_t element, m0;
  };
  std::optional<Part> OneElement(const Block& block) const {
    if (sharing_ != 1 || block.rows <= static_cast<int64_t>(Scratch::kDepthRows)) return {};
    if (block.m0 / m_ != (block.m0 + block.rows - 1) / m_) return {};
    return Part{block.product + block.m0 / m_, block.m0 % m_};
  }

  // The elements to whose results a block's rows belong: body(element, its first row, rows, the
  // block's row with which they begin). A row may belong to several.
  template <class Body>
  void ForEachElement(const Block& block, const Body& body) const {
    const int64_t end = block.m0 + block.rows;
    for (int64_t m0 = block.m0, next; m0 < end; m0 = next) {
      const int64_t first = block.product + m0 / m_, row = m0 % m_;
      next = std::min(m0 - row + m_, end);
      for (int64_t element = first; element < first + sharing_; ++element) {
        body(element, row, next - m0, m0 - block.m0);
      }
    }
  }

 private:
  int64_t m_, columns_;
  bool shared_;
  int64_t sharing_;  // elements whose results have the same product
  int64_t products_, rows_;
  Tiling tiling_;
};

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_PRODUCT_H_
