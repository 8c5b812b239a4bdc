// CUTLASS's warp-specialized Hopper product with the rank as more steps of its own K loop.
//
// A persistent block has one warp that fetches tiles of x and W by TMA into a ring of stages, and
// two warpgroups that multiply them (wgmma). Neither knows where a tile came from. So the low-rank
// part costs no pass over y: once a tile's ⌈k/64⌉ stages of [x ; W] are on their way, the
// fetching warp goes on with ⌈r/32⌉ stages of [h16 ; B], and the warpgroups add those into the same
// registers. A stage has room for 64 steps of K: 32 ranks' hi and lo of h16, side by side, beside
// one copy of the 32 rows of B, each 16 of which meet both hi and lo. Rank 16 at k = 4096 is two
// 16-deep wgmma steps on top of 256, 0.8% of the arithmetic, and 1.6% of the fetches.
//
// What lies outside a matrix TMA reads as zero: a k that is no multiple of 64, ranks beyond r.
//
// Overlapping the shrink. The kernel may be launched as a programmatic dependent of the kernel that
// writes h16, that is, before that one has finished. The fetching thread waits for it
// (griddepcontrol.wait) before its first stage of h16. Why nothing else needs to wait:
//  - Dependents start once every block of the kernel before has started and said
//    `launch_dependents`, or has ended. That kernel, an ordinary launch itself, did not start
//    before everything ahead of it in the stream was finished and visible: x, W, B and bias, unless
//    they come from that very kernel. It must be launched without the attribute, therefore.
//  - What that kernel still reads, x and A, is not y: XLA gives a call's results memory of their
//  own.
//  - Some block waits, so this kernel ends after the one before it, and what follows in the stream,
//    launched as usual, follows both. With r = 0 nobody would wait, so r = 0 is launched as usual.
// A block takes all of a multiprocessor's registers, so it starts where the kernel before has left,
// or never was. CUTLASS's own waits and triggers stay off (CUTLASS_ENABLE_GDC_FOR_SM90 undefined).
//
// The shrink beside. A product of 8 rounds of 128 tiles leaves 4 of an H100's multiprocessors free,
// enough to compute h on, rows in the order in which the product needs them (shrink_beside.cu):
// nothing is read before the product begins, and no multiplying warp has more to do. That kernel
// sets a flag for every 128 rows. A warp of each block that has nothing else to do waits for those
// of a tile and tells the fetching thread, which needs h16 some 40 µs after the tile's start in a
// large product, and 18 with 512 rows. (Where the fetching thread asked for them itself, every tile
// began 1000 cycles late, flags set or not.) Nobody waits for ever: a product starts when all
// blocks of the kernel before run already, and those wait for nobody.
//
// A product of one round has no flags: every block needs h16 when nearly all of it is there, so its
// fetching thread waits for that kernel's end, which in turn has nothing to clear before the
// product may start (in JAX, an H200, 512 rows of 1024→1024 10.67 → 10.15 µs).
//
// In a backward pass that kernel may have the gradient of B, too (sweep_beside.cu).
//
// Tried before: every block multiplies a share of k by A beside W, and a warp adds the shares of
// all blocks that have the same rows. The blocks then go through k in different orders, wait for
// each other at every tile, and the small wgmma reads x from shared memory again: 512 rows took
// 29.6 µs, not 27.6, 8192 rows 1.05 of cuBLAS's bare product, not 1.03.
//
// This file is compiled 20 times, a CUTLASS kernel being slow to compile: with
// JAX_FUSED_LORA_GEMM_PART from 0 to 19 for one kernel each. Always with NDEBUG: the asserts in
// CUTLASS's loop make the compiler serialize wgmma.
#include <atomic>
#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/numeric_types.h"
#include "native/cuda/device.cuh"
#include "native/cuda/gemm_sm90_kernel.h"
#include "native/cuda/shrink_beside.h"
#include "native/cuda/store_sm90.cuh"
#include "native/cuda/strides.cuh"

namespace jax_fused_lora {

// A mainloop's policy, and that a second warp of the producers has something to do.
template <class Policy>
struct WithSecondWarp : Policy {};

}  // namespace jax_fused_lora

template <class Policy>
struct cutlass::gemm::kernel::detail::HasAuxiliaryLoad<jax_fused_lora::WithSecondWarp<Policy>>
    : cute::true_type {};

namespace jax_fused_lora {

// CUTLASS calls the left operand (x) A, the right one (W) B and the result D.
//
// A mainloop that goes on with h16 and the factor after x and W. The kernel around it is given a K
// of whole tiles, those of x and those of the rank; the two descriptors of x and W know the true k.
template <class Mainloop>
struct WithRank : Mainloop {
  using Pipeline = typename Mainloop::MainloopPipeline;
  using State = typename Mainloop::PipelineState;
  using TileShape = typename Mainloop::TileShape;
  using TiledMma = typename Mainloop::TiledMma;
  using DispatchPolicy = WithSecondWarp<typename Mainloop::DispatchPolicy>;
  using ClusterShape = typename DispatchPolicy::ClusterShape;
  using SmemLayoutA = typename Mainloop::SmemLayoutA;
  using SmemLayoutB = typename Mainloop::SmemLayoutB;
  using CopyA = typename Mainloop::GmemTiledCopyA;
  using CopyB = typename Mainloop::GmemTiledCopyB;
  using Element = typename Mainloop::ElementA;
  using StrideB = typename Mainloop::StrideB;

  static constexpr int kTileM = cute::size<0>(TileShape{});
  using Last = LastTile<kTileM>;
  static constexpr int kRanks = 32;  // of a stage
  static constexpr int kStep = 16;   // K of a wgmma
  static_assert(cute::size<2>(TileShape{}) == kTileK && kTileK == 2 * kRanks &&
                kRanks == 2 * kStep);
  static constexpr int kReadyBarrier = 0;  // of a block: `ready` is zero

  struct Arguments : Mainloop::Arguments {
    int k, r;
    Element const* h16;
    typename Mainloop::StrideA h16_stride;
    Element const* factor;
    StrideB factor_stride;
    const unsigned* done;  // may be null
  };

  struct Params : Mainloop::Params {
    typename Mainloop::Params::TMA_A tma_load_h16;
    typename Mainloop::Params::TMA_B tma_load_factor;
    int m, k_tiles, r;  // k_tiles: tiles of x and W
    const unsigned* done;
    int done_count;
  };

  struct TensorStorage : Mainloop::TensorStorage {
    int ready;  // of this block's tiles, those whose h16 is there
  };

  int tile_number = 0;  // of a warp of the producers, from 1

  static int KOfKernel(int64_t k, int64_t r) {
    return (cute::ceil_div(k, kTileK) + cute::ceil_div(r, kRanks)) * kTileK;
  }

  template <class Problem>
  static Params to_underlying_arguments(Problem const& problem, Arguments const& given, void*) {
    using cute::_;
    auto [m, n, k_of_kernel] = problem;
    Params params;
    static_cast<typename Mainloop::Params&>(params) =
        Mainloop::to_underlying_arguments(cute::make_shape(m, n, given.k), given, nullptr);
    const auto matrix_like_x = [m = m](Element const* matrix, int columns, auto stride) {
      auto* const begin = reinterpret_cast<typename Mainloop::InternalElementA const*>(
          Last::Begin(matrix, m, cute::get<0>(stride)));
      return cute::make_tma_copy_A_sm90(
          CopyA{},
          cute::make_tensor(begin,
                            cute::make_layout(Last::Shape(m, columns), Last::Strides(stride, m))),
          SmemLayoutA{}(_, _, cute::Int<0>{}), TileShape{}, ClusterShape{});
    };
    params.tma_load_a = matrix_like_x(given.ptr_A, given.k, given.dA);
    params.m = m;
    params.k_tiles = cute::ceil_div(given.k, kTileK);
    params.r = given.r;
    params.done = given.done;
    params.done_count = cute::ceil_div(m, kBesideRows);
    if (given.r == 0) {
      params.tma_load_h16 = params.tma_load_a;
      params.tma_load_factor = params.tma_load_b;
      return params;
    }
    params.tma_load_h16 = matrix_like_x(given.h16, int(GemmSm90Width(given.r)), given.h16_stride);
    auto factor = cute::make_tensor(
        reinterpret_cast<typename Mainloop::InternalElementB const*>(given.factor),
        cute::make_layout(cute::make_shape(n, given.r, 1), given.factor_stride));
    params.tma_load_factor = cute::make_tma_copy_B_sm90(
        CopyB{}, factor, SmemLayoutB{}(_, _, cute::Int<0>{}), TileShape{}, ClusterShape{});
    return params;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    Mainloop::prefetch_tma_descriptors(params);
    if (params.r > 0) {
      cute::prefetch_tma_descriptor(params.tma_load_h16.get_tma_descriptor());
      cute::prefetch_tma_descriptor(params.tma_load_factor.get_tma_descriptor());
    }
  }

  // The fetching warp's part of one tile of y.
  template <class Inputs, class Coord, class KTileIterator>
  CUTLASS_DEVICE void load(Params const& params, Pipeline pipeline, State state,
                           Inputs const& inputs, Coord const& coord, KTileIterator, int, int,
                           uint32_t block_in_cluster, TensorStorage& stages) {
    using namespace cute;
    if (++tile_number == 1 && params.done != nullptr) {
      cutlass::arch::NamedBarrier::sync(2 * 32, kReadyBarrier);
    }
    if (!elect_one_sync()) return;

    // A TMA tensor is made of coordinates, so those of x serve h16 and those of W the factor.
    // Where the tiles are odd in number, one of a cluster lies outside: it has the last one's,
    // which takes less time than zeros (384 rows, W 4096→4096: 33.3 → 26.9 µs).
    auto [m_tile, n_tile, unused, batch] = coord;
    const auto inside = [](int tile, auto const& tiles) { return min(tile, size<2>(tiles) - 1); };
    Tensor left =
        get<0>(inputs)(_, _, inside(m_tile, get<0>(inputs)), _, Last::Matrix(params.m, m_tile));
    Tensor right = get<1>(inputs)(_, _, inside(n_tile, get<1>(inputs)), _, batch);

    // The blocks of a cluster that share a tile fetch a part of it each, for all of them.
    Layout cluster = Layout<ClusterShape>{};
    const int row = block_in_cluster % size<0>(cluster),
              column = block_in_cluster / size<0>(cluster);
    uint16_t share_left = 0, share_right = 0;
    if constexpr (is_same_v<CopyA, SM90_TMA_LOAD_MULTICAST>) {
      for (int j = 0; j < size<1>(cluster); ++j) share_left |= 1 << cluster(row, j, _0{});
    }
    if constexpr (is_same_v<CopyB, SM90_TMA_LOAD_MULTICAST>) {
      for (int i = 0; i < size<0>(cluster); ++i) share_right |= 1 << cluster(i, column, _0{});
    }
    Tensor smem_left = make_tensor(make_smem_ptr(stages.smem_A.data()), SmemLayoutA{});
    Tensor smem_right = make_tensor(make_smem_ptr(stages.smem_B.data()), SmemLayoutB{});

    // The stages of x and W.
    {
      auto copy_left = params.tma_load_a.get_slice(column);
      auto copy_right = params.tma_load_b.get_slice(row);
      Tensor from_left = copy_left.partition_S(left);
      Tensor from_right = copy_right.partition_S(right);
      Tensor to_left = copy_left.partition_D(smem_left);
      Tensor to_right = copy_right.partition_D(smem_right);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int k_tile = 0; k_tile < params.k_tiles; ++k_tile, ++state) {
        pipeline.producer_acquire(state);
        auto* barrier = pipeline.producer_get_barrier(state);
        copy(params.tma_load_a.with(*barrier, share_left), from_left(_, _, _, k_tile),
             to_left(_, _, _, state.index()));
        copy(params.tma_load_b.with(*barrier, share_right), from_right(_, _, _, k_tile),
             to_right(_, _, _, state.index()));
      }
    }

    // Those of the rank.
    auto copy_left = params.tma_load_h16.get_slice(column);
    auto copy_right = params.tma_load_factor.get_slice(row);
    Tensor to_left = copy_left.partition_D(smem_left);  // (…, stage)
    Tensor to_right = copy_right.partition_D(smem_right);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i * kRanks < params.r; ++i, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      Tensor from_right =
          copy_right.partition_S(domain_offset(make_coord(0, i * kRanks, 0), right));
      copy(params.tma_load_factor.with(*barrier, share_right), from_right(_, _, _, 0),
           to_right(_, _, _, state.index()));
      if (i == 0) {
        if (params.done != nullptr) {
          WaitForReady(stages, tile_number);
        } else {
          WaitForKernelBefore();
        }
      }
      Tensor from_left = copy_left.partition_S(left);
      copy(params.tma_load_h16.with(*barrier, share_left), from_left(_, _, _, i),
           to_left(_, _, _, state.index()));
    }
  }

  // From the warp that waits for h16 to the thread that fetches it. Atomic, so that racecheck does
  // not take a flag for a race.
  CUTLASS_DEVICE static void StoreReady(TensorStorage& stages, int tiles) {
    asm volatile(
        "{\n.reg .b32 before;\natom.release.cta.shared.exch.b32 before, [%0], %1;\n}" ::"r"(
            SharedAddress(&stages.ready)),
        "r"(tiles)
        : "memory");
  }
  CUTLASS_DEVICE static void WaitForReady(TensorStorage& stages, int tiles) {
    int now;
    do {
      asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;"
                   : "=r"(now)
                   : "r"(SharedAddress(&stages.ready))
                   : "memory");
    } while (now < tiles);
  }

  // Another warp's part: to wait for h16 of a tile's rows, so that the fetching thread does not.
  template <class Inputs, class Coord, class KTileIterator>
  CUTLASS_DEVICE void load_auxiliary(Params const& params, Pipeline, State, Inputs const&,
                                     Coord const& coord, KTileIterator, int, int lane, uint32_t,
                                     TensorStorage& stages) {
    if (params.done == nullptr) return;
    if (++tile_number == 1) {
      if (lane == 0) StoreReady(stages, 0);
      cutlass::arch::NamedBarrier::sync(2 * 32, kReadyBarrier);
    }
    if (lane != 0) return;
    const int tile = cute::get<0>(coord);
    const int begin = Last::FirstRow(params.m, tile);
    const int end = min((begin + kTileM - 1) / kBesideRows + 1, params.done_count);
    for (int i = begin / kBesideRows; i < end; ++i) {
      unsigned done;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(done)
                     : "l"(params.done + i)
                     : "memory");
      } while (done == 0);
      // All flags are about to be set. Who waits for the last one waits for all of that kernel, so
      // that what comes after this one in the stream follows both.
      if (i + 1 == params.done_count) WaitForKernelBefore();
    }
    // h16 was written as memory usually is, and TMA reads it.
    asm volatile("fence.proxy.async;" ::: "memory");
    StoreReady(stages, tile_number);
  }

  // A warpgroup's part. As Mainloop::mma, leaves one group of wgmma on its way and that stage to
  // mma_tail.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(Pipeline pipeline, State state, Accumulators& sums, int, int thread,
                          TensorStorage& stages, Params const& params) {
    using namespace cute;
    Mainloop::mma(pipeline, state, sums, params.k_tiles, thread, stages, params);
    State done = state;
    done.advance(params.k_tiles - 1);
    state.advance(params.k_tiles);

    constexpr int kGroup = cutlass::NumThreadsPerWarpGroup;
    TiledMma product;
    product.accumulate_ = GMMA::ScaleOut::One;
    auto slice = product.get_slice(__shfl_sync(0xffffffff, thread / kGroup, 0) * kGroup);
    Tensor left = slice.make_fragment_A(slice.partition_A(
        make_tensor(make_smem_ptr(stages.smem_A.data()), SmemLayoutA{})));  // (…, step, stage)
    Tensor right = slice.make_fragment_B(
        slice.partition_B(make_tensor(make_smem_ptr(stages.smem_B.data()), SmemLayoutB{})));

    CUTLASS_PRAGMA_NO_UNROLL
    for (int ranks = params.r; ranks > 0; ranks -= kRanks, ++state, ++done) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      const int stage = state.index();
      warpgroup_fence_operand(sums);
      if (ranks > kStep) {  // first, so that the group ends with a wgmma which is always there
        warpgroup_arrive();
        gemm(product, left(_, _, 2, stage), right(_, _, 1, stage), sums);
        gemm(product, left(_, _, 3, stage), right(_, _, 1, stage), sums);
      }
      warpgroup_arrive();
      gemm(product, left(_, _, 0, stage), right(_, _, 0, stage), sums);  // hi
      gemm(product, left(_, _, 1, stage), right(_, _, 0, stage), sums);  // lo
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(done);
    }
  }
};

template <int tile>
struct Tile;

template <>
struct Tile<0> {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
};

template <>
struct Tile<1> {
  using Shape = cute::Shape<cute::_256, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
};

// Where a block has more than one tile, the warpgroups take turns; where each has one, both
// multiply it, and each stores half (in JAX, an H200, µs, in turns and so: 512 rows of 1024→1024
// 11.1 and 10.6, 2048 rows 15.1 and 14.5, of 4096→4096 as long to what runs differ by; but three
// tiles a block, 1100 rows of 4096→4096, 75 and 77).
template <>
struct Tile<2> {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
};

template <>
struct Tile<3> : Tile<2> {
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
};

// For products of few tiles. (64×64 is no faster with its h beside it, which takes longer than the
// product then; few_sm90.cu has such tiles.)
template <>
struct Tile<4> : Tile<2> {
  using Shape = cute::Shape<cute::_64, cute::_128, cute::_64>;
};

template <class Tile, class Element, bool transposed>
struct Kernel {
  static constexpr int kAlignment = 8;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutW = std::conditional_t<transposed, cutlass::layout::ColumnMajor, RowMajor>;

  using Epilogue = StoreOf<WarpwiseStore<typename Tile::Shape, Element>>;

  using Mainloop = WithRank<typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      LayoutW, kAlignment, float, typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<
          int(sizeof(typename Epilogue::SharedStorage)) + 128>,
      typename Tile::Schedule>::CollectiveOp>;

  using Type = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, Epilogue,
                                                    cutlass::gemm::PersistentScheduler>;
};

template <int tile, bool bf16, bool transposed>
cudaError_t LaunchGemm(const Gemm& gemm, const GemmPlan& plan, const unsigned* done, int device,
                       int blocks, cudaStream_t stream, bool programmatic_dependent) {
  using Element = std::conditional_t<bf16, cutlass::bfloat16_t, cutlass::half_t>;
  using Kernel = typename Kernel<Tile<tile>, Element, transposed>::Type;
  using Mainloop = typename Kernel::CollectiveMainloop;
  using StrideX = typename Mainloop::StrideA;
  using StrideW = typename Mainloop::StrideB;
  using Cluster = typename Tile<tile>::Cluster;
  const void* entry = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
  constexpr int kShared = Kernel::SharedStorageSize;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cute::size<0>(Cluster{})),
                                  unsigned(cute::size<1>(Cluster{})), 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  static_assert(cute::size(Cluster{}) == kClusterSize);

  // By device; to do it twice does no harm.
  static std::atomic<bool> prepared[64];
  if (device >= 64 || !prepared[device].load(std::memory_order_relaxed)) {
    const cudaError_t error =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    if (device < 64) prepared[device].store(true, std::memory_order_relaxed);
  }
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {int(gemm.m), int(gemm.n), Mainloop::KOfKernel(gemm.k, gemm.r)};
  arguments.mainloop.ptr_A = static_cast<const Element*>(gemm.x);
  arguments.mainloop.dA = StrideX{gemm.k, {}, 0};
  arguments.mainloop.ptr_B = static_cast<const Element*>(gemm.w);
  arguments.mainloop.dB = RightStride<StrideW>(transposed ? gemm.k : gemm.n);
  arguments.mainloop.k = int(gemm.k);
  arguments.mainloop.r = int(gemm.r);
  arguments.mainloop.h16 = static_cast<const Element*>(gemm.h16);
  arguments.mainloop.h16_stride = StrideX{GemmSm90Width(gemm.r), {}, 0};
  arguments.mainloop.factor = static_cast<const Element*>(gemm.b);
  arguments.mainloop.factor_stride = RightStride<StrideW>(transposed ? gemm.r : gemm.n);
  arguments.mainloop.done = done;
  arguments.epilogue = {static_cast<const Element*>(gemm.bias), static_cast<Element*>(gemm.y)};
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = blocks;
  arguments.scheduler.max_swizzle_size = plan.swizzle;
  using Order = std::decay_t<decltype(arguments.scheduler.raster_order)>;
  arguments.scheduler.raster_order = plan.along_n ? Order::AlongN : Order::AlongM;

  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  config.gridDim = Kernel::get_grid_shape(params);
  if (programmatic_dependent && gemm.r > 0) ++config.numAttrs;
  void* pointers[] = {&params};
  return cudaLaunchKernelExC(&config, entry, pointers);
}

#define PART JAX_FUSED_LORA_GEMM_PART
template cudaError_t LaunchGemm<PART / 4, PART / 2 % 2 == 0, PART % 2 == 1>(
    const Gemm& gemm, const GemmPlan& plan, const unsigned* done, int device, int blocks,
    cudaStream_t stream, bool programmatic_dependent);
#undef PART

}  // namespace jax_fused_lora
