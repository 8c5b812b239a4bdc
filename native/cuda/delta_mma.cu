// y = s·(x·A)·B alone for some rows of 16-bit types, on tensor cores: see delta.cuh. A tile has 16
// rows.
//
// Operands go from memory to the registers that multiply them, 16 bytes a lane at a time where they
// lie so. That works because it is free which of the depth, the ranks and the columns play which
// part in a multiplication, as long as both factors agree: of 32 of the depth lane t of four has 8t
// to 8t + 7, of A's ranks lane g of eight has kBlocks neighbours, of each 16 ranks of B lane t has
// 4t to 4t + 3 and of 64 columns lane g 8 neighbours.
//
// h is float32, and multiplies B as the sum of two 16-bit numbers, as in thin.cu.
#include "native/cuda/delta.cuh"
#include "native/cuda/delta_mma.cuh"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16, kDepth = 32, kColumns = 64;
constexpr int64_t kMostRows = 480;  // more do not run at once

// A lane's part of 32 of the depth: 8 of rows g and g + 8 of x, and at each kBlocks ranks of A.
template <class E, bool kTransposed, int kBlocks>
struct Group {
  uint4 x[2];
  uint32_t a[kBlocks * 4];

  __device__ void Load(const E* upper, const E* lower, const E* factor, int in) {
    x[0] = __ldg(reinterpret_cast<const uint4*>(upper));
    x[1] = __ldg(reinterpret_cast<const uint4*>(lower));
    if constexpr (kTransposed) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const uint4 depths = __ldg(reinterpret_cast<const uint4*>(factor + j * in));
#pragma unroll
        for (int i = 0; i < 4; ++i) a[j * 4 + i] = Word(depths, i);
      }
    } else if constexpr (kBlocks == 1) {
      const uint16_t* const from = reinterpret_cast<const uint16_t*>(factor);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = __ldg(from + i * 2 * 8), high = __ldg(from + (i * 2 + 1) * 8);
        a[i] = low | high << 16;
      }
    } else {
      using Ranks = std::conditional_t<kBlocks == 2, uint32_t,
                                       std::conditional_t<kBlocks == 4, uint2, uint4>>;
#pragma unroll
      for (int depth = 0; depth < 8; ++depth) {
        const Ranks ranks = __ldg(reinterpret_cast<const Ranks*>(factor + depth * kBlocks * 8));
        memcpy(a + depth * (kBlocks / 2), &ranks, sizeof(ranks));
      }
    }
  }

  // A at `depth` and the next, of rank j of the lane's.
  __device__ uint32_t Depths(int depth, int j) const {
    if constexpr (kTransposed || kBlocks == 1) {
      return a[j * 4 + depth / 2];
    } else {
      constexpr int kWords = kBlocks / 2;
      return __byte_perm(a[depth * kWords + j / 2], a[(depth + 1) * kWords + j / 2],
                         j % 2 ? 0x7632 : 0x5410);
    }
  }

  __device__ void Multiply(float (&sums)[kBlocks][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        jax_fused_lora::Multiply<E>(sums[j], Word(x[0], step * 2), Word(x[1], step * 2),
                                    Word(x[0], step * 2 + 1), Word(x[1], step * 2 + 1),
                                    Depths(step * 4, j), Depths(step * 4 + 2, j));
      }
    }
  }
};

// h of a row as the second product takes it: of each 4 ranks 4 hi and 4 lo. kLanes neighbours have
// the row.
template <class E, int kLanes, int kCount>
__device__ inline void StorePairs(const float (&values)[kCount], uint4* row, int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int rank = lane + i * kLanes;
    E* const to = reinterpret_cast<E*>(row + rank / 4) + rank % 4;
    Split(values[i], to, to + 4);
  }
}

template <int kRanks>
struct Shared {
  static constexpr int kQuads = (kRanks < 16 ? 16 : kRanks) / 4;
  float shares[kWarps][kRows * kRanks];
  float arrived[kMostParts][kRows * kRanks];
  uint4 pairs[kRows][kQuads + 1];
  float row_scaling[kRows];
  uint64_t barrier;
};

template <class E, bool kTransposed, int kRanks>
__global__ void __launch_bounds__(kThreads)
    DeltaMmaKernel(const __grid_constant__ DeltaArguments p) {
#if __CUDA_ARCH__ >= 900  // the others never get it
  constexpr int kBlocks = kRanks / 8, kSteps = (kRanks + 15) / 16, kAhead = 2;
  extern __shared__ __align__(16) char memory[];
  Shared<kRanks>& shared = *reinterpret_cast<Shared<kRanks>*>(memory);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x, first_row = blockIdx.z * kRows;
  const int rows = min(p.rows - first_row, kRows);
  const Exchange exchange(&shared.barrier, rows * kRanks * 4 * kMostParts);

  // This block's part of the depth, its warps in turns. A row that is not there is another once
  // more; what comes of it is not written.
  const int groups = p.in / kDepth, share = (groups + kMostParts - 1) / kMostParts;
  const int end = min((part + 1) * share, groups);
  int next = part * share + warp;
  const int depth = next * kDepth + t * 8;
  const auto row = [&](int row) {
    return static_cast<const E*>(p.x) +
           (first_row + min(row, rows - 1)) * static_cast<int64_t>(p.in) + depth;
  };
  const E *upper = row(g), *lower = row(g + 8);
  const E* factor = static_cast<const E*>(p.a) +
                    (kTransposed ? g * kBlocks * static_cast<int64_t>(p.in) + depth
                                 : depth * static_cast<int64_t>(kRanks) + g * kBlocks);
  Group<E, kTransposed, kBlocks> ahead[kAhead];
  const auto load = [&] {
    constexpr int kApart = kWarps * kDepth;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (next + u * kWarps >= end) break;
      ahead[u].Load(upper, lower, factor, p.in);
      upper += kApart, lower += kApart, factor += kApart * (kTransposed ? 1 : kRanks);
    }
  };
  load();

  // Its strips of y, the warps of all blocks in turns; of the first B at once.
  const int strips = p.out / kColumns, strips_apart = kWarps * gridDim.y * kMostParts;
  int strip = (blockIdx.y * kWarps + warp) * kMostParts + part;
  BlockOfB<E, kTransposed, kRanks> b[kSteps];
  const auto load_b = [&] {
    if (strip >= strips) return;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      b[step].Load(static_cast<const E*>(p.b), p.out, step * 16 + t * 4,
                   strip * kColumns + g / 2 * 8 + g % 2 * 32);
    }
  };
  load_b();

  float sums[kBlocks][4] = {};
#pragma unroll 1
  while (next < end) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (next + u * kWarps < end) ahead[u].Multiply(sums);
    }
    next += kAhead * kWarps;
    load();
  }
  // A lane has 2·kBlocks neighbouring ranks of two rows.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const to = &shared.shares[warp][(g + half * 8) * kRanks + t * 2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; i += 2) {
      const auto sum = [&](int i) { return sums[i % kBlocks][half * 2 + i / kBlocks]; };
      *reinterpret_cast<float2*>(to + i) = make_float2(sum(i), sum(i + 1));
    }
  }
  exchange.Begin();
  __syncthreads();  // all shares are there
  for (int i = tid; i < rows * kRanks / 4; i += kThreads) {
    const float4 sum =
        SumShares<kWarps>(kWarps, [&](int warp) { return &shared.shares[warp][i * 4]; });
#pragma unroll
    for (int to = 0; to < kMostParts; ++to) {
      exchange.Send({sum.x, sum.y, sum.z, sum.w}, &shared.arrived[part][i * 4], to);
    }
  }
  exchange.Wait();

  constexpr int kLanes = kRanks < 32 ? kRanks : 32, kCount = kRanks / kLanes;
#pragma unroll 1
  for (int row = tid / kLanes; row < kRows; row += kThreads / kLanes) {
    const int own = tid % kLanes;
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = row * kRanks + own + i * kLanes;
      values[i] = row < rows ? p.shrink_scaling * SumParts(shared.arrived, at) : 0.0f;
      if (p.h != nullptr && part + blockIdx.y == 0 && row < rows) {
        p.h[first_row * static_cast<int64_t>(kRanks) + at] = values[i];
      }
    }
    const float scaling = ScaleRow<E, kLanes>(values, p.expand_scaling);
    StorePairs<E, kLanes>(values, shared.pairs[row], own);
    if (own == 0) shared.row_scaling[row] = scaling;
    if (kRanks < 16 && own < 2) shared.pairs[row][2 + own] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();  // h is whole

#pragma unroll 1
  while (strip < strips) {
    float y[8][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 upper = shared.pairs[g][step * 4 + t], lower = shared.pairs[g + 8][step * 4 + t];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t low = b[step].Ranks(0, j), high = b[step].Ranks(1, j);
        Multiply<E>(y[j], upper.x, lower.x, upper.y, lower.y, low, high);
        Multiply<E>(y[j], upper.z, lower.z, upper.w, lower.w, low, high);
      }
    }
    const int column = strip * kColumns + t * 8;
    strip += strips_apart;
    load_b();
    StoreRows<E>(y, shared.row_scaling, g, rows, [&](int row) {
      return static_cast<E*>(p.y) + (first_row + row) * static_cast<int64_t>(p.out) + column;
    });
  }
#endif
}

template <class E, bool kTransposed>
cudaError_t LaunchPart(cudaStream_t stream, const Pass& pass) {
  return DispatchRank(pass.sizes.rank, [&](auto rank) {
    constexpr int kRanks = decltype(rank)::value;
    return LaunchDelta(DeltaMmaKernel<E, kTransposed, kRanks>, stream, pass, kRows,
                       kWarps * kColumns, kThreads, sizeof(Shared<kRanks>));
  });
}

}  // namespace

bool DeltaMmaServes(const Pass& pass) {
  return pass.sizes.rows <= kMostRows && DeltaTakesVectors(pass, kDepth, kColumns);
}

cudaError_t LaunchDeltaMma(cudaStream_t stream, const Pass& pass) {
  return DispatchFactors(pass, [&](auto element, auto transposed) {
    return LaunchPart<decltype(element), decltype(transposed)::value>(stream, pass);
  });
}

}  // namespace jax_fused_lora
