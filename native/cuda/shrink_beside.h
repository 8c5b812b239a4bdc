// h = scaling · x·A beside the product that needs it: the same rows a little earlier, on a few
// multiprocessors that the product leaves free.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_BESIDE_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_BESIDE_H_

#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

constexpr int kBesideRows = 128;  // that are told of together
constexpr int kBesideMostRanks = 64;

// Fills shrink.h and shrink.h16, tiles of kBesideRows rows in order, and sets done[tile] to 1 when
// both are written, with release. All of `done` is zero when a programmatic dependent starts. It
// may be null, for one that waits for this kernel's end. `blocks`, an even number, have a
// multiprocessor each. Of `gemm` it reads x, the sizes and types; needs 16 byte rows of x and A,
// and r of at most kBesideMostRanks.
cudaError_t LaunchShrinkBeside(const Gemm& gemm, const GemmShrink& shrink, unsigned* done,
                               int blocks, cudaStream_t stream);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_SHRINK_BESIDE_H_
