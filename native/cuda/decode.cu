// y = x·W + bias + s·h·B for at most 16 rows: one pass over W, at memory speed. Two ways.
//
// In clusters (sm_90 and newer; whole vectors of 16 bytes, A like W, at most 64 ranks): one launch.
// A block has 128 columns and a part of the depth, its cluster all of the depth, so h and the sums
// are whole within a cluster: each block adds its part of x·A on the way, for each 128 columns anew
// (out of L2, an eighth of W at rank 16), and sends what it has of each column to the block that
// writes it. W comes through a ring of shared memory filled by cp.async, each warp with one of its
// own, so that no warp waits for another before the end: 64 KB of W are on their way to each
// multiprocessor at any time, twice what covers the latency. Nothing of it depends on where a
// block runs: the sums over steps, warps and blocks are added in one order.
//
// With tickets (the others): a block has 64 columns and a part of the depth, which its eight warps
// take in turns, 32 at a time. Its sums go to the workspace; the block that comes last for its
// columns, which a ticket tells, adds the parts in their order, then bias and s·h·B, and writes y.
// So y does not depend on which block that is. Device memory: W once; L2: x once for every 64
// columns, a part of y written and read once for each of the `splits`. h comes from a small kernel
// of its own, launched first, which also zeroes the tickets. The other is its programmatic
// dependent: it reads W meanwhile and waits for h only before it takes a ticket. That is right
// because the small kernel is launched as usual, after everything before it in the stream, and
// writes nothing but h and the tickets; y is written after the wait.
//
// One row of 4096 by 4096 in bfloat16, rank 16, on an H100: 24 µs with tickets, 15.5 in clusters;
// 16 rows 34.5 and 16.7. W alone takes 11.
//
// Sixteen-bit operands are multiplied on tensor cores, for one row too: that takes fewer
// instructions than multiplying one by one. float32 in clusters is multiplied as TensorFloat32,
// each number cut in two so that no bit that counts is lost; the rest goes one by one.
#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;            // of a block
constexpr int kStride = kColumns + 4;   // of its sums in shared memory
constexpr int kUnit = 32;               // of the depth, a warp at a time
constexpr int64_t kWantedBlocks = 264;  // two on each of an H100's multiprocessors
constexpr int kRows = static_cast<int>(kFewRows);
static_assert(kRows * kColumns / 4 == kThreads, "a thread finishes 4 columns of one row");

struct DecodeArguments {
  int rows;
  int64_t in, out;
  int rank;
  const void* x;
  const void* w;
  bool transposed;
  bool x_quads, w_quads;
  FactorView b;
  float expand_scaling;
  const float* h;
  float* parts;  // (splits, rows, columns of all blocks)
  unsigned* tickets;
  int splits;
};

int Splits(const Sizes& sizes) {
  const int64_t blocks = std::max<int64_t>(CeilDiv(sizes.out, kColumns), 1);
  const int64_t units = CeilDiv(sizes.in, kUnit);
  return static_cast<int>(
      std::max<int64_t>(1, std::min({kWantedBlocks / blocks, units / kWarps, int64_t{64}})));
}

// This block's units of the depth.
__device__ inline void OwnUnits(const DecodeArguments& p, int64_t unit, int64_t* begin,
                                int64_t* end) {
  const int64_t units = (p.in + unit - 1) / unit;
  const int64_t share = (units + p.splits - 1) / p.splits;
  *begin = min(static_cast<int64_t>(blockIdx.y) * share, units);
  *end = min(*begin + share, units);
}

// Adds up shared[part][row][column] and all that the other blocks have, and writes y.
template <class E>
__device__ inline void Finish(const DecodeArguments& p, const Result<E>& result,
                              const float (&shared)[kWarps][kRows][kStride], int parts) {
  __shared__ bool last;
  __syncthreads();  // the sums are there
  const int row = threadIdx.x / (kColumns / 4), quad = threadIdx.x % (kColumns / 4) * 4;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + quad;
  const bool some = row < p.rows;
  float sums[4] = {};
  if (some) {
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += shared[part][row][quad + j];
    }
  }
  const int64_t row_length = static_cast<int64_t>(gridDim.x) * kColumns;
  if (p.splits > 1) {
    if (some) {
      float* const to = p.parts + (static_cast<int64_t>(blockIdx.y) * p.rows + row) * row_length;
      __stcg(reinterpret_cast<float4*>(to + column),
             make_float4(sums[0], sums[1], sums[2], sums[3]));
    }
    WaitForKernelBefore();
    __threadfence();
    __syncthreads();  // all threads' parts are out
    if (threadIdx.x == 0) {
      last = atomicAdd(&p.tickets[blockIdx.x], 1u) + 1 == static_cast<unsigned>(p.splits);
    }
    __syncthreads();  // `last` is known
    if (!last) return;
    __threadfence();
    if (some) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = 0.0f;
      const float* from = p.parts + row * row_length + column;
#pragma unroll 4
      for (int split = 0; split < p.splits; ++split, from += p.rows * row_length) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(from));
        sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w;
      }
    }
  } else {
    WaitForKernelBefore();
  }
  if (!some || column >= p.out) return;
  float low_rank[4] = {};
#pragma unroll 2
  for (int rank = 0; rank < p.rank; rank += 4) {
    float b[4][4];
    LoadBlock<E>(p.b, rank, p.rank, column, p.out, b);
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const float h = rank + d < p.rank ? __ldcg(p.h + row * p.rank + rank + d) : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) low_rank[j] += h * b[d][j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] += p.expand_scaling * low_rank[j];
  result.Write(row, column, sums);
}

__device__ inline uint4 LoadOnce(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// Rows of x and W are whole vectors of 16 bytes. Lane 4g + t has, of each 32 of the depth, the 8
// from 8t: in the first multiplication 8t..8t+3 play 2t, 2t+1, 2t+8, 2t+9 (see Multiply), in the
// second the other four. W straight: column n of block j is n / 2 * 8 + n % 2 * 32 + j, so that a
// lane's 16 bytes are its column in each of the 8 blocks. W transposed: 8 · j + n.
template <class E, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    DecodeTensor(const __grid_constant__ DecodeArguments p,
                 const __grid_constant__ Result<E> result) {
  __shared__ __align__(16) float shared[kWarps][kRows][kStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const E* const x = static_cast<const E*>(p.x);
  const E* const w = static_cast<const E*>(p.w);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t own = first + g / 2 * 8 + g % 2 * 32;
  const uint4 zeros = make_uint4(0, 0, 0, 0);

  float sums[8][4] = {};
  int64_t begin, end;
  OwnUnits(p, kUnit, &begin, &end);
  for (int64_t unit = begin + warp; unit < end; unit += kWarps) {
    const int64_t depth = unit * kUnit + t * 8;
    const bool inside = depth < p.in;
    uint4 loaded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kTransposed) {
        const int64_t column = first + i * 8 + g;
        loaded[i] = inside && column < p.out ? LoadOnce(w + column * p.in + depth) : zeros;
      } else {
        loaded[i] = inside && own < p.out ? LoadOnce(w + (depth + i) * p.out + own) : zeros;
      }
    }
    uint4 upper = zeros, lower = zeros;
    if (inside && g < p.rows) upper = __ldg(reinterpret_cast<const uint4*>(x + g * p.in + depth));
    if (inside && g + 8 < p.rows) {
      lower = __ldg(reinterpret_cast<const uint4*>(x + (g + 8) * p.in + depth));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (kTransposed) {
        Multiply<E>(sums[j], upper.x, lower.x, upper.y, lower.y, loaded[j].x, loaded[j].y);
        Multiply<E>(sums[j], upper.z, lower.z, upper.w, lower.w, loaded[j].z, loaded[j].w);
      } else {
        Multiply<E>(sums[j], upper.x, lower.x, upper.y, lower.y, Pair(loaded[0], loaded[1], j),
                    Pair(loaded[2], loaded[3], j));
        Multiply<E>(sums[j], upper.z, lower.z, upper.w, lower.w, Pair(loaded[4], loaded[5], j),
                    Pair(loaded[6], loaded[7], j));
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + half * 8 >= p.rows) continue;
    float* const row = shared[warp][g + half * 8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        row[kTransposed ? j * 8 + t * 2 + n : t * 8 + n * 32 + j] = sums[j][half * 2 + n];
      }
    }
  }
  Finish(p, result, shared, kWarps);
}

// A thread has 4 columns of up to kSome rows, and 4 of the depth at a time. Sixteen neighbouring
// threads lie along W's rows.
template <class E, int kSome>
__global__ void __launch_bounds__(kThreads) DecodeWide(const __grid_constant__ DecodeArguments p,
                                                       const __grid_constant__ Result<E> result) {
  __shared__ __align__(16) float shared[kWarps][kRows][kStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = p.transposed ? threadIdx.x / 16 * 4 : threadIdx.x % 16 * 4;
  const int slot = p.transposed ? threadIdx.x % 16 : threadIdx.x / 16;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + quad;
  const E* const x = static_cast<const E*>(p.x);

  float sums[kSome][4] = {};
  int64_t begin, end;
  OwnUnits(p, 4, &begin, &end);
#pragma unroll(kSome == 16 ? 1 : 2)
  for (int64_t unit = begin + slot; unit < end; unit += 16) {
    const int64_t depth = unit * 4;
    float w[4][4];
    LoadBlock(static_cast<const E*>(p.w), p.transposed, p.w_quads, depth, p.in, column, p.out, w);
#pragma unroll
    for (int m = 0; m < kSome; ++m) {
      if (m >= p.rows) continue;
      float quad_of_x[4];
      LoadQuad(x + m * p.in + depth, p.in - depth, p.x_quads, quad_of_x);
#pragma unroll
      for (int d = 0; d < 4; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[m][j] += quad_of_x[d] * w[d][j];
      }
    }
  }
  // Over the lanes that have the same columns; straight, the warps' sums are left to add.
  const int first = p.transposed ? 1 : 16, last = p.transposed ? 16 : 32;
  for (int lanes = first; lanes < last; lanes *= 2) {
#pragma unroll
    for (int m = 0; m < kSome; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[m][j] += __shfl_xor_sync(0xffffffff, sums[m][j], lanes);
    }
  }
  if (p.transposed ? lane % 16 == 0 : lane < 16) {
#pragma unroll
    for (int m = 0; m < kSome; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) shared[p.transposed ? 0 : warp][m][quad + j] = sums[m][j];
    }
  }
  Finish(p, result, shared, p.transposed ? 1 : kWarps);
}

// ---------------------------------------------------------------------------------------------
// In clusters

constexpr int kClusterThreads = 128;
constexpr int kClusterWarps = kClusterThreads / 32;
constexpr int kClusterColumns = 128;  // of a block, and of its cluster
constexpr int kMostSlices = 8;        // of the depth, the blocks of a cluster
constexpr int kMostClusterRanks = 64;
// All blocks are to run at once, with room for clusters that do not fit a GPC's last few
// multiprocessors. Where one runs does not matter: all get the same share of the bandwidth.
constexpr int64_t kMostClusterBlocks = 192;
constexpr int64_t kLeastSlice = 128;  // of the depth

struct ClusterArguments {
  int rows;
  int64_t in, out;
  int rank;
  const void* x;
  const void* w;
  const void* a;
  const void* bias;
  FactorView b;
  float shrink_scaling, expand_scaling;
  float* h;
};

// What a warp multiplies at a time, in chunks of 16 bytes: 4 KB of W, what belongs to it of x, and
// a share of A. A step is 32 bytes of the depth, what one multiplication takes. W straight: one
// step deep and 128 columns wide, the four warps in turns. Transposed: four steps deep, that lines
// of 128 bytes are read, and a warp's own 32 columns wide; a warp takes one of the four of A.
template <class E, bool kTransposed, int kRanks>
struct Piece {
  static constexpr int kChunk = 16 / sizeof(E);
  static constexpr int kStep = 2 * kChunk;
  static constexpr int kSteps = kTransposed ? 4 : 1;
  static constexpr int kDepth = kSteps * kStep;
  static constexpr int kColumns = kTransposed ? 32 : kClusterColumns;
  // Of a row of each tile, W and A as they lie; and of the whole tiles.
  static constexpr int kXChunks = kDepth / kChunk;
  static constexpr int kWChunks = (kTransposed ? kDepth : kColumns) / kChunk;
  static constexpr int kAChunks = (kTransposed ? kStep : kRanks) / kChunk;
  static constexpr int kW = 256, kX = kRows * kXChunks, kA = kRanks * 2;
  static_assert(kW == (kTransposed ? kColumns : kDepth) * kWChunks);
  static_assert(kA == (kTransposed ? kRanks : kStep) * kAChunks);
  static constexpr int kAll = kW + kX + kA;
  static constexpr int kStages = kAll > 416 ? 2 : kAll > 320 ? 3 : 4;  // at most 80 KB
  static constexpr int kRing = kClusterWarps * kStages * kAll * 16;

  // After the ring, in the same memory: the sums of the warps that share columns and all warps' h.
  // Behind both, so that nobody waits for another's ring: what the blocks of the cluster send each
  // other. In floats.
  static constexpr int kShares = kTransposed ? 1 : kClusterWarps;
  static constexpr int kYStride = kClusterColumns + 8, kHStride = kRanks + 8;  // other banks
  static constexpr int kYShare = kRows * kYStride, kHShare = kRows * kHStride;
  static constexpr int kOwn = kShares * kYShare + kClusterWarps * kHShare;
  static constexpr int kYParts = kRing / 4 > kOwn ? kRing / 4 : kOwn;
  static constexpr int kHParts = kYParts + kRows * kClusterColumns;
  // Last: B of the columns that the block writes, and the bias as one more rank.
  static __host__ __device__ int BTile(int slices) { return kHParts + slices * kRows * kRanks; }
  static int Shared(int slices) {
    return 4 * (BTile(slices) + (kRanks + 1) * (kClusterColumns / slices));
  }
};

// Where a chunk of a tile lies, so that the chunks of 8 rows that are read at once are in different
// banks; kPairs: that of 4 rows two neighbouring chunks are.
template <int kChunks, bool kPairs = false>
__device__ inline int Swizzled(int row, int chunk) {
  constexpr int kFew = kChunks < 8 ? kChunks : 8;
  const int line = row / (8 / kFew);
  return row * kChunks + (chunk ^ (kPairs ? line % (kFew / 2) * 2 : line % kFew));
}

// A warp's way through a matrix along the depth, which goes down its rows or across them: tiles of
// 32 · kCopies chunks, kChunks a row.
template <class E, bool kDown, int kChunks, int kCopies, bool kPairs = false>
struct Stream {
  static constexpr int kChunk = 16 / sizeof(E), kRowsApart = 32 / kChunks;
  const E* data;
  const E* from;
  int64_t copies_apart, tiles_apart;
  int other_left;  // not in the depth
  int row, chunk;

  __device__ Stream(const void* matrix, int64_t row_length, int64_t depth, int64_t depth_apart,
                    int64_t other, int64_t others, int lane)
      : data(static_cast<const E*>(matrix)),
        copies_apart(kRowsApart * row_length),
        tiles_apart(kDown ? depth_apart * row_length : depth_apart),
        other_left(static_cast<int>(min(others - other, int64_t{256}))),
        row(lane / kChunks),
        chunk(lane % kChunks) {
    from = data + ((kDown ? depth : other) + row) * row_length + (kDown ? other : depth) +
           chunk * kChunk;
  }

  // The next tile, zeros where the matrix has ended.
  __device__ void Fetch(uint4* tile, int depth_left) {
    const bool across = chunk * kChunk < (kDown ? other_left : depth_left);
    const int down_left = kDown ? depth_left : other_left;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool some = across && row + i * kRowsApart < down_left;
      CopyAsync(tile + Swizzled<kChunks, kPairs>(row + i * kRowsApart, chunk),
                some ? from + i * copies_apart : data, some);
    }
    from += tiles_apart;
  }
};

// A step of x as the multiplications take it, 16 rows.
template <class E>
struct XStep {
  uint32_t hi[4], lo[4];  // lo: of float32

  template <int kChunks>
  __device__ void Load(const uint4* tile, int step, int lane) {
    if constexpr (sizeof(E) == 2) {
      LoadBlocks(hi, tile + Swizzled<kChunks>(lane % 16, step * 2 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4* const at = tile + Swizzled<kChunks>(lane / 4 + i % 2 * 8, step * 2 + i / 2);
        SplitTf32(reinterpret_cast<const float*>(at)[lane % 4], &hi[i], &lo[i]);
      }
    }
  }
};

// sums += x · a step of a tile, kBlocks blocks of 8 columns.
template <class E, bool kTransposed, int kChunks, int kBlocks>
__device__ inline void MultiplyStep(float (&sums)[kBlocks][4], const XStep<E>& x, const uint4* tile,
                                    int step, int lane) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      uint32_t w[4];
      if constexpr (kTransposed) {
        LoadBlocks(w, tile + Swizzled<kChunks>(pair * 16 + lane / 16 * 8 + lane % 8,
                                               step * 2 + lane / 8 % 2));
      } else {
        LoadBlocksTransposed(w, tile + Swizzled<kChunks>(lane % 16, pair * 2 + lane / 16));
      }
      Multiply<E>(sums[pair * 2], x.hi[0], x.hi[1], x.hi[2], x.hi[3], w[0], w[1]);
      Multiply<E>(sums[pair * 2 + 1], x.hi[0], x.hi[1], x.hi[2], x.hi[3], w[2], w[3]);
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t hi[2], lo[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float value;
        if constexpr (kTransposed) {
          const uint4* const at = tile + Swizzled<kChunks>(block * 8 + g, step * 2 + i);
          value = reinterpret_cast<const float*>(at)[t];
        } else {
          const uint4* const at = tile + Swizzled<kChunks, true>(t + i * 4, block * 2 + g / 4);
          value = reinterpret_cast<const float*>(at)[g % 4];
        }
        SplitTf32(value, &hi[i], &lo[i]);
      }
      MultiplyTf32(sums[block], x.lo, hi[0], hi[1]);
      MultiplyTf32(sums[block], x.hi, lo[0], lo[1]);
      MultiplyTf32(sums[block], x.hi, hi[0], hi[1]);
    }
  }
}

// A lane's part of the sums of a warp, to a matrix in shared memory.
template <int kBlocks>
__device__ inline void StoreSums(const float (&sums)[kBlocks][4], float* to, int stride, int rows,
                                 int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (row >= rows) continue;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      *reinterpret_cast<float2*>(to + row * stride + block * 8 + lane % 4 * 2) =
          make_float2(sums[block][half * 2], sums[block][half * 2 + 1]);
    }
  }
}

// The sum of the same four floats of each of several shares, at most kMost.
template <int kMost>
__device__ inline float4 SumShares(const float* from, int shares, int apart) {
  float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
  for (int share = 1; share < kMost; ++share) {
    if (share < shares) {
      const float4 more = *reinterpret_cast<const float4*>(from + share * apart);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
  }
  return sum;
}

// A cluster for every 128 columns; kRanks: as many as there is room for.
template <class E, bool kTransposed, int kRanks>
__global__ void __launch_bounds__(kClusterThreads, 2)
    DecodeCluster(const __grid_constant__ ClusterArguments p,
                  const __grid_constant__ Result<E> result) {
#if __CUDA_ARCH__ >= 900
  using P = Piece<E, kTransposed, kRanks>;
  extern __shared__ __align__(128) char memory[];
  const auto cluster = cooperative_groups::this_cluster();
  const int slices = cluster.num_blocks(), slice = cluster.block_rank();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x / slices) * kClusterColumns;

  cluster.barrier_arrive();  // a block that has begun may be written to

  // This block's part of the depth, and this warp's of that.
  const int64_t pieces = (p.in + P::kDepth - 1) / P::kDepth;
  const int64_t share = (pieces + slices - 1) / slices;
  const int64_t begin = min(slice * share, pieces), end = min(begin + share, pieces);
  constexpr int kEvery = kTransposed ? 1 : kClusterWarps, kApart = kEvery * P::kDepth;
  const int64_t own_begin = kTransposed ? begin : begin + warp;
  const int turns = static_cast<int>((end - own_begin + kEvery - 1) / kEvery);
  const int64_t own_first = first + (kTransposed ? warp * P::kColumns : 0);

  int64_t depth = own_begin * P::kDepth;
  const int a_offset = kTransposed ? warp * P::kStep : 0;
  constexpr bool kPairs = sizeof(E) == 4 && !kTransposed;
  Stream<E, !kTransposed, P::kWChunks, P::kW / 32, kPairs> w(p.w, kTransposed ? p.in : p.out, depth,
                                                             kApart, own_first, p.out, lane);
  Stream<E, false, P::kXChunks, P::kX / 32> x(p.x, p.in, depth, kApart, 0, p.rows, lane);
  Stream<E, !kTransposed, P::kAChunks, P::kA / 32, kPairs> a(
      p.a, kTransposed ? p.in : p.rank, depth + a_offset, kApart, 0, p.rank, lane);
  uint4* const ring = reinterpret_cast<uint4*>(memory) + warp * P::kStages * P::kAll;
  const auto fetch = [&](int stage) {
    uint4* const tiles = ring + stage * P::kAll;
    const int left = static_cast<int>(min(p.in - depth, int64_t{P::kDepth}));
    w.Fetch(tiles, left);
    x.Fetch(tiles + P::kW, left);
    a.Fetch(tiles + P::kW + P::kX, left - a_offset);
    depth += kApart;
  };
#pragma unroll 1
  for (int stage = 0; stage < P::kStages; ++stage) {
    if (stage < turns) fetch(stage);
    CommitCopies();
  }

  // The columns that this block will write; their part of B and bias is fetched meanwhile.
  const int shift = 31 - __clz(kClusterColumns / slices), columns = 1 << shift;
  const int quad_shift = shift - 2, quads = columns / 4;
  const int64_t own = first + slice * columns;
  float* const floats = reinterpret_cast<float*>(memory);
  float* const b = floats + P::BTile(slices);
#pragma unroll 1
  for (int i = tid; i < (kRanks / 4 + 1) * quads; i += kClusterThreads) {
    const int rank = (i >> quad_shift) * 4, quad = (i & (quads - 1)) * 4;
    const int64_t column = own + quad;
    float block[4][4];
    if (rank < kRanks) {
      LoadBlock<E>(p.b, rank, p.rank, column, p.out, block);
    } else {
      LoadQuad(static_cast<const E*>(p.bias) + column, p.bias == nullptr ? 0 : p.out - column,
               result.vectors, block[0]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > 0 && rank == kRanks) break;
      *reinterpret_cast<float4*>(b + (rank + j) * columns + quad) =
          make_float4(block[j][0], block[j][1], block[j][2], block[j][3]);
    }
  }

  float sums[P::kColumns / 8][4] = {}, h_sums[kRanks / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    WaitForCopies<P::kStages - 1>();
    __syncwarp();  // all lanes' copies are there
    const uint4* const w_tile = ring + stage * P::kAll;
    const uint4* const x_tile = w_tile + P::kW;
    const uint4* const a_tile = x_tile + P::kX;
    XStep<E> step_of_x;
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
      step_of_x.template Load<P::kXChunks>(x_tile, step, lane);
      MultiplyStep<E, kTransposed, P::kWChunks>(sums, step_of_x, w_tile, step, lane);
    }
    if (kTransposed) step_of_x.template Load<P::kXChunks>(x_tile, warp, lane);
    MultiplyStep<E, kTransposed, P::kAChunks>(h_sums, step_of_x, a_tile, 0, lane);
    __syncwarp();  // all lanes have read the stage
    if (turn + P::kStages < turns) fetch(stage);
    CommitCopies();
    if (++stage == P::kStages) stage = 0;
  }
  WaitForCopies<0>();
  __syncthreads();  // all rings are read, and B is there

  float* const h_shares = floats + P::kShares * P::kYShare;
  float* const y_parts = floats + P::kYParts;  // (slices, rows, columns)
  float* const h_parts = floats + P::kHParts;  // (slices, rows, kRanks)
  StoreSums(sums, floats + (kTransposed ? warp * P::kColumns : warp * P::kYShare), P::kYStride,
            p.rows, lane);
  StoreSums(h_sums, h_shares + warp * P::kHShare, P::kHStride, p.rows, lane);
  __syncthreads();  // all shares are there
  cluster.barrier_wait();
#pragma unroll 1
  for (int i = tid; i < p.rows * (kClusterColumns / 4); i += kClusterThreads) {
    const int row = i / (kClusterColumns / 4), column = i % (kClusterColumns / 4) * 4;
    float* const to = y_parts + (slice * p.rows + row) * columns + (column & (columns - 1));
    *reinterpret_cast<float4*>(cluster.map_shared_rank(to, column >> shift)) =
        SumShares<P::kShares>(floats + row * P::kYStride + column, P::kShares, P::kYShare);
  }
#pragma unroll 1
  for (int i = tid; i < p.rows * (kRanks / 4); i += kClusterThreads) {
    const int row = i / (kRanks / 4), rank = i % (kRanks / 4) * 4;
    const float4 sum =
        SumShares<kClusterWarps>(h_shares + row * P::kHStride + rank, kClusterWarps, P::kHShare);
    float* const to = h_parts + (slice * p.rows + row) * kRanks + rank;
#pragma unroll
    for (int block = 0; block < kMostSlices; ++block) {
      if (block < slices) *reinterpret_cast<float4*>(cluster.map_shared_rank(to, block)) = sum;
    }
  }
  cluster.sync();  // all parts are there; from here on each block is on its own

  float* const h = h_shares;
#pragma unroll 1
  for (int i = tid; i < p.rows * (kRanks / 4); i += kClusterThreads) {
    const int row = i / (kRanks / 4), rank = i % (kRanks / 4) * 4;
    const float4 sum =
        SumShares<kMostSlices>(h_parts + row * kRanks + rank, slices, p.rows * kRanks);
    const float quad[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Zero times an infinite x is in the ranks that are not there.
      const float value = rank + j < p.rank ? p.shrink_scaling * quad[j] : 0.0f;
      h[row * kRanks + rank + j] = value;
      if (blockIdx.x == 0 && rank + j < p.rank) p.h[row * p.rank + rank + j] = value;
    }
  }
  __syncthreads();  // h is whole
#pragma unroll 1
  for (int item = tid; item < p.rows * quads; item += kClusterThreads) {
    const int row = item >> quad_shift, quad = (item & (quads - 1)) * 4;
    float low_rank[4] = {};
#pragma unroll 4
    for (int rank = 0; rank < kRanks; rank += 4) {
      const float4 of_h = *reinterpret_cast<const float4*>(h + row * kRanks + rank);
      const float values[4] = {of_h.x, of_h.y, of_h.z, of_h.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 of_b = *reinterpret_cast<const float4*>(b + (rank + i) * columns + quad);
        low_rank[0] += values[i] * of_b.x, low_rank[1] += values[i] * of_b.y;
        low_rank[2] += values[i] * of_b.z, low_rank[3] += values[i] * of_b.w;
      }
    }
    const float4 sum =
        SumShares<kMostSlices>(y_parts + row * columns + quad, slices, p.rows * columns);
    const float4 bias = *reinterpret_cast<const float4*>(b + kRanks * columns + quad);
    float values[4] = {sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] += p.expand_scaling * low_rank[j];
    result.Write(row, own + quad, values);
  }
#endif
}

// Blocks of a cluster, a power of two. Many ranks leave too little memory for B of 128 columns.
int ClusterSlices(const Sizes& sizes) {
  const int64_t clusters = CeilDiv(sizes.out, kClusterColumns);
  int slices = sizes.rank > 16 ? 2 : 1;
  while (slices < kMostSlices && clusters * slices * 2 <= kMostClusterBlocks &&
         sizes.in >= slices * 2 * kLeastSlice) {
    slices *= 2;
  }
  return slices;
}

// Calls function(Tag<type of an element>, whether W is transposed, most ranks), the two being
// constants.
template <class Function>
cudaError_t DispatchCluster(Element element, bool transposed, int64_t rank,
                            const Function& function) {
  return Dispatch(element, [&](auto tag) {
    const auto with_ranks = [&](auto of_w) {
      return rank <= 16 ? function(tag, of_w, std::integral_constant<int, 16>())
                        : function(tag, of_w, std::integral_constant<int, kMostClusterRanks>());
    };
    return transposed ? with_ranks(std::true_type()) : with_ranks(std::false_type());
  });
}

// Whether a block may have the shared memory that it needs: GPUs of compute capability 12.x give it
// 99 KB, with which 17 and more ranks do not always do.
bool ClusterFits(Element element, bool transposed, const Sizes& sizes) {
  Gpu gpu;
  int shared = 0;
  DispatchCluster(element, transposed, sizes.rank, [&](auto tag, auto of_w, auto ranks) {
    shared = Piece<typename decltype(tag)::type, of_w, ranks>::Shared(ClusterSlices(sizes));
    return cudaSuccess;
  });
  return ThisGpu(&gpu) == cudaSuccess && shared <= gpu.block_shared;
}

template <class E, bool kTransposed, int kRanks>
cudaError_t LaunchCluster(cudaStream_t stream, const Sizes& sizes, const ClusterArguments& p,
                          const Result<E>& result) {
  const int slices = ClusterSlices(sizes);
  const int64_t blocks = CeilDiv(sizes.out, kClusterColumns) * slices;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return Launch(DecodeCluster<E, kTransposed, kRanks>, dim3(static_cast<unsigned>(blocks)),
                kClusterThreads, Piece<E, kTransposed, kRanks>::Shared(slices), stream, false,
                slices, p, result);
}

}  // namespace

int64_t DecodeWorkspace(const Sizes& sizes) {
  const int64_t splits = Splits(sizes), blocks = CeilDiv(sizes.out, kColumns);
  return splits == 1 ? 0 : splits * sizes.rows * blocks * kColumns + blocks;
}

cudaError_t LaunchDecode(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                         const void* w, bool transposed, const void* bias, const Factor& a,
                         const Factor& b, float shrink_scaling, float expand_scaling, float* h,
                         void* y, float* workspace) {
  if (sizes.rank < 0 || sizes.rank > kMaxRank || sizes.rows > kFewRows) {
    return cudaErrorInvalidValue;
  }
  if (sizes.rows == 0) return cudaSuccess;
  const int64_t width = Width(element), blocks = CeilDiv(sizes.out, kColumns);
  const FactorView b_view = View(b, sizes.rank, sizes.out);
  const bool whole =
      Vectors(x, sizes.in, width) && Vectors(w, transposed ? sizes.in : sizes.out, width);
  const bool vectors = Vectors(y, sizes.out, width, 4 * width) &&
                       (bias == nullptr || Vectors(bias, sizes.out, width, 4 * width));

  const bool a_like_w =
      a.element == element && a.transposed == transposed && View(a, sizes.in, sizes.rank).vectors;
  if (whole && (sizes.rank == 0 || a_like_w) && sizes.rank <= kMostClusterRanks && sizes.out > 0 &&
      HasSm90() && ClusterFits(element, transposed, sizes)) {
    const ClusterArguments p = {static_cast<int>(sizes.rows),
                                sizes.in,
                                sizes.out,
                                static_cast<int>(sizes.rank),
                                x,
                                w,
                                sizes.rank > 0 ? a.data : x,  // never read
                                bias,
                                b_view,
                                shrink_scaling,
                                expand_scaling,
                                h};
    return DispatchCluster(element, transposed, sizes.rank, [&](auto tag, auto of_w, auto ranks) {
      using E = typename decltype(tag)::type;
      const Result<E> result = {nullptr,    nullptr,   static_cast<E*>(y),
                                sizes.rows, sizes.out, vectors};
      return LaunchCluster<E, of_w, ranks>(stream, sizes, p, result);
    });
  }

  DecodeArguments p = {};
  p.rows = static_cast<int>(sizes.rows);
  p.in = sizes.in;
  p.out = sizes.out;
  p.rank = static_cast<int>(sizes.rank);
  p.x = x;
  p.w = w;
  p.transposed = transposed;
  p.x_quads = Vectors(x, sizes.in, width, 4 * width);
  p.w_quads = Vectors(w, transposed ? sizes.in : sizes.out, width, 4 * width);
  p.b = b_view;
  p.expand_scaling = expand_scaling;
  p.h = h;
  p.splits = Splits(sizes);
  const int64_t tickets = p.splits > 1 ? blocks : 0;
  p.parts = workspace;
  p.tickets = reinterpret_cast<unsigned*>(workspace + p.splits * sizes.rows * blocks * kColumns);
  // Parts are written 16 bytes at a time.
  if (tickets > 0 && reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }

  bool programmatic = false;
  if (sizes.rank > 0 || tickets > 0) {
    const cudaError_t error =
        LaunchShrinkRows(stream, element, sizes, x, a, shrink_scaling, h, p.tickets, tickets);
    if (error != cudaSuccess) return error;
    programmatic = HasSm90();
  }
  if (sizes.out == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), p.splits);

  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const Result<E> result = {nullptr, bias, static_cast<E*>(y), sizes.rows, sizes.out, vectors};
    const auto launch = [&](auto kernel) {
      return Launch(kernel, grid, kThreads, 0, stream, programmatic, 1, p, result);
    };
    if constexpr (sizeof(E) == 2) {
      if (whole) {
        return transposed ? launch(DecodeTensor<E, true>) : launch(DecodeTensor<E, false>);
      }
    }
    if (sizes.rows == 1) return launch(DecodeWide<E, 1>);
    return sizes.rows <= 4 ? launch(DecodeWide<E, 4>) : launch(DecodeWide<E, 16>);
  });
}

}  // namespace jax_fused_lora
