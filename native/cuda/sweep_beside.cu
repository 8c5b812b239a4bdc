// One cluster of four blocks sweeps g, 128 rows after the other. A block has a quarter of the
// columns, of all rows, so that its part of dB stays in registers from the first row to the last,
// and its part of B in shared memory: g is all that it reads. Of 128 rows it has a part of t only.
// The four parts go to the blocks in turns, each of which adds them in one order, and stores t and
// h16 while all go on with the next rows.
//
// The tensor cores read g from shared memory twice, as it lies for t and turned for dB. h goes
// there as hi and lo side by side, so that dB is one product with both. Shared memory is what
// bounds it: 8192 rows of 4096 columns take 303 µs, without dB 220, and bringing g alone 171. One
// warpgroup multiplies for t and two for dB; where each did both, ptxas spilled, and it was 577.
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cutlass.h"
#include "cutlass/numeric_types.h"
#include "native/cuda/beside.cuh"
#include "native/cuda/shrink_beside.h"
#include "native/cuda/sweep_beside.h"

namespace jax_fused_lora {
namespace {

using cute::_;
using cute::Int;
using cute::Shape;
using Element = cutlass::bfloat16_t;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Barrier = cutlass::arch::ClusterBarrier;

constexpr int kRows = kBesideRows, kRanks = kSweepMostRanks;
constexpr int kColumns = 128;  // of a stage
constexpr int kStages = 4;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kHelpers = kGroup - 32;
constexpr int kMultiplying = 3;  // warpgroups
constexpr int kThreads = kGroup * (1 + kMultiplying);
constexpr int kHalves = 2;  // of a stage's rows, and of its columns, 64 each
static_assert(kRows == 64 * kHalves && kColumns == 64 * kHalves);

using RowsOfG = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                             Shape<Int<kRows>, Int<kColumns>, Int<kStages>>{}));
// The same memory, 64 columns as rows.
using ColumnsOfG =
    decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                 Shape<cute::_64, Int<kRows>, Int<kHalves>, Int<kStages>>{}));
template <int kSteps>
using LayoutOfB = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                               Shape<Int<kRanks>, Int<kSteps * kColumns>>{}));
using LayoutOfH = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                               Shape<Int<2 * kRanks>, Int<kRows>, cute::_2>{}));

// kSteps: stages that a block's columns of a tile of rows take.
template <int kSteps>
struct Storage {
  alignas(1024) Element g[cute::cosize_v<RowsOfG>];
  alignas(1024) Element b[cute::cosize_v<LayoutOfB<kSteps>>];
  alignas(1024) Element h[cute::cosize_v<LayoutOfH>];
  alignas(16) float parts[kSweepBlocks][kRows][kRanks];  // of t, by the block they come from
  Full g_full[kStages], b_full, parts_full;
  Barrier g_empty[kStages], h_full[2], h_empty[2];
  Barrier parts_empty[kSweepBlocks];  // by the block they go to
};

// A way through the stages of g: the next one, and how often its barriers have turned.
struct Turn {
  int stage = 0, phase = 0;

  __device__ void Next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

inline auto MatrixOf(const void* data, int rows, int columns) {
  return cute::make_tensor(
      static_cast<const Element*>(data),
      cute::make_layout(cute::make_shape(rows, columns),
                        cute::make_stride(static_cast<int64_t>(columns), cute::_1{})));
}
inline auto CopyOfG(const void* g, int rows, int columns) {
  return cute::make_tma_copy(cute::SM90_TMA_LOAD{}, MatrixOf(g, rows, columns),
                             RowsOfG{}(_, _, Int<0>{}));
}
template <int kSteps>
auto CopyOfB(const void* b, int ranks, int columns) {
  return cute::make_tma_copy(cute::SM90_TMA_LOAD{}, MatrixOf(b, ranks, columns),
                             LayoutOfB<kSteps>{});
}

template <int kSteps>
struct Params {
  decltype(CopyOfG(nullptr, 0, 0)) copy_g;
  decltype(CopyOfB<kSteps>(nullptr, 0, 0)) copy_b;
  int rows, columns, ranks, tiles;
  float t_scaling, h16_scaling, db_scaling;
  const float* h;
  float* t;
  void* h16;
  __nv_bfloat16* db;
  unsigned* done;
};

// One thread's part: g and B into shared memory.
template <int kSteps>
__device__ void Fetch(const Params<kSteps>& p, Storage<kSteps>& s, int block) {
  const auto b =
      cute::local_tile(p.copy_b.get_tma_tensor(cute::make_shape(p.ranks, p.columns)),
                       Shape<Int<kRanks>, Int<kSteps * kColumns>>{}, cute::make_coord(0, block));
  const auto copy_b = p.copy_b.get_slice(0);
  s.b_full.arrive_and_expect_tx(sizeof(s.b));
  cute::copy(p.copy_b.with(reinterpret_cast<uint64_t&>(s.b_full)), copy_b.partition_S(b),
             copy_b.partition_D(cute::make_tensor(cute::make_smem_ptr(s.b), LayoutOfB<kSteps>{})));

  const auto g = cute::local_tile(p.copy_g.get_tma_tensor(cute::make_shape(p.rows, p.columns)),
                                  Shape<Int<kRows>, Int<kColumns>>{}, cute::make_coord(_, _));
  const auto copy_g = p.copy_g.get_slice(0);
  const auto from = copy_g.partition_S(g);
  const auto to = copy_g.partition_D(cute::make_tensor(cute::make_smem_ptr(s.g), RowsOfG{}));
  Turn turn;
  for (int tile = 0; tile < p.tiles; ++tile) {
    for (int step = 0; step < kSteps; ++step, turn.Next()) {
      const int stage = turn.stage;
      s.g_empty[stage].wait(turn.phase ^ 1);
      s.g_full[stage].arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
      cute::copy(p.copy_g.with(reinterpret_cast<uint64_t&>(s.g_full[stage])),
                 from(_, _, _, tile, block * kSteps + step), to(_, _, _, stage));
    }
  }
}

// h of a tile's rows into shared memory, as hi and lo.
template <int kSteps>
__device__ void SplitH(const Params<kSteps>& p, Storage<kSteps>& s, int tile, int thread) {
  const auto h = cute::make_tensor(cute::make_smem_ptr(s.h), LayoutOfH{})(_, _, tile % 2);
  s.h_empty[tile % 2].wait(tile / 2 % 2 ^ 1);
  for (int i = thread; i < kRows * kRanks / 4; i += kHelpers) {
    const int in_tile = i % kRows, rank = i / kRows * 4;
    const int64_t row = int64_t{tile} * kRows + in_tile;
    float4 quad = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < p.rows && rank < p.ranks) {
      quad = *reinterpret_cast<const float4*>(p.h + row * p.ranks + rank);
    }
    const float values[4] = {quad.x, quad.y, quad.z, quad.w};
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < 4; ++j) {
      __nv_bfloat16 hi, lo;
      Split(values[j], &hi, &lo);
      h(rank + j, in_tile) = reinterpret_cast<Element&>(hi);
      h(kRanks + rank + j, in_tile) = reinterpret_cast<Element&>(lo);
    }
  }
  cutlass::arch::fence_view_async_shared();
  s.h_full[tile % 2].arrive();
}

// t and h16 of a tile that is this block's to add up.
template <int kSteps>
__device__ void AddUp(const Params<kSteps>& p, Storage<kSteps>& s, int tile, int thread) {
  s.parts_full.wait(tile / kSweepBlocks % 2);
  for (int i = thread; i < kRows * kRanks / 4; i += kHelpers) {
    const int in_tile = i / (kRanks / 4), rank = i % (kRanks / 4) * 4;
    const int64_t row = int64_t{tile} * kRows + in_tile;
    if (row >= p.rows) break;
    const float4 sum = SumShares<kSweepBlocks>(
        kSweepBlocks, [&](int block) { return &s.parts[block][in_tile][rank]; });
    const float values[4] = {p.t_scaling * sum.x, p.t_scaling * sum.y, p.t_scaling * sum.z,
                             p.t_scaling * sum.w};
    StoreRanks<__nv_bfloat16>(values, row, rank, p.ranks, p.h16_scaling, p.t, p.h16);
  }
  asm volatile("fence.proxy.async;" ::: "memory");  // TMA reads h16
  cutlass::arch::NamedBarrier::sync(kHelpers, 0);
  if (thread != 0) return;
  SetDone(p.done + tile);
  s.parts_full.arrive_and_expect_tx(sizeof(s.parts));
  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kSweepBlocks; ++block) {
    s.parts_empty[tile % kSweepBlocks].arrive(block);
  }
}

// Two numbers into another block's shared memory, of which its barrier is told.
__device__ inline void SendPair(float first, float second, const void* to, const void* barrier,
                                int block) {
  uint32_t address, told;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(to)), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(told)
      : "r"(SharedAddress(barrier)), "r"(block));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
          "r"(address),
      "f"(first), "f"(second), "r"(told)
      : "memory");
}

// A warpgroup's part: t of this block's columns.
template <int kSteps>
__device__ void MultiplyT(const Params<kSteps>& p, Storage<kSteps>& s, int block) {
  using cute::GMMA::Major;
  static_assert(kRanks == 16);
  const int thread = threadIdx.x % kGroup;
  cute::TiledMMA product =
      cute::make_tiled_mma(cute::SM90_64x16x16_F32BF16BF16_SS<Major::K, Major::K>{});
  const auto slice = product.get_slice(thread);
  const auto g = slice.make_fragment_A(
      slice.partition_A(cute::make_tensor(cute::make_smem_ptr(s.g), RowsOfG{})));
  const auto b = slice.make_fragment_B(
      slice.partition_B(cute::make_tensor(cute::make_smem_ptr(s.b), LayoutOfB<kSteps>{})));
  auto t = cute::partition_fragment_C(product, Shape<Int<kRows>, Int<kRanks>>{});

  Turn turn;
  s.b_full.wait(0);
  CUTLASS_PRAGMA_NO_UNROLL
  for (int tile = 0; tile < p.tiles; ++tile) {
    cute::clear(t);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int step = 0; step < kSteps; ++step, turn.Next()) {
      const int stage = turn.stage;
      s.g_full[stage].wait(turn.phase);
      cute::warpgroup_fence_operand(t);
      cute::warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kColumns / 16; ++k) {
        cute::gemm(product, g(_, _, k, stage), b(_, _, step * (kColumns / 16) + k), t);
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(t);
      if (thread == 0) s.g_empty[stage].arrive();
    }

    const int to = tile % kSweepBlocks, before = tile / kSweepBlocks;  // parts that it has had
    if (before > 0) s.parts_empty[to].wait((before - 1) % 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int half = i / 2, upper = i % 2;
      const int row = half * 64 + thread / 32 * 16 + upper * 8 + thread % 32 / 4;
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < kRanks / 8; ++n) {
        SendPair(t(cute::make_coord(0, upper, n), half, 0),
                 t(cute::make_coord(1, upper, n), half, 0),
                 &s.parts[block][row][n * 8 + thread % 4 * 2], &s.parts_full, to);
      }
    }
  }
}

// A warpgroup's part: dB of half of each stage's columns.
template <int kSteps>
__device__ void MultiplyDb(const Params<kSteps>& p, Storage<kSteps>& s, int block, int half) {
  using cute::GMMA::Major;
  const int thread = threadIdx.x % kGroup;
  cute::TiledMMA product =
      cute::make_tiled_mma(cute::SM90_64x32x16_F32BF16BF16_SS<Major::MN, Major::K>{});
  const auto slice = product.get_slice(thread);
  const auto columns = cute::make_tensor(cute::make_smem_ptr(s.g), ColumnsOfG{});
  const auto g = slice.make_fragment_A(slice.partition_A(columns(_, _, half, _)));
  const auto h = slice.make_fragment_B(
      slice.partition_B(cute::make_tensor(cute::make_smem_ptr(s.h), LayoutOfH{})));
  auto sums = cute::make_tensor<float>(cute::append(
      cute::shape(cute::partition_fragment_C(product, Shape<cute::_64, Int<2 * kRanks>>{})),
      Int<kSteps>{}));
  cute::clear(sums);

  Turn turn;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int tile = 0; tile < p.tiles; ++tile) {
    s.h_full[tile % 2].wait(tile / 2 % 2);
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kSteps; ++step, turn.Next()) {
      const int stage = turn.stage;
      s.g_full[stage].wait(turn.phase);
      cute::warpgroup_fence_operand(sums);
      cute::warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kRows / 16; ++k) {
        cute::gemm(product, g(_, _, k, stage), h(_, _, k, tile % 2), sums(_, _, _, step));
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(sums);
      if (thread == 0) s.g_empty[stage].arrive();
    }
    if (thread == 0) s.h_empty[tile % 2].arrive();
  }

  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kRanks / 4; ++i) {
      const int j = i % 2, upper = i / 2 % 2, n = i / 4;
      const int column = (block * kSteps + step) * kColumns + half * 64 + thread / 32 * 16 +
                         upper * 8 + thread % 32 / 4;
      const int rank = n * 8 + thread % 4 * 2 + j;
      if (column >= p.columns || rank >= p.ranks) continue;
      const float sum = sums(cute::make_coord(j, upper, n), 0, 0, step) +              // hi
                        sums(cute::make_coord(j, upper, n + kRanks / 8), 0, 0, step);  // lo
      p.db[int64_t{rank} * p.columns + column] = Rounded<__nv_bfloat16>(p.db_scaling * sum);
    }
  }
}

template <int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    SweepKernel(const __grid_constant__ Params<kSteps> p) {
  extern __shared__ __align__(1024) char memory[];
  auto& s = *reinterpret_cast<Storage<kSteps>*>(memory);
  const int group = threadIdx.x / kGroup, block = blockIdx.x;
  if (threadIdx.x / 32 == 1) StartProduct(p.done, p.tiles);
  if (threadIdx.x == 0) {
    for (Full& barrier : s.g_full) barrier.init(1);
    s.b_full.init(1);
    s.parts_full.init(1);
    for (Barrier& barrier : s.g_empty) barrier.init(kMultiplying);
    for (Barrier& barrier : s.h_full) barrier.init(kHelpers);
    for (Barrier& barrier : s.h_empty) barrier.init(kHalves);
    for (Barrier& barrier : s.parts_empty) barrier.init(1);
    cutlass::arch::fence_barrier_init();
    s.parts_full.arrive_and_expect_tx(sizeof(s.parts));
  }
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();  // all blocks' barriers are ready

  // dB's sums alone are 128 registers of a thread, of 128 that each has as they start.
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<72>();
    if (threadIdx.x == 0) {
      Fetch(p, s, block);
    } else if (threadIdx.x >= 32) {
      const int thread = threadIdx.x - 32;
      for (int tile = 0; tile <= p.tiles; ++tile) {
        if (tile < p.tiles) SplitH(p, s, tile, thread);
        if (tile > 0 && (tile - 1) % kSweepBlocks == block) AddUp(p, s, tile - 1, thread);
      }
    }
    __syncwarp();
  } else if (group == 1) {
    cutlass::arch::warpgroup_reg_dealloc<72>();
    MultiplyT(p, s, block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<184>();
    MultiplyDb(p, s, block, group - 2);
  }
  // A block's memory and barriers stay until nobody sends to them any more.
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

template <int kSteps>
cudaError_t LaunchSteps(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad,
                        unsigned* done, cudaStream_t stream) {
  const int m = static_cast<int>(gemm.m), n = static_cast<int>(gemm.k),
            r = static_cast<int>(gemm.r);
  const Params<kSteps> params = {CopyOfG(gemm.x, m, n),
                                 CopyOfB<kSteps>(shrink.a, r, n),
                                 m,
                                 n,
                                 r,
                                 static_cast<int>(CeilDiv(m, kRows)),
                                 shrink.scaling,
                                 shrink.h16_scaling,
                                 grad.scaling,
                                 grad.h,
                                 shrink.h,
                                 shrink.h16,
                                 static_cast<__nv_bfloat16*>(grad.gradient),
                                 done};
  return Launch(SweepKernel<kSteps>, dim3(kSweepBlocks), kThreads, sizeof(Storage<kSteps>), stream,
                false, kSweepBlocks, params);
}

}  // namespace

cudaError_t LaunchSweepBeside(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad,
                              unsigned* done, cudaStream_t stream) {
  static_assert(SweepSteps(kSweepMostColumns) * kColumns * kSweepBlocks == kSweepMostColumns);
  return SweepSteps(gemm.k) == 6 ? LaunchSteps<6>(gemm, shrink, grad, done, stream)
                                 : LaunchSteps<8>(gemm, shrink, grad, done, stream);
}

}  // namespace jax_fused_lora
