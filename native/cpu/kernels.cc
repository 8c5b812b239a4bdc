// The kernels table for every instruction set: Highway compiles this file once for each and
// KernelsFor picks the best that the machine has.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/kernels.cc"

// Register tiles are arrays of vectors, which sizeless vectors cannot form: on such machines the
// 128-bit Arm set runs. SSSE3 gains nothing over the other x86 sets for products of floats.
#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS \
  (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3)
#endif

#include "native/cpu/kernels.h"

#include <algorithm>

#include "hwy/foreach_target.h"  // must come before the headers below
#include "native/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace jax_fused_lora {
namespace HWY_NAMESPACE {

constexpr size_t kDepth = Scratch::kDepth;

// Rows of x, columns [p, p + depth), as float32: in place, or widened into `to`.
template <class T>
Rows<const float> Widened(const T* x, size_t row, size_t m, size_t depth, float* to) {
  if constexpr (std::is_same<T, float>::value) {
    return {x, row};
  } else {
    for (size_t i = 0; i < m; ++i) ToFloat(x + i * row, depth, to + i * depth);
    return {to, depth};
  }
}

// Lanes lie along the rank. A vector that starts at a row of A and runs over its end reads the
// next rows' elements into lanes that are never stored: so any rank is one load and one multiply
// a row of A, and only the last rows, where the overrun would leave A, are read with care.
template <class T>
void ShrinkFew(const void* x_, size_t m, size_t k, const void* a_, size_t r, float* h,
               Scratch* scratch) {
  const T* a = static_cast<const T*>(a_);
  const DF d;
  for (size_t i = 0; i < m; ++i) {
    const T* x = static_cast<const T*>(x_) + i * k;
    for (size_t p0 = 0; p0 < k || p0 == 0; p0 += kDepth) {
      const size_t depth = std::min(kDepth, k - p0);
      const float* xf = Widened(x + p0, k, 1, depth, scratch->rows).data;
      for (size_t r0 = 0; r0 < r; r0 += kLanes) {
        const size_t lanes = std::min(kLanes, r - r0);
        const T* from = a + p0 * r + r0;
        const size_t left = (k - p0) * r - r0;  // elements of A from here on
        const size_t whole = left < kLanes ? 0 : std::min(depth, (left - kLanes) / r + 1);
        VF acc[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
        if (p0 > 0) acc[0] = LoadFloatN(h + i * r + r0, lanes);
        size_t p = 0;
        for (; p + 4 <= whole; p += 4) {
          JAX_FUSED_LORA_UNROLL
          for (size_t u = 0; u < 4; ++u) {
            acc[u] = hn::MulAdd(hn::Set(d, xf[p + u]), LoadFloat(from + (p + u) * r), acc[u]);
          }
        }
        for (; p < depth; ++p) {
          const VF row = p < whole ? LoadFloat(from + p * r) : LoadFloatN(from + p * r, lanes);
          acc[0] = hn::MulAdd(hn::Set(d, xf[p]), row, acc[0]);
        }
        const VF sum = hn::Add(hn::Add(acc[0], acc[1]), hn::Add(acc[2], acc[3]));
        StoreFloatN(sum, h + i * r + r0, lanes);
      }
    }
  }
}

// A block of `kLanes` rows by up to 256 columns is widened, then gathered column by column.
template <class T>
void Transpose(const void* a_, size_t k, size_t r, size_t k0, size_t k1, float* at) {
  const T* a = static_cast<const T*>(a_);
  const DF d;
  constexpr size_t kColumns = 256;
  HWY_ALIGN float block[kLanes * kColumns];
  const auto column = hn::Mul(hn::Iota(DI(), 0), hn::Set(DI(), static_cast<int32_t>(kColumns)));
  for (size_t p = k0; p < k1; p += kLanes) {
    const size_t rows = std::min(kLanes, k1 - p);
    for (size_t r0 = 0; r0 < r; r0 += kColumns) {
      const size_t columns = std::min(kColumns, r - r0);
      for (size_t i = 0; i < rows; ++i) ToFloat(a + (p + i) * r + r0, columns, block + i * kColumns);
      for (size_t j = 0; j < columns; ++j) {
        float* to = at + (r0 + j) * k + p;
        if (rows == kLanes) {
          StoreFloat(hn::GatherIndex(d, block + j, column), to);
        } else {
          for (size_t i = 0; i < rows; ++i) to[i] = block[i * kColumns + j];
        }
      }
    }
  }
}

template <class T>
void Widen(const void* from, size_t n, float* to) {
  ToFloat(static_cast<const T*>(from), n, to);
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
      Nt<float>(rows, r, depth, Widened(x + i * k + p, k, rows, depth, scratch->rows),
                {at + p, k}, scale, p > 0, {h + i * r, r});
    }
  }
}

template <class T>
void Expand(const float* h, size_t m, size_t r, const float* b, size_t b_row, size_t n,
            float scale, const float* init, size_t init_row, void* y, size_t y_row) {
  Nn<float, T>(m, n, r, {h, r, 1}, {b, b_row}, scale, {init, init_row},
               {static_cast<T*>(y), y_row});
}

template <class T>
void Outer(const float* h, size_t m, size_t r, const void* g, size_t n, float scale, float* out) {
  Nn<T, float>(r, n, m, {h, 1, r}, {static_cast<const T*>(g), n}, scale, {out, n}, {out, n});
}

// Few rows: W streams past once, eight of its rows at a time over the whole width, so that memory
// sees eight long contiguous reads; the sums of m ≤ kFew rows stay in the first cache.
// More rows: a panel of W is packed contiguous (and widened) into the second cache, where every
// tile of rows reads it.
template <class T>
void Product(const void* x_, size_t m, size_t k, const void* w_, size_t n, size_t j0,
             size_t columns, const void* bias_, float* out, Scratch* scratch) {
  const T* x = static_cast<const T*>(x_);
  const T* w = static_cast<const T*>(w_) + j0;
  Rows<const float> init = {nullptr, 0};
  if (bias_ != nullptr) {
    ToFloat(static_cast<const T*>(bias_) + j0, columns, out);
    for (size_t i = 1; i < m; ++i) std::copy_n(out, columns, out + i * columns);
    init = {out, columns};
  } else if (k == 0) {
    std::fill_n(out, m * columns, 0.0f);
  }
  for (size_t p = 0; p < k; p += kDepth) {
    const size_t depth = std::min(kDepth, k - p);
    const Rows<const float> xf = Widened(x + p, k, m, depth, scratch->rows);
    if (m <= Scratch::kFew) {
      constexpr size_t kStep = 8;
      for (size_t q = 0; q < depth; q += kStep) {
        Nn<T, float>(m, columns, std::min(kStep, depth - q), {xf.data + q, xf.row, 1},
                     {w + (p + q) * n, n}, 1.0f, init, {out, columns});
        init = {out, columns};
      }
    } else {
      for (size_t q = 0; q < depth; ++q) {
        ToFloat(w + (p + q) * n, columns, scratch->panel + q * columns);
      }
      Nn<float, float>(m, columns, depth, {xf.data, xf.row, 1}, {scratch->panel, columns}, 1.0f,
                       init, {out, columns});
      init = {out, columns};
    }
  }
}

template <class T>
void ProductTransposed(const void* g_, size_t m, size_t n, const void* w_, size_t k0,
                       size_t columns, float* out, Scratch* scratch) {
  const T* g = static_cast<const T*>(g_);
  const T* w = static_cast<const T*>(w_) + k0 * n;
  if (n == 0) std::fill_n(out, m * columns, 0.0f);
  for (size_t p = 0; p < n; p += kDepth) {
    const size_t depth = std::min(kDepth, n - p);
    Nt<T>(m, columns, depth, Widened(g + p, n, m, depth, scratch->rows), {w + p, n}, 1.0f, p > 0,
          {out, columns});
  }
}

template <class T>
void Sum(const float* partial, size_t slices, size_t stride, size_t i0, size_t i1, void* out_) {
  T* out = static_cast<T*>(out_);
  const auto sum = [&](size_t i, auto load) HWY_ATTR {
    VF total = load(partial + i);
    for (size_t s = 1; s < slices; ++s) total = hn::Add(total, load(partial + s * stride + i));
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

template <class T>
void SumTransposed(const float* partial, size_t slices, size_t stride, size_t k, size_t r,
                   size_t k0, size_t k1, void* out_) {
  T* out = static_cast<T*>(out_);
  const DF d;
  constexpr size_t kRank = 64;  // ranks taken at a time
  HWY_ALIGN float block[kRank * kLanes];
  const auto column = hn::Mul(hn::Iota(DI(), 0), hn::Set(DI(), static_cast<int32_t>(kLanes)));
  for (size_t p = k0; p < k1; p += kLanes) {
    const size_t rows = std::min(kLanes, k1 - p);
    for (size_t r0 = 0; r0 < r; r0 += kRank) {
      const size_t ranks = std::min(kRank, r - r0);
      for (size_t j = 0; j < ranks; ++j) {
        const size_t at = (r0 + j) * k + p;
        Sum<float>(partial + at, slices, stride, 0, rows, block + j * kLanes);
      }
      for (size_t i = 0; i < rows; ++i) {
        T* to = out + (p + i) * r + r0;
        size_t j = 0;
        for (; j + kLanes <= ranks; j += kLanes) {
          StoreFloat(hn::GatherIndex(d, block + j * kLanes + i, column), to + j);
        }
        if (j < ranks) {
          HWY_ALIGN float last[kLanes] = {};
          for (size_t l = 0; j + l < ranks; ++l) last[l] = block[(j + l) * kLanes + i];
          StoreFloatN(LoadFloat(last), to + j, ranks - j);
        }
      }
    }
  }
}

template <class T>
constexpr Kernels Table() {
  return {&ShrinkFew<T>, &Transpose<T>, &Widen<T>,   &Shrink<T>,
          &Expand<T>,    &Outer<T>,     &Product<T>, &ProductTransposed<T>,
          &Sum<T>,       &SumTransposed<T>};
}

const Kernels* TableFor(Storage storage) {
  static constexpr Kernels kFloat32 = Table<float>();
  static constexpr Kernels kBfloat16 = Table<hwy::bfloat16_t>();
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

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace jax_fused_lora
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jax_fused_lora {

HWY_EXPORT(TableFor);
HWY_EXPORT(TargetName);

const Kernels& KernelsFor(Storage storage) { return *HWY_DYNAMIC_DISPATCH(TableFor)(storage); }

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace jax_fused_lora
#endif  // HWY_ONCE
