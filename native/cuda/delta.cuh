// What the kernels of y = s·(x·A)·B alone have in common. For few rows (delta_fma.cu, delta_mma.cu)
// a cluster of 8 blocks has a tile of rows. Each sums its eighth of the depth, sends the sums to
// all, and writes its part of y. There is hardly any work in that; the time is what the steps take
// that wait for each other, and how many instructions a warp has between them. So what is not usual
// (other ranks, types that differ, an addend) is not asked for here but left to rows.cu and
// thin.cu, all that is read is asked for at the start, B too, and sums are sent so that nobody has
// to ask for them: 970 cycles at a barrier of the cluster that waits for what was stored elsewhere
// became 300. More rows, in 16 bits, have smaller clusters or none (delta_tma.cu).
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_DELTA_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_DELTA_CUH_

#include <algorithm>
#include <type_traits>

#include "native/cuda/shrink_expand.cuh"
#include "native/cuda/tma.cuh"

namespace jax_fused_lora {

struct DeltaArguments {
  int rows, in, out;
  const void *x, *a, *b;
  float shrink_scaling, expand_scaling;
  float* h;  // may be null
  void* y;
};

inline DeltaArguments ArgumentsOf(const Pass& pass) {
  return {static_cast<int>(pass.sizes.rows),
          static_cast<int>(pass.sizes.in),
          static_cast<int>(pass.sizes.out),
          pass.x,
          pass.a.data,
          pass.b.data,
          pass.shrink_scaling,
          pass.expand_scaling,
          pass.h,
          pass.y};
}

// Blocks that run at once: of an H200's 132 multiprocessors 120 take clusters of 8.
constexpr int64_t kDeltaBlocks = 120;

// Whether the kernels are for such a pass, wherever its operands lie.
inline bool DeltaTakes(const Pass& pass) {
  const Sizes& sizes = pass.sizes;
  const bool ranks = sizes.rank == 8 || sizes.rank == 16 || sizes.rank == 32 || sizes.rank == 64;
  const bool alike = pass.a.element == pass.element && pass.b.element == pass.element &&
                     pass.a.transposed == pass.b.transposed;
  const bool bare = pass.addend.base == nullptr && pass.addend.bias == nullptr &&
                    pass.h16 == nullptr && pass.y != nullptr;
  return ranks && alike && bare && sizes.in > 0 && std::max(sizes.in, sizes.out) <= 1 << 27 &&
         HasSm90();
}

// Whether they are for it on tensor cores, with all in vectors: a 16-bit type, in and out multiples
// of `depth` and `columns`.
inline bool DeltaTakesVectors(const Pass& pass, int64_t depth, int64_t columns) {
  const Sizes& sizes = pass.sizes;
  const int64_t width = Width(pass.element);
  const FactorView a = View(pass.a, sizes.in, sizes.rank), b = View(pass.b, sizes.rank, sizes.out);
  return DeltaTakes(pass) && pass.element != Element::kFloat32 && sizes.in % depth == 0 &&
         sizes.out % columns == 0 && a.vectors && (b.transposed ? b.quads : b.vectors) &&
         Vectors(pass.x, sizes.in, width) && Vectors(pass.y, sizes.out, width);
}

// Calls function(E(), std::bool_constant<transposed>()) for such a pass's 16-bit type E.
template <class Function>
cudaError_t DispatchFactors(const Pass& pass, const Function& function) {
  const auto launch = [&](auto element) {
    return pass.a.transposed ? function(element, std::true_type())
                             : function(element, std::false_type());
  };
  return pass.element == Element::kBfloat16 ? launch(__nv_bfloat16()) : launch(__half());
}

// Calls function(std::integral_constant<int, rank>()) for one of those ranks.
template <class Function>
cudaError_t DispatchRank(int64_t rank, const Function& function) {
  switch (rank) {
    case 8:
      return function(std::integral_constant<int, 8>());
    case 16:
      return function(std::integral_constant<int, 16>());
    case 32:
      return function(std::integral_constant<int, 32>());
    case 64:
      return function(std::integral_constant<int, 64>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Launches a kernel whose clusters have `tile` rows each. The columns of y are shared out to as
// many clusters as give each block at most `columns`, if there is room for them.
inline cudaError_t LaunchDelta(void (*kernel)(DeltaArguments), cudaStream_t stream,
                               const Pass& pass, int64_t tile, int64_t columns, int threads,
                               size_t shared) {
  const Sizes& sizes = pass.sizes;
  const int64_t tiles = CeilDiv(sizes.rows, tile);
  const int64_t room = std::max<int64_t>(1, kDeltaBlocks / (tiles * kMostParts));
  const int64_t splits = std::min(room, CeilDiv(sizes.out, columns * kMostParts));
  return Launch(kernel,
                dim3(kMostParts, static_cast<unsigned>(splits), static_cast<unsigned>(tiles)),
                threads, shared, stream, false, kMostParts, ArgumentsOf(pass));
}

#ifdef __CUDACC__

// How the blocks of a cluster send each other their sums, from sm_90 on. A block waits until the
// bytes that it expects have arrived; then all it was sent may be read, and nothing more comes.
class Exchange {
 public:
  // `barrier` is in shared memory. All threads; bytes: of the sums of all blocks.
  __device__ Exchange(uint64_t* barrier, int bytes) : barrier_(SharedAddress(barrier)) {
    if (threadIdx.x == 0) {
      InitBarrier(barrier_, 1);
      FenceBarriers();
    }
    __syncwarp();  // for compute-sanitizer, where the compiler predicates what one thread does
    if (threadIdx.x == 0) ArriveExpecting(barrier_, bytes);
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }

  // All threads, before the first sends: nothing may be sent to a block that has not begun.
  __device__ void Begin() const { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

  // One or four floats to where `to` is in block `part`.
  template <int kCount>
  __device__ void Send(const float (&values)[kCount], const float* to, int part) const {
    static_assert(kCount == 1 || kCount == 4);
    const auto there = [part](uint32_t here) {
      uint32_t address;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(here), "r"(part));
      return address;
    };
    const uint32_t address = there(SharedAddress(to)), signal = there(barrier_);
    if constexpr (kCount == 1) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
              address),
          "r"(__float_as_uint(values[0])), "r"(signal)
          : "memory");
    } else {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
          "[%5];" ::"r"(address),
          "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])),
          "r"(__float_as_uint(values[2])), "r"(__float_as_uint(values[3])), "r"(signal)
          : "memory");
    }
  }

  // All threads.
  __device__ void Wait() const { WaitForPhase(barrier_, 0); }

 private:
  uint32_t barrier_;
};

// The sum of what the blocks have sent, in one order.
template <int kSize>
__device__ inline float SumParts(const float (&arrived)[kMostParts][kSize], int at) {
  float parts[kMostParts];
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) parts[i] = arrived[i][at];
#pragma unroll
  for (int apart = 1; apart < kMostParts; apart *= 2) {
#pragma unroll
    for (int i = 0; i < kMostParts; i += 2 * apart) parts[i] += parts[i + apart];
  }
  return parts[0];
}

#endif  // __CUDACC__

// Both: `pass` must be one that the kernel serves.
bool DeltaFmaServes(const Pass& pass);
cudaError_t LaunchDeltaFma(cudaStream_t stream, const Pass& pass);
bool DeltaMmaServes(const Pass& pass);
cudaError_t LaunchDeltaMma(cudaStream_t stream, const Pass& pass);
bool DeltaTmaServes(const Pass& pass);
cudaError_t LaunchDeltaTma(cudaStream_t stream, const Pass& pass);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_DELTA_CUH_
