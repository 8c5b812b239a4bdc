// What the kernels of a shrink and expand share: thin.cu has the many rows, rows.cu the few,
// delta.cuh the usual ones of these.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_EXPAND_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_EXPAND_CUH_

#include <algorithm>

#include "native/cuda/device.cuh"
#include "native/cuda/gemm_sm90.h"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {

// What LaunchShrink and LaunchShrinkExpand are asked for.
struct Pass {
  Element element;
  Sizes sizes;
  const void* x;
  Factor a, b;
  float shrink_scaling, expand_scaling;
  Addend addend;
  float* h;   // may be null
  void* h16;  // may be null
  float h16_scaling;
  void* y;  // null for the shrink alone
};

// The end of a pass, y written `count` elements at a time where it can be.
template <class E>
Result<E> ResultOf(const Pass& pass, int64_t count) {
  const int64_t out = pass.sizes.out, width = sizeof(E);
  const Addend& addend = pass.addend;
  const bool vectors = Vectors(pass.y, out, width, std::min<int64_t>(16, count * width)) &&
                       (addend.base == nullptr || Vectors(addend.base, out, 4)) &&
                       (addend.bias == nullptr || Vectors(addend.bias, out, width, 4 * width));
  return {addend.base, addend.bias, static_cast<E*>(pass.y), pass.sizes.rows, out, vectors};
}

// At most kFewRows rows.
cudaError_t LaunchRows(cudaStream_t stream, const Pass& pass);

constexpr int64_t kMostLength = int64_t{1} << 30;  // of a row of x or y

// Blocks of a cluster, where there are clusters.
constexpr int kMostParts = 8;

#ifdef __CUDACC__

// The sum of four floats of each of at most kMost shares, in their order; they are all asked for at
// once.
template <int kMost, class Address>
__device__ inline float4 SumShares(int count, const Address& address) {
  float4 shares[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    shares[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i < count) shares[i] = *reinterpret_cast<const float4*>(address(i));
  }
  float4 sum = shares[0];
#pragma unroll
  for (int i = 1; i < kMost; ++i) {
    sum.x += shares[i].x, sum.y += shares[i].y, sum.z += shares[i].z, sum.w += shares[i].w;
  }
  return sum;
}

// float16 is short of exponents, not of bits: the power of two that brings a row of h whose largest
// finite element is `most` up to elements of 2^14, and its inverse.
struct ScaleOfRow {
  float up, down;

  __device__ explicit ScaleOfRow(float most) {
    const int exponent = (__float_as_int(most) >> 23) - 127;  // most < 2^(exponent + 1)
    const int power = most > 0.0f ? min(14 - exponent, 126) : 0;
    up = __int_as_float((127 + power) << 23);
    down = __int_as_float((127 - power) << 23);
  }
};

constexpr int kH16Block = static_cast<int>(GemmSm90Width(1));  // columns of h16, of 16 ranks
static_assert(GemmSm90Width(17) == 2 * kH16Block);
__device__ inline int H16Width(int rank) { return (rank + 15) / 16 * kH16Block; }

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_EXPAND_CUH_
