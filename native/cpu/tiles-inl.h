// The register-tiled products that every pass is made of.
//
//   Nn: out[i, j] = init[i, j] + bias[j] + scale · Σ_p a(i, p) · b[p, j]     b's rows run along j
//   Stream: Nn for one to four rows
//   Nt: out[i, j] = scale · Σ_p a[i, p] · b[j, p]  (+ out[i, j])   both run along p
//
// In each the vectors lie along a long axis (in_features or out_features), and along the rank only
// where that is whole panels: so a rank of 1 or 13 wastes no lane. 16-bit operands are widened in
// registers.
#if defined(JAX_FUSED_LORA_CPU_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef JAX_FUSED_LORA_CPU_TILES_INL_H_
#undef JAX_FUSED_LORA_CPU_TILES_INL_H_
#else
#define JAX_FUSED_LORA_CPU_TILES_INL_H_
#endif

#include "native/cpu/convert-inl.h"

// Register tiles are arrays of vectors: the loops over them must vanish.
#undef JAX_FUSED_LORA_UNROLL
#if HWY_COMPILER_CLANG
#define JAX_FUSED_LORA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define JAX_FUSED_LORA_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace jax_fused_lora {
namespace HWY_NAMESPACE {

// 6 × 4 accumulators and a row of b fill the 32 registers of AVX-512 and Arm, 3 × 4 (6 × 2 for
// Nn, whose broadcasts fold into the multiply) the 16 of older x86.
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr size_t kNnRows = 6, kNnVecs = 2, kNtRows = 3, kNtCols = 4;
#else
constexpr size_t kNnRows = 6, kNnVecs = 4, kNtRows = 6, kNtCols = 4;
#endif

constexpr size_t kPanel = kNnVecs * kLanes;

// Whether the tiles of a packed product ask for what will be packed next: x86 before AVX-512 loses
// more by the instructions than it gains, and asks while it packs (Zen 3, float32, two threads, the
// product alone: 64×1024→1024 1660 → 1320 µs, 128 rows 2350 → 2150, 256 rows the same).
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr bool kTilesAsk = false;
#else
constexpr bool kTilesAsk = true;
#endif

// Up to which rows W is multiplied as it lies. A strip that is one line wide has its lines in one
// set of the first cache where W's rows are a power of two apart, and each tile of rows brings them
// from the second anew: there only two tiles do (Zen 3, float32, 1024→1024, as it lies and packed:
// 12 rows 500 and 550 µs, 16 690 and 650, 32 1150 and 840, 64 2300 and 1290).
constexpr size_t kInPlaceRows = kPanel > 16 ? Scratch::kDepthRows : 2 * kNnRows;

// The tile of Nn for 5 to 8 rows, a strip of two lines (Zen 5, float32, a layer of 8×1024→1024 100
// µs, with 6 × 4 122; 8×2048→2048 357 and 440).
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
constexpr size_t kFewNnRows = 8, kFewNnVecs = 2;
#else
constexpr size_t kFewNnRows = kNnRows, kFewNnVecs = kNnVecs;
#endif

// Ranks of a panel of A, one vector with AVX-512 and the tile of few rows then. (12 rows of x are
// too many for one set of the first cache: Zen 4, 512×2048, rank 16, 86 GFLOP/s, 8 rows 115. One
// vector of AVX2, rank 8, would be no faster than Nt.)
constexpr size_t kRankPanel = kPanel < 16 ? kPanel : 16;

// Columns of a block of a product. Its sums, 4 bytes for each of 258 rows, want a second-level
// cache of their own: that of machines with AVX-512 holds twice what others' do (512×1024→1024,
// float32, of 256 columns 377, of 512 389 GFLOP/s).
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr size_t kProductColumns = 256;
#else
constexpr size_t kProductColumns = Scratch::kColumns;
#endif
static_assert(Scratch::kPanel % kPanel == 0, "a panel of W is whole panels of Nn");

// Column j of the first row. Panels are kPanel wide, a constant: a division would cost as much as
// a tile's loads.
template <class Float>
HWY_INLINE Float* InPanel(Panels<Float> panels, size_t j) {
  return panels.data + j / kPanel * panels.panel + j % kPanel;
}

// A float32 operand read element by element.
struct Scalars {
  const float* data;
  size_t row, step;  // distance between rows, and between the elements of a row
};

// A matrix whose rows are contiguous.
template <class T>
struct Rows {
  T* data;
  size_t row;
};

// What a tile asks of memory while it multiplies: the next lines of a matrix that will be read
// soon, row after row, so many of them for every kSteps of the tile's steps. Few of them under way
// let the tile's own lines come from the second cache; all of a panel's at once took as long as
// reading it (AVX-512, 512×1024, float32, one for 8 steps: packing W 290 → 90 µs, turning it 450 →
// 150, a layer forward and backward 0.95 of what it took).
template <size_t kSteps_>
class Ahead {
 public:
  static constexpr size_t kSteps = kSteps_, kLine = 64;

  template <class T>
  Ahead(const T* from, size_t row, size_t columns, size_t lines = 1)
      : at_(reinterpret_cast<uintptr_t>(from)),
        row_(row * sizeof(T)),
        width_((columns * sizeof(T) + kLine - 1) / kLine * kLine),
        lines_(lines) {}

  HWY_INLINE void Ask() {
    for (size_t i = 0; i < lines_; ++i) AskForLine();
  }
  HWY_INLINE void AskForLine() {
    PrefetchToSecondCache(at_ + line_);
    line_ += kLine;
    const bool whole = line_ == width_;
    line_ = whole ? 0 : line_;
    at_ += whole ? row_ : 0;
  }

 private:
  uintptr_t at_;
  size_t row_, width_, line_ = 0;  // bytes
  size_t lines_;
};
struct NothingAhead {
  static constexpr size_t kSteps = 0;
  HWY_INLINE void Ask() {}
  HWY_INLINE void AskForLine() {}
};

// The depth of a product whose first steps each multiply two bfloat16: the number of these, and of
// all steps. In `a` they lie where one float32 would, and so in a float32 b, which was packed; of a
// bfloat16 b each takes two rows.
struct PairsFirst {
  size_t pairs, steps;
};

// A function, which is inlined before a lambda is: as a lambda in NnTile this loop took float32 2
// to 4 % longer (Zen 4, GCC 12, 512 and 2048 rows of 1024→1024).
template <class Next, class Step>
HWY_INLINE void EachStep(size_t p, size_t end, Next& ahead, const Step& step) {
  if constexpr (Next::kSteps > 0) {
    for (; p + Next::kSteps <= end; p += Next::kSteps) {
      ahead.Ask();
      if constexpr (Next::kSteps <= 4) {
        JAX_FUSED_LORA_UNROLL
        for (size_t s = 0; s < Next::kSteps; ++s) step(p + s);
      } else {  // eight unrolled took 1.13 of the time (AVX-512, 512×1024, float32)
        for (size_t s = 0; s < Next::kSteps; ++s) step(p + s);
      }
    }
  }
  for (; p < end; ++p) step(p);
}

template <size_t kRows, size_t kVecs, bool kTail, class TB, class TO, class Depth, class Next>
HWY_INLINE void NnTile(Depth depth, Scalars a, Rows<const TB> b, float scale,
                       Rows<const float> init, const float* bias, Rows<TO> out, size_t columns,
                       Next& ahead) {
  const DF d;
  const auto load = [&](const auto* from)
                        HWY_ATTR { return kTail ? LoadFloatN(from, columns) : LoadFloat(from); };
  VF acc[kRows][kVecs];
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) acc[i][j] = hn::Zero(d);
  }
  const auto step = [&](size_t p, auto by_pairs) HWY_ATTR {
    constexpr bool kPairs = decltype(by_pairs)::value;
    VF bv[kVecs];
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) {
      if constexpr (kPairs && !std::is_same<TB, float>::value) {
        const TB* upper = b.data + 2 * p * b.row + j * kLanes;
        bv[j] = kTail ? PairUpN(upper, upper + b.row, columns) : PairUp(upper, upper + b.row);
      } else {
        bv[j] = load(b.data + p * b.row + j * kLanes);
      }
    }
    JAX_FUSED_LORA_UNROLL
    for (size_t i = 0; i < kRows; ++i) {
      const VF av = hn::Set(d, a.data[i * a.row + p * a.step]);
      JAX_FUSED_LORA_UNROLL
      for (size_t j = 0; j < kVecs; ++j) {
        if constexpr (kPairs) {
          acc[i][j] = MulAddPairs(av, bv[j], acc[i][j]);
        } else {
          acc[i][j] = hn::MulAdd(av, bv[j], acc[i][j]);
        }
      }
    }
  };
  if constexpr (std::is_same<Depth, PairsFirst>::value) {
    EachStep(0, depth.pairs, ahead, [&](size_t p) HWY_ATTR { step(p, std::true_type()); });
    if constexpr (!std::is_same<TB, float>::value) b.data += depth.pairs * b.row;
    EachStep(depth.pairs, depth.steps, ahead,
             [&](size_t p) HWY_ATTR { step(p, std::false_type()); });
  } else {
    EachStep(0, depth, ahead, [&](size_t p) HWY_ATTR { step(p, std::false_type()); });
  }
  const VF vscale = hn::Set(d, scale);
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) {
      VF start = hn::Zero(d);
      if (init.data != nullptr) start = load(init.data + i * init.row + j * kLanes);
      if (bias != nullptr) start = hn::Add(start, load(bias + j * kLanes));
      const VF v = hn::MulAdd(acc[i][j], vscale, start);
      TO* to = out.data + i * out.row + j * kLanes;
      if (kTail) {
        StoreFloatN(v, to, columns);
      } else {
        StoreFloat(v, to);
      }
    }
  }
}

template <size_t kRows, size_t kVecs, bool kTail, class TB, class TO, class Depth, class Next>
HWY_INLINE void NnPanel(size_t m, Depth depth, Scalars a, Rows<const TB> b, float scale,
                        Rows<const float> init, const float* bias, Rows<TO> out, size_t columns,
                        Next& ahead) {
  const auto tile = [&](auto rows) HWY_ATTR {
    NnTile<decltype(rows)::value, kVecs, kTail>(depth, a, b, scale, init, bias, out, columns,
                                                ahead);
    a.data += decltype(rows)::value * a.row;
    if (init.data != nullptr) init.data += decltype(rows)::value * init.row;
    out.data += decltype(rows)::value * out.row;
    m -= decltype(rows)::value;
  };
  if constexpr (kVecs == 1) {  // an edge is not worth the code of a tile of each size
    while (m >= kRows) tile(std::integral_constant<size_t, kRows>());
    if (m >= 4) tile(std::integral_constant<size_t, 4>());
    if (m >= 2) tile(std::integral_constant<size_t, 2>());
    if (m >= 1) tile(std::integral_constant<size_t, 1>());
    return;
  }
  // The last two tiles have half of what is left each: a tile of one row waits for its own sums as
  // long as one of four takes (Zen 5, float32, 15×1024→1024: 8 + 4 + 2 + 1 rows 217 µs, 8 + 7 167).
  // A size is named once, or its tile would become a function that knows no constants.
  while (m > 0) {
    switch (m >= 2 * kRows ? kRows : m > kRows ? (m + 1) / 2 : m) {
      case 8:
        if constexpr (kRows >= 8) tile(std::integral_constant<size_t, 8>());
        break;
      case 7:
        if constexpr (kRows >= 7) tile(std::integral_constant<size_t, 7>());
        break;
      case 6:
        tile(std::integral_constant<size_t, 6>());
        break;
      case 5:
        tile(std::integral_constant<size_t, 5>());
        break;
      case 4:
        tile(std::integral_constant<size_t, 4>());
        break;
      case 3:
        tile(std::integral_constant<size_t, 3>());
        break;
      case 2:
        tile(std::integral_constant<size_t, 2>());
        break;
      default:
        tile(std::integral_constant<size_t, 1>());
    }
  }
}

// out (m, n) = init + bias + scale · a (m, k) · b (k, n). `init` (m, n) and `bias` (n) may be null,
// and `init` may be `out` itself.
template <class TB, class TO, size_t kRows = kNnRows, size_t kVecs = kNnVecs, class Depth,
          class Next = NothingAhead>
HWY_INLINE void Nn(size_t m, size_t n, Depth depth, Scalars a, Panels<const TB> b, float scale,
                   Rows<const float> init, Rows<TO> out, const float* bias = nullptr,
                   Next ahead = {}) {
  size_t j = 0;
  const auto panel = [&](auto vecs, auto tail) HWY_ATTR {
    const Rows<const float> from = {init.data == nullptr ? nullptr : init.data + j, init.row};
    NnPanel<kRows, decltype(vecs)::value, decltype(tail)::value, TB, TO>(
        m, depth, a, {InPanel(b, j), b.row}, scale, from, bias == nullptr ? nullptr : bias + j,
        {out.data + j, out.row}, n - j, ahead);
    j += decltype(vecs)::value * kLanes;
  };
  while (j + kVecs * kLanes <= n) {
    panel(std::integral_constant<size_t, kVecs>(), std::false_type());
  }
  while (j + kLanes <= n) panel(std::integral_constant<size_t, 1>(), std::false_type());
  if (j < n) panel(std::integral_constant<size_t, 1>(), std::true_type());
}

template <size_t kRows, size_t kSteps, size_t kVecs, bool kTail, class T, class Next>
HWY_INLINE void StreamTile(Rows<const float> x, Rows<const T> w, bool add, Rows<float> out,
                           size_t columns, Next& ahead) {
  const DF d;
  VF acc[kRows][kVecs];
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) {
      const float* from = out.data + i * out.row + j * kLanes;
      acc[i][j] = !add ? hn::Zero(d) : kTail ? LoadFloatN(from, columns) : LoadFloat(from);
    }
  }
  JAX_FUSED_LORA_UNROLL
  for (size_t p = 0; p < kSteps; ++p) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) {
      const T* from = w.data + p * w.row + j * kLanes;
      if (j * kLanes * sizeof(T) % 64 == 0) ahead.AskForLine();
      const VF wv = kTail ? LoadFloatN(from, columns) : LoadFloat(from);
      JAX_FUSED_LORA_UNROLL
      for (size_t i = 0; i < kRows; ++i) {
        acc[i][j] = hn::MulAdd(hn::Set(d, x.data[i * x.row + p]), wv, acc[i][j]);
      }
    }
  }
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kVecs; ++j) {
      float* to = out.data + i * out.row + j * kLanes;
      if (kTail) {
        StoreFloatN(acc[i][j], to, columns);
      } else {
        StoreFloat(acc[i][j], to);
      }
    }
  }
}

// out (kRows, columns) = x (kRows, k) · w (k, columns), added to what is there if `add`. kSteps
// rows of w at a time over the whole width, each read once, the next of them asked for meanwhile
// where w comes from memory: long contiguous reads, and the sums stay in the first cache.
template <size_t kRows, size_t kSteps, bool kAsk, class T>
HWY_INLINE void Stream(size_t k, Rows<const float> x, Rows<const T> w, size_t columns, bool add,
                       Rows<float> out) {
  constexpr size_t kVecs = kAsk ? 2 : kRows <= 2 ? 4 : kNnVecs;
  const auto sweep = [&](auto steps, auto ahead) HWY_ATTR {
    constexpr size_t kSome = decltype(steps)::value;
    size_t j = 0;
    const auto tile = [&](auto vecs, auto tail) HWY_ATTR {
      StreamTile<kRows, kSome, decltype(vecs)::value, decltype(tail)::value, T>(
          x, {w.data + j, w.row}, add, {out.data + j, out.row}, columns - j, ahead);
      j += decltype(vecs)::value * kLanes;
    };
    while (j + kVecs * kLanes <= columns) {
      tile(std::integral_constant<size_t, kVecs>(), std::false_type());
    }
    while (j + kLanes <= columns) tile(std::integral_constant<size_t, 1>(), std::false_type());
    if (j < columns) tile(std::integral_constant<size_t, 1>(), std::true_type());
    x.data += kSome;
    w.data += kSome * w.row;
    add = true;
    k -= kSome;
  };
  while (k >= kSteps) {
    const std::integral_constant<size_t, kSteps> steps;
    if constexpr (kAsk) {
      sweep(steps, Ahead<1>(w.data + kSteps * w.row, w.row, columns));
    } else {
      sweep(steps, NothingAhead());
    }
  }
  while (k > 0) sweep(std::integral_constant<size_t, 1>(), NothingAhead());
}

// The sum of the 128-bit blocks of a vector of `kCount` lanes, without a way through memory.
template <size_t kCount, class V>
HWY_INLINE auto SumBlocks(V v) {
  if constexpr (kCount <= 4) {
    return v;
  } else {
    const hn::FixedTag<float, kCount / 2> half;
    return SumBlocks<kCount / 2>(hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// The four sums of four vectors' lanes, in one shuffle tree: summing 24 accumulators one by one
// would take a tile of Nt some 240 instructions beside its 768 multiplications.
HWY_INLINE void StoreSums(VF a, VF b, VF c, VF e, float scale, bool add, float* out) {
  const DF d;
  const hn::Repartition<uint64_t, DF> d64;
  const VF ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const VF ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab64 = hn::BitCast(d64, ab), ce64 = hn::BitCast(d64, ce);
  const VF blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab64, ce64)),
                            hn::BitCast(d, hn::InterleaveUpper(d64, ab64, ce64)));
  const hn::FixedTag<float, 4> d4;
  auto sum = SumBlocks<kLanes>(blocks);  // each 128-bit block holds a partial sum of a, b, c and e
  sum = hn::Mul(sum, hn::Set(d4, scale));
  hn::StoreU(add ? hn::Add(sum, hn::LoadU(d4, out)) : sum, d4, out);
}

// A bfloat16 `a` is multiplied by pairs.
template <size_t kRows, size_t kCols, class TA, class TB>
HWY_INLINE void NtTile(size_t k, Rows<const TA> a, Rows<const TB> b, float scale, bool add,
                       Rows<float> out) {
  const DF d;
  constexpr bool kPairs = std::is_same<TA, hwy::bfloat16_t>::value;
  constexpr size_t kStep = kPairs ? 2 * kLanes : kLanes;
  const auto load = [&](const auto* from, auto tail) HWY_ATTR {
    if constexpr (kPairs) {
      return decltype(tail)::value ? LoadPairsN(from, k) : LoadPairs(from);
    } else {
      return decltype(tail)::value ? LoadFloatN(from, k) : LoadFloat(from);
    }
  };
  VF acc[kRows][4];  // unused columns of a narrow tile stay zero
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < 4; ++j) acc[i][j] = hn::Zero(d);
  }
  const auto step = [&](auto tail) HWY_ATTR {
    VF bv[kCols];
    JAX_FUSED_LORA_UNROLL
    for (size_t j = 0; j < kCols; ++j) bv[j] = load(b.data + j * b.row, tail);
    JAX_FUSED_LORA_UNROLL
    for (size_t i = 0; i < kRows; ++i) {
      const VF av = load(a.data + i * a.row, tail);
      JAX_FUSED_LORA_UNROLL
      for (size_t j = 0; j < kCols; ++j) {
        if constexpr (kPairs) {
          acc[i][j] = MulAddPairs(av, bv[j], acc[i][j]);
        } else {
          acc[i][j] = hn::MulAdd(av, bv[j], acc[i][j]);
        }
      }
    }
  };
  // Both pointers move, so that a row is a pointer and a multiple of its row distance: with an
  // index in their place the compiler kept a pointer for each row, and half of them on the stack.
  for (; k >= kStep; k -= kStep) {
    step(std::false_type());
    a.data += kStep;
    b.data += kStep;
  }
  if (k > 0) step(std::true_type());
  JAX_FUSED_LORA_UNROLL
  for (size_t i = 0; i < kRows; ++i) {
    float* to = out.data + i * out.row;
    if (kCols == 4) {
      StoreSums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], scale, add, to);
    } else {
      float sums[4];
      StoreSums(acc[i][0], acc[i][1], acc[i][2], acc[i][3], scale, false, sums);
      for (size_t j = 0; j < kCols; ++j) to[j] = add ? to[j] + sums[j] : sums[j];
    }
  }
}

// out (m, n) = scale · a (m, k) · b (n, k)ᵀ, added to what is there if `add`. Columns of b are
// the outer loop of a row tile: a's rows stay in the first cache while b streams past. Asking for
// the next tile's rows of a meanwhile lost to the machine's own prefetchers (AVX-512, float32,
// 512×2048, rank 16: 132 GFLOP/s, without 141; not measured on Arm).
template <class TA, class TB>
HWY_INLINE void Nt(size_t m, size_t n, size_t k, Rows<const TA> a, Rows<const TB> b, float scale,
                   bool add, Rows<float> out) {
  const auto row_tile = [&](size_t i, auto rows) HWY_ATTR {
    const Rows<const TA> ai = {a.data + i * a.row, a.row};
    size_t j = 0;
    const auto tile = [&](auto cols) HWY_ATTR {
      NtTile<decltype(rows)::value, decltype(cols)::value, TA, TB>(
          k, ai, {b.data + j * b.row, b.row}, scale, add, {out.data + i * out.row + j, out.row});
      j += decltype(cols)::value;
    };
    while (j + kNtCols <= n) tile(std::integral_constant<size_t, kNtCols>());
    if (n - j >= 2) tile(std::integral_constant<size_t, 2>());
    if (n - j >= 1) tile(std::integral_constant<size_t, 1>());
  };
  size_t i = 0;
  for (; i + kNtRows <= m; i += kNtRows) {
    row_tile(i, std::integral_constant<size_t, kNtRows>());
  }
  if (m - i >= 4) row_tile(i, std::integral_constant<size_t, 4>()), i += 4;
  if (m - i >= 2) row_tile(i, std::integral_constant<size_t, 2>()), i += 2;
  if (m - i >= 1) row_tile(i, std::integral_constant<size_t, 1>());
}

}  // namespace HWY_NAMESPACE
}  // namespace jax_fused_lora
HWY_AFTER_NAMESPACE();

#endif  // include guard
