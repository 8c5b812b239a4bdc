// Storage types to and from float32 vectors, for whichever instruction set is being compiled.
//
// Both directions are spelled out here where a Highway release we support is not exact: the
// narrowing to bfloat16 truncated before 1.1, and the float16 conversions that older x86
// emulates truncate and know no infinity.
#if defined(JAX_FUSED_LORA_CPU_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef JAX_FUSED_LORA_CPU_CONVERT_INL_H_
#undef JAX_FUSED_LORA_CPU_CONVERT_INL_H_
#else
#define JAX_FUSED_LORA_CPU_CONVERT_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jax_fused_lora {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr size_t kLanes = HWY_LANES(float);

// Whether a load or store under a mask leaves the memory of the other lanes alone.
constexpr bool kMasksFloats = HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2;
constexpr bool kMasksHalves = HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3;

// AVX512-BF16 multiplies pairs of bfloat16, and rounds to it. Its instructions are written out:
// the older Highways that we support have no set with them.
// They take subnormal numbers for zero, as any arithmetic does in XLA's threads.
#undef JAX_FUSED_LORA_PAIRS  // differs from one instruction set to the next
#if HWY_ARCH_X86_64 && HWY_TARGET == HWY_AVX3 && (HWY_COMPILER_GCC || HWY_COMPILER_CLANG)
#define JAX_FUSED_LORA_PAIRS 1
#else
#define JAX_FUSED_LORA_PAIRS 0
#endif

#undef JAX_FUSED_LORA_HARDWARE_F16  // differs from one instruction set to the next
// F16C (AVX2 and newer) and Arm convert float16 in hardware, correctly rounded.
#if HWY_ARCH_ARM || (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2)
#define JAX_FUSED_LORA_HARDWARE_F16 1
#else
#define JAX_FUSED_LORA_HARDWARE_F16 0
#endif

HWY_INLINE VU LoadBits(const void* from) {
  return hn::PromoteTo(DU(), hn::LoadU(DU16(), static_cast<const uint16_t*>(from)));
}

HWY_INLINE void StoreBits(VU bits, void* to) {
  // Bits are below 2^16, which a saturating narrowing keeps.
  hn::StoreU(hn::DemoteTo(DU16(), hn::BitCast(DI(), bits)), DU16(), static_cast<uint16_t*>(to));
}

HWY_INLINE VF LoadFloat(const float* from) { return hn::LoadU(DF(), from); }

HWY_INLINE void StoreFloat(VF v, float* to) { hn::StoreU(v, DF(), to); }

HWY_INLINE VF LoadFloat(const hwy::bfloat16_t* from) {
  return hn::BitCast(DF(), hn::ShiftLeft<16>(LoadBits(from)));
}

// Round to nearest even; a NaN keeps its sign and stays a NaN.
HWY_INLINE void StoreFloat(VF v, hwy::bfloat16_t* to) {
  const DU du;
  const VU bits = hn::BitCast(du, v);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
  const VU quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40));
  // Not Ne(v, v): Highway compares ordered on AVX2 and newer, which is false for NaN.
  StoreBits(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded), to);
}

#if JAX_FUSED_LORA_HARDWARE_F16

HWY_INLINE VF LoadFloat(const hwy::float16_t* from) {
  return hn::PromoteTo(DF(), hn::LoadU(hn::Rebind<hwy::float16_t, DF>(), from));
}

HWY_INLINE void StoreFloat(VF v, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, DF> d16;
  hn::StoreU(hn::DemoteTo(d16, v), d16, to);
}

#else

HWY_INLINE VF LoadFloat(const hwy::float16_t* from) {
  const DU du;
  const DF df;
  const VU half = LoadBits(from);
  const VU sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(du, 0x8000)));
  const VU magnitude = hn::And(half, hn::Set(du, 0x7FFF));
  const VU shifted = hn::ShiftLeft<13>(magnitude);
  const VU normal = hn::Add(shifted, hn::Set(du, 112u << 23));
  const VU special = hn::Add(shifted, hn::Set(du, 224u << 23));  // infinity and NaN
  // A subnormal is its mantissa in units of 2^-24: put it under the leading one of 2^-14.
  const VF subnormal = hn::Sub(hn::BitCast(df, hn::Add(shifted, hn::Set(du, 113u << 23))),
                               hn::BitCast(df, hn::Set(du, 113u << 23)));
  VU bits = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x7BFF)), special, normal);
  bits = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 0x0400)), hn::BitCast(du, subnormal), bits);
  return hn::BitCast(df, hn::Or(bits, sign));
}

HWY_INLINE void StoreFloat(VF v, hwy::float16_t* to) {
  const DU du;
  const DF df;
  const VU bits = hn::BitCast(du, v);
  const VU sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000));
  const VU magnitude = hn::And(bits, hn::Set(du, 0x7FFFFFFF));
  const VU odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1));
  // Rebias by -112 and round to nearest even; a carry out of the mantissa is right as it stands.
  const VU normal = hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, hn::Set(du, 0xC8000FFFu)), odd));
  // Adding 0.5 leaves a float16 subnormal in the low bits, rounded by the adder itself.
  const VU half = hn::BitCast(du, hn::Set(df, 0.5f));
  const VU subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f))), half);
  VU result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 113u << 23)), subnormal, normal);
  result =
      hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, (143u << 23) - 1)), hn::Set(du, 0x7C00), result);
  result = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x7F800000)), hn::Set(du, 0x7E00), result);
  StoreBits(hn::Or(result, sign), to);
}

#endif  // JAX_FUSED_LORA_HARDWARE_F16

// The first n ≤ kLanes elements; the rest of the vector is zero and its memory is not touched. A
// masked load where the machine has one (Zen 5, float32, a layer of 20×1000→50 57 → 18 µs).
template <class T>
HWY_INLINE VF LoadFloatN(const T* from, size_t n) {
  if constexpr (kMasksFloats && std::is_same<T, float>::value) {
    return hn::MaskedLoad(hn::FirstN(DF(), n), DF(), from);
  }
  HWY_ALIGN T lanes[kLanes] = {};
  if constexpr (kMasksHalves && sizeof(T) == 2) {
    const DU16 d16;
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    hn::Store(hn::MaskedLoad(hn::FirstN(d16, n), d16, bits), d16,
              reinterpret_cast<uint16_t*>(lanes));
  } else {
    for (size_t i = 0; i < n; ++i) lanes[i] = from[i];
  }
  return LoadFloat(lanes);
}

template <class T>
HWY_INLINE void StoreFloatN(VF v, T* to, size_t n) {
  if constexpr (kMasksFloats && std::is_same<T, float>::value) {
    hn::BlendedStore(v, hn::FirstN(DF(), n), DF(), to);
    return;
  }
  HWY_ALIGN T lanes[kLanes];
  StoreFloat(v, lanes);
  for (size_t i = 0; i < n; ++i) to[i] = lanes[i];
}

// Pairs of bfloat16: each lies where a float32 would.

#if JAX_FUSED_LORA_PAIRS

// sum + the two products of each of x's pairs with y's.
HWY_INLINE VF MulAddPairs(VF x, VF y, VF sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(y.raw));
  return sum;
}

// A bfloat16 that the CPU rounds: a step fewer than ten. (`lora_forward`, Zen 4, 2048×1024, rank
// 16, 900 → 780 to 940 µs, 512×1024, rank 8, 180 → 127.)
struct Rounded {
  hwy::bfloat16_t value;
};
HWY_INLINE void StoreFloat(VF v, Rounded* to) {
  decltype(hn::LowerHalf(v).raw) rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v.raw));
  std::memcpy(to, &rounded, sizeof rounded);
}

#endif  // JAX_FUSED_LORA_PAIRS

// An element of one row and the one below it.
HWY_INLINE VF PairUp(const hwy::bfloat16_t* upper, const hwy::bfloat16_t* lower) {
  const VU lower_bits = hn::BitCast(DU(), LoadFloat(lower));
  return hn::BitCast(DF(), hn::Or(LoadBits(upper), lower_bits));
}
// The first n ≤ kLanes of them, and zeros.
HWY_INLINE VF PairUpN(const hwy::bfloat16_t* upper, const hwy::bfloat16_t* lower, size_t n) {
  const VU upper_bits = hn::BitCast(DU(), LoadFloatN(upper, n));
  const VU lower_bits = hn::BitCast(DU(), LoadFloatN(lower, n));
  return hn::BitCast(DF(), hn::Or(hn::ShiftRight<16>(upper_bits), lower_bits));
}

// Pairs that lie along a row.
HWY_INLINE VF LoadPairs(const hwy::bfloat16_t* from) {
  const hn::Repartition<uint16_t, DF> d;
  return hn::BitCast(DF(), hn::LoadU(d, reinterpret_cast<const uint16_t*>(from)));
}
// The first n elements, and zeros.
HWY_INLINE VF LoadPairsN(const hwy::bfloat16_t* from, size_t n) {
  const hn::Repartition<uint16_t, DF> d;
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  return hn::BitCast(DF(), hn::MaskedLoad(hn::FirstN(d, n), d, bits));
}

// n bfloat16 of a row. Of an odd number the last is left as a float32, or a pair with a zero
// before.
HWY_INLINE void CopyPairs(const hwy::bfloat16_t* from, size_t n, float* to) {
  std::memcpy(to, from, n / 2 * sizeof *to);
  if (n % 2 != 0) StoreFloatN(LoadFloatN(from + n - 1, 1), to + n / 2, 1);
}

// Asks for the cache line at an address, which may lie outside of any array.
HWY_INLINE void PrefetchToSecondCache(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), /*write=*/0, /*locality=*/2);
}

// n elements of storage type T as float32.
template <class T>
HWY_INLINE void ToFloat(const T* from, size_t n, float* to) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    StoreFloat(LoadFloat(from + i), to + i);
  }
  if (i < n) StoreFloatN(LoadFloatN(from + i, n - i), to + i, n - i);
}

}  // namespace HWY_NAMESPACE
}  // namespace jax_fused_lora
HWY_AFTER_NAMESPACE();

#endif  // include guard
