// In place of gemm_sm90.cc and few_sm90.cu, where the library is built without CUTLASS.

#include "native/cuda/few_sm90.h"
#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

bool GemmSm90RunsOn(int /*major*/, int /*minor*/) { return false; }

bool GemmSm90Serves(const Gemm& /*gemm*/) { return false; }

cudaError_t GemmSm90(const Gemm& /*gemm*/, cudaStream_t /*stream*/,
                     bool /*programmatic_dependent*/) {
  return cudaErrorNotSupported;
}

int64_t GemmSm90ShrinkScratch(int64_t /*m*/) { return 0; }

bool GemmSm90Shrinks(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/) { return false; }

cudaError_t GemmSm90(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/, cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

bool GemmSm90Sweeps(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/, const GemmGrad& /*grad*/) {
  return false;
}

cudaError_t GemmSm90(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/, const GemmGrad& /*grad*/,
                     cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

bool FewSm90Serves(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/) { return false; }

cudaError_t FewSm90(const Gemm& /*gemm*/, const GemmShrink& /*shrink*/, cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

}  // namespace jax_fused_lora
