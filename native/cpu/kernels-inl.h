// The kernels, templates of the storage type, for whichever instruction set is being compiled;
// their tables, where that is among the sets that JAX_FUSED_LORA_SETS says are this file's.
#if defined(JAX_FUSED_LORA_CPU_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef JAX_FUSED_LORA_CPU_KERNELS_INL_H_
#undef JAX_FUSED_LORA_CPU_KERNELS_INL_H_
#else
#define JAX_FUSED_LORA_CPU_KERNELS_INL_H_
#endif

#include <algorithm>

#include "native/cpu/amx.h"
#include "native/cpu/kernels.h"
#include "native/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace jax_fused_lora {
namespace HWY_NAMESPACE {

constexpr size_t kDepth = Scratch::kDepth;

// Of m rows of `columns` elements, `row` apart, those to be brought to another type in one go: all
// where they lie behind each other, since a short row costs as much as a long one (1024 rows of a
// factor of rank 8, bfloat16, Zen 4: turned on the way in 12.6 → 1.2 µs, on the way out 17 → 2.5).
inline size_t Together(size_t columns, size_t row, size_t m) {
  return columns == row && m > 0 ? m : 1;
}

// m rows of `depth` elements as float32: in place, or widened into `to`.
template <class T>
Rows<const float> Widened(const T* x, size_t row, size_t m, size_t depth, float* to) {
  if constexpr (std::is_same<T, float>::value) {
    return {x, row};
  } else {
    const size_t together = Together(depth, row, m);
    for (size_t i = 0; i < m; i += together) {
      ToFloat(x + i * row, together * depth, to + i * depth);
    }
    return {to, depth};
  }
}

// Elements of a row that one step of a product multiplies, and its depth of `n` of them.
template <bool kPairs>
constexpr size_t kTogether = kPairs ? 2 : 1;
template <bool kPairs>
HWY_INLINE auto DepthOf(size_t n) {
  if constexpr (kPairs) {
    return PairsFirst{n / 2, n / 2 + n % 2};
  } else {
    return n;
  }
}

// m rows of `depth` elements for such a product: as float32, or as pairs in `to`.
template <bool kPairs, class T>
Rows<const float> Steps(const T* x, size_t row, size_t m, size_t depth, float* to) {
  if constexpr (kPairs) {
    const size_t steps = depth / 2 + depth % 2;
    for (size_t i = 0; i < m; ++i) CopyPairs(x + i * row, depth, to + i * steps);
    return {to, steps};
  } else {
    return Widened(x, row, m, depth, to);
  }
}

// One row of h += x · a, `depth` elements of x. Lanes lie along the rank.
//
// A rank that divides a vector: a vector is whole rows of A, each lane times its row's x. A layer
// of 1×1024, rank 8, inside a program: 1.34 → 1.2 µs.
//
// Any rank: a vector that starts at a row of A and runs over its end reads the next rows' elements
// into lanes that are never stored: one load and one multiply a row, and only the last rows,
// where the overrun would leave A, are read with care.
template <class T>
void ShrinkRow(const float* x, size_t depth, const T* a, size_t elements, size_t r, float* h) {
  const DF d;
  size_t p = 0;
  if (r < kLanes && kLanes % r == 0) {
    const size_t rows = kLanes / r;
    HWY_ALIGN int32_t lane_row[kLanes];
    for (size_t i = 0; i < kLanes; ++i) lane_row[i] = static_cast<int32_t>(i / r);
    const auto first = hn::Load(DI(), lane_row);
    const auto step = hn::Set(DI(), static_cast<int32_t>(rows));
    VF even = hn::Zero(d), odd = hn::Zero(d);
    for (; p + kLanes <= depth; p += kLanes) {
      const VF xv = LoadFloat(x + p);
      auto index = first;
      for (size_t s = 0; s < r; ++s) {
        const VF xs = hn::TableLookupLanes(xv, hn::IndicesFromVec(d, index));
        even = hn::MulAdd(xs, LoadFloat(a + (p + s * rows) * r), even);
        index = hn::Add(index, step);
        std::swap(even, odd);
      }
    }
    HWY_ALIGN float sums[kLanes];
    StoreFloat(hn::Add(even, odd), sums);
    for (size_t i = 0; i < kLanes; ++i) h[i % r] += sums[i];
  }
  size_t r0 = 0;
  // Vectors of ranks side by side, so that a row of A is read from end to end, and eight sums under
  // way (float32, delta of 1×1024, rank 64, Zen 4: 48 → 20 µs).
  const auto wide = [&](auto vecs) HWY_ATTR {
    constexpr size_t kVecs = decltype(vecs)::value, kChains = 8 / kVecs;
    for (; r0 + kVecs * kLanes <= r; r0 += kVecs * kLanes) {
      VF acc[kChains][kVecs];
      JAX_FUSED_LORA_UNROLL
      for (size_t v = 0; v < kVecs; ++v) {
        acc[0][v] = LoadFloat(h + r0 + v * kLanes);
        JAX_FUSED_LORA_UNROLL
        for (size_t c = 1; c < kChains; ++c) acc[c][v] = hn::Zero(d);
      }
      const auto row = [&](size_t q, size_t c) HWY_ATTR {
        const VF xv = hn::Set(d, x[q]);
        const T* from = a + q * r + r0;
        JAX_FUSED_LORA_UNROLL
        for (size_t v = 0; v < kVecs; ++v) {
          acc[c][v] = hn::MulAdd(xv, LoadFloat(from + v * kLanes), acc[c][v]);
        }
      };
      size_t q = p;
      for (; q + kChains <= depth; q += kChains) {
        JAX_FUSED_LORA_UNROLL
        for (size_t c = 0; c < kChains; ++c) row(q + c, c);
      }
      for (; q < depth; ++q) row(q, 0);
      JAX_FUSED_LORA_UNROLL
      for (size_t v = 0; v < kVecs; ++v) {
        JAX_FUSED_LORA_UNROLL
        for (size_t c = 1; c < kChains; ++c) acc[0][v] = hn::Add(acc[0][v], acc[c][v]);
        StoreFloat(acc[0][v], h + r0 + v * kLanes);
      }
    }
  };
  wide(std::integral_constant<size_t, 8>());
  wide(std::integral_constant<size_t, 4>());
  wide(std::integral_constant<size_t, 2>());
  for (; r0 < r; r0 += kLanes) {
    const size_t lanes = std::min(kLanes, r - r0);
    const T* from = a + r0;
    const size_t left = elements - r0;
    const size_t whole = left < kLanes ? 0 : std::min(depth, (left - kLanes) / r + 1);
    VF acc[4] = {LoadFloatN(h + r0, lanes), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    size_t q = p;
    for (; q + 4 <= whole; q += 4) {
      JAX_FUSED_LORA_UNROLL
      for (size_t u = 0; u < 4; ++u) {
        acc[u] = hn::MulAdd(hn::Set(d, x[q + u]), LoadFloat(from + (q + u) * r), acc[u]);
      }
    }
    for (; q < depth; ++q) {
      const VF row = q < whole ? LoadFloat(from + q * r) : LoadFloatN(from + q * r, lanes);
      acc[0] = hn::MulAdd(hn::Set(d, x[q]), row, acc[0]);
    }
    StoreFloatN(hn::Add(hn::Add(acc[0], acc[1]), hn::Add(acc[2], acc[3])), h + r0, lanes);
  }
}

template <class T>
void ShrinkFew(const void* x_, size_t m, size_t k, const void* a_, size_t r, float* h,
               Scratch* scratch) {
  const T* x = static_cast<const T*>(x_);
  const T* a = static_cast<const T*>(a_);
  std::fill_n(h, m * r, 0.0f);
  for (size_t i = 0; i < m && r > 0; ++i) {
    for (size_t p = 0; p < k; p += kDepth) {
      const size_t depth = std::min(kDepth, k - p);
      const float* xf = Widened(x + i * k + p, k, 1, depth, scratch->rows).data;
      ShrinkRow(xf, depth, a + p * r, (k - p) * r, r, h + i * r);
    }
  }
}

template <size_t kRows, size_t kVecs, bool kAsk, bool kPairs, class T>
void ShrinkVectors(const T* x, size_t m, size_t k, const T* a, size_t r, float* h,
                   Scratch* scratch) {
  using Soon = Ahead<1>;
  constexpr size_t kWidth = kVecs * kLanes, kSoon = 32;  // columns, rows
  constexpr size_t kLines =
      (kWidth * sizeof(T) + Soon::kLine - 1) / Soon::kLine * kTogether<kPairs>;
  for (size_t i = 0; i < m; i += kRows) {
    const size_t rows = std::min(kRows, m - i);
    const Rows<float> to = {h + i * r, r};
    for (size_t p = 0; p < k; p += kDepth) {
      const size_t depth = std::min(kDepth, k - p);
      const Rows<const float> xf = Steps<kPairs>(x + i * k + p, k, rows, depth, scratch->rows);
      const auto multiply = [&](size_t s, size_t ranks, auto ahead) HWY_ATTR {
        Nn<T, float, kRows, kVecs>(rows, ranks, DepthOf<kPairs>(depth), {xf.data, xf.row, 1},
                                   Panels<const T>::RowMajor(a + p * r + s, r, kPanel), 1.0f,
                                   {p == 0 ? nullptr : to.data + s, r}, {to.data + s, r}, nullptr,
                                   ahead);
      };
      if (!kAsk || i > 0) {
        multiply(0, r, NothingAhead());
        continue;
      }
      for (size_t s = 0; s < r; s += kWidth) {
        multiply(s, kWidth, Soon(a + (p + kSoon) * r + s, r, kWidth, kLines));
      }
    }
  }
}

// Where a row of A is whole vectors, lanes lie along the rank: A is read as it lies, and no lanes
// are to be summed (float32, rank 16: 36×2048, Zen 3, 63 → 90 GFLOP/s, of 96; 512×2048, Zen 4, 97
// to 100 → 117). Wide rows are asked for well ahead, since the prefetchers come too late for a tile
// of few rows: 8 rows of 1024, rank 64, Sapphire Rapids, one thread, not asked for, 8, 16 and 32
// rows ahead 30, 22, 17 and 15 µs. (On AMD's cores, where W's few rows lost by it, it was not
// measured.)
template <class T, bool kPairs>
void ShrinkPanels(const void* x, size_t m, size_t k, const void* a, size_t r, float* h,
                  Scratch* scratch) {
  if (k == 0) std::fill_n(h, m * r, 0.0f);
  const auto shrink = r % kPanel != 0 ? &ShrinkVectors<kFewNnRows, kFewNnVecs, false, kPairs, T>
                      : IsAmd()       ? &ShrinkVectors<kNnRows, kNnVecs, false, kPairs, T>
                                      : &ShrinkVectors<kNnRows, kNnVecs, true, kPairs, T>;
  shrink(static_cast<const T*>(x), m, k, static_cast<const T*>(a), r, h, scratch);
}

// A square of kSize columns, as wide as a vector, turned: by fours of rows within each 128-bit
// block, then the blocks themselves. Blocks stored one by one, each to a row of its own, took three
// times as long (AVX-512, 64×128: 4,400 → 1,500 ticks).
template <size_t kSize>
HWY_INLINE void TransposeSquare(Rows<const float> from, Rows<float> to) {
  const hn::FixedTag<float, kSize> d;
  const hn::Repartition<uint64_t, decltype(d)> d64;
  hn::Vec<decltype(d)> fours[kSize / 4][4];  // [q][c]: in block b, column 4·b + c of rows 4·q...
  JAX_FUSED_LORA_UNROLL
  for (size_t q = 0; q < kSize / 4; ++q) {
    const float* rows = from.data + 4 * q * from.row;
    const auto r0 = hn::LoadU(d, rows), r1 = hn::LoadU(d, rows + from.row);
    const auto r2 = hn::LoadU(d, rows + 2 * from.row), r3 = hn::LoadU(d, rows + 3 * from.row);
    const auto low01 = hn::BitCast(d64, hn::InterleaveLower(d, r0, r1));
    const auto low23 = hn::BitCast(d64, hn::InterleaveLower(d, r2, r3));
    const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(d, r0, r1));
    const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(d, r2, r3));
    fours[q][0] = hn::BitCast(d, hn::InterleaveLower(d64, low01, low23));
    fours[q][1] = hn::BitCast(d, hn::InterleaveUpper(d64, low01, low23));
    fours[q][2] = hn::BitCast(d, hn::InterleaveLower(d64, high01, high23));
    fours[q][3] = hn::BitCast(d, hn::InterleaveUpper(d64, high01, high23));
  }
  JAX_FUSED_LORA_UNROLL
  for (size_t c = 0; c < 4; ++c) {
    const auto store = [&](size_t block, auto v)
                           HWY_ATTR { hn::StoreU(v, d, to.data + (4 * block + c) * to.row); };
    if constexpr (kSize == 4) {
      store(0, fours[0][c]);
    } else if constexpr (kSize == 8) {
      store(0, hn::ConcatLowerLower(d, fours[1][c], fours[0][c]));
      store(1, hn::ConcatUpperUpper(d, fours[1][c], fours[0][c]));
    } else {
      static_assert(kSize == 16, "four blocks");
      const auto blocks = [&](size_t first, auto even, auto odd) HWY_ATTR {
        store(first, hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even));
        store(first + 1, hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even)));
      };
      blocks(0, hn::ConcatLowerLower(d, fours[2][c], fours[0][c]),
             hn::ConcatLowerLower(d, fours[3][c], fours[1][c]));
      blocks(2, hn::ConcatUpperUpper(d, fours[2][c], fours[0][c]),
             hn::ConcatUpperUpper(d, fours[3][c], fours[1][c]));
    }
  }
}

template <size_t kSize>
HWY_INLINE void TransposeSquares(Rows<const float> from, size_t i0, size_t i1, size_t j0, size_t j1,
                                 Rows<float> to) {
  for (size_t j = j0; j < j1; j += kSize) {
    for (size_t i = i0; i < i1; i += kSize) {
      TransposeSquare<kSize>({from.data + i * from.row + j, from.row},
                             {to.data + j * to.row + i, to.row});
    }
  }
}

// to (columns, rows) = fromᵀ, from (rows, columns): large squares, small squares, and what is left.
inline void TransposeFloats(Rows<const float> from, size_t rows, size_t columns, Rows<float> to) {
  const size_t large_rows = rows / kLanes * kLanes, large_columns = columns / kLanes * kLanes;
  const size_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  TransposeSquares<kLanes>(from, 0, large_rows, 0, large_columns, to);
  if (kLanes > 4) {
    TransposeSquares<4>(from, large_rows, whole_rows, 0, large_columns, to);
    TransposeSquares<4>(from, 0, whole_rows, large_columns, whole_columns, to);
  }
  for (size_t j = 0; j < columns; ++j) {
    for (size_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      to.data[j * to.row + i] = from.data[i * from.row + j];
    }
  }
}

// 64 rows at a time: the rows of `at` lie a power of two apart more often than not, and one line
// written to each in turn would evict the others.
template <class T>
void Transpose(const void* a_, size_t r, size_t k0, size_t k1, Panels<float> at) {
  const T* a = static_cast<const T*>(a_);
  constexpr size_t kRows = 64, kColumns = 64;
  HWY_ALIGN float block[kRows * kColumns];
  for (size_t p = k0; p < k1; p += kRows) {
    const size_t rows = std::min(kRows, k1 - p);
    for (size_t r0 = 0; r0 < r; r0 += kColumns) {
      const size_t columns = std::min(kColumns, r - r0);
      const Rows<const float> from = Widened(a + p * r + r0, r, rows, columns, block);
      for (size_t i = 0; i < rows; i += kPanel) {
        TransposeFloats({from.data + i * from.row, from.row}, std::min(kPanel, rows - i), columns,
                        {InPanel(at, p + i) + r0 * at.row, at.row});
      }
    }
  }
}

// Rows of `columns` elements into panels; the line that lies `ahead` elements further on is asked
// for.
template <class T>
void PackRows(Rows<const T> from, size_t rows, size_t columns, Panels<float> to, size_t ahead = 0) {
  for (size_t p = 0; p < rows; ++p) {
    const T* row = from.data + p * from.row;
    size_t j = 0;
    for (; j + kPanel <= columns; j += kPanel) {
      float* panel = InPanel(to, j) + p * to.row;
      JAX_FUSED_LORA_UNROLL
      for (size_t i = 0; i < kPanel; i += kLanes) {
        if (ahead != 0 && i * sizeof(T) % Ahead<1>::kLine == 0) {
          const size_t bytes = (j + i + ahead) * sizeof(T);
          PrefetchToSecondCache(reinterpret_cast<uintptr_t>(row) + bytes);
        }
        StoreFloat(LoadFloat(row + j + i), panel + i);
      }
    }
    if (j < columns) ToFloat(row + j, columns - j, InPanel(to, j) + p * to.row);
  }
}

// Rows of bfloat16 into panels of pairs, which lie where a float32 would.
inline void PackPairs(Rows<const hwy::bfloat16_t> from, size_t rows, size_t columns,
                      Panels<float> to) {
  for (size_t p = 0; p + 2 <= rows; p += 2) {
    const hwy::bfloat16_t *upper = from.data + p * from.row, *lower = upper + from.row;
    const auto at = [&](size_t j) HWY_ATTR { return InPanel(to, j) + p / 2 * to.row; };
    size_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) StoreFloat(PairUp(upper + j, lower + j), at(j));
    const size_t left = columns - j;
    if (left > 0) StoreFloatN(PairUpN(upper + j, lower + j, left), at(j), left);
  }
  if (rows % 2 == 0) return;
  PackRows<hwy::bfloat16_t>({from.data + (rows - 1) * from.row, from.row}, 1, columns,
                            {to.data + rows / 2 * to.row, to.row, to.panel, to.width});
}

// Panels (columns, rows) = fromᵀ, from (rows, columns), of numbers or of pairs, of which there are
// no more than a packed product is deep at a time. As few rows at a time as a square has, each read
// from end to end.
template <bool kPairs, class T>
void TurnRows(Rows<const T> from, size_t rows, size_t columns, Panels<float> to) {
  constexpr size_t kRows = kLanes, kRow = std::max(Scratch::kPanelDepth, Scratch::kTilesDepth);
  HWY_ALIGN float block[kRows * kRow];
  for (size_t i = 0; i < rows; i += kRows) {
    const size_t some = std::min(kRows, rows - i);
    const T* first = from.data + i * from.row;
    const Rows<float> turned = {InPanel(to, i), to.row};
    if constexpr (kPairs) {
      for (size_t s = 0; s < some; ++s) CopyPairs(first + s * from.row, columns, block + s * kRow);
      TransposeFloats({block, kRow}, some, (columns + 1) / 2, turned);
    } else {
      TransposeFloats(Widened(first, from.row, some, columns, block), some, columns, turned);
    }
  }
}

template <class T>
void Pack(const void* b, size_t r, size_t n, size_t j0, size_t j1, Panels<float> to) {
  PackRows<T>({static_cast<const T*>(b) + j0, n}, r, j1 - j0, to.From(j0));
}

template <class T>
void Shrink(const void* x_, size_t m, size_t k, const float* at, size_t r, float scale, float* h,
            Scratch* scratch) {
  const T* x = static_cast<const T*>(x_);
  if (k == 0) std::fill_n(h, m * r, 0.0f);
  for (size_t i = 0; i < m; i += kNtRows) {
    const size_t rows = std::min(kNtRows, m - i);
    for (size_t p = 0; p < k; p += kDepth) {
      const size_t depth = std::min(kDepth, k - p);
      const Rows<const float> xf = Widened(x + i * k + p, k, rows, depth, scratch->rows);
      Nt<float, float>(rows, r, depth, xf, {at + p, k}, scale, p > 0, {h + i * r, r});
    }
  }
}

// The same of an `at` of bfloat16, by pairs.
template <class T>
void ShrinkAsIs(const void* x, size_t m, size_t k, const void* at, size_t r, float scale,
                float* h) {
  const T *rows = static_cast<const T*>(x), *columns = static_cast<const T*>(at);
  if (k == 0) std::fill_n(h, m * r, 0.0f);
  for (size_t i = 0; i < m; i += kNtRows) {
    const size_t some = std::min(kNtRows, m - i);
    for (size_t p = 0; p < k; p += 2 * kDepth) {
      Nt<T, T>(some, r, std::min(2 * kDepth, k - p), {rows + i * k + p, k}, {columns + p, k}, scale,
               p > 0, {h + i * r, r});
    }
  }
}

// What a kernel's result is stored as, which has T's bits.
#if JAX_FUSED_LORA_PAIRS
template <class T, bool kPairs>
using Result = std::conditional_t<kPairs, Rounded, T>;
#else
template <class T, bool kPairs>
using Result = T;
#endif

template <class T, bool kPairs>
void Expand(const float* h, size_t m, size_t r, Panels<const float> b, size_t n, float scale,
            const float* init, size_t init_row, const float* bias, void* y, size_t y_row) {
  using Out = Result<T, kPairs>;
  Nn<float, Out>(m, n, r, {h, r, 1}, b, scale, {init, init_row}, {static_cast<Out*>(y), y_row},
                 bias);
}

// g's rows lie far apart, and every tile of ranks reads them: for many ranks panels of g are packed
// (Zen 3, float32, 36×2048, rank 64: 40 → 59 GFLOP/s; but rank 16: 38 → 34, bfloat16 60 → 45).
template <class T>
void Outer(const float* h, size_t h_row, size_t m, size_t r, const void* g_, size_t g_row, size_t n,
           float scale, bool add, float* out, size_t out_row, Scratch* scratch) {
  const T* g = static_cast<const T*>(g_);
  constexpr size_t kManyRanks = 32, kPanelDepth = Scratch::kPanelDepth;
  if (r < kManyRanks) {
    const auto panels = Panels<const T>::RowMajor(g, g_row, kPanel);
    Nn<T, float>(r, n, m, {h, 1, h_row}, panels, scale, {add ? out : nullptr, out_row},
                 {out, out_row});
    return;
  }
  for (size_t i = 0; i < m; i += kPanelDepth) {
    const size_t rows = std::min(kPanelDepth, m - i);
    for (size_t j = 0; j < n; j += kPanel) {
      const size_t columns = std::min(kPanel, n - j);
      const auto panel = Panels<float>::Packed(scratch->panel, rows, kPanel);
      PackRows<T>({g + i * g_row + j, g_row}, rows, columns, panel);
      Nn<float, float>(r, columns, rows, {h + i * h_row, 1, h_row}, panel.Read(), scale,
                       {add || i > 0 ? out + j : nullptr, out_row}, {out + j, out_row});
    }
  }
}

template <class T>
void Sum(const float* first, const float* rest, size_t slices, size_t stride, size_t i0, size_t i1,
         void* out_) {
  T* out = static_cast<T*>(out_);
  const auto sum = [&](size_t i, auto load) HWY_ATTR {
    VF total = load(first + i);
    for (size_t s = 0; s < slices; ++s) total = hn::Add(total, load(rest + s * stride + i));
    return total;
  };
  size_t i = i0;
  for (; i + kLanes <= i1; i += kLanes) {
    StoreFloat(sum(i, [](const float* from) HWY_ATTR { return LoadFloat(from); }), out + i);
  }
  if (i < i1) {
    StoreFloatN(sum(i, [&](const float* from) HWY_ATTR { return LoadFloatN(from, i1 - i); }),
                out + i, i1 - i);
  }
}

// m ≤ kFew rows of x, k elements of each.
template <size_t kSteps, bool kAsk, class T>
void StreamRows(size_t m, size_t k, Rows<const float> x, Rows<const T> w, size_t columns, bool add,
                Rows<float> out) {
  const auto stream = [&](auto rows) HWY_ATTR {
    Stream<decltype(rows)::value, kSteps, kAsk, T>(k, x, w, columns, add, out);
  };
  if (m == 1) stream(std::integral_constant<size_t, 1>());
  if (m == 2) stream(std::integral_constant<size_t, 2>());
  if (m == 3) stream(std::integral_constant<size_t, 3>());
  if (m == 4) stream(std::integral_constant<size_t, 4>());
}

// to = init + bias, of which one may be null.
inline void Begin(const float* init, const float* bias, size_t n, float* to) {
  if (init == nullptr || bias == nullptr) {
    const float* from = init == nullptr ? bias : init;
    if (from != to) std::copy_n(from, n, to);
    return;
  }
  size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    StoreFloat(hn::Add(LoadFloat(init + j), LoadFloat(bias + j)), to + j);
  }
  for (; j < n; ++j) to[j] = init[j] + bias[j];
}

// out (m, columns) = [out +] scale · x (m, k) · w for few rows, where packing w would take as long
// as multiplying: strips of w as they lie, `deep` lines at a time, which were asked for one such
// block before, so that reading and multiplying take their time together. (The product alone on two
// threads, float32, packed and so, Zen 5 and Sapphire Rapids: 16×1024→1024 190 → 124 µs and 240 →
// 157, 16×2048→2048 740 → 475 and 953 → 622.)
template <class T, size_t kRows, size_t kVecs>
void InPlaceProduct(size_t deep, const T* x, size_t x_row, size_t m, size_t k, Rows<const T> w,
                    size_t columns, float scale, bool add, Rows<float> out, Scratch* scratch) {
  constexpr size_t kRow = Scratch::kPanelRow, kDepth = 128;
  using Next = Ahead<4>;
  const auto blocks = [](size_t size, size_t of) { return (size + of - 1) / of; };
  const size_t tiles = blocks(columns, kVecs * kLanes) * blocks(m, kRows);
  const size_t w_lines = blocks(columns * sizeof(T), Next::kLine);
  const size_t lines = blocks(Next::kSteps * w_lines, std::max<size_t>(tiles, 1));
  for (size_t i = 0; k == 0 && !add && i < m; ++i) {
    std::fill_n(out.data + i * out.row, columns, 0.0f);
  }
  for (size_t p0 = 0; p0 < k; p0 += kDepth) {
    const size_t end = std::min(p0 + kDepth, k);
    for (size_t i = 0; i < m; ++i) ToFloat(x + i * x_row + p0, end - p0, scratch->rows + i * kRow);
    for (size_t p = p0; p < end; p += deep) {
      const size_t depth = std::min(deep, end - p);
      const bool more = p + depth < k;
      const Next ahead(w.data + (more ? p + depth : p) * w.row, w.row, columns, more * lines);
      Nn<T, float, kRows, kVecs>(m, columns, depth, {scratch->rows + p - p0, kRow, 1},
                                 Panels<const T>::RowMajor(w.data + p * w.row, w.row, kPanel),
                                 scale, {p > 0 || add ? out.data : nullptr, out.row}, out, nullptr,
                                 ahead);
    }
  }
}

// The same for up to kInPlaceRows.
template <class T>
void MultiplyInPlace(const T* x, size_t x_row, size_t m, size_t k, Rows<const T> w, size_t columns,
                     float scale, bool add, Rows<float> out, Scratch* scratch) {
  if (m <= Scratch::kStreamed) {
    const size_t deep = IsAmd() ? 8 : 16;
    InPlaceProduct<T, kFewNnRows, kFewNnVecs>(deep, x, x_row, m, k, w, columns, scale, add, out,
                                              scratch);
  } else {
    InPlaceProduct<T, kNnRows, kNnVecs>(/*deep=*/32, x, x_row, m, k, w, columns, scale, add, out,
                                        scratch);
  }
}

// Like x·W of few rows: b streams past (1×1024, rank 8, Zen 3: shrink and expand 1.8 → 1.2 µs).
template <class T>
void ExpandFew(const float* h, size_t m, size_t r, const float* b, size_t b_row, size_t n,
               float scale, const float* init, size_t init_row, const float* bias, void* y_,
               size_t y_row, Scratch* scratch) {
  T* y = static_cast<T*>(y_);
  const size_t most = Scratch::kPanelDepth * Scratch::kPanel / std::max(m, Scratch::kFew);
  for (size_t j = 0; j < n; j += most) {
    const size_t columns = std::min(most, n - j);
    Rows<float> out = {scratch->panel, columns};
    if constexpr (std::is_same<T, float>::value) out = {y + j, y_row};
    bool begun = init != nullptr || bias != nullptr;
    for (size_t i = 0; i < m; ++i) {
      float* row = out.data + i * out.row;
      if (begun) {
        Begin(init == nullptr ? nullptr : init + i * init_row + j,
              bias == nullptr ? nullptr : bias + j, columns, row);
      } else if (r == 0) {
        std::fill_n(row, columns, 0.0f);
      }
    }
    if (m > Scratch::kFew) {
      MultiplyInPlace<float>(h, r, m, r, {b + j, b_row}, columns, scale, begun, out, scratch);
    } else {
      for (size_t p = 0; p < r; p += kDepth) {
        const size_t depth = std::min(kDepth, r - p);
        for (size_t i = 0; i < m; ++i) {
          for (size_t q = 0; q < depth; ++q) {
            scratch->rows[i * depth + q] = scale * h[i * r + p + q];
          }
        }
        StreamRows<4, false, float>(m, depth, {scratch->rows, depth}, {b + p * b_row + j, b_row},
                                    columns, begun, out);
        begun = true;
      }
    }
    if constexpr (!std::is_same<T, float>::value) {
      for (size_t i = 0; i < m; ++i) {
        Sum<T>(out.data + i * out.row, nullptr, 0, 0, 0, columns, y + i * y_row + j);
      }
    }
  }
}

// Some whole rows of W at a time, read from end to end. AMD's cores like fewer of them (the product
// alone on two threads, float32, 1024→1024: Zen 5, 1 row, 4 of them 67 µs, 16 83; 8 rows, 8 of them
// 76, 16 83; Sapphire Rapids, 8 rows, 8 of them 130, 16 110), and for one or two rows their own
// prefetchers alone (Zen 3, 2048→2048, the next rows asked for and not: 1 row 970 and 810 µs, 2
// rows 1000 and 880, 4 rows 900 and 1040).
template <class T>
void StreamFew(const void* x_, size_t m, size_t k, size_t k0, size_t k1, const void* w_, size_t n,
               size_t j0, size_t columns, float* out, size_t out_row, Scratch* scratch) {
  const T* x = static_cast<const T*>(x_);
  const T* w = static_cast<const T*>(w_) + j0;
  if (m > Scratch::kFew) {
    return MultiplyInPlace<T>(x + k0, k, m, k1 - k0, {w + k0 * n, n}, columns, 1.0f, false,
                              {out, out_row}, scratch);
  }
  for (size_t i = 0; k0 == k1 && i < m; ++i) std::fill_n(out + i * out_row, columns, 0.0f);
  const auto stream = !IsAmd() ? StreamRows<16, true, T>
                      : m <= 2 ? StreamRows<4, false, T>
                               : StreamRows<4, true, T>;
  for (size_t p = k0; p < k1; p += kDepth) {
    const size_t depth = std::min(kDepth, k1 - p);
    const Rows<const float> xf = Widened(x + p, k, m, depth, scratch->rows);
    stream(m, depth, xf, {w + p * n, n}, columns, p > k0, {out, out_row});
  }
}

// W for a packed product, as numbers or, of bfloat16, as pairs.
template <class T, By kBy_>
struct Straight {
  static constexpr By kBy = kBy_;
  const T* w;  // (depth, columns), n apart
  size_t n;

  void operator()(size_t p, size_t j, size_t depth, size_t width, Panels<float> to) const {
    const Rows<const T> from = {w + p * n + j, n};
    if constexpr (kBy != By::kNumbers) {
      PackPairs(from, depth, width, to);
    } else {
      PackRows<T>(from, depth, width, to, kTilesAsk ? 0 : Scratch::kPanel);
    }
  }
  Ahead<8> Soon(size_t p, size_t j, size_t, size_t width) const {
    return {w + p * n + j, n, width};
  }
};

template <class T, By kBy_>
struct Turned {
  static constexpr By kBy = kBy_;
  const T* w;  // (columns, depth), n apart
  size_t n;

  void operator()(size_t p, size_t j, size_t depth, size_t width, Panels<float> to) const {
    TurnRows<kBy != By::kNumbers, T>({w + j * n + p, n}, width, depth, to);
  }
  Ahead<8> Soon(size_t p, size_t j, size_t depth, size_t) const {
    return {w + j * n + p, n, depth};
  }
};

// A factor of the low-rank part that was packed for all blocks.
struct Copied {
  Panels<const float> b;  // (depth, columns)

  void operator()(size_t p, size_t j, size_t depth, size_t width, Panels<float> to) const {
    for (size_t i = 0; i < width; i += kPanel) {
      PackRows<float>({InPanel(b, j + i) + p * b.row, b.row}, depth, std::min(kPanel, width - i),
                      {InPanel(to, i), to.row, 0, kPanel});
    }
  }
};

// scale · h (m, rank) · b, as part of a product: `pack` brings panels of b. A default one is none.
template <class Pack = Copied>
struct MoreDepth {
  const float* h;
  size_t rank;
  Pack pack;
  float scale;
};

// What a packed product is made of: tiles of so many rows and vectors, panels of W so wide, depths
// of whole units of steps.
template <By kBy>
struct Packed {
  static constexpr size_t kRows = kNnRows, kVecs = kNnVecs, kWidth = Scratch::kPanel, kUnit = 1;
  static constexpr size_t kMost = Scratch::kPanelDepth, kUsual = kMost - kLanes;  // steps
  static constexpr size_t kRow = Scratch::kPanelRow;
  struct Tiles {};
};
#if JAX_FUSED_LORA_AMX
// Tiles are so fast that bringing their sums counts (256 rows, an Intel server's core: 128 steps
// deep 0.8 to 1.0·10¹² multiplications and additions a second, 256 1.0 to 1.1, 512 1.0 to 1.2), and
// a panel of 32 columns is what the first cache has room for.
template <>
struct Packed<By::kTiles> {
  using Tiles = ::jax_fused_lora::Tiles;
  static constexpr size_t kRows = Tiles::kBlock, kVecs = kRows / kLanes, kWidth = kRows;
  static constexpr size_t kUnit = Tiles::kSteps;
  static constexpr size_t kMost = Scratch::kTilesDepth, kUsual = kMost - kUnit;
  static constexpr size_t kRow = Scratch::kTilesRow;
};
#endif

// out (m, columns) = x (m, k) · w + bias + low_rank, `pack` bringing panels of w into the first
// cache, where every tile of rows reads them; the rows' part of that depth is in the second
// meanwhile, and so are the sums. The low-rank part is so much more depth: [x | scale·h]·[w; b].
// Added to the sums in a pass of its own it took 5 % of 512×1024→1024, rank 16.
template <class T, class TO, class Pack, class PackFactor>
void PackedProduct(const T* x, size_t m, size_t k, const Pack& pack, size_t columns,
                   const MoreDepth<PackFactor>& low_rank, const float* bias, Rows<TO> out,
                   Scratch* scratch) {
  using Of = Packed<Pack::kBy>;
  constexpr size_t kWidth = Of::kWidth, kRow = Of::kRow;
  constexpr size_t kElements = kTogether<Pack::kBy != By::kNumbers>;  // of x, in a step
  // The last depth takes in a low-rank part of a usual size: tiles so shallow that they have little
  // more than that are slow (AVX-512, 512×1024, rank 16, float32, forward and backward: seven
  // depths of 144 and one of 32 took 1.07 of what seven of 128 and one of 144 take).
  const size_t steps_of_w = (k + kElements * Of::kUnit - 1) / (kElements * Of::kUnit) * Of::kUnit;
  const size_t whole = steps_of_w + low_rank.rank;
  const auto depth_at = [&](size_t p) { return whole - p <= Of::kMost ? whole - p : Of::kUsual; };
  [[maybe_unused]] typename Of::Tiles tiles;
  size_t p = 0;
  do {
    const size_t depth = depth_at(p);
    const size_t of_w = p < steps_of_w ? std::min(depth, steps_of_w - p) : 0, of_b = depth - of_w;
    const size_t q = p + of_w - steps_of_w;  // where of_b > 0, the first of these ranks
    const size_t p_of_w = p * kElements, depth_of_w = std::min(of_w * kElements, k - p_of_w);
    const size_t filled = (depth_of_w + kElements - 1) / kElements;  // steps; zeros are the others
    for (size_t i = 0; i < m; ++i) {
      float* row = scratch->rows + i * kRow;
      if constexpr (Pack::kBy == By::kNumbers) {
        if (of_w > 0) ToFloat(x + p_of_w + i * k, depth_of_w, row);
      } else {
        if (of_w > 0) CopyPairs(x + p_of_w + i * k, depth_of_w, row);
        std::fill(row + filled, row + of_w, 0.0f);
      }
      for (size_t s = 0; s < of_b; ++s) {
        row[of_w + s] = low_rank.scale * low_rank.h[i * low_rank.rank + q + s];
      }
    }
    for (size_t j = 0; j < columns; j += kWidth) {
      const size_t width = std::min(kWidth, columns - j);
      // From one step on. That a row of them is so long is a constant.
      const auto panels_from = [&](size_t step) HWY_ATTR {
        constexpr size_t kWide = std::min(kPanel, kWidth);
        return Panels<float>{scratch->panel + step * kWide, kWide, depth * kWide, kWide};
      };
      const Panels<float> panels = panels_from(0), of_factor = panels_from(of_w);
      if (of_w > 0) {
        pack(p_of_w, j, depth_of_w, width, panels);
        std::fill(panels.data + filled * panels.row, of_factor.data, 0.0f);
      }
      if (of_b > 0) low_rank.pack(q, j, of_b, width, of_factor);
      float* sums = scratch->sums + j;
      const auto multiply = [&](auto steps, size_t from, bool begun, auto ahead) HWY_ATTR {
        const Panels<const float> by = panels_from(from).Read();
        const Scalars rows = {scratch->rows + from, kRow, 1};
        const Rows<const float> init = {begun ? sums : nullptr, columns};
        if (p + depth < whole) {
          Nn<float, float, kNnRows, Of::kVecs>(m, width, steps, rows, by, 1.0f, init,
                                               {sums, columns}, nullptr, ahead);
        } else {
          Nn<float, TO, kNnRows, Of::kVecs>(m, width, steps, rows, by, 1.0f, init,
                                            {out.data + j, out.row},
                                            bias == nullptr ? nullptr : bias + j, ahead);
        }
      };
      const auto begin = [&](auto ahead) HWY_ATTR {
        if constexpr (Pack::kBy == By::kNumbers) {
          multiply(depth, 0, p > 0, ahead);
        } else if constexpr (Pack::kBy == By::kPairs) {
          multiply(PairsFirst{of_w, depth}, 0, p > 0, ahead);
        } else {
          if (of_w > 0) {
            const auto ask = [&](size_t lines) HWY_ATTR {
              for (size_t i = 0; i < lines; ++i) ahead.AskForLine();
            };
            tiles.Multiply(m, width, of_w, scratch->rows, kRow, panels.data, panels.row, p > 0,
                           sums, columns, ask);
          }
          if (of_b > 0 || p + depth == whole) {
            multiply(of_b, of_w, p + of_w > 0, NothingAhead());
          }
        }
      };
      const bool more = j + width < columns;
      const size_t next_j = more ? j + width : 0, next_p = (more ? p : p + depth) * kElements;
      if (kTilesAsk && next_p < k) {
        const size_t next_depth = std::min(depth_at(next_p / kElements) * kElements, k - next_p);
        begin(pack.Soon(next_p, next_j, next_depth, std::min(kWidth, columns - next_j)));
      } else {
        begin(NothingAhead());
      }
    }
    p += depth;
  } while (p < whole);
}

template <By kBy, class T>
Straight<T, kBy> Packing(const void* w, size_t n, size_t j0) {
  return {static_cast<const T*>(w) + j0, n};
}

template <By kBy, class T>
Turned<T, kBy> Turning(const void* w, size_t n, size_t k0) {
  return {static_cast<const T*>(w) + k0 * n, n};
}

// Up to which rows W is multiplied as it lies where pairs can be: pairs are to be brought together,
// and what lies in place is widened (bfloat16, Zen 4, 1024→1024, in place and packed: 9 rows 131
// and 150 to 170 µs, 16 205 and 197, 32 404 and 310, 64 729 and 460).
constexpr size_t kPairsInPlaceRows = 12, kTilesInPlaceRows = 8;

template <class T, By kBy>
void Product(const void* x_, size_t m, size_t k, const void* w_, size_t n, size_t j0,
             size_t columns, float* out, Scratch* scratch) {
  const T* x = static_cast<const T*>(x_);
  if (m > (kBy == By::kNumbers ? kInPlaceRows
           : kBy == By::kPairs ? kPairsInPlaceRows
                               : kTilesInPlaceRows)) {
    return PackedProduct<T, float>(x, m, k, Packing<kBy, T>(w_, n, j0), columns, MoreDepth<>(),
                                   nullptr, {out, columns}, scratch);
  }
  MultiplyInPlace<T>(x, k, m, k, {static_cast<const T*>(w_) + j0, n}, columns, 1.0f, false,
                     {out, columns}, scratch);
}

template <class T, By kBy>
void Layer(const void* x, size_t m, size_t k, const void* w, size_t n, size_t j0, size_t columns,
           const LowRank& low_rank, const float* bias, void* y, size_t y_row, Scratch* scratch) {
  const MoreDepth<> part = {low_rank.h, low_rank.rank, {low_rank.b}, low_rank.scale};
  using Out = Result<T, kBy != By::kNumbers>;
  PackedProduct<T, Out>(static_cast<const T*>(x), m, k, Packing<kBy, T>(w, n, j0), columns, part,
                        bias, {static_cast<Out*>(y), y_row}, scratch);
}

// Few rows: dot products with the rows of W, as they lie. More rows: panels of W are turned.
template <class T, By kBy>
void ProductTransposed(const void* g_, size_t m, size_t n, const void* w_, size_t k0,
                       size_t columns, float* out, Scratch* scratch) {
  const T* g = static_cast<const T*>(g_);
  if (m > (kBy == By::kTiles ? kTilesInPlaceRows : Scratch::kDepthRows)) {
    return PackedProduct<T, float>(g, m, n, Turning<kBy, T>(w_, n, k0), columns,
                                   MoreDepth<Turned<T, By::kNumbers>>(), nullptr, {out, columns},
                                   scratch);
  }
  const T* w = static_cast<const T*>(w_) + k0 * n;
  if (n == 0) std::fill_n(out, m * columns, 0.0f);
  constexpr size_t kWidth = Scratch::kPanel;  // so few rows of W stay in the second cache
  for (size_t j = 0; j < columns; j += kWidth) {
    for (size_t p = 0; p < n; p += kDepth) {
      const size_t depth = std::min(kDepth, n - p);
      const auto multiply = [&](auto rows) HWY_ATTR {
        Nt(m, std::min(kWidth, columns - j), depth, rows, Rows<const T>{w + j * n + p, n}, 1.0f,
           p > 0, {out + j, columns});
      };
      if constexpr (kBy != By::kNumbers) {
        multiply(Rows<const T>{g + p, n});
      } else {
        multiply(Widened(g + p, n, m, depth, scratch->rows));
      }
    }
  }
}

template <class T, By kBy>
void LayerTransposed(const void* g, size_t m, size_t n, const void* w, size_t k0, size_t columns,
                     const float* t, size_t r, const void* a, void* dx, size_t dx_row,
                     Scratch* scratch) {
  const MoreDepth<Turned<T, By::kNumbers>> part = {t, r, Turning<By::kNumbers, T>(a, r, k0), 1.0f};
  using Out = Result<T, kBy != By::kNumbers>;
  PackedProduct<T, Out>(static_cast<const T*>(g), m, n, Turning<kBy, T>(w, n, k0), columns, part,
                        nullptr, {static_cast<Out*>(dx), dx_row}, scratch);
}

// As many ranks at a time as a panel has room for, summed in float32.
template <class T, bool kPairs>
void ExpandTransposed(const float* t, size_t m, size_t r, const void* a, size_t k0, size_t columns,
                      const float* init, void* dx_, size_t dx_row, Scratch* scratch) {
  auto* dx = static_cast<Result<T, kPairs>*>(dx_);
  constexpr size_t kWidth = Scratch::kPanel, kMost = Scratch::kPanelDepth;
  const Turned<T, By::kNumbers> turn = Turning<By::kNumbers, T>(a, r, k0);
  for (size_t j = 0; j < columns; j += kWidth) {
    const size_t width = std::min(kWidth, columns - j);
    Rows<const float> before = {init + j, columns};
    const auto add = [&](size_t q, size_t ranks, auto out) HWY_ATTR {
      const auto panels = Panels<float>::Packed(scratch->panel, ranks, kPanel);
      turn(q, j, ranks, width, panels);
      Nn(m, width, ranks, {t + q, r, 1}, panels.Read(), 1.0f, before, out);
    };
    size_t q = 0;
    for (; r - q > kMost; q += kMost) {
      const Rows<float> sums = {scratch->rows, kWidth};
      add(q, kMost, sums);
      before = {sums.data, sums.row};
    }
    add(q, r - q, Rows<Result<T, kPairs>>{dx + j, dx_row});
  }
}

inline void Gather(const float* partial, size_t slices, size_t stride, size_t m, size_t partial_row,
                   size_t columns, float* out) {
  for (size_t i = 0; i < m; ++i) {
    const float* first = partial + i * partial_row;
    const float* rest = slices > 1 ? first + stride : nullptr;
    Sum<float>(first, rest, slices - 1, stride, 0, columns, out + i * columns);
  }
}

template <class T>
void SumTransposed(const float* partial, size_t slices, size_t stride, size_t partial_row, size_t r,
                   size_t n, void* out_, size_t out_row) {
  T* out = static_cast<T*>(out_);
  constexpr size_t kRows = 64, kRanks = 64;  // of `out`, taken at a time
  HWY_ALIGN float sums[kRanks * kRows], turned[kRows * kRanks];
  for (size_t p = 0; p < n; p += kRows) {
    const size_t rows = std::min(kRows, n - p);
    for (size_t r0 = 0; r0 < r; r0 += kRanks) {
      const size_t ranks = std::min(kRanks, r - r0);
      const float* from = partial + r0 * partial_row + p;
      Gather(from, slices, stride, ranks, partial_row, rows, sums);
      T* to = out + p * out_row + r0;
      if constexpr (std::is_same<T, float>::value) {
        TransposeFloats({sums, rows}, ranks, rows, {to, out_row});
      } else {
        TransposeFloats({sums, rows}, ranks, rows, {turned, ranks});
        const size_t together = Together(ranks, out_row, rows);
        for (size_t i = 0; i < rows; i += together) {
          Sum<T>(turned + i * ranks, nullptr, 0, 0, 0, together * ranks, to + i * out_row);
        }
      }
    }
  }
}

template <class T, By kBy = By::kNumbers>
constexpr Kernels Table() {
  constexpr bool kPairs = kBy != By::kNumbers;
  decltype(Kernels::shrink_as_is) as_is = nullptr;
  if constexpr (kPairs) as_is = &ShrinkAsIs<T>;
  return {Packed<kBy>::kRows,
          kPanel,
          kRankPanel,
          kProductColumns,
          kInPlaceRows,
          &ShrinkFew<T>,
          &ShrinkPanels<T, kPairs>,
          &Transpose<T>,
          &Pack<T>,
          &Shrink<T>,
          as_is,
          &Expand<T, kPairs>,
          &ExpandFew<T>,
          &Outer<T>,
          &StreamFew<T>,
          &Product<T, kBy>,
          &Layer<T, kBy>,
          &Gather,
          &ProductTransposed<T, kBy>,
          &LayerTransposed<T, kBy>,
          &ExpandTransposed<T, kPairs>,
          &Sum<T>,
          &SumTransposed<T>};
}

#if JAX_FUSED_LORA_SETS
const Kernels* TableFor(Storage storage, [[maybe_unused]] By by) {
  static constexpr Kernels kFloat32 = Table<float>();
  static constexpr Kernels kBfloat16 = Table<hwy::bfloat16_t>();
#if JAX_FUSED_LORA_PAIRS
  static constexpr Kernels kPairs = Table<hwy::bfloat16_t, By::kPairs>();
  if (storage == Storage::kBfloat16 && by == By::kPairs) return &kPairs;
#endif
#if JAX_FUSED_LORA_PAIRS && JAX_FUSED_LORA_AMX
  static constexpr Kernels kTiles = Table<hwy::bfloat16_t, By::kTiles>();
  if (storage == Storage::kBfloat16 && by == By::kTiles) return &kTiles;
#endif
  static constexpr Kernels kFloat16 = Table<hwy::float16_t>();
  switch (storage) {
    case Storage::kBfloat16:
      return &kBfloat16;
    case Storage::kFloat16:
      return &kFloat16;
    default:
      return &kFloat32;
  }
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace jax_fused_lora
HWY_AFTER_NAMESPACE();

#endif  // JAX_FUSED_LORA_CPU_KERNELS_INL_H_
