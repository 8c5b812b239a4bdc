// h = s·x·A (also t = s·g·Bᵀ), alone or with y = addend + s·h·B behind it in the same kernel, for
// many rows. (rows.cu has the few, delta.cuh the usual ones of these and of some more.)
//
// A block has 64 rows, or 32 where those would leave multiprocessors idle, and all ranks. Where
// there are fewer such tiles than the GPU has room for blocks, a cluster of up to 8 blocks has the
// tile: each sums its part of the depth, all add the parts through distributed shared memory in one
// order, and each writes its part of y. So 512 rows of 4096 keep 128 multiprocessors busy, and a
// block of theirs has all it reads on the way at once. Before sm_90 a tile is one block's.
//
// x is read exactly once, through a ring of shared-memory tiles filled by cp.async; A comes out of
// L2 once a tile. Eight warps share a step's depth and the ranks between them: rank 16 leaves one
// warp wide enough for all ranks, so each warp takes an eighth of the depth, and the eight sums are
// added in one order at the end. h never leaves shared memory on its way to y. B is read straight
// from L2 into the registers that multiply it, a strip of 64 columns ahead, once for every 32 rows;
// y is written straight from the registers that hold it: no barrier in that half of the kernel.
// Device memory: x, h and y once, A and B once. L2: A once for every tile, B once for every 32
// rows.
//
// Every tile begins elsewhere in the depth, and in the columns: all blocks run in step, and all
// asking for the same tile of A at once is what a few slices of L2 would have to answer.
//
// Sixteen-bit operands are multiplied on tensor cores. A 16-bit h would miss the project's accuracy
// rule, so the second product has it as the sum of two, hi + lo, and multiplies B with both. What
// bfloat16 loses that way is 2^-18 of h. float16 is short of exponents, not of bits: each row of h
// is first brought to a largest element of 2^14 by a power of two, which y is divided by again.
// Where x or the factor is float32, the products are float32 multiplications and additions.
#include <cooperative_groups.h>

#include "native/cuda/delta.cuh"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;  // of y, a warp at a time

// What comes behind h: y by tensor cores, or by multiplications in float32. Those are also for a
// 16-bit B that cannot be read in vectors: what reads it one by one, beside the tensor cores, cost
// them their registers.
enum class Expand { kNone, kTensor, kWide };

struct ThinArguments {
  int64_t rows;
  int in, out, rank;
  const void* x;
  bool x_vectors, x_quads;
  FactorView a, b;
  float shrink_scaling, expand_scaling;
  float* h;      // may be null
  bool h_quads;  // h may be written 4 at a time
  void* h16;     // may be null
  float h16_scaling;
  int stages;
  // Logarithms. Warps side by side over the ranks, the others share the depth; and the blocks of a
  // cluster.
  int across_shift, parts_shift;
};

// Tiles of type Tile. kBlocks is a warp's width in blocks of 8 ranks, kRowBlocks the rows in blocks
// of 16.
template <class Tile, int kBlocks, int kRowBlocks>
struct Thin {
  static constexpr bool kTensor = sizeof(Tile) == 2;
  static constexpr int kRows = kRowBlocks * 16;
  static constexpr int kDepth = (kBlocks == 2 ? 128 : 64) / (kTensor ? 1 : 2);
  static constexpr int kChunk = 16 / sizeof(Tile);
  static constexpr int kRowChunks = kDepth / kChunk;
  static constexpr int kStride = kDepth + kChunk;  // one chunk more than needed: other banks
  static constexpr int kWarpRanks = kBlocks * 8;

  // Elements of one stage: a tile of x and one of A.
  static constexpr int kXTile = kRows * kStride;
  static __host__ __device__ int ATile(int ranks, bool transposed) {
    return transposed ? ranks * kStride : kDepth * (ranks + kChunk);
  }
  // Floats of a row of sums, and of all rows.
  static __host__ __device__ int SumsStride(int ranks) { return ranks + 4; }
  static __host__ __device__ int Sums(int ranks) { return kRows * SumsStride(ranks); }
};

// One chunk of 16 bytes of a tile, of which `left` elements exist, zeros for the others. kVectors:
// it may be copied as it is, and all of it exists or nothing.
template <bool kVectors, class Tile, class Source>
__device__ inline void CopyChunk(Tile* to, const Source* from, int left, bool quads) {
  constexpr int kChunk = 16 / sizeof(Tile);
  if constexpr (kVectors) {
    CopyAsync(to, from, left > 0);
  } else if constexpr (sizeof(Tile) == 4) {
    float quad[4];
    LoadQuad(from, left, quads, quad);
    *reinterpret_cast<float4*>(to) = make_float4(quad[0], quad[1], quad[2], quad[3]);
  } else {
    alignas(16) Tile elements[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) elements[j] = j < left ? from[j] : Rounded<Tile>(0.0f);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(elements);
  }
}

__device__ inline void WaitForStage(int stages) {
  if (stages == 4) {
    WaitForCopies<2>();
  } else if (stages == 3) {
    WaitForCopies<1>();
  } else {
    WaitForCopies<0>();
  }
}

// One stage's share of this warp, on tensor cores. Lane layouts: see Multiply.
template <class Tile, int kBlocks, int kRowBlocks>
__device__ inline void MultiplyStage(float (&sums)[kRowBlocks][kBlocks][4], const Tile* x_tile,
                                     const Tile* a_tile, bool transposed, int ranks, int own_rank,
                                     int own_step, int steps_apart, int lane) {
  using T = Thin<Tile, kBlocks, kRowBlocks>;
  for (int depth = own_step * 16; depth < T::kDepth; depth += steps_apart * 16) {
    uint32_t x[kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      LoadBlocks(x[m], x_tile + (m * 16 + lane % 16) * T::kStride + depth + lane / 16 * 8);
    }
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      uint32_t a[4];
      const int rank = own_rank + pair * 16;
      if (transposed) {
        LoadBlocks(
            a, a_tile + (rank + lane / 16 * 8 + lane % 8) * T::kStride + depth + lane / 8 % 2 * 8);
      } else {
        LoadBlocksTransposed(
            a, a_tile + (depth + lane % 16) * (ranks + T::kChunk) + rank + lane / 16 * 8);
      }
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Multiply<Tile>(sums[m][pair * 2], x[m][0], x[m][1], x[m][2], x[m][3], a[0], a[1]);
        Multiply<Tile>(sums[m][pair * 2 + 1], x[m][0], x[m][1], x[m][2], x[m][3], a[2], a[3]);
      }
    }
  }
}

// A lane's sums to a matrix of h_stride, from the warp's first rank.
template <int kBlocks, int kRowBlocks>
__device__ inline void StoreSums(const float (&sums)[kRowBlocks][kBlocks][4], float* to,
                                 int h_stride, int lane) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float* const at = to + (m * 16 + lane / 4) * h_stride + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = make_float2(sums[m][j][0], sums[m][j][1]);
      *reinterpret_cast<float2*>(at + 8 * h_stride) = make_float2(sums[m][j][2], sums[m][j][3]);
    }
  }
}

// The same two in float32: a lane has rows lane / 4 + 8·i and, of every 16 ranks, 4 from
// lane % 4 * 4.
template <int kBlocks, int kRowBlocks>
struct WideSums {
  float value[kRowBlocks * 2][kBlocks * 2];
};

template <class Tile, int kBlocks, int kRowBlocks>
__device__ inline void MultiplyStage(WideSums<kBlocks, kRowBlocks>& sums, const float* x_tile,
                                     const float* a_tile, bool transposed, int ranks, int own_rank,
                                     int own_step, int steps_apart, int lane) {
  using T = Thin<float, kBlocks, kRowBlocks>;
  for (int depth = own_step * 4; depth < T::kDepth; depth += steps_apart * 4) {
    float x[kRowBlocks * 2][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks * 2; ++i) {
      LoadQuad(x_tile + (lane / 4 + i * 8) * T::kStride + depth, x[i]);
    }
#pragma unroll
    for (int quad = 0; quad < kBlocks / 2; ++quad) {
      const int rank = own_rank + quad * 16 + lane % 4 * 4;
      float a[4][4];  // depth, rank
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (transposed) {
          float column[4];
          LoadQuad(a_tile + (rank + j) * T::kStride + depth, column);
#pragma unroll
          for (int d = 0; d < 4; ++d) a[d][j] = column[d];
        } else {
          LoadQuad(a_tile + (depth + j) * (ranks + T::kChunk) + rank, a[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowBlocks * 2; ++i) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums.value[i][quad * 4 + j] += x[i][d] * a[d][j];
        }
      }
    }
  }
}

template <int kBlocks, int kRowBlocks>
__device__ inline void StoreSums(const WideSums<kBlocks, kRowBlocks>& sums, float* to, int h_stride,
                                 int lane) {
#pragma unroll
  for (int i = 0; i < kRowBlocks * 2; ++i) {
#pragma unroll
    for (int quad = 0; quad < kBlocks / 2; ++quad) {
      const float* const value = sums.value[i] + quad * 4;
      *reinterpret_cast<float4*>(to + (lane / 4 + i * 8) * h_stride + quad * 16 + lane % 4 * 4) =
          make_float4(value[0], value[1], value[2], value[3]);
    }
  }
}

// A block's part of y, which its warps take in strips of 64 columns, 32 rows at a time. Every tile
// begins with another strip.
struct Strips {
  int first_column, count, turn;
  int items;  // the same strips once or twice, for the first and the second 32 rows

  __device__ int Row(int item) const { return item < count ? 0 : 32; }
  __device__ int Column(int item) const {
    const int turned = (item < count ? item : item - count) + turn;
    return first_column + (turned < count ? turned : turned - count) * kColumns;
  }
};

// y from h in float32. A lane has a quarter of the rows and 8 of the 64 columns.
template <class E>
__device__ inline void ExpandWide(const ThinArguments& p, const Result<E>& result, const float* h,
                                  int h_stride, int64_t first_row, const Strips& strips, int warp,
                                  int lane) {
  for (int item = warp; item < strips.items; item += kWarps) {
    const int row = strips.Row(item) + lane / 8 * 8;
    const int column = strips.Column(item) + lane % 8 * 4;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const int own = column + side * 32;
      float sums[8][4] = {};
#pragma unroll 1
      for (int rank = 0; rank < p.rank; rank += 4) {
        float b[4][4];
        LoadBlock<E>(p.b, rank, p.rank, own, p.out, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float quad[4];
          LoadQuad(h + (row + i) * h_stride + rank, quad);
#pragma unroll
          for (int d = 0; d < 4; ++d) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] += quad[d] * b[d][j];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] *= p.expand_scaling;
        result.Write(first_row + row + i, own, sums[i]);
      }
    }
  }
}

// 16 ranks by 64 columns of a 16-bit B on tensor cores. Which of the 64 is column n of block j is
// free: n / 2 * 8 + n % 2 * 32 + j makes the 8 blocks' elements of a lane neighbours, in B and in
// y, and 4 lanes' stores whole sectors. Likewise rank 4t + i of each 16, i < 4, plays 2t, 2t + 1,
// 2t + 8 and 2t + 9 for lane t.
template <class E>
struct BlockOfB {
  // As they lie: 8 columns of 4 ranks, or transposed 4 ranks of 8 columns.
  uint4 loaded[4];

  __device__ void Load(const ThinArguments& p, int first_rank, int first_column, int lane) {
    const E* const data = static_cast<const E*>(p.b.data);
    const int g = lane / 4, rank = first_rank + lane % 4 * 4;
    const int column = first_column + g / 2 * 8 + g % 2 * 32;
    if (p.b.transposed) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint2 low = make_uint2(0, 0), high = low;
        const uint2* const from =
            reinterpret_cast<const uint2*>(data + static_cast<int64_t>(column + j) * p.rank + rank);
        const uint2* const after =
            reinterpret_cast<const uint2*>(reinterpret_cast<const E*>(from) + p.rank);
        if (rank < p.rank && column + j < p.out) low = __ldg(from);
        if (rank < p.rank && column + j + 1 < p.out) high = __ldg(after);
        loaded[j / 2] = make_uint4(low.x, low.y, high.x, high.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        loaded[i] = make_uint4(0, 0, 0, 0);
        if (rank + i < p.rank && column < p.out) {
          loaded[i] = __ldg(reinterpret_cast<const uint4*>(
              data + static_cast<int64_t>(rank + i) * p.out + column));
        }
      }
    }
  }

  // As Multiply takes them.
  __device__ void Arrange(bool transposed, uint32_t (&b)[8][2]) const {
    if (transposed) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        b[j][0] = loaded[j / 2].x, b[j][1] = loaded[j / 2].y;
        b[j + 1][0] = loaded[j / 2].z, b[j + 1][1] = loaded[j / 2].w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        b[j][0] = Pair(loaded[0], loaded[1], j);
        b[j][1] = Pair(loaded[2], loaded[3], j);
      }
    }
  }
};

// y from h, which lies as pairs: of each 4 ranks 4 hi and 4 lo. `ahead` is the first block of B.
template <class E>
__device__ inline void ExpandTensor(const ThinArguments& p, const Result<E>& result, const float* h,
                                    int h_stride, const float* row_scaling, int64_t first_row,
                                    const Strips& strips, BlockOfB<E>& ahead, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  const bool bare = result.vectors && result.base == nullptr && result.bias == nullptr;
  for (int item = warp; item < strips.items;) {
    const int first = strips.Row(item), column = strips.Column(item);
    float sums[2][8][4] = {};
    int rank = 0;
    do {
      uint32_t b[8][2];
      ahead.Arrange(p.b.transposed, b);
      const float* const own = h + (first + g) * h_stride + rank + t * 4;
      rank += 16;
      if (rank >= p.rank) item += kWarps;
      if (item < strips.items) {
        ahead.Load(p, rank < p.rank ? rank : 0, strips.Column(item), lane);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 upper = *reinterpret_cast<const uint4*>(own + m * 16 * h_stride);
        const uint4 lower = *reinterpret_cast<const uint4*>(own + (m * 16 + 8) * h_stride);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Multiply<E>(sums[m][j], upper.x, lower.x, upper.y, lower.y, b[j][0], b[j][1]);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Multiply<E>(sums[m][j], upper.z, lower.z, upper.w, lower.w, b[j][0], b[j][1]);
        }
      }
    } while (rank < p.rank);
    const auto write = [&](const auto& store) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int row = m * 16 + side * 8;
          const float scaling =
              std::is_same_v<E, __half> ? row_scaling[first + g + row] : p.expand_scaling;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float values[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = scaling * sums[m][j][side * 2 + n];
            store(row, n * 32, values);
          }
        }
      }
    };
    // Nearly always there is nothing to ask for each store; that halves this loop's instructions.
    const int64_t own_row = first_row + first + g;
    if (bare && first_row + first + 32 <= p.rows && column + kColumns <= p.out) {
      E* const y = result.y + own_row * p.out + column + t * 8;
      write([&](int row, int across, const float (&values)[8]) {
        E elements[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) elements[j] = Rounded<E>(values[j]);
        StoreVectors(elements, y + row * static_cast<int64_t>(p.out) + across);
      });
    } else {
      write([&](int row, int across, float (&values)[8]) {
        result.Write(own_row + row, column + t * 8 + across, values);
      });
    }
  }
}

// Four values to where one float each would lie, as pairs for ExpandTensor.
template <class E>
__device__ inline void StorePairs(const float (&values)[4], float* to) {
  alignas(16) E pairs[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) Split(values[j], pairs + j, pairs + 4 + j);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(pairs);
}

// Turns h (kRows, ranks) into pairs where it lies, its rows brought to a largest element of 2^14.
template <int kRows>
__device__ inline void ScaleRows(float* h, int h_stride, int ranks, float expand_scaling,
                                 float* row_scaling) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_lanes = min(ranks / 4, 32), warp_rows = 32 / row_lanes;
  for (int first = warp * warp_rows; first < kRows; first += kWarps * warp_rows) {
    const int row = first + lane / row_lanes;
    float* const own = h + row * h_stride + lane % row_lanes * 4;
    float most = 0.0f;
    for (int rank = 0; rank < ranks; rank += 128) {
      float quad[4];
      LoadQuad(own + rank, quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = fabsf(quad[j]);
        most = isfinite(value) ? fmaxf(most, value) : most;
      }
    }
    for (int lanes = 1; lanes < row_lanes; lanes *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
    }
    const ScaleOfRow scale(most);
    if (lane % row_lanes == 0) row_scaling[row] = expand_scaling * scale.down;
    for (int rank = 0; rank < ranks; rank += 128) {
      float quad[4];
      LoadQuad(own + rank, quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) quad[j] *= scale.up;
      StorePairs<__half>(quad, own + rank);
    }
  }
}

template <class E, bool kWideShrink, int kBlocks, int kRowBlocks, Expand kExpand>
__global__ void __launch_bounds__(kThreads, 2)
    ThinKernel(const __grid_constant__ ThinArguments p, const __grid_constant__ Result<E> result) {
  using Tile = std::conditional_t<kWideShrink, float, E>;  // and A's type
  using T = Thin<Tile, kBlocks, kRowBlocks>;
  extern __shared__ __align__(16) char memory[];
  __shared__ float row_scaling[T::kRows];

  LaunchDependents();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int across = 1 << p.across_shift, warps_deep = kWarps >> p.across_shift;
  const int ranks = T::kWarpRanks << p.across_shift;
  const int own_rank = (warp & (across - 1)) * T::kWarpRanks, own_step = warp >> p.across_shift;
  const int parts = 1 << p.parts_shift, part = blockIdx.x & (parts - 1);
  const int tile = blockIdx.x >> p.parts_shift;
  const int64_t first_row = static_cast<int64_t>(tile) * T::kRows;
  const int rows = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(T::kRows)));

  // This block's part of the depth.
  const int all_steps = p.rank > 0 ? (p.in + T::kDepth - 1) / T::kDepth : 0;
  const int share_steps = (all_steps + parts - 1) >> p.parts_shift;
  const int first_step = min(part * share_steps, all_steps);
  const int steps = min(share_steps, all_steps - first_step);

  const int stage_size = T::kXTile + T::ATile(ranks, p.a.transposed);
  Tile* const stages = reinterpret_cast<Tile*>(memory);
  const Tile* const a = static_cast<const Tile*>(p.a.data);
  constexpr int kRowsApart = kThreads / T::kRowChunks;
  const int x_row = tid / T::kRowChunks, x_column = tid % T::kRowChunks * T::kChunk;
  const E* const own_x = static_cast<const E*>(p.x) + (first_row + x_row) * p.in + x_column;
  int fetched = steps > 0 ? tile % steps : 0;

  const auto fetch_x = [&](auto vectors, Tile* x_tile, int depth) {
    constexpr bool kVectors = decltype(vectors)::value;
    const E* const from = own_x + depth;
    Tile* const to = x_tile + x_row * T::kStride + x_column;
    const int left = p.in - depth - x_column;
#pragma unroll(kVectors ? T::kRows / kRowsApart : 1)
    for (int i = 0; i < T::kRows; i += kRowsApart) {
      CopyChunk<kVectors>(to + i * T::kStride, from + i * static_cast<int64_t>(p.in),
                          x_row + i < rows ? left : 0, p.x_quads);
    }
  };
  const auto fetch_a = [&](auto vectors, Tile* a_tile, int depth) {
    constexpr bool kVectors = decltype(vectors)::value;
    const int left = p.in - depth;
    if (p.a.transposed) {
      const Tile* const from = a + depth;
#pragma unroll 1
      for (int row = x_row; row < ranks; row += kRowsApart) {
        CopyChunk<kVectors>(a_tile + row * T::kStride + x_column,
                            from + row * static_cast<int64_t>(p.in) + x_column,
                            row < p.rank ? left - x_column : 0, p.a.quads);
      }
    } else {
      constexpr int kWarpChunks = T::kWarpRanks / T::kChunk;  // 2, 4 or 8
      const int shift = p.across_shift + (kWarpChunks == 2 ? 1 : kWarpChunks == 4 ? 2 : 3);
      const Tile* const from = a + static_cast<int64_t>(depth) * p.rank;
#pragma unroll 1
      for (int i = tid; i < T::kDepth << shift; i += kThreads) {
        const int row = i >> shift, column = (i & ((1 << shift) - 1)) * T::kChunk;
        CopyChunk<kVectors>(a_tile + row * (ranks + T::kChunk) + column,
                            from + row * p.rank + column, row < left ? p.rank - column : 0,
                            p.a.quads);
      }
    }
  };
  const auto fetch = [&](int stage) {
    Tile* const x_tile = stages + stage * stage_size;
    const int depth = (first_step + fetched) * T::kDepth;
    if (++fetched == steps) fetched = 0;
    if (std::is_same_v<Tile, E> && p.x_vectors) {
      fetch_x(std::bool_constant<std::is_same_v<Tile, E>>(), x_tile, depth);
    } else {
      fetch_x(std::false_type(), x_tile, depth);
    }
    if (p.a.vectors) {
      fetch_a(std::true_type(), x_tile + T::kXTile, depth);
    } else {
      fetch_a(std::false_type(), x_tile + T::kXTile, depth);
    }
  };

  for (int stage = 0; stage < p.stages; ++stage) {
    if (stage < steps) fetch(stage);
    CommitCopies();
  }

  // This block's part of y, and the first that this warp needs of B.
  Strips strips = {};
  BlockOfB<E> ahead;
  if constexpr (kExpand != Expand::kNone) {
    const int all = (p.out + kColumns - 1) / kColumns;
    const int share = (all + parts - 1) >> p.parts_shift, first = min(part * share, all);
    strips.first_column = first * kColumns;
    strips.count = min(share, all - first);
    strips.items = strips.count * (T::kRows / 32);
    strips.turn = strips.count > 0 ? tile % strips.count : 0;
    if constexpr (kExpand == Expand::kTensor) {
      if (warp < strips.items) ahead.Load(p, 0, strips.Column(warp), lane);
    }
  }

  using Sums =
      std::conditional_t<T::kTensor, float[kRowBlocks][kBlocks][4], WideSums<kBlocks, kRowBlocks>>;
  Sums sums = {};
  int stage = 0, before = p.stages - 1;
  for (int step = 0; step < steps; ++step) {
    WaitForStage(p.stages);
    __syncthreads();  // this step's tiles are whole, those of the step before are read
    if (step > 0) {
      if (step - 1 + p.stages < steps) fetch(before);
      CommitCopies();
    }
    const Tile* const x_tile = stages + stage * stage_size;
    MultiplyStage<Tile>(sums, x_tile, x_tile + T::kXTile, p.a.transposed, ranks, own_rank, own_step,
                        warps_deep, lane);
    before = stage;
    if (++stage == p.stages) stage = 0;
  }
  WaitForCopies<0>();
  __syncthreads();  // the tiles are read

  // The sums of the depth's shares, then h, in the same memory.
  float* const shares = reinterpret_cast<float*>(memory);
  const int h_stride = T::SumsStride(ranks), share = T::Sums(ranks);
  StoreSums(sums, shares + own_step * share + own_rank, h_stride, lane);
  __syncthreads();  // all shares are there

  // Four ranks a thread at a time.
  const int shift = 31 - __clz(ranks / 4), quads = T::kRows << shift;
  const auto place = [&](int i) { return (i >> shift) * h_stride + (i & ((1 << shift) - 1)) * 4; };
  const auto block_sum = [&](int at) {
    return SumShares<kWarps>(warps_deep, [&](int i) { return shares + i * share + at; });
  };
  // What this block tells the world of h.
  const int own_begin = quads * part >> p.parts_shift,
            own_end = quads * (part + 1) >> p.parts_shift;
  float* h = shares;
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  if (parts > 1) {
    for (int i = tid; i < quads; i += kThreads) {
      const int at = place(i);
      *reinterpret_cast<float4*>(shares + at) = block_sum(at);
    }
    cluster.sync();  // all blocks' sums are there
    h += warps_deep * share;
  }
#endif
  const int begin = kExpand == Expand::kNone ? own_begin : 0;
  const int end = kExpand == Expand::kNone ? own_end : quads;
  for (int i = begin + tid; i < end; i += kThreads) {
    const int row = i >> shift, at = place(i), rank = at - row * h_stride;
    float4 sum;
#if __CUDA_ARCH__ >= 900
    if (parts > 1) {
      sum = SumShares<kMostParts>(
          parts, [&](int block) { return cluster.map_shared_rank(shares, block) + at; });
    } else {
      sum = block_sum(at);
    }
#else
    sum = block_sum(at);
#endif
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[j] = rank + j < p.rank ? p.shrink_scaling * values[j] : 0.0f;
    }
    if constexpr (kExpand == Expand::kTensor && std::is_same_v<E, __nv_bfloat16>) {
      StorePairs<E>(values, h + at);
    } else if constexpr (kExpand != Expand::kNone) {
      *reinterpret_cast<float4*>(h + at) = make_float4(values[0], values[1], values[2], values[3]);
    }
    if (row >= rows || i < own_begin || i >= own_end) continue;
    if (p.h != nullptr && rank < p.rank) {
      float* const to = p.h + (first_row + row) * p.rank + rank;
      if (p.h_quads) {
        *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (rank + j < p.rank) to[j] = values[j];
        }
      }
    }
    if constexpr (kExpand == Expand::kNone && sizeof(E) == 2) {
      const int h16_width = H16Width(p.rank), to = rank / 16 * kH16Block + rank % 16;
      if (p.h16 != nullptr && to < h16_width) {
        alignas(8) E hi[4], lo[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) SplitClamped(p.h16_scaling * values[j], hi + j, lo + j);
        E* const pair = static_cast<E*>(p.h16) + (first_row + row) * h16_width + to;
        *reinterpret_cast<uint2*>(pair) = *reinterpret_cast<uint2*>(hi);
        *reinterpret_cast<uint2*>(pair + kH16Block / 2) = *reinterpret_cast<uint2*>(lo);
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  // Nothing is handed on here, and a release would wait for h's way to memory.
  if (parts > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
  if constexpr (kExpand != Expand::kNone) {
    __syncthreads();  // h is whole
    if constexpr (kExpand == Expand::kWide) {
      ExpandWide(p, result, h, h_stride, first_row, strips, warp, lane);
    } else {
      if constexpr (std::is_same_v<E, __half>) {
        ScaleRows<T::kRows>(h, h_stride, ranks, p.expand_scaling, row_scaling);
        __syncthreads();  // the pairs are whole
      }
      ExpandTensor(p, result, h, h_stride, row_scaling, first_row, strips, ahead, warp, lane);
    }
  }
#if __CUDA_ARCH__ >= 900
  // No block may end while another still reads its sums.
  if (parts > 1) asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

template <class E, bool kWideShrink, int kBlocks, int kRowBlocks, Expand kExpand>
cudaError_t LaunchThin(cudaStream_t stream, ThinArguments p, const Result<E>& result,
                       const Gpu& gpu) {
  using Tile = std::conditional_t<kWideShrink, float, E>;
  using T = Thin<Tile, kBlocks, kRowBlocks>;
  const int most_parts = HasSm90() ? kMostParts : 1;
  const int64_t tiles = CeilDiv(p.rows, T::kRows);
  // Blocks without a part of the depth still write theirs of y. A multiprocessor moves as many
  // bytes for one block as for two, and of 132 only 120 take clusters of four and more (an H200):
  // two blocks on some make all wait. 2048 rows of 4096→4096, rank 16, in 256 blocks 22.6 µs, in
  // 128 14.2. Of high ranks, which multiply longer, two share one well: 8192 rows of rank 64 in 128
  // blocks 97 µs, in 256 77.
  const int64_t steps = CeilDiv(p.in, T::kDepth);
  const int64_t strips = kExpand == Expand::kNone ? 0 : CeilDiv(p.out, kColumns);
  const auto fits = [&](int shift) {
    const int halves = shift > 1 ? 3 : kBlocks > 2 ? 4 : 2;  // blocks of two multiprocessors
    return 2 * (tiles << shift) <= halves * gpu.multiprocessors;
  };
  p.parts_shift = 0;
  while (1 << p.parts_shift < most_parts && fits(p.parts_shift + 1) &&
         2 << p.parts_shift <= std::max(steps, strips)) {
    ++p.parts_shift;
  }
  p.across_shift = 0;
  while (T::kWarpRanks << p.across_shift < p.rank) ++p.across_shift;
  const int ranks = T::kWarpRanks << p.across_shift;
  const int stage = (T::kXTile + T::ATile(ranks, p.a.transposed)) * sizeof(Tile);
  const int reserved = 2048;  // of a block, by the system and for row_scaling
  p.stages = std::max(2, std::min(4, (gpu.shared / 2 - reserved) / stage));
  const bool apart = p.parts_shift > 0 && kExpand != Expand::kNone;  // h from the sums
  const int sums =
      ((kWarps >> p.across_shift) + apart) * T::Sums(ranks) * static_cast<int>(sizeof(float));
  const int shared = std::max(sums, p.stages * stage);
  if constexpr (kRowBlocks > 2) {
    // 64 rows where 32, in two parts, would be more blocks than multiprocessors.
    if (tiles * (most_parts > 1 ? 4 : 1) <= gpu.multiprocessors || shared > gpu.block_shared) {
      return LaunchThin<E, kWideShrink, kBlocks, 2, kExpand>(stream, p, result, gpu);
    }
  }
  const int64_t blocks = tiles << p.parts_shift;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return Launch(ThinKernel<E, kWideShrink, kBlocks, kRowBlocks, kExpand>,
                dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream, false,
                1 << p.parts_shift, p, result);
}

template <class E, bool kWideShrink, int kRowBlocks, Expand kExpand>
cudaError_t LaunchThin(cudaStream_t stream, const ThinArguments& p, const Result<E>& result,
                       const Gpu& gpu) {
  return p.rank <= 32 ? LaunchThin<E, kWideShrink, 2, kRowBlocks, kExpand>(stream, p, result, gpu)
                      : LaunchThin<E, kWideShrink, 4, kRowBlocks, kExpand>(stream, p, result, gpu);
}

// float32 factors stay with 32 rows.
template <class E, Expand kExpand>
cudaError_t LaunchThin(cudaStream_t stream, const ThinArguments& p, const Result<E>& result,
                       const Gpu& gpu) {
  if constexpr (sizeof(E) == 2) {
    constexpr int kRowBlocks = kExpand == Expand::kWide ? 2 : 4;
    if (!p.a.wide) return LaunchThin<E, false, kRowBlocks, kExpand>(stream, p, result, gpu);
  }
  return LaunchThin<E, true, 2, kExpand>(stream, p, result, gpu);
}

cudaError_t LaunchManyRows(cudaStream_t stream, const Pass& pass) {
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  const Sizes& sizes = pass.sizes;
  const int64_t width = Width(pass.element);
  ThinArguments p = {};
  p.rows = sizes.rows;
  p.in = static_cast<int>(sizes.in);
  p.out = static_cast<int>(sizes.out);
  p.rank = static_cast<int>(sizes.rank);
  p.x = pass.x;
  p.x_vectors = Vectors(pass.x, sizes.in, width);
  p.x_quads = Vectors(pass.x, sizes.in, width, 4 * width);
  p.a = View(pass.a, sizes.in, sizes.rank);
  p.b = View(pass.b, sizes.rank, sizes.out);
  p.shrink_scaling = pass.shrink_scaling;
  p.expand_scaling = pass.expand_scaling;
  p.h = pass.h;
  p.h_quads = Vectors(pass.h, sizes.rank, sizeof(float));
  p.h16 = pass.h16;
  p.h16_scaling = pass.h16_scaling;
  return Dispatch(pass.element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if (pass.y == nullptr) {
      return LaunchThin<E, Expand::kNone>(stream, p, Result<E>(), gpu);
    }
    if constexpr (sizeof(E) == 2) {
      if (!p.b.wide && (p.b.transposed ? p.b.quads : p.b.vectors)) {
        return LaunchThin<E, Expand::kTensor>(stream, p, ResultOf<E>(pass, 8), gpu);
      }
    }
    return LaunchThin<E, Expand::kWide>(stream, p, ResultOf<E>(pass, 4), gpu);
  });
}

cudaError_t LaunchPass(cudaStream_t stream, Pass pass) {
  const Sizes& sizes = pass.sizes;
  if (sizes.out == 0) pass.y = nullptr;
  if (sizes.rank < 0 || sizes.rank > kMaxRank || std::max(sizes.in, sizes.out) > kMostLength) {
    return cudaErrorInvalidValue;
  }
  if (sizes.rows == 0 || (sizes.rank == 0 && pass.y == nullptr)) return cudaSuccess;
  if (DeltaFmaServes(pass)) return LaunchDeltaFma(stream, pass);
  if (DeltaMmaServes(pass)) return LaunchDeltaMma(stream, pass);
  if (DeltaTmaServes(pass)) return LaunchDeltaTma(stream, pass);
  // From 5 rows on a cluster with tensor cores is the faster one: 4096→4096, rank 16, takes 6.9 µs
  // for 16 rows here and 9.1 for one row there.
  const bool tensor = pass.element != Element::kFloat32 && pass.a.element != Element::kFloat32;
  const int64_t few = tensor && HasSm90() ? 4 : kFewRows;
  return sizes.rows <= few ? LaunchRows(stream, pass) : LaunchManyRows(stream, pass);
}

}  // namespace

cudaError_t LaunchShrink(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                         const Factor& a, float scaling, float* h, void* h16, float h16_scaling) {
  return LaunchPass(stream, {element, sizes, x, a, Factor{nullptr, element, false}, scaling, 0.0f,
                             Addend{nullptr, nullptr}, h, h16, h16_scaling, nullptr});
}

cudaError_t LaunchShrinkExpand(cudaStream_t stream, Element element, const Sizes& sizes,
                               const void* x, const Factor& a, const Factor& b,
                               float shrink_scaling, float expand_scaling, const Addend& addend,
                               float* h, void* y) {
  return LaunchPass(stream, {element, sizes, x, a, b, shrink_scaling, expand_scaling, addend, h,
                             nullptr, 0.0f, y});
}

}  // namespace jax_fused_lora
