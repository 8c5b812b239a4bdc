// The adapted layer of few rows in one kernel, on Hopper's tensor cores.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_FEW_SM90_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_FEW_SM90_H_

#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

// Whether the kernel takes a call that GemmSm90Serves, with A and h of `shrink`: up to 128 rows, or
// more where one round of its tiles does; up to 64 ranks, in whole 16 bytes.
bool FewSm90Serves(const Gemm& gemm, const GemmShrink& shrink);

// y and shrink.h; h16 and the scratch memory are not touched.
cudaError_t FewSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_FEW_SM90_H_
