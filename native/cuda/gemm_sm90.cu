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
//  - A tile of y is written after its last stage was multiplied, a stage of h16, which was fetched
//    after the wait. So y may share memory with anything that the kernel before still reads.
//  - Some block waits, so this kernel ends after the one before it, and what follows in the stream,
//    launched as usual, follows both. With r = 0 nobody would wait, so r = 0 is launched as usual.
// A block takes all of a multiprocessor's registers, so it starts where the kernel before has left,
// or never was. CUTLASS's own waits and triggers stay off (CUTLASS_ENABLE_GDC_FOR_SM90 undefined).
//
// Shrinking inside. Every block has x's tiles in shared memory anyway, so h = x·A costs no sweep of
// x: the n/256 (or n/128) blocks of some rows each multiply a few of k's tiles, a share, by A as
// well, beside W. That is 1/16 of a wgmma's work for 4 of 64 tiles, and every block begins k with
// its own share, so that all shares are done when the first twentieth of the product is. They lie
// in memory then, and a warp of each block that has nothing else to do adds a part of each, in one
// order, writes that part of h and h16, and counts itself in. The same warp waits until all parts
// are counted and tells the fetching thread, which goes on with h16 some 40 µs later in a large
// product. (Where the warps that multiply added the shares, 512 rows took 41 µs, not the product's
// 26: fences and atomics take microseconds while the copies run. Where the fetching thread asked
// for the count itself, every tile began 1000 to 1700 cycles late, parts counted or not.)
//
// The counters must be zero when a product begins: a small kernel before sees to that, whose
// programmatic dependent this one is, and who counts or waits for a count waits for that one first.
// (Counters of the kernel's own, a slot for each scratch memory, that the last block to read them
// sets back, were no faster: 512 rows 29.3 to 29.9 µs, with the kernel before 28.8 to 29.6.)
//
// No block waits for ever. Blocks take tiles in the order of their number, all blocks of the
// grid run at once (it is no larger than what the GPU holds), and a tile waits for the shares of
// tiles that are fewer numbers ahead than there are blocks (ShrinkPlan). So of all tiles that wait,
// take the one with the lowest number: the tiles before one whose share it lacks, in the same
// block, have still lower numbers, so they are done, and that share is under way.
//
// This file is compiled 13 times, a CUTLASS kernel being slow to compile: with
// JAX_FUSED_LORA_GEMM_PART from 0 to 11 for one kernel each, and without for the functions of the
// header. Always with NDEBUG: the asserts in CUTLASS's loop make the compiler serialize wgmma.
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {

// How k is shared out; all zero where h comes from elsewhere.
struct Shares {
  int length = 0;  // in tiles of kTileK
  int count = 0;
  int ahead = 0;  // clusters that must run at once, see ShrinkPlan
};

constexpr int kTileK = 64;
constexpr int kShrinkBytes = 16 << 10;  // of a share of A in shared memory
// Ranks that x is multiplied by at a time. More would want more of A in shared memory and, once for
// each share, sums in device memory.
constexpr int kMostRanks = 32;
constexpr int ShrinkRanks(int64_t r) { return r <= 16 ? 16 : kMostRanks; }

// Of a tile of rows: how many shares are there, and how many parts of h are finished.
constexpr int kCounters = 2;

// Launches one kernel; instantiated by the parts. `shrink` may be null.
template <int tile, bool bf16, bool transposed>
cudaError_t LaunchGemm(const Gemm& gemm, const GemmPlan& plan, const GemmShrink* shrink,
                       const Shares& shares, unsigned* counters, int device, int multiprocessors,
                       cudaStream_t stream, bool programmatic_dependent);

}  // namespace jax_fused_lora

#ifdef JAX_FUSED_LORA_GEMM_PART

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/numeric_types.h"
#include "native/cuda/device.cuh"

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
  static constexpr int kRanks = 32;  // of a stage
  static constexpr int kStep = 16;   // K of a wgmma
  static_assert(cute::size<2>(TileShape{}) == kTileK && kTileK == 2 * kRanks &&
                kRanks == 2 * kStep);
  static constexpr int kThreads = cute::size(TiledMma{});  // that multiply a tile together
  static constexpr int kShareBarrier = 0;  // of a block: a share's sums are on their way to memory

  // x·A of a tile's rows and kWidth ranks, with a share of A in shared memory, which lies as W
  // does.
  template <int kWidth>
  struct Shrink {
    static constexpr bool kStraight = cutlass::gemm::detail::is_major<0, StrideB>();
    using Atom = std::conditional_t<
        !kStraight, cute::GMMA::Layout_K_SW128_Atom<Element>,
        std::conditional_t<kWidth == 16, cute::GMMA::Layout_MN_SW32_Atom<Element>,
                           cute::GMMA::Layout_MN_SW64_Atom<Element>>>;
    static constexpr int kBytes = kWidth * kTileK * sizeof(Element);  // of a tile of k
    using Shape = cute::Shape<cute::Int<kTileM>, cute::Int<kWidth>, cute::Int<kTileK>>;
    using Layout = decltype(cute::tile_to_shape(
        Atom{},
        cute::Shape<cute::Int<kWidth>, cute::Int<kTileK>, cute::Int<kShrinkBytes / kBytes>>{}));
    using Product = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Element, Element, float, Shape, cute::GMMA::Major::K,
                                   kStraight ? cute::GMMA::Major::MN : cute::GMMA::Major::K>(),
        cute::Layout<cute::Shape<cute::Int<kThreads / 128>, cute::_1, cute::_1>>{}));

    static auto Tma(Element const* a, int r, int k, StrideB stride) {
      using namespace cute;
      return make_tma_copy_B_sm90(
          SM90_TMA_LOAD{},
          make_tensor(reinterpret_cast<typename Mainloop::InternalElementB const*>(a),
                      make_layout(make_shape(r, k, 1), stride)),
          Layout{}(_, _, Int<0>{}), Shape{}, cute::Shape<_1, _1, _1>{});
    }
    using Descriptor = decltype(Tma(nullptr, 0, 0, StrideB{}));
  };

  // What a shrink inside works on; also the device's.
  struct ShrinkArguments {
    Shares shares;
    int m;
    Element const* a;
    StrideB a_stride;
    float scaling, h16_scaling;
    float* h;
    Element* h16;
    float* sums;  // of each share
    unsigned* counters;
  };

  struct Arguments : Mainloop::Arguments {
    int k, r;
    Element const* h16;
    typename Mainloop::StrideA h16_stride;
    Element const* factor;
    StrideB factor_stride;
    ShrinkArguments shrink;
  };

  struct Params : Mainloop::Params {
    typename Mainloop::Params::TMA_A tma_load_h16;
    typename Mainloop::Params::TMA_B tma_load_factor;
    typename Shrink<16>::Descriptor tma_load_a16;
    typename Shrink<32>::Descriptor tma_load_a32;
    int k_tiles, k, r;  // k_tiles: tiles of x and W
    ShrinkArguments shrink;
  };

  struct TensorStorage : Mainloop::TensorStorage {
    cute::array_aligned<Element, kShrinkBytes / sizeof(Element), 1024> shrink;
    int2 tiles[DispatchPolicy::Stages];  // row and column, by the tile's first stage
    int ready;                           // of this block's tiles, those whose h16 is there
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
    params.k_tiles = cute::ceil_div(given.k, kTileK);
    params.k = given.k;
    params.r = given.r;
    params.shrink = given.shrink;
    if (given.r == 0) {
      params.tma_load_h16 = params.tma_load_a;
      params.tma_load_factor = params.tma_load_b;
      return params;
    }
    auto h16 = cute::make_tensor(
        reinterpret_cast<typename Mainloop::InternalElementA const*>(given.h16),
        cute::make_layout(cute::make_shape(m, int(GemmSm90Width(given.r)), 1), given.h16_stride));
    auto factor = cute::make_tensor(
        reinterpret_cast<typename Mainloop::InternalElementB const*>(given.factor),
        cute::make_layout(cute::make_shape(n, given.r, 1), given.factor_stride));
    params.tma_load_h16 = cute::make_tma_copy_A_sm90(
        CopyA{}, h16, SmemLayoutA{}(_, _, cute::Int<0>{}), TileShape{}, ClusterShape{});
    params.tma_load_factor = cute::make_tma_copy_B_sm90(
        CopyB{}, factor, SmemLayoutB{}(_, _, cute::Int<0>{}), TileShape{}, ClusterShape{});
    if (given.shrink.shares.length > 0) {
      const auto& shrink = given.shrink;
      if (ShrinkRanks(given.r) == 16) {
        params.tma_load_a16 = Shrink<16>::Tma(shrink.a, given.r, given.k, shrink.a_stride);
      } else {
        params.tma_load_a32 = Shrink<32>::Tma(shrink.a, given.r, given.k, shrink.a_stride);
      }
    }
    return params;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    Mainloop::prefetch_tma_descriptors(params);
    if (params.r > 0) {
      cute::prefetch_tma_descriptor(params.tma_load_h16.get_tma_descriptor());
      cute::prefetch_tma_descriptor(params.tma_load_factor.get_tma_descriptor());
    }
    if (params.shrink.shares.length > 0) {
      cute::prefetch_tma_descriptor(ShrinkRanks(params.r) == 16
                                        ? params.tma_load_a16.get_tma_descriptor()
                                        : params.tma_load_a32.get_tma_descriptor());
    }
  }

  // A tile's way through k: first `lead` tiles of k from `begin` on, round the end of k, of which
  // those of this block's share come at the steps from `first` on; then the others in their order.
  // Blocks of a cluster that have rows in common go together.
  struct Way {
    int begin, lead, first, length;

    // The tile of k after that of a step. (Going round from `begin` to the end instead, all rows of
    // W are read at once, a little of each: 512 rows of 4096 took 31.7 µs, not 28.8.)
    CUTLASS_DEVICE int Next(int step, int k_tile, int k_tiles) const {
      const int end = begin + lead < k_tiles ? begin + lead : begin + lead - k_tiles;
      if (step + 1 < lead) return k_tile + 1 < k_tiles ? k_tile + 1 : 0;
      if (step + 1 > lead) ++k_tile;
      if (step + 1 == lead) k_tile = 0;
      return k_tile == begin || (k_tile == 0 && end <= begin) ? end : k_tile;
    }
  };
  CUTLASS_DEVICE static Way WayOf(Params const& params, int n_tile) {
    constexpr int kSides = cute::size<1>(ClusterShape{});
    const int length = params.shrink.shares.length, side = n_tile % kSides;
    const int begin = (n_tile - side) * length, left = params.k_tiles - n_tile * length;
    if (begin >= params.k_tiles || length == 0) return {params.k_tiles, 0, 0, 0};
    // One step before, on behalf of the compiler: see mma.
    return {(begin > 0 ? begin : params.k_tiles) - 1, 1 + kSides * length, 1 + side * length,
            left > 0 ? min(left, length) : 0};
  }

  // A's share, on the barrier of a stage whose own copies are still to come.
  template <int kWidth>
  CUTLASS_DEVICE static void LoadShare(typename Shrink<kWidth>::Descriptor const& tma,
                                       Params const& params, int k_tile, int length,
                                       typename Pipeline::ProducerBarrierType* barrier,
                                       TensorStorage& stages) {
    using namespace cute;
    using Own = Shrink<kWidth>;
    cutlass::arch::ClusterTransactionBarrier::expect_transaction(barrier, length * Own::kBytes);
    Tensor a = local_tile(tma.get_tma_tensor(make_shape(params.r, params.k, 1)),
                          Shape<Int<kWidth>, Int<kTileK>>{}, make_coord(0, _, 0));
    auto slice = tma.get_slice(0);
    Tensor from = slice.partition_S(a);
    Tensor to =
        slice.partition_D(make_tensor(make_smem_ptr(stages.shrink.data()), typename Own::Layout{}));
    for (int i = 0; i < length; ++i) {
      copy(tma.with(*barrier, 0), from(_, _, _, k_tile + i), to(_, _, _, i));
    }
  }

  // The fetching warp's part of one tile of y.
  template <class Inputs, class Coord, class KTileIterator>
  CUTLASS_DEVICE void load(Params const& params, Pipeline pipeline, State state,
                           Inputs const& inputs, Coord const& coord, KTileIterator, int, int,
                           uint32_t block_in_cluster, TensorStorage& stages) {
    using namespace cute;
    ++tile_number;
    if (!elect_one_sync()) return;

    // A TMA tensor is made of coordinates, so those of x serve h16 and those of W the factor.
    auto [m_tile, n_tile, unused, batch] = coord;
    Tensor left = get<0>(inputs)(_, _, m_tile, _, batch);   // (BLK_M, BLK_K, k)
    Tensor right = get<1>(inputs)(_, _, n_tile, _, batch);  // (BLK_N, BLK_K, k)

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
    const bool shrinks = params.shrink.shares.length > 0;
    const Way way = WayOf(params, n_tile);
    {
      auto copy_left = params.tma_load_a.get_slice(column);
      auto copy_right = params.tma_load_b.get_slice(row);
      Tensor from_left = copy_left.partition_S(left);
      Tensor from_right = copy_right.partition_S(right);
      Tensor to_left = copy_left.partition_D(smem_left);
      Tensor to_right = copy_right.partition_D(smem_right);
      int k_tile = way.lead > 0 ? way.begin : 0;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int step = 0; step < params.k_tiles; ++step, ++state) {
        // Before the arrival that is part of acquiring, so that who waits for the stage sees it.
        // Nobody reads what lies there: more stages than there are have passed since.
        if (shrinks && step == 0) {
          if (tile_number == 1) StoreReady(stages, 0);
          asm volatile(
              "st.shared.v2.b32 [%0], {%1, %2};" ::"r"(SharedAddress(&stages.tiles[state.index()])),
              "r"(int(m_tile)), "r"(int(n_tile))
              : "memory");
        }
        pipeline.producer_acquire(state);
        auto* barrier = pipeline.producer_get_barrier(state);
        if (shrinks && step == 0 && way.length > 0) {
          const int own = n_tile * params.shrink.shares.length;
          if (ShrinkRanks(params.r) == 16) {
            LoadShare<16>(params.tma_load_a16, params, own, way.length, barrier, stages);
          } else {
            LoadShare<32>(params.tma_load_a32, params, own, way.length, barrier, stages);
          }
        }
        copy(params.tma_load_a.with(*barrier, share_left), from_left(_, _, _, k_tile),
             to_left(_, _, _, state.index()));
        copy(params.tma_load_b.with(*barrier, share_right), from_right(_, _, _, k_tile),
             to_right(_, _, _, state.index()));
        k_tile = way.Next(step, k_tile, params.k_tiles);
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
        if (shrinks) {
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

  CUTLASS_DEVICE static unsigned* Counters(Params const& params, int m_tile) {
    return params.shrink.counters + int64_t{m_tile} * kCounters;
  }

  // After all that this thread, and those it waited for, have written.
  CUTLASS_DEVICE static void Add(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
  CUTLASS_DEVICE static void WaitForCount(unsigned* counter, unsigned count) {
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now < count);
  }

  // From the warp that waits for h16 to the thread that fetches it.
  CUTLASS_DEVICE static void StoreReady(TensorStorage& stages, int tiles) {
    asm volatile("st.release.cta.shared.b32 [%0], %1;" ::"r"(SharedAddress(&stages.ready)),
                 "r"(tiles)
                 : "memory");
  }
  CUTLASS_DEVICE static void WaitForReady(TensorStorage& stages, int tiles) {
    int now;
    do {
      asm volatile("ld.acquire.cta.shared.b32 %0, [%1];"
                   : "=r"(now)
                   : "r"(SharedAddress(&stages.ready))
                   : "memory");
    } while (now < tiles);
  }

  // The sums of a thread's share, to where those of the others are.
  template <class Sums>
  CUTLASS_DEVICE static void StoreShare(Sums const& sums, int2 tile, int thread,
                                        Params const& params) {
    constexpr int kQuads = cute::size(Sums{}) / 4;
    float4* const own = reinterpret_cast<float4*>(params.shrink.sums) +
                        (int64_t{tile.x} * params.shrink.shares.count + tile.y) * kQuads * kThreads;
    CUTLASS_PRAGMA_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      __stcg(own + q * kThreads + thread,
             make_float4(sums(q * 4), sums(q * 4 + 1), sums(q * 4 + 2), sums(q * 4 + 3)));
    }
    cutlass::arch::NamedBarrier::arrive(kThreads + 32, kShareBarrier);
  }

  // Another warp's part: of the rows that this block has in common with others, to add the shares
  // of some, and to say when all are added. The warpgroups that multiply do not wait for any of
  // that, nor does the fetching thread before it needs h16.
  template <class Inputs, class Coord, class KTileIterator>
  CUTLASS_DEVICE void load_auxiliary(Params const& params, Pipeline, State, Inputs const&,
                                     Coord const& coord, KTileIterator, int, int lane, uint32_t,
                                     TensorStorage& stages) {
    if (params.shrink.shares.length == 0) return;
    ++tile_number;
    auto [m_tile, n_tile, unused, batch] = coord;
    cutlass::arch::NamedBarrier::sync(kThreads + 32, kShareBarrier);  // our share is there
    WaitForKernelBefore();
    if (WayOf(params, n_tile).length > 0) {
      if (ShrinkRanks(params.r) == 16) {
        AddShares<16>(params, m_tile, n_tile, lane, stages);
      } else {
        AddShares<32>(params, m_tile, n_tile, lane, stages);
      }
    }
    WaitForCount(Counters(params, m_tile) + 1, params.shrink.shares.count);
    // h16 was written as memory usually is, and TMA reads it.
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncwarp();
    if (lane == 0) StoreReady(stages, tile_number);
  }

  template <int kWidth>
  CUTLASS_DEVICE static void AddShares(Params const& params, int m_tile, int share, int lane,
                                       TensorStorage& stages) {
    constexpr int kQuads = kTileM * kWidth / 4;  // of a tile
    const ShrinkArguments& shrink = params.shrink;
    const int count = shrink.shares.count;
    unsigned* const counters = Counters(params, m_tile);
    if (lane == 0) Add(counters);
    WaitForCount(counters, count);

    const float4* const sums =
        reinterpret_cast<const float4*>(shrink.sums) + int64_t{m_tile} * count * kQuads;
    // This warp has few registers, so what it adds comes by way of A's share, which was used.
    constexpr int kRoom = kShrinkBytes / sizeof(float4);
    float4* const copies = reinterpret_cast<float4*>(stages.shrink.data());
    const int each = cute::ceil_div(kQuads, count), end = min((share + 1) * each, kQuads);
    const int round = min(each, kRoom / count);  // a share's, at a time
    for (int begin = share * each; begin < end; begin += round) {
      const int stop = min(begin + round, end);
      for (int i = begin + lane; i < stop; i += 32) {
        for (int j = 0; j < count; ++j) {
          CopyAsync(copies + j * round + i - begin, sums + j * kQuads + i, true);
        }
      }
      CommitCopies();
      WaitForCopies<0>();
      for (int i = begin + lane; i < stop; i += 32) {  // what this thread has copied
        float4 sum = make_float4(0, 0, 0, 0);
        for (int j = 0; j < count; ++j) {
          const float4 add = copies[j * round + i - begin];
          sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
        }
        StoreH<kWidth>(params, m_tile, i, sum);
      }
    }
    // For TMA, which reads h16 and fills A's share again.
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncwarp();
    if (lane == 0) Add(counters + 1);
  }

  // Four sums of h, of the many that a tile's rows have.
  template <int kWidth>
  CUTLASS_DEVICE static void StoreH(Params const& params, int m_tile, int i, float4 const& sum) {
    using Number =
        std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
    const ShrinkArguments& shrink = params.shrink;
    const int r = params.r, width = int(GemmSm90Width(r));
    // Of the accumulators of a 64 x kWidth wgmma, a thread's four are two rows of two ranks.
    const int thread = i % kThreads, quad = i / kThreads;
    const int block = quad / (kWidth / 8) * (kThreads / 128) + thread / 128;
    const int64_t first =
        int64_t{m_tile} * kTileM + block * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
    const int rank = quad % (kWidth / 8) * 8 + thread % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * 8;
      if (row >= shrink.m) break;
      const float values[2] = {shrink.scaling * (half ? sum.z : sum.x),
                               shrink.scaling * (half ? sum.w : sum.y)};
      alignas(4) Number hi[2], lo[2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (rank + j < r) shrink.h[row * r + rank + j] = values[j];
        SplitClamped(shrink.h16_scaling * values[j], hi + j, lo + j);
      }
      Number* const pair = reinterpret_cast<Number*>(shrink.h16) + row * width +
                           rank / kStep * kRanks + rank % kStep;
      *reinterpret_cast<uint32_t*>(pair) = *reinterpret_cast<uint32_t*>(hi);
      *reinterpret_cast<uint32_t*>(pair + kStep) = *reinterpret_cast<uint32_t*>(lo);
    }
  }

  // A warpgroup's part. As Mainloop::mma, leaves one group of wgmma on its way and that stage to
  // mma_tail.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(Pipeline pipeline, State state, Accumulators& sums, int, int thread,
                          TensorStorage& stages, Params const& params) {
    using namespace cute;
    constexpr int kGroup = cutlass::NumThreadsPerWarpGroup;
    const int group = __shfl_sync(0xffffffff, thread / kGroup, 0) * kGroup;
    TiledMma product;
    auto slice = product.get_slice(group);
    Tensor left = slice.make_fragment_A(slice.partition_A(
        make_tensor(make_smem_ptr(stages.smem_A.data()), SmemLayoutA{})));  // (…, step, stage)
    Tensor right = slice.make_fragment_B(
        slice.partition_B(make_tensor(make_smem_ptr(stages.smem_B.data()), SmemLayoutB{})));

    const int first_stage = state.index();
    State done = state;
    bool multiplied = false;  // the stage `done`, which is still to be released
    const auto end_step = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      if (multiplied) {
        pipeline.consumer_release(done);
        ++done;
      }
      multiplied = true;
      ++state;
    };
    // A step of x and W, and what else multiplies its stage.
    const auto multiply = [&](auto const& beside) CUTLASS_LAMBDA_FUNC_INLINE {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      const int stage = state.index();
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < size<2>(left); ++step) {
        gemm(product, left(_, _, step, stage), right(_, _, step, stage), sums);
        product.accumulate_ = GMMA::ScaleOut::One;
      }
      beside(stage);
      end_step();
    };
    const auto multiply_alone = [&](int steps) CUTLASS_LAMBDA_FUNC_INLINE {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; steps > 0; --steps) multiply([](int) {});
    };

    // The first of a loop's accumulations is outside of it, or the compiler serializes all wgmma.
    product.accumulate_ = GMMA::ScaleOut::Zero;
    multiply([](int) {});
    int steps = params.k_tiles - 1;
    const auto shrink = [&](auto width, int2 tile, Way way) CUTLASS_LAMBDA_FUNC_INLINE {
      using Own = Shrink<decltype(width)::value>;
      typename Own::Product own_product;
      Tensor h = partition_fragment_C(own_product, take<0, 2>(typename Own::Shape{}));
      auto own_slice = own_product.get_slice(group);
      Tensor a = own_slice.make_fragment_B(own_slice.partition_B(
          make_tensor(make_smem_ptr(stages.shrink.data()), typename Own::Layout{})));
      int i = 0;
      const auto multiply_a = [&](int stage) CUTLASS_LAMBDA_FUNC_INLINE {
        warpgroup_fence_operand(h);
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < size<2>(left); ++step) {
          gemm(own_product, left(_, _, step, stage), a(_, _, step, i), h);
          own_product.accumulate_ = GMMA::ScaleOut::One;
        }
      };
      multiply_alone(way.first - 1);
      own_product.accumulate_ = GMMA::ScaleOut::Zero;
      multiply(multiply_a);
      CUTLASS_PRAGMA_NO_UNROLL
      for (i = 1; i < way.length; ++i) multiply(multiply_a);
      multiply_alone(1);  // while this step is multiplied, those of h are done
      warpgroup_fence_operand(h);
      StoreShare(h, tile, thread, params);
      steps -= way.first + way.length;
    };
    if (params.shrink.shares.length > 0) {
      const int2 tile = stages.tiles[first_stage];
      const Way way = WayOf(params, tile.y);
      if (way.length > 0) {
        ShrinkRanks(params.r) == 16 ? shrink(Int<16>{}, tile, way) : shrink(Int<32>{}, tile, way);
      } else {
        cutlass::arch::NamedBarrier::arrive(kThreads + 32, kShareBarrier);
      }
    }
    multiply_alone(steps);

    CUTLASS_PRAGMA_NO_UNROLL
    for (int ranks = params.r; ranks > 0; ranks -= kRanks) {
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
      end_step();
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
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <>
struct Tile<1> {
  using Shape = cute::Shape<cute::_256, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <>
struct Tile<2> {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
};

template <class Tile, class Element, bool transposed>
struct Kernel {
  static constexpr int kAlignment = 8;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutW = std::conditional_t<transposed, cutlass::layout::ColumnMajor, RowMajor>;

  // y = sums + bias, in float32, rounded once.
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using PlusBias = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float, kRound>,
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, typename Tile::Shape, Element, float>,
      cutlass::epilogue::fusion::Sm90AccFetch>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape,
      typename Tile::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      RowMajor, kAlignment, Element, RowMajor, kAlignment, typename Tile::EpilogueSchedule,
      PlusBias>::CollectiveOp;

  using Mainloop = WithRank<typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      LayoutW, kAlignment, float, typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<
          int(sizeof(typename Epilogue::SharedStorage)) + kShrinkBytes + 1024>,
      typename Tile::Schedule>::CollectiveOp>;

  using Type = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, Epilogue,
                                                    cutlass::gemm::PersistentScheduler>;
};

// The distance of W's or B's rows, for (n, k) or (k, n).
template <class Stride>
Stride RightStride(int64_t row) {
  Stride stride{};
  if constexpr (std::is_same_v<std::decay_t<decltype(cute::get<0>(stride))>, int64_t>) {
    cute::get<0>(stride) = row;
  } else {
    cute::get<1>(stride) = row;
  }
  return stride;
}

template <int tile, bool bf16, bool transposed>
cudaError_t LaunchGemm(const Gemm& gemm, const GemmPlan& plan, const GemmShrink* shrink,
                       const Shares& shares, unsigned* counters, int device, int multiprocessors,
                       cudaStream_t stream, bool programmatic_dependent) {
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
  constexpr int kClusterSize = cute::size(Cluster{});

  // By device; to do it twice does no harm.
  static std::atomic<bool> prepared[64];
  if (device >= 64 || !prepared[device].load(std::memory_order_relaxed)) {
    const cudaError_t error =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    if (device < 64) prepared[device].store(true, std::memory_order_relaxed);
  }
  int clusters = multiprocessors / kClusterSize;
  if (shrink != nullptr) {
    // Blocks wait for each other, so the grid has no more than run at once.
    static std::atomic<int> room[64];  // clusters, by device
    clusters = device < 64 ? room[device].load(std::memory_order_relaxed) : 0;
    if (clusters == 0) {
      const auto& cluster = attributes[0].val.clusterDim;
      config.gridDim = dim3(multiprocessors / kClusterSize * cluster.x, cluster.y);
      if (cudaOccupancyMaxActiveClusters(&clusters, entry, &config) != cudaSuccess) {
        cudaGetLastError();  // or the next launch would seem to have failed
        return cudaErrorCooperativeLaunchTooLarge;
      }
      if (device < 64) room[device].store(clusters, std::memory_order_relaxed);
    }
    if (shares.ahead > clusters) return cudaErrorCooperativeLaunchTooLarge;
  }
  // As few as take no more rounds: of 1024 tiles 128 blocks have 8 each. With all 132 the rows of
  // a round are not the same for all, and 8192 rows of 4096 took 1 to 6 % longer.
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  using Shape = typename Tile<tile>::Shape;
  const int64_t tiles = ceil_div(gemm.m, cute::size<0>(Shape{}) * cute::size<0>(Cluster{})) *
                        ceil_div(gemm.n, cute::size<1>(Shape{}) * cute::size<1>(Cluster{}));
  clusters = std::max<int64_t>(ceil_div(tiles, ceil_div(tiles, clusters)), shares.ahead);

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
  if (shrink != nullptr) {
    arguments.mainloop.shrink = {shares,
                                 int(gemm.m),
                                 static_cast<const Element*>(shrink->a),
                                 RightStride<StrideW>(transposed ? gemm.k : gemm.r),
                                 shrink->scaling,
                                 shrink->h16_scaling,
                                 shrink->h,
                                 static_cast<Element*>(shrink->h16),
                                 shrink->scratch,
                                 counters};
  }
  arguments.epilogue.thread = {{static_cast<const Element*>(gemm.bias)}, {}, {}};
  arguments.epilogue.ptr_D = static_cast<Element*>(gemm.y);
  arguments.epilogue.dD = {gemm.n, {}, 0};
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = clusters * kClusterSize;
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
    const Gemm& gemm, const GemmPlan& plan, const GemmShrink* shrink, const Shares& shares,
    unsigned* counters, int device, int multiprocessors, cudaStream_t stream,
    bool programmatic_dependent);
#undef PART

}  // namespace jax_fused_lora

#else  // The functions of the header.

#include <limits>

namespace jax_fused_lora {
namespace {

constexpr int kTiles = 3;

using Launcher = cudaError_t (*)(const Gemm&, const GemmPlan&, const GemmShrink*, const Shares&,
                                 unsigned*, int, int, cudaStream_t, bool);

// By tile, bf16 and transposed.
constexpr Launcher kLaunchers[kTiles][2][2] = {
    {{LaunchGemm<0, false, false>, LaunchGemm<0, false, true>},
     {LaunchGemm<0, true, false>, LaunchGemm<0, true, true>}},
    {{LaunchGemm<1, false, false>, LaunchGemm<1, false, true>},
     {LaunchGemm<1, true, false>, LaunchGemm<1, true, true>}},
    {{LaunchGemm<2, false, false>, LaunchGemm<2, false, true>},
     {LaunchGemm<2, true, false>, LaunchGemm<2, true, true>}},
};

constexpr int kTileRows[kTiles] = {128, 256, 128}, kTileColumns[kTiles] = {256, 128, 128};
constexpr bool kClusterAlongN[kTiles] = {false, true, false};  // the two blocks of a cluster

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As TMA wants it.
bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

cudaError_t Multiprocessors(int device, int* count) {
  static std::atomic<int> counts[64];
  if (device < 64 && (*count = counts[device].load(std::memory_order_relaxed)) > 0) {
    return cudaSuccess;
  }
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && device < 64) counts[device].store(*count, std::memory_order_relaxed);
  return error;
}

// Tiles of k in a share: shares of fewer than 4 would be many, and are read again to be added.
constexpr int kShareLength = 4;
// Steps of a product of which a share may be part: more than there are stages, see WithRank.
constexpr int kLeastSteps = 24;

// How the shares lie, `length` 0 where h has to come from elsewhere.
Shares ShrinkPlan(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                  int multiprocessors) {
  Shares shares;
  const int64_t k_tiles = CeilDiv(gemm.k, kTileK), ranks = ShrinkRanks(gemm.r);
  const int64_t columns = CeilDiv(gemm.n, kTileColumns[plan.tile]);
  const int64_t length = std::max<int64_t>(kShareLength, CeilDiv(k_tiles, columns));
  const int64_t count = CeilDiv(k_tiles, length);
  // In clusters, of which the GPU has room for half its multiprocessors at once: tiles from one
  // of some rows to the last of them that has a share.
  const int64_t cluster_columns = kClusterAlongN[plan.tile] ? 2 : 1,
                cluster_rows = kClusterAlongN[plan.tile] ? 1 : 2;
  const int64_t across = CeilDiv(columns, cluster_columns);
  const int64_t down = CeilDiv(CeilDiv(gemm.m, kTileRows[plan.tile]), cluster_rows);
  const int64_t ahead = plan.along_n ? CeilDiv(count, cluster_columns) : across * down;
  const bool waits_end = plan.swizzle == 1 && ahead <= multiprocessors / 2;
  if (gemm.r > 0 && gemm.r <= kMostRanks && length * ranks * kTileK * 2 <= kShrinkBytes &&
      k_tiles >= kLeastSteps && waits_end && (gemm.transposed || gemm.r % 8 == 0) &&
      Aligned(shrink.a)) {
    shares.length = static_cast<int>(length);
    shares.count = static_cast<int>(count);
    shares.ahead = static_cast<int>(ahead);
  }
  return shares;
}

// Rows of whole tiles, of any plan and with those that a cluster adds.
constexpr int64_t kLeastTileRows = 128;
int64_t MostRows(int64_t m) { return CeilDiv(m, 256) * 256; }

__global__ void ClearKernel(unsigned* counters, int64_t count) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
}

}  // namespace

int64_t GemmSm90ShrinkScratch(int64_t m, int64_t k, int64_t r) {
  if (r > kMostRanks) return 0;
  return MostRows(m) * CeilDiv(CeilDiv(k, kTileK), kShareLength) * ShrinkRanks(r) +
         MostRows(m) / kLeastTileRows * kCounters;
}

bool GemmSm90RunsOn(int major, int minor) { return major == 9 && minor == 0; }

bool GemmSm90Serves(const Gemm& gemm) {
  // TMA's rows are multiples of 16 bytes; sizes and, rounded up to tiles, counts are ints.
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 4;
  const auto fits = [](int64_t size) { return size > 0 && size <= kMost; };
  if (!fits(gemm.m) || !fits(gemm.k) || !fits(gemm.n) || gemm.k % 8 != 0 || gemm.n % 8 != 0 ||
      !Aligned(gemm.x) || !Aligned(gemm.w) || !Aligned(gemm.bias) || !Aligned(gemm.y)) {
    return false;
  }
  return gemm.r == 0 || (gemm.r > 0 && gemm.r <= kMost && (!gemm.transposed || gemm.r % 8 == 0) &&
                         Aligned(gemm.h16) && Aligned(gemm.b));
}

GemmPlan GemmSm90Plan(const Gemm& gemm, int multiprocessors) {
  // Every multiprocessor takes a tile at a time, so a product lasts as long as the tiles that one
  // of them takes, and the last round may be nearly empty. A tile of half the size takes a little
  // more than half the time, having half the reuse.
  const auto time = [&](int64_t rows, int64_t columns, double tile) {
    return CeilDiv(CeilDiv(gemm.m, rows) * CeilDiv(gemm.n, columns), multiprocessors) * tile;
  };
  const double wide = time(128, 256, 2), tall = time(256, 128, 2), small = time(128, 128, 1.1);
  GemmPlan plan;
  if (small < std::min(wide, tall)) {
    plan.tile = 2;
  } else {
    plan.tile = wide < tall ? 0 : 1;
  }
  const int64_t rows = plan.tile == 1 ? 256 : 128, columns = plan.tile == 0 ? 256 : 128;
  plan.along_n = CeilDiv(gemm.n, columns) <= CeilDiv(gemm.m, rows);
  plan.swizzle = 1;
  return plan;
}

namespace {

// GemmSm90Plan's, but that blocks which share rows run at once.
GemmPlan PlanOfShrink(const Gemm& gemm, int multiprocessors) {
  GemmPlan plan = GemmSm90Plan(gemm, multiprocessors);
  const int64_t tiles =
      CeilDiv(gemm.m, kTileRows[plan.tile]) * CeilDiv(gemm.n, kTileColumns[plan.tile]);
  if (tiles > multiprocessors) plan.along_n = true;
  return plan;
}

cudaError_t ThisDevice(int* device, int* multiprocessors) {
  const cudaError_t error = cudaGetDevice(device);
  return error == cudaSuccess ? Multiprocessors(*device, multiprocessors) : error;
}

}  // namespace

bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     int multiprocessors) {
  return GemmSm90Serves(gemm) && ShrinkPlan(gemm, shrink, plan, multiprocessors).length > 0;
}

bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink) {
  int device, multiprocessors;
  return ThisDevice(&device, &multiprocessors) == cudaSuccess &&
         GemmSm90Shrinks(gemm, shrink, PlanOfShrink(gemm, multiprocessors), multiprocessors);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmPlan& plan, cudaStream_t stream,
                     bool programmatic_dependent) {
  if (!GemmSm90Serves(gemm) || plan.tile < 0 || plan.tile >= kTiles) return cudaErrorInvalidValue;
  int device, multiprocessors;
  const cudaError_t error = ThisDevice(&device, &multiprocessors);
  if (error != cudaSuccess) return error;
  return kLaunchers[plan.tile][gemm.bf16][gemm.transposed](
      gemm, plan, nullptr, {}, nullptr, device, multiprocessors, stream, programmatic_dependent);
}

cudaError_t GemmSm90(const Gemm& gemm, cudaStream_t stream, bool programmatic_dependent) {
  int device, multiprocessors;
  const cudaError_t error = ThisDevice(&device, &multiprocessors);
  if (error != cudaSuccess) return error;
  return GemmSm90(gemm, GemmSm90Plan(gemm, multiprocessors), stream, programmatic_dependent);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     cudaStream_t stream) {
  if (!GemmSm90Serves(gemm) || plan.tile < 0 || plan.tile >= kTiles) return cudaErrorInvalidValue;
  int device, multiprocessors;
  const cudaError_t error = ThisDevice(&device, &multiprocessors);
  if (error != cudaSuccess) return error;
  const Shares shares = ShrinkPlan(gemm, shrink, plan, multiprocessors);
  if (shares.length == 0) return cudaErrorInvalidValue;
  auto* const counters = reinterpret_cast<unsigned*>(
      shrink.scratch + MostRows(gemm.m) * shares.count * ShrinkRanks(gemm.r));
  ClearKernel<<<1, 256, 0, stream>>>(counters, MostRows(gemm.m) / kLeastTileRows * kCounters);
  const cudaError_t cleared = cudaGetLastError();
  if (cleared != cudaSuccess) return cleared;
  return kLaunchers[plan.tile][gemm.bf16][gemm.transposed](gemm, plan, &shrink, shares, counters,
                                                           device, multiprocessors, stream,
                                                           /*programmatic_dependent=*/true);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream) {
  int device, multiprocessors;
  const cudaError_t error = ThisDevice(&device, &multiprocessors);
  if (error != cudaSuccess) return error;
  return GemmSm90(gemm, shrink, PlanOfShrink(gemm, multiprocessors), stream);
}

}  // namespace jax_fused_lora

#endif
