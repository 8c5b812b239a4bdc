#include "native/cuda/gpu.h"

namespace jax_fused_lora {

cudaError_t ThisGpu(Gpu* gpu) {
  // Each thread remembers the one it asked for last: handlers ask several times a call.
  thread_local Gpu known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (known.device != device) {
    Gpu found;
    found.device = device;
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    get(&found.major, cudaDevAttrComputeCapabilityMajor);
    get(&found.minor, cudaDevAttrComputeCapabilityMinor);
    get(&found.multiprocessors, cudaDevAttrMultiProcessorCount);
    get(&found.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(&found.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    if (error != cudaSuccess) return error;
    known = found;
  }
  *gpu = known;
  return cudaSuccess;
}

cudaError_t AllowShared(const void* kernel, size_t bytes) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  if (static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) >= bytes) return cudaSuccess;
  Gpu gpu;
  error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  const int most = gpu.block_shared - static_cast<int>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

}  // namespace jax_fused_lora
