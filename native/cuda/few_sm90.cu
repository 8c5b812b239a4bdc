// The adapted layer of few rows: y = x·W + bias + s·h·B with h = s·x·A, all in one kernel.
//
// So few rows do not keep the tensor cores busy; the time is what it takes to bring W to the
// multiprocessors, and each of them reads all of x beside it. So each computes h for itself: the
// tile of x that meets a tile of W meets one of A, too, which is 16 columns beside 64. The sums of
// h are already where a warpgroup's left operand may lie, in its registers, so the rank is two more
// wgmma for each 16 of them, and nobody waits for an h from elsewhere.
//
// A block has 64 columns of y and 64 or 128 rows, or 128 of each. Where that leaves half of the
// multiprocessors idle, two blocks, a cluster, share the depth. Each adds the rank's part of its
// own h, the product being linear; then they exchange halves of y, by registers: a thread of one
// block has what the same thread of the other has.
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

constexpr int kDepth = 64;  // of a tile
// Rows and ranks of any number of columns; and of more rows, as many columns as leave a tile of
// 128×128 two multiprocessors of an H100.
constexpr int64_t kMostRows = 128, kMostRanks = 64;
constexpr int64_t kMoreRows = 256, kMoreRanks = 32, kMoreColumns = 33 * 128;
constexpr int kMostShared = 227 * 1024;

template <class Element, int tile_rows, int tile_columns, int tile_ranks, bool transposed>
struct Few {
  static constexpr int kRows = tile_rows, kColumns = tile_columns, kRanks = tile_ranks;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutW = std::conditional_t<transposed, cutlass::layout::ColumnMajor, RowMajor>;
  static constexpr int kGroups = kRows / 64;          // warpgroups that multiply
  static constexpr int kBox = kRows == 64 ? 16 : 64;  // rows of x copied at a time
  static constexpr int kMultiply = kGroups * 128, kThreads = kMultiply + 32;
  // What a thread sends to the other block: half of its sums of y, and those of h.
  static constexpr int kHalf = kColumns / 4, kOfH = kRanks / 2;
  static constexpr int kStageBytes = (kRows + kColumns + kRanks) * kDepth * 2;
  static constexpr int kOtherBytes =
      kRanks * kColumns * 2 + (kHalf + kOfH) * 4 * kMultiply + 4 * 1024;
  static constexpr int kStages = std::min(12, (kMostShared - kOtherBytes) / kStageBytes);

  // CUTLASS calls the left operand (x) A and the right one, be it W, A or B, B.
  template <int columns, int depth>
  using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element, LayoutW,
      8, float, cute::Shape<Int<kRows>, Int<columns>, Int<depth>>,
      cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::collective::StageCount<kStages>,
      std::conditional_t<kGroups == 2, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecialized>>::CollectiveOp;
  using OfW = Collective<kColumns, kDepth>;
  // A box of x: a part of the tile that lies there as one of its own would.
  using LayoutBox = decltype(cute::tile_to_shape(typename OfW::SmemLayoutAtomA{},
                                                 cute::Shape<Int<kBox>, Int<kDepth>>{}));
  using CopyX = decltype(cute::make_tma_copy(
      cute::SM90_TMA_LOAD{},
      cute::make_tensor(
          static_cast<const Element*>(nullptr),
          cute::make_layout(cute::Shape<int, int>{}, cute::Stride<int64_t, cute::_1>{})),
      LayoutBox{}));
  using OfA = Collective<kRanks, kDepth>;
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
    alignas(1024) Element a[kStages * kRanks * kDepth];
    alignas(1024) Element b[kRanks * kColumns];
    float4 exchange[(kHalf + kOfH) / 4][kMultiply];
    cutlass::arch::ClusterTransactionBarrier filled[kStages], b_filled;
    cutlass::arch::ClusterBarrier read[kStages];
  };
  static_assert(sizeof(Storage) <= kMostShared);

  struct Params {
    CopyX x;
    typename OfW::Params::TMA_B w;
    typename OfA::Params::TMA_B a;
    typename OfB::Params::TMA_B b;
    int rows, in, out, rank, parts;  // of a cluster
    float scaling, h16_scaling;
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

template <class Few>
__global__ void __launch_bounds__(Few::kThreads, 1)
    FewKernel(const __grid_constant__ typename Few::Params p) {
  using namespace cute;
  using OfW = typename Few::OfW;
  using OfA = typename Few::OfA;
  using OfB = typename Few::OfB;
  using Element = typename OfW::ElementA;
  constexpr int kRows = Few::kRows, kColumns = Few::kColumns, kRanks = Few::kRanks;
  constexpr int kStages = Few::kStages;
  extern __shared__ __align__(1024) char memory[];
  auto& storage = *reinterpret_cast<typename Few::Storage*>(memory);
  const int thread = threadIdx.x;
  const bool fetches = thread >= Few::kMultiply;
  const int part = p.parts == 2 ? blockIdx.x % 2 : 0;
  const int column_tile = p.parts == 2 ? blockIdx.x / 2 : blockIdx.x;
  const int row_tile = blockIdx.y;
  const int all_tiles = (p.in + kDepth - 1) / kDepth, share = (all_tiles + p.parts - 1) / p.parts;
  const int first = part * share, tiles = max(0, min(share, all_tiles - first));
  // Boxes of x that have rows. What lies where the others would be meets only rows of y that nobody
  // writes.
  const int boxes = min(kRows / Few::kBox, (p.rows - row_tile * kRows + Few::kBox - 1) / Few::kBox);
  // The last one begins earlier and brings rows again: zeros for what lies beyond the rows take
  // longer to copy than rows do (160 rows of 4096: 31.7 → 22.6 µs; 96 rows: 19.2 → 17.5).
  const auto row_of_box = [&](int box) {
    return max(0, min(row_tile * kRows + box * Few::kBox, p.rows - Few::kBox));
  };

  if (thread == Few::kMultiply) {
    prefetch_tma_descriptor(p.w.get_tma_descriptor());
    prefetch_tma_descriptor(p.x.get_tma_descriptor());
    prefetch_tma_descriptor(p.a.get_tma_descriptor());
    prefetch_tma_descriptor(p.b.get_tma_descriptor());
    for (int i = 0; i < kStages; ++i) {
      storage.filled[i].init(1);
      storage.read[i].init(Few::kGroups);
    }
    storage.b_filled.init(1);
    cutlass::arch::fence_barrier_init();
  }
  if (p.parts == 2) cute::cluster_arrive_relaxed();  // this block has begun
  __syncthreads();                                   // the barriers are there

  if (fetches) {
    if (thread == Few::kMultiply) {
      // The tiles of a matrix, of which this block wants column `j`: (columns, depth, k).
      const auto tiles_of = [&](const auto& tma, int columns, int depth, auto shape, int j) {
        Tensor all = tma.get_tma_tensor(make_shape(columns, depth, 1));
        return local_tile(all, shape, make_coord(j, _, 0));
      };
      const auto copy_x = p.x.get_slice(_0{});
      const auto copy_w = p.w.get_slice(_0{});
      const auto copy_a = p.a.get_slice(_0{});
      const auto copy_b = p.b.get_slice(_0{});
      Tensor from_w = copy_w.partition_S(
          tiles_of(p.w, p.out, p.in, Shape<Int<kColumns>, Int<kDepth>>{}, column_tile));
      Tensor from_a =
          copy_a.partition_S(tiles_of(p.a, p.rank, p.in, Shape<Int<kRanks>, Int<kDepth>>{}, 0));
      Tensor from_b = copy_b.partition_S(
          tiles_of(p.b, p.out, p.rank, Shape<Int<kColumns>, Int<kRanks>>{}, column_tile));
      Tensor all_x = p.x.get_tma_tensor(make_shape(p.rows, p.in));
      Tensor to_w =
          copy_w.partition_D(make_tensor(make_smem_ptr(storage.w), typename OfW::SmemLayoutB{}));
      Tensor to_a =
          copy_a.partition_D(make_tensor(make_smem_ptr(storage.a), typename OfA::SmemLayoutB{}));
      Tensor to_b =
          copy_b.partition_D(make_tensor(make_smem_ptr(storage.b), typename OfB::SmemLayoutB{}));
      const auto barrier_of = [](auto& barrier) -> uint64_t& {
        return *reinterpret_cast<uint64_t*>(&barrier);
      };
      const int bytes = Few::kStageBytes - (kRows - boxes * Few::kBox) * kDepth * 2;
      int stage = 0, turn = 0;
      for (int i = 0; i < tiles; ++i) {
        if (turn > 0) storage.read[stage].wait((turn - 1) % 2);
        storage.filled[stage].arrive_and_expect_tx(bytes);
        uint64_t& barrier = barrier_of(storage.filled[stage]);
        copy(p.w.with(barrier, 0), from_w(_, _, _, first + i), to_w(_, _, _, stage));
        CUTLASS_PRAGMA_UNROLL
        for (int box = 0; box < kRows / Few::kBox; ++box) {
          if (box >= boxes) break;
          Tensor from = domain_offset(make_coord(row_of_box(box), (first + i) * kDepth), all_x);
          Element* const to = storage.x + (stage * kRows + box * Few::kBox) * kDepth;
          copy(p.x.with(barrier, 0),
               copy_x.partition_S(
                   local_tile(from, Shape<Int<Few::kBox>, Int<kDepth>>{}, make_coord(0, 0))),
               copy_x.partition_D(make_tensor(make_smem_ptr(to), typename Few::LayoutBox{})));
        }
        copy(p.a.with(barrier, 0), from_a(_, _, _, first + i), to_a(_, _, _, stage));
        if (i == 0) {
          storage.b_filled.arrive_and_expect_tx(kRanks * kColumns * 2);
          copy(p.b.with(barrier_of(storage.b_filled), 0), from_b(_, _, _, 0), to_b(_, _, _, 0));
        }
        if (++stage == kStages) stage = 0, ++turn;
      }
    }
    __syncwarp();
    if (p.parts == 2) {  // as the others
      cute::cluster_wait();
      cute::cluster_arrive();
      cute::cluster_wait();
    }
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
  int stage = 0, turn = 0;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = 0; i < tiles; ++i) {
    storage.filled[stage].wait(turn % 2);
    warpgroup_fence_operand(y);
    warpgroup_fence_operand(h);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kDepth / 16; ++step) {
      gemm(multiply_w, x_for_w(_, _, step, stage), w(_, _, step, stage), y);
      gemm(multiply_a, x_for_a(_, _, step, stage), a(_, _, step, stage), h);
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();  // the stage before is read
    warpgroup_fence_operand(y);
    warpgroup_fence_operand(h);
    if (i > 0 && thread % 128 == 0) storage.read[stage == 0 ? kStages - 1 : stage - 1].arrive();
    if (++stage == kStages) stage = 0, ++turn;
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(y);
  warpgroup_fence_operand(h);

  // h = scaling · x·A, of ranks that are: an infinite x times the zeros beyond them is NaN. A
  // thread has rows g and g + 8 and, of each 8 ranks, two neighbouring ones.
  const int g = thread % 32 / 4, t = thread % 4;
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

  // The first block of a cluster ends with the first half of y and with h, the second with the
  // second half.
  const int in_tile = thread / 32 * 16, box = in_tile / Few::kBox;
  const int64_t first_row = (box < boxes ? row_of_box(box) : p.rows) + in_tile % Few::kBox + g;
  const bool tells_h = column_tile == 0 && part == 0;
  if (p.parts == 2) {
    cute::cluster_wait();  // the other block has begun
    const uint32_t own = SharedAddress(&storage.exchange[0][thread]);
    const uint32_t there = cute::set_block_rank(own, part ^ 1);
    const auto send = [&](int i, float v0, float v1, float v2, float v3) {
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                       there + i * static_cast<int>(sizeof(storage.exchange[0]))),
                   "f"(v0), "f"(v1), "f"(v2), "f"(v3)
                   : "memory");
    };
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Few::kHalf; i += 4) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int j = half * Few::kHalf + i;
        if (half != part) send(i / 4, y(j), y(j + 1), y(j + 2), y(j + 3));
      }
    }
    if (column_tile == 0 && part == 1) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Few::kOfH; i += 4) {
        send((Few::kHalf + i) / 4, h(i), h(i + 1), h(i + 2), h(i + 3));
      }
    }
    cute::cluster_arrive();
    cute::cluster_wait();  // all is sent
    const auto add = [&](auto& sums, int j, int i) {
      const float4 other = storage.exchange[i][thread];
      sums(j) += other.x, sums(j + 1) += other.y, sums(j + 2) += other.z, sums(j + 3) += other.w;
    };
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Few::kHalf; i += 4) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (half == part) add(y, half * Few::kHalf + i, i / 4);
      }
    }
    if (tells_h) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Few::kOfH; i += 4) add(h, i, (Few::kHalf + i) / 4);
    }
  }

  using Number =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  CUTLASS_PRAGMA_UNROLL
  for (int block = 0; block < kColumns / 8; ++block) {
    if (p.parts == 2 && block / (kColumns / 16) != part) continue;
    const int column = column_tile * kColumns + block * 8 + t * 2;
    if (column >= p.out) continue;
    float bias[2] = {};
    if (p.bias != nullptr) {
      bias[0] = static_cast<float>(p.bias[column]);
      bias[1] = static_cast<float>(p.bias[column + 1]);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + half * 8;
      if (row >= p.rows) continue;
      alignas(4) Number pair[2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) pair[j] = Rounded<Number>(y(block * 4 + half * 2 + j) + bias[j]);
      *reinterpret_cast<uint32_t*>(p.y + row * p.out + column) = *reinterpret_cast<uint32_t*>(pair);
    }
  }
  if (tells_h) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(h); ++i) {
      const int64_t row = first_row + i / 2 % 2 * 8;
      const int rank = i / 4 * 8 + t * 2 + i % 2;
      if (row < p.rows && rank < p.rank) p.h[row * p.rank + rank] = h(i);
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

template <class Element, int kRows, int kColumns, int kRanks, bool transposed>
cudaError_t LaunchFew(const Gemm& gemm, const GemmShrink& shrink, int multiprocessors,
                      cudaStream_t stream) {
  using Own = Few<Element, kRows, kColumns, kRanks, transposed>;
  using OfW = typename Own::OfW;
  const int m = static_cast<int>(gemm.m), k = static_cast<int>(gemm.k),
            n = static_cast<int>(gemm.n), r = static_cast<int>(gemm.r);
  auto x = cute::make_tensor(
      static_cast<const Element*>(gemm.x),
      cute::make_layout(cute::make_shape(m, k), cute::make_stride(gemm.k, cute::_1{})));
  const int64_t column_tiles = CeilDiv(gemm.n, kColumns), row_tiles = CeilDiv(gemm.m, kRows);
  const int parts = column_tiles * row_tiles * 2 <= multiprocessors ? 2 : 1;
  const typename Own::Params params = {
      cute::make_tma_copy(cute::SM90_TMA_LOAD{}, x, typename Own::LayoutBox{}),
      RightOperand<OfW>(gemm.w, n, k, transposed ? gemm.k : gemm.n, typename OfW::TileShape{}),
      RightOperand<typename Own::OfA>(shrink.a, r, k, transposed ? gemm.k : gemm.r,
                                      typename Own::OfA::TileShape{}),
      RightOperand<typename Own::OfB>(gemm.b, n, r, transposed ? gemm.r : gemm.n,
                                      typename Own::OfB::TileShape{}),
      m,
      k,
      n,
      r,
      parts,
      shrink.scaling,
      shrink.h16_scaling,
      shrink.h,
      static_cast<const Element*>(gemm.bias),
      static_cast<Element*>(gemm.y)};
  return Launch(FewKernel<Own>,
                dim3(static_cast<unsigned>(column_tiles * parts), static_cast<unsigned>(row_tiles)),
                Own::kThreads, sizeof(typename Own::Storage), stream, false, parts, params);
}

template <class Element, bool transposed>
cudaError_t LaunchTile(const Gemm& gemm, const GemmShrink& shrink, int multiprocessors,
                       cudaStream_t stream) {
  const auto with_ranks = [&](auto rows, auto columns) {
    const auto launch = [&](auto ranks) {
      return LaunchFew<Element, decltype(rows)::value, decltype(columns)::value,
                       decltype(ranks)::value, transposed>(gemm, shrink, multiprocessors, stream);
    };
    if (gemm.r <= 16) return launch(Int<16>{});
    return gemm.r <= 32 ? launch(Int<32>{}) : launch(Int<64>{});
  };
  if (gemm.m <= 64) return with_ranks(Int<64>{}, Int<64>{});
  // Wide ones read x half as often (256 rows of 4096: 23.2 µs, not 24.9), narrow ones fill the GPU
  // where there are few (256 rows of 2048: 9.9, not 12.5).
  const bool wide =
      gemm.m > kMostRows && CeilDiv(gemm.m, 128) * CeilDiv(gemm.n, 64) * 2 > multiprocessors;
  return wide ? with_ranks(Int<128>{}, Int<128>{}) : with_ranks(Int<128>{}, Int<64>{});
}

}  // namespace

bool FewSm90Serves(const Gemm& gemm, const GemmShrink& shrink) {
  const bool some = gemm.m <= kMostRows && gemm.r <= kMostRanks;
  const bool more = gemm.m <= kMoreRows && gemm.r <= kMoreRanks && gemm.n <= kMoreColumns;
  return (some || more) && gemm.r > 0 && gemm.r % 8 == 0 &&
         reinterpret_cast<uintptr_t>(shrink.a) % 16 == 0 && GemmSm90Serves(gemm);
}

cudaError_t FewSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream) {
  using cutlass::bfloat16_t, cutlass::half_t;
  if (!FewSm90Serves(gemm, shrink)) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  if (gemm.transposed) {
    return gemm.bf16 ? LaunchTile<bfloat16_t, true>(gemm, shrink, multiprocessors, stream)
                     : LaunchTile<half_t, true>(gemm, shrink, multiprocessors, stream);
  }
  return gemm.bf16 ? LaunchTile<bfloat16_t, false>(gemm, shrink, multiprocessors, stream)
                   : LaunchTile<half_t, false>(gemm, shrink, multiprocessors, stream);
}

}  // namespace jax_fused_lora
