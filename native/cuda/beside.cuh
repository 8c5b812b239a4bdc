// What the kernels that run beside the product share: how they tell it of rows, and what they
// store.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_BESIDE_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_BESIDE_CUH_

#include "cutlass/cutlass.h"
#include "native/cuda/device.cuh"
#include "native/cuda/shrink_expand.cuh"

namespace jax_fused_lora {

// One warp's part, at a kernel's start: `done`, unless it is null, is cleared, and the product may
// start. It reads `done` without waiting for this kernel, so what is cleared has to have reached
// the L2 cache before.
__device__ inline void StartProduct(unsigned* done, int tiles) {
  if (done != nullptr) {
    for (int i = blockIdx.x + threadIdx.x % 32 * gridDim.x; i < tiles; i += 32 * gridDim.x) {
      done[i] = 0;
    }
    __threadfence();
    __syncwarp();
  }
  LaunchDependents();
}

__device__ inline void SetDone(unsigned* done) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(done) : "memory");
}

// Neighbouring ranks of a row, an even number from an even rank on, to h and to h16.
template <class Number, int kCount>
__device__ inline void StoreRanks(const float (&values)[kCount], int64_t row, int rank, int ranks,
                                  float h16_scaling, float* h, void* h16) {
  const int width = H16Width(ranks);
  if (rank / 16 * kH16Block >= width) return;
  alignas(8) Number hi[kCount], lo[kCount];
  CUTLASS_PRAGMA_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const bool some = rank + j < ranks;  // or x's infinities times A's padding
    if (some) h[row * ranks + rank + j] = values[j];
    SplitClamped(some ? h16_scaling * values[j] : 0.0f, hi + j, lo + j);
  }
  Number* const to = static_cast<Number*>(h16) + row * width + rank / 16 * kH16Block + rank % 16;
  CUTLASS_PRAGMA_UNROLL
  for (int j = 0; j < kCount; j += 2) {
    *reinterpret_cast<uint32_t*>(to + j) = *reinterpret_cast<uint32_t*>(hi + j);
    *reinterpret_cast<uint32_t*>(to + kH16Block / 2 + j) = *reinterpret_cast<uint32_t*>(lo + j);
  }
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_BESIDE_CUH_
