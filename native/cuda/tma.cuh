// The copy engine of sm_90 and newer, and the barriers in shared memory that count what it has
// brought.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_

#include <cuda.h>

#include "native/cuda/device.cuh"

namespace jax_fused_lora {

// Bytes of shared memory that two blocks of a multiprocessor have each, of Hopper's and of some
// newer ones.
constexpr int kTmaShared = 110 * 1024;

// Whether the current device has that, and the driver makes maps.
bool HasTma();

// The map of a matrix in boxes, whose rows of 64 or 128 bytes are swizzled: sixteen bytes lie where
// their place in the row, xor the row (of 64 bytes: half the row), says. `columns` are whole 16
// bytes, and so is where they begin.
bool MapBoxes(Element element, const void* data, int64_t rows, int64_t columns, int box_rows,
              int box_columns, CUtensorMap* map);

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

// The tiles of a loop's steps, in stages of shared memory that go round. A stage is filled again
// two steps after it was multiplied, when nobody has to be waited for any more (one step: phases of
// several µs took up to 1.2 times as long), by the warps in turns, whom that keeps a while (by one
// of them all the time: 700 cycles a step, and 500).
template <int kWarps>
class Ring {
 public:
  static constexpr int kBehind = 2;
  using Barriers = uint64_t[2];  // of a stage: that it is filled, that it is read

  // One thread, before all others have the ring.
  static __device__ void Init(Barriers* barriers, int stages) {
    for (int i = 0; i < stages; ++i) {
      InitBarrier(SharedAddress(&barriers[i][0]), 1);
      InitBarrier(SharedAddress(&barriers[i][1]), kWarps);
    }
  }

  // All threads. copy(step, stage, barrier), of one thread, has the barrier expect the bytes of a
  // step and starts the copies.
  template <class Copy>
  __device__ Ring(Barriers* barriers, int stages, int steps, const Copy& copy)
      : barriers_(barriers), stages_(stages), steps_(steps) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < min(stages, steps); ++i) copy(i, i, Filled(i));
    }
    __syncwarp();
  }

  // The stage of a step, when it is filled; each warp asks for one step after the other.
  template <class Copy>
  __device__ int Wait(int step, const Copy& copy) {
    if (step >= kBehind) {
      const int next = step - kBehind + stages_;
      if (next < steps_ && threadIdx.x == step % kWarps * 32) {
        WaitForPhase(SharedAddress(&barriers_[filling_][1]), filling_phase_);
        copy(next, filling_, Filled(filling_));
      }
      __syncwarp();
      if (++filling_ == stages_) filling_ = 0, ++filling_phase_;
    }
    WaitForPhase(Filled(stage_), phase_);
    return stage_;
  }

  // Each warp, when it has read the stage.
  __device__ void Release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) Arrive(SharedAddress(&barriers_[stage_][1]));
    if (++stage_ == stages_) stage_ = 0, ++phase_;
  }

 private:
  __device__ uint32_t Filled(int stage) const { return SharedAddress(&barriers_[stage][0]); }

  Barriers* barriers_;
  int stages_, steps_;
  int stage_ = 0, phase_ = 0;
  int filling_ = 0, filling_phase_ = 0;
};

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_TMA_CUH_
