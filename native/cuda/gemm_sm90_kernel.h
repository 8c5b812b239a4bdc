// What the product's kernels have to agree on with who launches them.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_KERNEL_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_KERNEL_H_

#include <cuda_runtime_api.h>

#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

constexpr int kTileK = 64;
constexpr int kClusterSize = 2;

// Launches one kernel; each is compiled by itself. `done` may be null, else h16's flags.
template <int tile, bool bf16, bool transposed>
cudaError_t LaunchGemm(const Gemm& gemm, const GemmPlan& plan, const unsigned* done, int device,
                       int blocks, cudaStream_t stream, bool programmatic_dependent);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_KERNEL_H_
