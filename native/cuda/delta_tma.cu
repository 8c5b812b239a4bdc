// y = s·(x·A)·B alone for more rows of 16-bit types, from Hopper on: see delta.cuh.
//
// What takes time is to read x and to write y. A block has up to 32 or 64 rows. The copy engine
// brings x and A, through a ring of stages; the warps share a stage's rows and depth, and add their
// sums up at the end. Where the tiles are few two or four blocks, a cluster, have one: each sums
// its part of the depth, sends the sums to all, and writes its part of y. h lies in shared memory
// as pairs (see delta_mma.cuh), and each warp writes y of 64 columns at a time, for which it holds
// B in registers.
//
// x is read from its end to its beginning: if it is what a kernel like this has just written, its
// last columns are still in the L2 cache (an H200, 8192 rows of 4096→4096, chained: 35.6 µs, from
// its beginning 39.9, a copy 33.4).
#include <climits>

#include "native/cuda/delta.cuh"
#include "native/cuda/delta_mma.cuh"
#include "native/cuda/tma.cuh"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 64;    // of y, a warp at a time
constexpr int kSwizzled = 64;   // of the depth, 128 bytes, that the copy engine swizzles
constexpr int kDepths = 128;    // the depth is a multiple of
constexpr int kMostStages = 8;  // of the ring
using Tiles = Ring<kWarps>;

template <class Element, bool transposed, int ranks, int rows>
struct Tile {
  using E = Element;
  static constexpr bool kTransposed = transposed;
  static constexpr int kRanks = ranks, kRows = rows;
  // Of a stage. A step has some 250 cycles of its own, but there have to be a few stages.
  static constexpr int kDepth = kRows * kRanks <= 32 * 16 ? 256 : 128;
  static constexpr int kRowBlocks = kRows / 16, kShares = kWarps / kRowBlocks;  // of the depth
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kXBytes + kRanks * kDepth * 2;
  // A as it lies, in one run. Wider rows would share banks, and are swizzled.
  static constexpr bool kRun = !kTransposed && kRanks <= 16;
  static constexpr int kSumsStride = kRanks + 4;  // floats
  static constexpr int kSums = kRows * kRanks;
  static constexpr int kSteps = (kRanks + 15) / 16;  // of the product with B
  // What lies in the stages' place when they are read.
  static constexpr int kSharesBytes = kShares * kRows * kSumsStride * 4;
  static constexpr int kPairsBytes = kRows * (kSteps * 4 + 1) * 16;

  // Bytes for what the blocks of a cluster send, and how many stages have room beside that.
  static constexpr int ArrivedBytes(int parts) { return parts > 1 ? parts * kSums * 4 : 0; }
  static constexpr int Stages(int parts) {
    return std::min(kMostStages, (kTmaShared - ArrivedBytes(parts)) / kStageBytes);
  }
  static_assert(Stages(1) > Tiles::kBehind);
  static_assert(kSharesBytes + kPairsBytes <= Tiles::kBehind * kStageBytes);
};

struct TileArguments {
  DeltaArguments delta;
  int rows;  // of a tile, kRows at most
  int parts, stages;
};

// A warp's share of a stage, of whose depth `depths` exist.
template <class T>
__device__ inline void MultiplyStage(float (&sums)[T::kRanks / 8][4], const char* stage, int depths,
                                     int warp, int lane) {
  constexpr int kRanks = T::kRanks, kShareDepth = T::kDepth / T::kShares;
  const int row = warp % T::kRowBlocks * 16 + lane % 16;
  const int first = warp / T::kRowBlocks * kShareDepth;
  if (first >= depths) return;
  const char* const a = stage + T::kXBytes;
  // Where 8 of the depth of a row lie that is swizzled, and 8 ranks of a row of A.
  const auto along = [](const char* rows, int count, int row, int depth) {
    return rows + (depth / kSwizzled * count + row) * 128 +
           ((depth % kSwizzled / 8) ^ row % 8) * 16;
  };
  const auto across = [&](int depth, int rank) {
    const int mask = T::kRun ? 0 : kRanks == 32 ? depth / 2 % 4 : depth % 8;
    return a + depth * kRanks * 2 + ((rank / 8) ^ mask) * 16;
  };
#pragma unroll
  for (int k = 0; k < kShareDepth; k += 32) {
    const int depth = first + k;
    uint32_t x[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      LoadBlocks(x[step], along(stage, T::kRows, row, depth + step * 16 + lane / 16 * 8));
    }
    const auto multiply = [&](int step, int block, uint32_t low, uint32_t high) {
      Multiply<typename T::E>(sums[block], x[step][0], x[step][1], x[step][2], x[step][3], low,
                              high);
    };
    if constexpr (kRanks == 8) {
      uint32_t of_a[4];
      if constexpr (T::kTransposed) {
        LoadBlocks(of_a, along(a, kRanks, lane % 8, depth + lane / 8 * 8));
      } else {
        LoadBlocksTransposed(of_a, across(depth + lane, 0));
      }
      multiply(0, 0, of_a[0], of_a[1]);
      multiply(1, 0, of_a[2], of_a[3]);
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int rank = 0; rank < kRanks; rank += 16) {
          uint32_t of_a[4];
          if constexpr (T::kTransposed) {
            LoadBlocks(of_a, along(a, kRanks, rank + lane / 16 * 8 + lane % 8,
                                   depth + step * 16 + lane / 8 % 2 * 8));
          } else {
            LoadBlocksTransposed(of_a, across(depth + step * 16 + lane % 16, rank + lane / 16 * 8));
          }
          multiply(step, rank / 8, of_a[0], of_a[1]);
          multiply(step, rank / 8 + 1, of_a[2], of_a[3]);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    DeltaTmaKernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap a,
                   const __grid_constant__ TileArguments arguments) {
#if __CUDA_ARCH__ >= 900  // the others never get it
  using E = typename T::E;
  constexpr int kRanks = T::kRanks, kRows = T::kRows;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Tiles::Barriers barriers[kMostStages];
  __shared__ uint64_t exchange_barrier;
  __shared__ float row_scaling[kRows];
  const DeltaArguments& p = arguments.delta;
  const int parts = arguments.parts, stages = arguments.stages;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int first_row = tile * arguments.rows, rows = min(p.rows - first_row, arguments.rows);
  if (tid == 0) Tiles::Init(barriers, stages);
  if (tid == 32) {
    PrefetchMap(x);
    if (!T::kRun) PrefetchMap(a);
  }
  const Exchange exchange(&exchange_barrier, rows * kRanks * 4 * parts);
  __syncthreads();  // the barriers are there

  // This block's part of the depth, of which it takes the last first.
  const int all_steps = (p.in + T::kDepth - 1) / T::kDepth;
  const int first_step = all_steps * part / parts;
  const int steps = all_steps * (part + 1) / parts - first_step;
  const auto depth_of = [&](int i) { return (first_step + steps - 1 - i) * T::kDepth; };
  const auto copy = [&](int i, int stage, uint32_t barrier) {
    const int depth = depth_of(i), depths = min(T::kDepth, p.in - depth);
    char* const to = memory + stage * T::kStageBytes;
    char* const to_a = to + T::kXBytes;
    ArriveExpecting(barrier, depths * (arguments.rows + kRanks) * 2);
#pragma unroll
    for (int k = 0; k < T::kDepth; k += kSwizzled) {
      if (k >= depths) break;
      CopyBox(to + k * kRows * 2, x, first_row, depth + k, barrier);
      if constexpr (T::kTransposed) CopyBox(to_a + k * kRanks * 2, a, 0, depth + k, barrier);
      if constexpr (!T::kTransposed && !T::kRun) {
        CopyBox(to_a + k * kRanks * 2, a, depth + k, 0, barrier);
      }
    }
    if constexpr (T::kRun) {
      CopyRun(to_a, static_cast<const E*>(p.a) + static_cast<int64_t>(depth) * kRanks,
              depths * kRanks * 2, barrier);
    }
  };
  Tiles tiles(barriers, stages, steps, copy);

  // Its strips of y, its warps in turns; of the first B at once, if there is room for it.
  constexpr bool kAhead = kRanks <= 32;
  const int strips = p.out / kColumns, end = strips * (part + 1) / parts;
  int strip = strips * part / parts + warp;
  BlockOfB<E, T::kTransposed, kRanks> ahead[T::kSteps];
  const auto load_b = [&] {
    if (strip >= end) return;
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
      ahead[step].Load(static_cast<const E*>(p.b), p.out, step * 16 + t * 4,
                       strip * kColumns + g / 2 * 8 + g % 2 * 32);
    }
  };
  if constexpr (kAhead) load_b();

  float sums[kRanks / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const int stage = tiles.Wait(i, copy);
    MultiplyStage<T>(sums, memory + stage * T::kStageBytes, p.in - depth_of(i), warp, lane);
    tiles.Release();
  }
  __syncthreads();  // all stages are read

  float* const shares = reinterpret_cast<float*>(memory);
  auto& pairs = *reinterpret_cast<uint4(*)[kRows][T::kSteps * 4 + 1]>(memory + T::kSharesBytes);
  float* const arrived = reinterpret_cast<float*>(memory + stages * T::kStageBytes);
  {
    const int row = warp / T::kRowBlocks * kRows + warp % T::kRowBlocks * 16 + g;
    float* const to = shares + row * T::kSumsStride + t * 2;
#pragma unroll
    for (int j = 0; j < kRanks / 8; ++j) {
      *reinterpret_cast<float2*>(to + j * 8) = make_float2(sums[j][0], sums[j][1]);
      *reinterpret_cast<float2*>(to + 8 * T::kSumsStride + j * 8) =
          make_float2(sums[j][2], sums[j][3]);
    }
  }
  exchange.Begin();
  __syncthreads();  // all shares are there

  // A thread has four ranks of a row at a time.
  constexpr int kLanes = kRanks / 4, kRowsApart = kThreads / kLanes;
  const int quad = tid % kLanes, rank = quad * 4;
  const auto sum_of_shares = [&](int row) {
    return SumShares<T::kShares>(T::kShares, [&](int share) {
      return shares + (share * kRows + row) * T::kSumsStride + rank;
    });
  };
  if (parts > 1) {
    for (int row = tid / kLanes; row < rows; row += kRowsApart) {
      const float4 sum = sum_of_shares(row);
      for (int to = 0; to < parts; ++to) {
        exchange.Send({sum.x, sum.y, sum.z, sum.w}, arrived + part * T::kSums + row * kRanks + rank,
                      to);
      }
    }
    exchange.Wait();
  }
  const int tells_from = rows * part / parts, tells_to = rows * (part + 1) / parts;
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsApart) {
    const int row = first + tid / kLanes;
    if (kRows < kRowsApart && row >= kRows) break;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < rows) {
      sum = parts > 1
                ? SumShares<kMostParts>(
                      parts, [&](int i) { return arrived + i * T::kSums + row * kRanks + rank; })
                : sum_of_shares(row);
    }
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (float& value : values) value *= p.shrink_scaling;
    if (p.h != nullptr && row >= tells_from && row < tells_to) {
      *reinterpret_cast<float4*>(p.h + static_cast<int64_t>(first_row + row) * kRanks + rank) =
          make_float4(values[0], values[1], values[2], values[3]);
    }
    const float scaling = ScaleRow<E, kLanes>(values, p.expand_scaling);
    if (quad == 0) row_scaling[row] = scaling;
    alignas(16) E pair[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) Split(values[i], pair + i, pair + 4 + i);
    pairs[row][quad] = *reinterpret_cast<uint4*>(pair);
    if (kRanks < 16) pairs[row][2 + quad] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();  // h is whole

#pragma unroll 1
  while (strip < end) {
    E* const y = static_cast<E*>(p.y) + static_cast<int64_t>(first_row) * p.out + strip * kColumns;
    if constexpr (!kAhead) load_b();
    uint32_t b[T::kSteps][8][2];
#pragma unroll
    for (int step = 0; step < T::kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        b[step][j][0] = ahead[step].Ranks(0, j), b[step][j][1] = ahead[step].Ranks(1, j);
      }
    }
    strip += kWarps;
    if constexpr (kAhead) load_b();
#pragma unroll 1
    for (int row = g; row - g < rows; row += 16) {
      float sums[8][4] = {};
#pragma unroll
      for (int step = 0; step < T::kSteps; ++step) {
        const uint4 upper = pairs[row][step * 4 + t], lower = pairs[row + 8][step * 4 + t];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Multiply<E>(sums[j], upper.x, lower.x, upper.y, lower.y, b[step][j][0], b[step][j][1]);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Multiply<E>(sums[j], upper.z, lower.z, upper.w, lower.w, b[step][j][0], b[step][j][1]);
        }
      }
      StoreRows<E>(sums, row_scaling, row, rows,
                   [&](int row) { return y + row * static_cast<int64_t>(p.out) + t * 8; });
    }
  }
#endif
}

struct Plan {
  int64_t rows;  // of a tile
  int parts;
};

// As many tiles as run at once, one or two blocks on each multiprocessor, or whole rounds of these.
// Four blocks a tile for up to 1920 rows are worth their exchange where rows are long (an H200,
// rank 16, chains, µs with two and with four: 1536 rows of 4096→4096 11.1 and 10.2, of
// 2048→2048 7.1 and 7.2, of 1024→1024 5.2 and 5.7).
Plan PlanOf(const Sizes& sizes, int64_t multiprocessors) {
  const bool exchanges_more = sizes.in + sizes.out > 4096 && sizes.rank <= 32;
  const struct {
    int parts;
    int64_t tiles, most_rows;
  } plans[] = {{4, kDeltaBlocks / 4, exchanges_more ? 64 : 32},
               {2, multiprocessors / 2, 32},
               {2, multiprocessors, 64}};
  for (const auto& plan : plans) {
    if (sizes.rows <= plan.tiles * plan.most_rows) {
      return {CeilDiv(sizes.rows, plan.tiles), plan.parts};
    }
  }
  const int64_t rounds = CeilDiv(sizes.rows, 2 * multiprocessors * 64);
  return {CeilDiv(sizes.rows, 2 * multiprocessors * rounds), 1};
}

template <class T>
cudaError_t LaunchTile(cudaStream_t stream, const Pass& pass, const Plan& plan) {
  const Sizes& sizes = pass.sizes;
  int parts = plan.parts;
  while (T::Stages(parts) <= Tiles::kBehind) parts /= 2;
  const int rows = static_cast<int>(plan.rows), stages = T::Stages(parts);
  CUtensorMap x, a = {};
  bool mapped = MapBoxes(pass.element, pass.x, sizes.rows, sizes.in, rows, kSwizzled, &x);
  if constexpr (!T::kRun) {
    const int64_t a_rows = T::kTransposed ? T::kRanks : sizes.in;
    const int64_t a_columns = T::kTransposed ? sizes.in : T::kRanks;
    const int box_rows = T::kTransposed ? T::kRanks : kSwizzled;
    const int box_columns = T::kTransposed ? kSwizzled : T::kRanks;
    mapped =
        mapped && MapBoxes(pass.element, pass.a.data, a_rows, a_columns, box_rows, box_columns, &a);
  }
  if (!mapped) return cudaErrorUnknown;
  const int64_t blocks = CeilDiv(sizes.rows, rows) * parts;
  const int shared = stages * T::kStageBytes + T::ArrivedBytes(parts);
  return Launch(DeltaTmaKernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream,
                false, parts, x, a, TileArguments{ArgumentsOf(pass), rows, parts, stages});
}

template <class E, bool kTransposed>
cudaError_t LaunchPart(cudaStream_t stream, const Pass& pass) {
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  const Plan plan = PlanOf(pass.sizes, gpu.multiprocessors);
  return DispatchRank(pass.sizes.rank, [&](auto rank) {
    constexpr int kRanks = decltype(rank)::value;
    return plan.rows <= 32 ? LaunchTile<Tile<E, kTransposed, kRanks, 32>>(stream, pass, plan)
                           : LaunchTile<Tile<E, kTransposed, kRanks, 64>>(stream, pass, plan);
  });
}

}  // namespace

bool DeltaTmaServes(const Pass& pass) {
  return pass.sizes.rows <= INT_MAX / 64 && DeltaTakesVectors(pass, kDepths, kColumns) &&
         Vectors(pass.h, pass.sizes.rank, 4) && HasTma();
}

cudaError_t LaunchDeltaTma(cudaStream_t stream, const Pass& pass) {
  return DispatchFactors(pass, [&](auto element, auto transposed) {
    return LaunchPart<decltype(element), decltype(transposed)::value>(stream, pass);
  });
}

}  // namespace jax_fused_lora
