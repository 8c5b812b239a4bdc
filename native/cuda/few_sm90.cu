// The adapted layer of few rows: y = x·W + bias + s·h·B with h = s·x·A, all in one kernel.
//
// So few rows do not keep the tensor cores busy; the time is what it takes to bring W to the
// multiprocessors, and each of them reads all of x beside it. So each computes h for itself: the
// tile of x that meets a tile of W meets one of A, too, which is 16 columns beside 64. The sums of
// h are already where a warpgroup's left operand may lie, in its registers, so the rank is two more
// wgmma for each 16 of them, and nobody waits for an h from elsewhere.
//
// TMA copies a box row after row, and 16 ranks of A are a row of 32 bytes, so that A took it as
// many rows as W (an H200, 4096→4096, 16 rows of x: 1.4 of 12.8 µs; transposed, where 64 elements
// of a rank follow each other, 0.3 of 11.9). So for 64 rows and 16 ranks A comes as it lies, in one
// run, and four warps that have nothing else to do lay it as wgmma reads it. (Of 128 rows a tile
// takes as long straight as transposed.)
//
// A block has 64 columns of y and 64 or 128 rows. (128 of each read x half as often: 256 rows of
// 4096→4096 21.2 µs, not 23.8, but as a product with h beside 19.1.) Where that leaves half of the
// multiprocessors idle, or more, two or four blocks, a cluster, share the depth. Each adds the
// rank's part of its own h, the product being linear; then they exchange shares of y, by registers:
// a thread of one block has what the same thread of another has. How many they are is a constant:
// as an argument it made 830 more instructions, and 16 rows of 4096→4096 took 13.5 µs, not 12
// (presumably as the exchange runs once, and its code has to come from memory).
//
// A block takes 0.4 µs for 128 of the depth, be there ever so few blocks. Not faster, in that
// slower build (16 rows of 4096→1024, 11.2 µs with two blocks): two warpgroups that take turns at
// the tiles, 11.5, and room for 16 rows of x instead of 64, so eight stages instead of five, 11.1.
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/numeric_types.h"
#include "native/cuda/device.cuh"
#include "native/cuda/few_sm90.h"
#include "native/cuda/strides.cuh"

namespace jax_fused_lora {
namespace {

using cute::_;
using cute::Int;

constexpr int kSwizzled = 64;  // columns of x, 128 bytes, that TMA lays as wgmma reads them
// Rows of any number of columns; more rows, where their tiles are few.
constexpr int64_t kMostRows = 128, kMostRanks = 64;
constexpr int kMostShared = 227 * 1024;

template <class Element, int tile_rows, int tile_columns, int tile_ranks, int tile_parts,
          bool transposed>
struct Few {
  static constexpr int kParts = tile_parts;  // blocks of a cluster, or one
  static constexpr int kRows = tile_rows, kColumns = tile_columns, kRanks = tile_ranks;
  // Of a tile. (An H200, 4096→4096, rank 16: 16 rows 11.5 µs, 12.1 with 64, 64 rows 12.3 and 13.4;
  // 128 rows need more stages: transposed 16.8, and 13.4 with 64.)
  static constexpr int kDepth = kRows == 64 && kRanks <= 32 ? 128 : 64;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutW = std::conditional_t<transposed, cutlass::layout::ColumnMajor, RowMajor>;
  static constexpr int kGroups = kRows / 64;  // warpgroups that multiply
  static constexpr bool kRun = !transposed && kRanks == 16 && kRows == 64;  // A as it lies
  static constexpr int kMultiply = kGroups * 128, kRunWarps = kRun ? 4 : 0;
  static constexpr int kThreads = kMultiply + 32 + kRunWarps * 32;
  // A thread's sums, in fours, of which each block of a cluster ends with a share, or, where the
  // blocks are more, every other block with one; and the fours that the others send it.
  static constexpr int kOfY = kColumns / 8, kOfH = kRanks / 8;
  static constexpr int Share(int fours) { return std::max(1, fours / kParts); }
  static constexpr int kReceived = (kParts - 1) * (Share(kOfY) + Share(kOfH));
  // A run has stages of its own, more of them: what lays it out would keep x and W waiting.
  static constexpr int kRunStages = 2 * kRunWarps, kBytesOfA = kRanks * kDepth * 2;
  static constexpr int kStageBytes = (kRows + kColumns) * kDepth * 2 + (kRun ? 0 : kBytesOfA);
  static constexpr int kOtherBytes = kRanks * kColumns * 2 + kReceived * 16 * kMultiply + 4 * 1024 +
                                     (kRun ? kRunStages * kBytesOfA : 0);
  static constexpr int kStages = std::min(12, (kMostShared - kOtherBytes) / kStageBytes);
  static constexpr int kStagesOfA = kRun ? kRunStages : kStages;

  // CUTLASS calls the left operand (x) A and the right one, be it W, A or B, B.
  template <int columns, int depth, int stages = kStages>
  using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element, LayoutW,
      8, float, cute::Shape<Int<kRows>, Int<columns>, Int<depth>>,
      cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::collective::StageCount<stages>,
      std::conditional_t<kGroups == 2, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecialized>>::CollectiveOp;
  using OfW = Collective<kColumns, kDepth>;
  using OfA = Collective<kRanks, kDepth, kStagesOfA>;
  using OfB = Collective<kColumns, kRanks>;  // its left operand comes from registers
  static constexpr auto kMajor = transposed ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using MultiplyB = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<Int<kRows>, Int<kColumns>, Int<kRanks>>,
                                 cute::GMMA::Major::K, kMajor>(),
      cute::Layout<cute::Shape<Int<kGroups>, cute::_1, cute::_1>>{}));

  struct Storage {
    alignas(1024) Element x[kStages * kRows * kDepth];
    alignas(1024) Element w[kStages * kColumns * kDepth];
    alignas(1024) Element a[kStagesOfA * kRanks * kDepth];
    alignas(1024) Element b[kRanks * kColumns];
    float4 exchange[kReceived][kMultiply];
    cutlass::arch::ClusterTransactionBarrier filled[kStages], b_filled, exchanged;
    cutlass::arch::ClusterBarrier read[kStages];
    // Of a run.
    cutlass::arch::ClusterTransactionBarrier a_filled[kStagesOfA];
    cutlass::arch::ClusterBarrier a_laid[kStagesOfA], a_read[kStagesOfA];
  };
  static_assert(sizeof(Storage) <= kMostShared);

  struct Params {
    CUtensorMap x;
    typename OfW::Params::TMA_B w;
    typename OfA::Params::TMA_B a;
    typename OfB::Params::TMA_B b;
    int rows, rows_of_tile, in, out, rank, parts;  // of a cluster
    float scaling, h16_scaling;
    const Element* run;  // A
    float* h;
    const Element* bias;  // may be null
    Element* y;
  };
};

// Eight values as a lane's part of a left operand, 16 steps of K.
template <class Element, class Values, class Fragment>
__device__ void ToFragments(const Values& values, int first, float scaling, Fragment&& hi,
                            Fragment&& lo) {
  using Number =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    SplitClamped(scaling * values(first + i), reinterpret_cast<Number*>(&hi(i)),
                 reinterpret_cast<Number*>(&lo(i)));
  }
}

// Waits for a barrier's first phase, and for what other blocks of the cluster have sent with it.
__device__ inline void WaitInCluster(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra WAIT;\n}" ::"r"(barrier)
      : "memory");
}

// One warp's part: lays a tile of A, which has come as it lies in memory, as wgmma reads it. There
// the 16 bytes of 8 ranks are somewhere else in their row, and a row has room for kRanks. What lies
// behind `depth` is not A, and zero then.
template <class Few, class Element>
__device__ void LayRun(Element* tile, int rank, int depth) {
  constexpr int kRow = Few::kRanks / 8, kEach = Few::kDepth * kRow / 32;  // of 8 ranks
  const int lane = threadIdx.x % 32, row_of_run = rank / 8;
  auto* const eights = reinterpret_cast<uint4*>(tile);
  uint4 values[kEach];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int to = i * 32 + lane, row = to / kRow, column = to % kRow;
    const bool some = row < depth && column < row_of_run;
    values[i] = some ? eights[row * row_of_run + column] : uint4{};
  }
  __syncwarp();
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int to = i * 32 + lane;
    eights[to ^ (to >> 3 & (kRow - 1))] = values[i];
  }
}

// One warp's part: its share of the tiles of A, of a run. Each warp has two stages.
template <class Few>
__device__ void FetchRun(typename Few::Storage& storage, const typename Few::Params& p, int warp,
                         int first, int tiles) {
  constexpr int kDepth = Few::kDepth, kStages = Few::kStagesOfA, kWarps = Few::kRunWarps;
  const bool fetches = threadIdx.x % 32 == 0;
  const auto tile_of = [&](int i) { return storage.a + i % kStages * Few::kRanks * kDepth; };
  const auto fetch = [&](int i) {
    const int k0 = (first + i) * kDepth, bytes = min(kDepth, p.in - k0) * p.rank * 2;
    auto& barrier = storage.a_filled[i % kStages];
    barrier.arrive_and_expect_tx(bytes);
    cute::SM90_BULK_COPY_G2S::copy(p.run + int64_t{k0} * p.rank,
                                   reinterpret_cast<uint64_t*>(&barrier), tile_of(i), bytes);
  };
  for (int i = warp; fetches && i < min(tiles, kStages); i += kWarps) fetch(i);
  for (int i = warp; i < tiles; i += kWarps) {
    if (fetches && i >= kWarps && i + kWarps < tiles) {
      storage.a_read[(i - kWarps) % kStages].wait((i - kWarps) / kStages % 2);
      fetch(i + kWarps);
    }
    __syncwarp();
    storage.a_filled[i % kStages].wait(i / kStages % 2);
    LayRun<Few>(tile_of(i), p.rank, p.in - (first + i) * kDepth);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads it
    __syncwarp();
    if (fetches) storage.a_laid[i % kStages].arrive();
  }
}

template <class Few>
__global__ void __launch_bounds__(Few::kThreads, 1)
    FewKernel(const __grid_constant__ typename Few::Params p) {
  using namespace cute;
  using OfW = typename Few::OfW;
  using OfA = typename Few::OfA;
  using OfB = typename Few::OfB;
  using Element = typename OfW::ElementA;
  using Number =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  constexpr int kRows = Few::kRows, kColumns = Few::kColumns, kRanks = Few::kRanks;
  constexpr int kStages = Few::kStages, kStagesOfA = Few::kStagesOfA, kDepth = Few::kDepth;
  extern __shared__ __align__(1024) char memory[];
  auto& storage = *reinterpret_cast<typename Few::Storage*>(memory);
  const int thread = threadIdx.x;
  const bool fetches = thread >= Few::kMultiply;
  constexpr int kParts = Few::kParts, kOfY = Few::kOfY, kOfH = Few::kOfH;
  constexpr int kShareOfY = Few::Share(kOfY), kShareOfH = Few::Share(kOfH);
  const bool shared = p.parts > 1;
  const int part = shared ? blockIdx.x % kParts : 0;
  const int column_tile = shared ? blockIdx.x / kParts : blockIdx.x;
  const bool tells_h = column_tile == 0;
  const auto owner_of_y = [](int i) { return i * kParts / kOfY; };
  const auto owner_of_h = [](int i) { return i * kParts / kOfH; };
  const int all_tiles = (p.in + kDepth - 1) / kDepth, share = (all_tiles + p.parts - 1) / p.parts;
  const int first = part * share, tiles = max(0, min(share, all_tiles - first));
  // The last tile's rows begin earlier, if they are fewer: zeros for what lies beyond the rows take
  // longer to copy than rows do (160 rows of 4096: 31.7 → 22.6 µs; 96 rows: 19.2 → 17.5).
  const int first_row = min(static_cast<int>(blockIdx.y) * p.rows_of_tile, p.rows - p.rows_of_tile);

  if (thread == Few::kMultiply) {
    prefetch_tma_descriptor(p.w.get_tma_descriptor());
    prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&p.x));
    prefetch_tma_descriptor(p.a.get_tma_descriptor());
    prefetch_tma_descriptor(p.b.get_tma_descriptor());
    for (int i = 0; i < kStages; ++i) {
      storage.filled[i].init(1);
      storage.read[i].init(Few::kMultiply / 32);
    }
    for (int i = 0; i < kStagesOfA; ++i) {
      storage.a_filled[i].init(1);
      storage.a_laid[i].init(1);
      storage.a_read[i].init(Few::kMultiply / 32);
    }
    storage.b_filled.init(1);
    storage.exchanged.init(1);
    cutlass::arch::fence_barrier_init();
  }
  if (shared) {
    if (thread == Few::kMultiply) {
      const bool ends_with_h = tells_h && part * kOfH % kParts == 0;
      const int fours = (kParts - 1) * (kShareOfY + ends_with_h * kShareOfH);
      const int warps = (p.rows_of_tile + 15) / 16;
      storage.exchanged.arrive_and_expect_tx(warps * 32 * fours * sizeof(float4));
    }
    cute::cluster_arrive();  // this block has begun
  }
  __syncthreads();  // the barriers are there

  if (fetches) {
    if (thread == Few::kMultiply) {
      // The tiles of a matrix, of which this block wants column `j`: (columns, depth, k).
      const auto tiles_of = [&](const auto& tma, int columns, int depth, auto shape, int j) {
        Tensor all = tma.get_tma_tensor(make_shape(columns, depth, 1));
        return local_tile(all, shape, make_coord(j, _, 0));
      };
      const auto copy_w = p.w.get_slice(_0{});
      const auto copy_a = p.a.get_slice(_0{});
      const auto copy_b = p.b.get_slice(_0{});
      Tensor from_w = copy_w.partition_S(
          tiles_of(p.w, p.out, p.in, Shape<Int<kColumns>, Int<kDepth>>{}, column_tile));
      Tensor from_a =
          copy_a.partition_S(tiles_of(p.a, p.rank, p.in, Shape<Int<kRanks>, Int<kDepth>>{}, 0));
      Tensor from_b = copy_b.partition_S(
          tiles_of(p.b, p.out, p.rank, Shape<Int<kColumns>, Int<kRanks>>{}, column_tile));
      Tensor to_w =
          copy_w.partition_D(make_tensor(make_smem_ptr(storage.w), typename OfW::SmemLayoutB{}));
      Tensor to_a =
          copy_a.partition_D(make_tensor(make_smem_ptr(storage.a), typename OfA::SmemLayoutB{}));
      Tensor to_b =
          copy_b.partition_D(make_tensor(make_smem_ptr(storage.b), typename OfB::SmemLayoutB{}));
      const auto barrier_of = [](auto& barrier) -> uint64_t& {
        return *reinterpret_cast<uint64_t*>(&barrier);
      };
      const int bytes = (p.rows_of_tile + kColumns) * kDepth * 2 + (Few::kRun ? 0 : Few::kBytesOfA);
      // Nobody reads W again, unless it meets more rows.
      const auto w_hint =
          gridDim.y == 1 ? TMA::CacheHintSm90::EVICT_FIRST : TMA::CacheHintSm90::EVICT_NORMAL;
      int stage = 0, turn = 0;
      for (int i = 0; i < tiles; ++i) {
        if (turn > 0) storage.read[stage].wait((turn - 1) % 2);
        const int k0 = (first + i) * kDepth;
        storage.filled[stage].arrive_and_expect_tx(bytes);
        uint64_t& barrier = barrier_of(storage.filled[stage]);
        copy(p.w.with(barrier, 0, w_hint), from_w(_, _, _, first + i), to_w(_, _, _, stage));
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kDepth; k += kSwizzled) {
          SM90_TMA_LOAD_2D::copy(&p.x, &barrier,
                                 static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL),
                                 storage.x + stage * kRows * kDepth + kRows * k, k0 + k, first_row);
        }
        if constexpr (!Few::kRun) {
          copy(p.a.with(barrier, 0), from_a(_, _, _, first + i), to_a(_, _, _, stage));
        }
        if (i == 0) {
          storage.b_filled.arrive_and_expect_tx(kRanks * kColumns * 2);
          copy(p.b.with(barrier_of(storage.b_filled), 0), from_b(_, _, _, 0), to_b(_, _, _, 0));
        }
        if (++stage == kStages) stage = 0, ++turn;
      }
    }
    if constexpr (Few::kRun) {
      const int warp = thread / 32 - Few::kMultiply / 32 - 1;
      if (warp >= 0) FetchRun<Few>(storage, p, warp, first, tiles);
    }
    __syncwarp();
    if (shared) cute::cluster_wait();
    return;
  }

  const int group_thread = __shfl_sync(0xffffffff, thread / 128, 0) * 128;
  typename OfW::TiledMma multiply_w;
  typename OfA::TiledMma multiply_a;
  typename Few::MultiplyB multiply_b;
  multiply_w.accumulate_ = multiply_a.accumulate_ = multiply_b.accumulate_ = GMMA::ScaleOut::One;
  const auto slice_w = multiply_w.get_slice(group_thread);
  const auto slice_a = multiply_a.get_slice(group_thread);
  const auto slice_b = multiply_b.get_slice(group_thread);
  Tensor s_x = make_tensor(make_smem_ptr(storage.x), typename OfW::SmemLayoutA{});
  Tensor s_w = make_tensor(make_smem_ptr(storage.w), typename OfW::SmemLayoutB{});
  Tensor s_a = make_tensor(make_smem_ptr(storage.a), typename OfA::SmemLayoutB{});
  Tensor s_b = make_tensor(make_smem_ptr(storage.b), typename OfB::SmemLayoutB{});
  Tensor x_for_w = slice_w.make_fragment_A(slice_w.partition_A(s_x));  // (…, step, stage)
  Tensor x_for_a = slice_a.make_fragment_A(slice_a.partition_A(s_x));
  Tensor w = slice_w.make_fragment_B(slice_w.partition_B(s_w));
  Tensor a = slice_a.make_fragment_B(slice_a.partition_B(s_a));
  Tensor b = slice_b.make_fragment_B(slice_b.partition_B(s_b));

  Tensor y = partition_fragment_C(multiply_w, Shape<Int<kRows>, Int<kColumns>>{});
  Tensor h = partition_fragment_C(multiply_a, Shape<Int<kRows>, Int<kRanks>>{});
  clear(y);
  clear(h);
  const int lane = thread % 32, in_tile = thread / 32 * 16;  // the first of the warp's rows
  const bool some_rows = in_tile < p.rows_of_tile;
  int stage = 0, turn = 0;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = 0; i < tiles; ++i) {
    storage.filled[stage].wait(turn % 2);
    const int stage_of_a = Few::kRun ? i % kStagesOfA : stage;
    if (Few::kRun) storage.a_laid[stage_of_a].wait(i / kStagesOfA % 2);
    warpgroup_fence_operand(y);
    warpgroup_fence_operand(h);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kDepth / 16; ++step) {
      gemm(multiply_w, x_for_w(_, _, step, stage), w(_, _, step, stage), y);
      gemm(multiply_a, x_for_a(_, _, step, stage), a(_, _, step, stage_of_a), h);
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    warpgroup_fence_operand(y);
    warpgroup_fence_operand(h);
    // What is read by now: the stage before.
    if (i > 0 && lane == 0) {
      storage.read[(stage + kStages - 1) % kStages].arrive();
      if (Few::kRun) storage.a_read[(i - 1) % kStagesOfA].arrive();
    }
    if (++stage == kStages) stage = 0, ++turn;
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(y);
  warpgroup_fence_operand(h);

  // h = scaling · x·A, of ranks that are: an infinite x times the zeros beyond them is NaN. A
  // thread has rows g and g + 8 and, of each 8 ranks, two neighbouring ones.
  const int g = lane / 4, t = lane % 4;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(h); ++i) {
    const int rank = i / 4 * 8 + t * 2 + i % 2;
    h(i) = rank < p.rank ? p.scaling * h(i) : 0.0f;
  }
  if (tiles > 0) {
    storage.b_filled.wait(0);
    using Half = Shape<Shape<_2, _2, _2>, _1, Int<kRanks / 16>>;
    Tensor hi = make_tensor<Element>(Half{});
    Tensor lo = make_tensor<Element>(Half{});
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < kRanks / 16; ++block) {
      ToFragments<Element>(h, block * 8, p.h16_scaling, hi(_, 0, block), lo(_, 0, block));
    }
    warpgroup_fence_operand(y);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < kRanks / 16; ++block) {
      gemm(multiply_b, hi(_, _, block), b(_, _, block, 0), y);
      gemm(multiply_b, lo(_, _, block), b(_, _, block, 0), y);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(y);
  }

  // Each block of a cluster ends with a share of y and, of the first columns, of h.
  if (shared) cute::cluster_wait();  // the other blocks have begun
  if (!some_rows) return;
  if (shared) {
    constexpr int kFirstOfH = (kParts - 1) * kShareOfY;
    const uint32_t exchange = SharedAddress(&storage.exchange[0][thread]);
    const uint32_t exchanged = SharedAddress(&storage.exchanged);
    // From one block to another goes what is `part ^ other` - 1 among what that one is sent.
    const auto send = [&](const auto& sums, int i, int owner, int first, int share) {
      const int place = first + ((part ^ owner) - 1) * share + i % share;
      const uint32_t there = exchange + place * static_cast<uint32_t>(sizeof(storage.exchange[0]));
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
          "{%1, %2, %3, %4}, [%5];" ::"r"(cute::set_block_rank(there, owner)),
          "f"(sums(i * 4)), "f"(sums(i * 4 + 1)), "f"(sums(i * 4 + 2)), "f"(sums(i * 4 + 3)),
          "r"(cute::set_block_rank(exchanged, owner))
          : "memory");
    };
    const auto add = [&](auto& sums, int i, int first, int share) {
      CUTLASS_PRAGMA_UNROLL
      for (int other = 0; other < kParts - 1; ++other) {
        const float4 sent = storage.exchange[first + other * share + i % share][thread];
        sums(i * 4) += sent.x, sums(i * 4 + 1) += sent.y;
        sums(i * 4 + 2) += sent.z, sums(i * 4 + 3) += sent.w;
      }
    };
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kOfY; ++i) {
      if (owner_of_y(i) != part) send(y, i, owner_of_y(i), 0, kShareOfY);
    }
    if (tells_h) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kOfH; ++i) {
        if (owner_of_h(i) != part) send(h, i, owner_of_h(i), kFirstOfH, kShareOfH);
      }
    }
    WaitInCluster(exchanged);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kOfY; ++i) {
      if (owner_of_y(i) == part) add(y, i, 0, kShareOfY);
    }
    if (tells_h) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kOfH; ++i) {
        if (owner_of_h(i) == part) add(h, i, kFirstOfH, kShareOfH);
      }
    }
  }

  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kColumns / 8; ++block) {
    if (shared && owner_of_y(block) != part) continue;
    const int column = column_tile * kColumns + block * 8 + t * 2;
    if (column >= p.out) continue;
    float bias[2] = {};
    if (p.bias != nullptr) {
      bias[0] = static_cast<float>(p.bias[column]);
      bias[1] = static_cast<float>(p.bias[column + 1]);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = in_tile + g + half * 8;
      if (row >= p.rows_of_tile) continue;
      alignas(4) Number pair[2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) pair[j] = Rounded<Number>(y(block * 4 + half * 2 + j) + bias[j]);
      *reinterpret_cast<uint32_t*>(p.y + int64_t{first_row + row} * p.out + column) =
          *reinterpret_cast<uint32_t*>(pair);
    }
  }
  if (tells_h) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(h); ++i) {
      const int row = in_tile + g + i / 2 % 2 * 8;
      const int rank = i / 4 * 8 + t * 2 + i % 2;
      if ((shared && owner_of_h(i / 4) != part) || row >= p.rows_of_tile || rank >= p.rank) {
        continue;
      }
      p.h[int64_t{first_row + row} * p.rank + rank] = h(i);
    }
  }
}

template <class Collective, class Shape>
auto RightOperand(const void* data, int columns, int depth, int64_t row, Shape shape) {
  auto matrix =
      cute::make_tensor(static_cast<const typename Collective::ElementB*>(data),
                        cute::make_layout(cute::make_shape(columns, depth, 1),
                                          RightStride<typename Collective::StrideB>(row)));
  return cute::make_tma_copy_B_sm90(typename Collective::GmemTiledCopyB{}, matrix,
                                    typename Collective::SmemLayoutB{}(_, _, Int<0>{}), shape,
                                    cute::Shape<cute::_1, cute::_1, cute::_1>{});
}

// x (m, k) in boxes of `rows` and kSwizzled columns, 128 bytes each, as wgmma reads its left
// operand.
template <class Element>
bool MapRows(const void* x, int m, int k, int rows, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(m)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(k) * 2};
  const cuuint32_t box[] = {kSwizzled, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             map, cute::TMA::to_CUtensorMapDataType<Element>(), 2u, const_cast<void*>(x), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Element, int kRows, int kColumns, int kRanks, int kParts, bool transposed>
cudaError_t LaunchFew(const Gemm& gemm, const GemmShrink& shrink, int multiprocessors,
                      cudaStream_t stream) {
  using Own = Few<Element, kRows, kColumns, kRanks, kParts, transposed>;
  using OfW = typename Own::OfW;
  const int m = static_cast<int>(gemm.m), k = static_cast<int>(gemm.k),
            n = static_cast<int>(gemm.n), r = static_cast<int>(gemm.r);
  const int64_t column_tiles = CeilDiv(gemm.n, kColumns), row_tiles = CeilDiv(gemm.m, kRows);
  const int parts = column_tiles * row_tiles * kParts <= multiprocessors ? kParts : 1;
  const int rows_of_tile = static_cast<int>(CeilDiv(gemm.m, row_tiles));
  CUtensorMap x;
  if (!MapRows<Element>(gemm.x, m, k, rows_of_tile, &x)) return cudaErrorUnknown;
  const typename Own::Params params = {
      x,
      RightOperand<OfW>(gemm.w, n, k, transposed ? gemm.k : gemm.n, typename OfW::TileShape{}),
      RightOperand<typename Own::OfA>(shrink.a, r, k, transposed ? gemm.k : gemm.r,
                                      typename Own::OfA::TileShape{}),
      RightOperand<typename Own::OfB>(gemm.b, n, r, transposed ? gemm.r : gemm.n,
                                      typename Own::OfB::TileShape{}),
      m,
      rows_of_tile,
      k,
      n,
      r,
      parts,
      shrink.scaling,
      shrink.h16_scaling,
      static_cast<const Element*>(shrink.a),
      shrink.h,
      static_cast<const Element*>(gemm.bias),
      static_cast<Element*>(gemm.y)};
  return Launch(FewKernel<Own>,
                dim3(static_cast<unsigned>(column_tiles * parts), static_cast<unsigned>(row_tiles)),
                Own::kThreads, sizeof(typename Own::Storage), stream, false, parts, params);
}

// What a block has of y, and how many blocks may share the depth of it.
struct Tile {
  int rows, columns, parts;
};

// The first that serves, of the measured order; no rows: none does.
Tile TileOf(const Gemm& gemm, int multiprocessors) {
  const auto blocks = [&](int rows, int columns, int parts) {
    return CeilDiv(gemm.m, rows) * CeilDiv(gemm.n, columns) * parts;
  };
  // Where clusters of four fit side by side: 32 of them, on 132 multiprocessors, took 12.8 µs for
  // 16 rows of 2048→2048, and two blocks a tile 8.5.
  if (blocks(64, 64, 4) <= multiprocessors * 3 / 4) return {64, 64, 4};
  if (blocks(64, 64, 2) <= multiprocessors) return {64, 64, 2};
  // (µs, one of these and two of the next, straight and transposed: 512 rows of 1024→1024 7.0, 7.0
  // and 6.2, 6.7, 256 rows of 1536→1536 8.3, 7.7 and 7.3, 7.6.)
  if (blocks(64, 64, 1) <= multiprocessors && gemm.k <= 1024) return {64, 64, 1};
  if (blocks(128, 64, 2) <= multiprocessors) return {128, 64, 2};
  if (gemm.m <= 64) return {64, 64, 1};
  if (gemm.m <= kMostRows) return {128, 64, 1};
  // Where the product's tiles of 64×128 leave too few multiprocessors for h of so many rows (1024
  // rows of 1024→1024 9.3 µs, and 10.1 with tiles of 128×128).
  const bool alone = gemm.m > 512 && blocks(64, 128, 1) > multiprocessors - 8;
  return alone && blocks(128, 64, 1) <= multiprocessors ? Tile{128, 64, 1} : Tile{};
}

template <class Element, bool transposed>
cudaError_t LaunchTile(const Gemm& gemm, const GemmShrink& shrink, int multiprocessors,
                       cudaStream_t stream) {
  const auto with_ranks = [&](auto rows, auto parts) {
    const auto launch = [&](auto ranks) {
      return LaunchFew<Element, decltype(rows)::value, 64, decltype(ranks)::value,
                       decltype(parts)::value, transposed>(gemm, shrink, multiprocessors, stream);
    };
    if (gemm.r <= 16) return launch(Int<16>{});
    return gemm.r <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
  };
  const Tile tile = TileOf(gemm, multiprocessors);
  if (tile.rows == 128) return with_ranks(Int<128>{}, Int<2>{});
  return tile.parts == 4 ? with_ranks(Int<64>{}, Int<4>{}) : with_ranks(Int<64>{}, Int<2>{});
}

}  // namespace

bool FewSm90Serves(const Gemm& gemm, const GemmShrink& shrink) {
  Gpu gpu;
  return gemm.r > 0 && gemm.r <= kMostRanks && gemm.r % 8 == 0 &&
         reinterpret_cast<uintptr_t>(shrink.a) % 16 == 0 && GemmSm90Serves(gemm) &&
         ThisGpu(&gpu) == cudaSuccess && TileOf(gemm, gpu.multiprocessors).rows > 0;
}

cudaError_t FewSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream) {
  using cutlass::bfloat16_t, cutlass::half_t;
  if (!FewSm90Serves(gemm, shrink)) return cudaErrorInvalidValue;
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  const int multiprocessors = gpu.multiprocessors;
  if (gemm.transposed) {
    return gemm.bf16 ? LaunchTile<bfloat16_t, true>(gemm, shrink, multiprocessors, stream)
                     : LaunchTile<half_t, true>(gemm, shrink, multiprocessors, stream);
  }
  return gemm.bf16 ? LaunchTile<bfloat16_t, false>(gemm, shrink, multiprocessors, stream)
                   : LaunchTile<half_t, false>(gemm, shrink, multiprocessors, stream);
}

}  // namespace jax_fused_lora
