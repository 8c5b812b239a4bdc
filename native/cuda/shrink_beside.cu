// CUTLASS's mainloop for Hopper on tiles of 128 rows and all ranks, and a store of h and h16 behind
// it. What a multiprocessor reads from L2 in a cycle is the limit, so TMA fills a ring of 8 stages,
// and the two blocks of a cluster, which have neighbouring rows, fetch A for each other. Clusters
// leave no odd multiprocessor behind either: the product's blocks come in twos as well.
// (cp.async and mma.sync, 256 threads: 128 rows of 4096 took 40 µs, not 16.5.)
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/numeric_types.h"
#include "native/cuda/beside.cuh"
#include "native/cuda/shrink_beside.h"

namespace jax_fused_lora {
namespace {

using cute::_;

template <class Element, int kRanks, bool transposed>
struct Beside {
  using RowMajor = cutlass::layout::RowMajor;
  using Shape = cute::Shape<cute::Int<kBesideRows>, cute::Int<kRanks>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element,
      std::conditional_t<transposed, cutlass::layout::ColumnMajor, RowMajor>, 8, float, Shape,
      Cluster, cutlass::gemm::collective::StageCount<8>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  static constexpr int kMultiply = cute::size(typename Mainloop::TiledMma{});
  static constexpr int kThreads = 128 + kMultiply;

  struct Storage {
    typename Mainloop::TensorStorage tensors;
    typename Mainloop::PipelineStorage pipeline;
  };

  struct Params {
    typename Mainloop::Params mainloop;
    int rows, in, rank;
    float scaling, h16_scaling;
    float* h;
    Element* h16;
    unsigned* done;
    int tiles;
  };
};

// A thread's sums of a tile: of each 8 ranks two neighbouring ones, in two rows.
template <class Params, class Sums>
__device__ void StoreTile(const Params& p, int tile, int thread, const Sums& sums) {
  using Element = std::remove_pointer_t<decltype(p.h16)>;
  using Number =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  CUTLASS_PRAGMA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = int64_t{tile} * kBesideRows + thread / 32 * 16 + half * 8 + thread % 32 / 4;
    if (row >= p.rows) continue;
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < cute::size(Sums{}) / 4; ++n) {
      const float pair[2] = {p.scaling * sums(n * 4 + half * 2),
                             p.scaling * sums(n * 4 + half * 2 + 1)};
      StoreRanks<Number>(pair, row, n * 8 + thread % 4 * 2, p.rank, p.h16_scaling, p.h, p.h16);
    }
  }
}

template <class Beside>
__global__ void __launch_bounds__(Beside::kThreads, 1)
    BesideKernel(const __grid_constant__ typename Beside::Params p) {
  using Mainloop = typename Beside::Mainloop;
  using Pipeline = typename Mainloop::MainloopPipeline;
  extern __shared__ __align__(1024) char memory[];
  auto& storage = *reinterpret_cast<typename Beside::Storage*>(memory);
  const bool fetches = threadIdx.x < 128;
  const int thread = threadIdx.x - 128;  // of those that multiply

  if (threadIdx.x / 32 == 1) StartProduct(p.done, p.tiles);

  typename Pipeline::Params pipeline_params;
  pipeline_params.role =
      fetches ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = threadIdx.x % 128 == 0;
  pipeline_params.num_consumers = Beside::kMultiply;
  pipeline_params.transaction_bytes = Mainloop::TmaTransactionBytes;
  Pipeline pipeline(storage.pipeline, pipeline_params, typename Beside::Cluster{});
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();  // both blocks' barriers are ready

  Mainloop mainloop;
  const auto inputs = mainloop.load_init(cute::make_shape(p.rows, p.rank, p.in, 1), p.mainloop);
  const int k_tiles = cute::size<3>(cute::get<0>(inputs));
  const int rank_in_cluster = blockIdx.x % 2;
  // Both blocks of a cluster go as often, one perhaps with rows that are not.
  const int first = blockIdx.x - rank_in_cluster;
  if (fetches) {
    if (threadIdx.x >= 32) return;
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (int pair = first; pair < p.tiles; pair += gridDim.x) {
      mainloop.load(p.mainloop, pipeline, state, inputs,
                    cute::make_coord(pair + rank_in_cluster, 0, _, 0),
                    cute::make_coord_iterator(cute::shape<3>(cute::get<0>(inputs))), k_tiles,
                    threadIdx.x, rank_in_cluster, storage.tensors);
      state.advance(k_tiles);
    }
    mainloop.load_tail(pipeline, state);
    return;
  }
  typename Mainloop::PipelineState state;
  for (int pair = first; pair < p.tiles; pair += gridDim.x) {
    const int tile = pair + rank_in_cluster;
    auto sums = cute::partition_fragment_C(typename Mainloop::TiledMma{},
                                           cute::take<0, 2>(typename Beside::Shape{}));
    mainloop.mma(pipeline, state, sums, k_tiles, thread, storage.tensors, p.mainloop);
    mainloop.mma_tail(pipeline, state, k_tiles);
    state.advance(k_tiles);
    StoreTile(p, tile, thread, sums);
    if (p.done == nullptr) continue;
    asm volatile("fence.proxy.async;" ::: "memory");  // TMA reads h16
    cutlass::arch::NamedBarrier::sync(Beside::kMultiply, 0);
    if (thread == 0 && tile < p.tiles) SetDone(p.done + tile);
  }
}

template <class Element, int kRanks, bool transposed>
cudaError_t Launch(const Gemm& gemm, const GemmShrink& shrink, unsigned* done, int blocks,
                   cudaStream_t stream) {
  using Own = Beside<Element, kRanks, transposed>;
  using Mainloop = typename Own::Mainloop;
  const int m = static_cast<int>(gemm.m), k = static_cast<int>(gemm.k),
            r = static_cast<int>(gemm.r);
  typename Mainloop::Arguments arguments{};
  arguments.ptr_A = static_cast<const Element*>(gemm.x);
  arguments.dA = {gemm.k, {}, 0};
  arguments.ptr_B = static_cast<const Element*>(shrink.a);
  cute::get<transposed ? 0 : 1>(arguments.dB) = transposed ? gemm.k : gemm.r;
  const typename Own::Params params = {
      Mainloop::to_underlying_arguments(cute::make_shape(m, r, k), arguments, nullptr),
      m,
      k,
      r,
      shrink.scaling,
      shrink.h16_scaling,
      shrink.h,
      static_cast<Element*>(shrink.h16),
      done,
      static_cast<int>(CeilDiv(gemm.m, kBesideRows))};
  return jax_fused_lora::Launch(BesideKernel<Own>, dim3(blocks), Own::kThreads,
                                sizeof(typename Own::Storage), stream, false, 2, params);
}

template <class Element, bool transposed>
cudaError_t LaunchRanks(const Gemm& gemm, const GemmShrink& shrink, unsigned* done, int blocks,
                        cudaStream_t stream) {
  if (gemm.r <= 16) return Launch<Element, 16, transposed>(gemm, shrink, done, blocks, stream);
  if (gemm.r <= 32) return Launch<Element, 32, transposed>(gemm, shrink, done, blocks, stream);
  return Launch<Element, 64, transposed>(gemm, shrink, done, blocks, stream);
}

}  // namespace

cudaError_t LaunchShrinkBeside(const Gemm& gemm, const GemmShrink& shrink, unsigned* done,
                               int blocks, cudaStream_t stream) {
  using cutlass::bfloat16_t, cutlass::half_t;
  if (gemm.transposed) {
    return gemm.bf16 ? LaunchRanks<bfloat16_t, true>(gemm, shrink, done, blocks, stream)
                     : LaunchRanks<half_t, true>(gemm, shrink, done, blocks, stream);
  }
  return gemm.bf16 ? LaunchRanks<bfloat16_t, false>(gemm, shrink, done, blocks, stream)
                   : LaunchRanks<half_t, false>(gemm, shrink, done, blocks, stream);
}

}  // namespace jax_fused_lora
