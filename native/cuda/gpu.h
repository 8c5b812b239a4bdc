// The GPU that a launch goes to.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_GPU_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_GPU_H_

#include <cuda_runtime_api.h>

#include <cstddef>

namespace jax_fused_lora {

struct Gpu {
  int device = -1;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int block_shared = 0;  // bytes of shared memory that a block may have
  int shared = 0;        // that a multiprocessor has
};

// The current one.
cudaError_t ThisGpu(Gpu* gpu);

// Lets a block of the kernel have so many bytes of dynamic shared memory on the current GPU, and
// as many more as any block may have. That limit belongs to the kernel, whoever launches it: a
// thread that set it to what its own launch needs took it from under another's (two that launched
// the shrink with ranks 64 and 128: of 100,000 launches 5,510 failed, and 8,834).
cudaError_t AllowShared(const void* kernel, size_t bytes);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_GPU_H_
