// The gradients of A and B from many rows of bfloat16: as in grad.cu, but that the copy engine
// brings the tiles, two boxes of 64 columns of x and one of t, which it swizzles. (An H200, chains,
// µs of grad.cu's and of this: rank 16, 8192 rows of 4096 25.0 and 21.3, two gradients 44.7
// and 37.1, of 2048 rows 15.2 and 12.9, of 512 rows 7.2 and 6.6; rank 32, 8192 rows 31.1 and 28.3,
// but rank 64 43.4 and 48.)
#include <algorithm>

#include "native/cuda/grad.cuh"
#include "native/cuda/tma.cuh"

namespace jax_fused_lora {
namespace {

constexpr int64_t kFewestRows = 256, kMostRanks = 32;
constexpr int kRows = 64;  // of a tile
constexpr int kBoxColumns = 64, kMostStages = 8;
using Tiles = Ring<kGradWarps>;

template <int kRanks>
struct Layout : GradLayout<__nv_bfloat16, kRanks> {
  using Places = GradLayout<__nv_bfloat16, kRanks>;
  static_assert(Places::kColumns == 2 * kBoxColumns && Places::kM * 16 == kBoxColumns);
  static constexpr int kBox = kRows * kBoxColumns * 2, kX = 2 * kBox;  // bytes
  static constexpr int kStage = kX + kRows * kRanks * 4;
  static constexpr int kStages = std::min(kMostStages, kTmaShared / kStage);
  static_assert(kStages > Tiles::kBehind && kStages * kStage >= Places::kSums);
};

struct GradMaps {
  CUtensorMap x[kMostGrads], t[kMostGrads];
};

template <int kRanks>
__global__ void __launch_bounds__(kGradThreads, 2)
    GradTmaKernel(const __grid_constant__ GradMaps maps,
                  const __grid_constant__ GradArguments all) {
#if __CUDA_ARCH__ >= 900  // the others never get it
  using L = Layout<kRanks>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Tiles::Barriers barriers[L::kStages];
  LaunchDependents();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int place = warp % L::kPlaces, share = warp / L::kPlaces;
  const unsigned slice = blockIdx.y;
  const bool second = blockIdx.x >= all.parts[0].blocks;
  const unsigned block = blockIdx.x - (second ? all.parts[0].blocks : 0);
  const CUtensorMap& of_x = maps.x[second];
  const CUtensorMap& of_t = maps.t[second];
  if (tid == 0) {
    PrefetchMap(of_x);
    PrefetchMap(of_t);
    Tiles::Init(barriers, L::kStages);
    FenceBarriers();
  }
  __syncthreads();  // the barriers are there

  // A last slice may have no rows. A slice has whole tiles, but for the last rows of all, behind
  // which there are zeros.
  const int64_t begin = min(slice * all.slice_rows, all.rows);
  const int rows = static_cast<int>(min(begin + all.slice_rows, all.rows) - begin);
  const int steps = (rows + kRows - 1) / kRows;
  const auto copy = [&](int step, int stage, uint32_t barrier) {
    char* const to = memory + stage * L::kStage;
    const int row = static_cast<int>(begin) + step * kRows;
    const int column = static_cast<int>(block) * L::kColumns;
    ArriveExpecting(barrier, L::kStage);
    CopyBox(to, of_x, row, column, barrier);
    CopyBox(to + L::kBox, of_x, row, column + kBoxColumns, barrier);
    CopyBox(to + L::kX, of_t, row, 0, barrier);
  };
  Tiles tiles(barriers, L::kStages, steps, copy);

  Quads sums[L::kM][L::kJ] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = tiles.Wait(step, copy);
    const char* const x_tile =
        memory + stage * L::kStage + L::Column(place) / kBoxColumns * L::kBox;
    const char* const t_tile = memory + stage * L::kStage + L::kX;
#pragma unroll
    for (int i = 0; i < kRows; i += L::kShares * L::kStep) {
      const int first = i + share * L::kStep;
      if (step * kRows + first >= rows) break;
      const int x_row = first + lane / 16 * 8 + lane % 8;
      MultiplyHalves<L>(
          sums,
          [&](int row, int j) {
            const int own = first + row, rank = L::Rank(place) + j * 8 + lane / 4;
            const int mask = kRanks == 16 ? own / 2 % 4 : own % 8;
            return *reinterpret_cast<const float*>(t_tile + own * kRanks * 4 +
                                                   ((rank / 4) ^ mask) * 16 + rank % 4 * 4);
          },
          [&](int m) {
            const int chunk = m * 2 + lane / 8 % 2;
            return x_tile + x_row * 128 + (chunk ^ x_row % 8) * 16;
          },
          lane);
    }
    tiles.Release();
  }
  __syncthreads();  // the tiles are read
  FinishBlock<L, __nv_bfloat16>(all.parts[second], all.rank, slice, block, sums, place, share, lane,
                                memory);
#endif
}

}  // namespace

bool GradTmaServes(const GradArguments& all) {
  if (all.rows < kFewestRows || all.rows > 1 << 30 || all.rank % 4 != 0 || all.rank > kMostRanks) {
    return false;
  }
  for (const GradPart& part : all.parts) {
    if (part.blocks > 0 && !(part.x_vectors && part.t_vectors && part.in < 1 << 30)) return false;
  }
  return HasTma();
}

cudaError_t LaunchGradTma(cudaStream_t stream, const GradArguments& all, int64_t blocks) {
  const auto launch = [&](auto ranks) {
    using L = Layout<decltype(ranks)::value>;
    GradMaps maps = {};
    for (int i = 0; i < kMostGrads; ++i) {
      const GradPart& part = all.parts[i];
      if (part.blocks > 0 && !(MapBoxes(Element::kBfloat16, part.x, all.rows, part.in, kRows,
                                        kBoxColumns, &maps.x[i]) &&
                               MapBoxes(Element::kFloat32, part.t, all.rows, all.rank, kRows,
                                        decltype(ranks)::value, &maps.t[i]))) {
        return cudaErrorUnknown;
      }
    }
    return Launch(GradTmaKernel<decltype(ranks)::value>,
                  dim3(static_cast<unsigned>(blocks), all.slices), kGradThreads,
                  L::kStages * L::kStage, stream, false, 1, maps, all);
  };
  return all.rank <= 16 ? launch(std::integral_constant<int, 16>())
                        : launch(std::integral_constant<int, 32>());
}

}  // namespace jax_fused_lora
