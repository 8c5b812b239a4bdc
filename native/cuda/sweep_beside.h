// t = scaling · g·Bᵀ and dB = scaling · hᵀ·g beside the product of dx that needs t, in one sweep of
// g.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_SWEEP_BESIDE_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_SWEEP_BESIDE_H_

#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

// The multiprocessors that it takes, one cluster, each with a quarter of g's columns.
constexpr int kSweepBlocks = 4;
constexpr int kSweepMostColumns = 4096, kSweepMostRanks = 16;

// So many times 128 columns of g a block multiplies for each tile of rows.
constexpr int SweepSteps(int64_t columns) { return columns <= kSweepMostColumns / 4 * 3 ? 6 : 8; }

// As LaunchShrinkBeside, of a transposed product in bfloat16 alone: gemm.x is g and shrink.a B.
cudaError_t LaunchSweepBeside(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad,
                              unsigned* done, cudaStream_t stream);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_SWEEP_BESIDE_H_
