// Barriers in shared memory that count bytes, and the copies and stores that tell them of theirs,
// from sm_90 on.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_

#include <cuda.h>

#include "native/cuda/device.cuh"

namespace jax_fused_lora {

#ifdef __CUDACC__

// Barriers are shared memory's addresses of 8 bytes each. `arrivals` end a phase, with all bytes
// that are expected in it.
__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By who has made barriers, before others hear of them.
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void ArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// For the end of a phase, of which only the first bit counts, and of what the cluster's blocks have
// sent until then.
__device__ inline void WaitForPhase(uint32_t barrier, int phase) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred done;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
  }
}

// A box of a matrix from (row, column) on, zeros outside; `from` is a parameter of the kernel.
__device__ inline void CopyBox(void* to, const CUtensorMap& from, int row, int column,
                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(SharedAddress(to)),
      "l"(&from), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// Bytes that lie behind each other, all in sixteens.
__device__ inline void CopyRun(void* to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_
