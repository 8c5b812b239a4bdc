// h = s·x·A (also t = s·g·Bᵀ), alone or with y = addend + s·h·B behind it in the same kernel.
//
// Many rows: a block has 32 rows (16 where there would be too few blocks) and all ranks, so that x
// is read exactly once, through a ring of shared-memory tiles filled by cp.async; A comes out of L2
// once a block. Eight warps share a tile's depth and the ranks between them: rank 16 leaves one
// warp wide enough for all ranks, so each warp takes an eighth of the depth, and the eight sums are
// added in one order at the end. h never leaves shared memory on its way to y. B is read straight
// from L2 into the registers that multiply it, once a block, and y is written straight from the
// registers that hold it, 64 columns a warp at a time: no barrier in that half of the kernel.
// Device memory: x, h and y once, A and B once; L2: A and B once for every 32 rows.
//
// Sixteen-bit operands are multiplied on tensor cores. A 16-bit h would miss the project's accuracy
// rule, so the second product has it as the sum of two, hi + lo, and multiplies B with both. What
// bfloat16 loses that way is 2^-18 of h. float16 is short of exponents, not of bits: each row of h
// is first brought to a largest element of 2^14 by a power of two, which y is divided by again.
// Where x or the factor is float32, the products are float32 multiplications and additions.
//
// Few rows (16 at most): a cluster of 8 blocks. Each block sums an eighth of the depth, all add the
// eight sums through distributed shared memory, and each writes an eighth of y. Before sm_90 a
// single block does it all.
#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "native/cuda/device.cuh"
#include "native/cuda/gemm_sm90.h"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kCluster = 8;
constexpr int kPrefetchColumns = 32;

struct Shape {
  int64_t rows, in, out;
  int rank;
};

// ---------------------------------------------------------------------------------------------
// Many rows

struct ThinArguments {
  Shape shape;
  const void* x;
  bool x_vectors, x_quads;
  FactorView a, b;
  float shrink_scaling, expand_scaling;
  float* h;   // may be null
  void* h16;  // may be null
  float h16_scaling;
  int block_rows, stages;
  int warps_across;  // warps side by side over the ranks; the others share the depth
  bool b_vectors;    // B may be read as the tensor cores' expand likes it
};

// Tiles of type Tile. kBlocks is a warp's width in blocks of 8 ranks.
template <class Tile, int kBlocks>
struct Thin {
  static constexpr bool kTensor = sizeof(Tile) == 2;
  static constexpr int kDepth = (kBlocks == 2 ? 128 : 64) / (kTensor ? 1 : 2);
  static constexpr int kChunk = 16 / sizeof(Tile);
  static constexpr int kStride = kDepth + kChunk;  // one chunk more than needed: other banks
  static constexpr int kWarpRanks = kBlocks * 8;

  static __host__ __device__ int Ranks(int warps_across) { return warps_across * kWarpRanks; }
  // Elements of one stage: a tile of x and one of A.
  static __host__ __device__ int XTile(int rows) { return rows * kStride; }
  static __host__ __device__ int ATile(int ranks, bool transposed) {
    return transposed ? ranks * kStride : kDepth * (ranks + kChunk);
  }
};

// A tile from (row, column) of the matrix (rows, row_length), converted where need be, zeros
// outside; tile_columns is a power of two, 16 bytes at least.
template <class Tile, class Source>
__device__ void Stage(Tile* tile, int tile_rows, int tile_columns, int stride, const Source* source,
                      bool vectors, bool quads, int64_t row, int64_t rows, int64_t column,
                      int64_t row_length) {
  constexpr int kChunk = 16 / sizeof(Tile);
  const int chunks = tile_columns / kChunk, shift = 31 - __clz(chunks);
  for (int i = threadIdx.x; i < tile_rows << shift; i += kThreads) {
    const int r = i >> shift, c = (i & (chunks - 1)) * kChunk;
    Tile* const to = tile + r * stride + c;
    const bool some = row + r < rows && column + c < row_length;
    const Source* const from = source + (some ? (row + r) * row_length + column + c : 0);
    if constexpr (std::is_same_v<Tile, Source>) {
      if (vectors) {
        CopyAsync(to, from, some);
        continue;
      }
    }
    if constexpr (sizeof(Tile) == 4) {
      float quad[4];
      LoadQuad(from, some ? row_length - column - c : 0, quads, quad);
      *reinterpret_cast<float4*>(to) = make_float4(quad[0], quad[1], quad[2], quad[3]);
    } else {
      alignas(16) Tile elements[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const bool inside = some && column + c + j < row_length;
        elements[j] = inside ? from[j] : Rounded<Tile>(0.0f);
      }
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(elements);
    }
  }
}

// One stage's share of this warp, on tensor cores. Lane layouts: see Multiply.
template <class Tile, int kBlocks>
__device__ inline void MultiplyStageTensor(float (&sums)[2][kBlocks][4], const Tile* x_tile,
                                           const Tile* a_tile, bool transposed, int ranks,
                                           int row_blocks, int own_rank, int own_step,
                                           int steps_apart, int lane) {
  using T = Thin<Tile, kBlocks>;
  for (int depth = own_step * 16; depth < T::kDepth; depth += steps_apart * 16) {
    uint32_t x[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m < row_blocks) {
        LoadBlocks(x[m], x_tile + (m * 16 + lane % 16) * T::kStride + depth + lane / 16 * 8);
      }
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
      for (int m = 0; m < 2; ++m) {
        if (m < row_blocks) {
          Multiply<Tile>(sums[m][pair * 2], x[m][0], x[m][1], x[m][2], x[m][3], a[0], a[1]);
          Multiply<Tile>(sums[m][pair * 2 + 1], x[m][0], x[m][1], x[m][2], x[m][3], a[2], a[3]);
        }
      }
    }
  }
}

// The same in float32: a lane has rows lane / 4 + 8·i and, of every 16 ranks, 4 from lane % 4 * 4.
template <int kBlocks>
__device__ inline void MultiplyStageWide(float (&sums)[4][kBlocks * 2], const float* x_tile,
                                         const float* a_tile, bool transposed, int ranks,
                                         int row_blocks, int own_rank, int own_step,
                                         int steps_apart, int lane) {
  using T = Thin<float, kBlocks>;
  for (int depth = own_step * 4; depth < T::kDepth; depth += steps_apart * 4) {
    float x[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < row_blocks * 2) LoadQuad(x_tile + (lane / 4 + i * 8) * T::kStride + depth, x[i]);
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
      for (int i = 0; i < 4; ++i) {
        if (i < row_blocks * 2) {
#pragma unroll
          for (int d = 0; d < 4; ++d) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][quad * 4 + j] += x[i][d] * a[d][j];
          }
        }
      }
    }
  }
}

// y from h and a B in float32. A lane has a quarter of the rows and 8 of a warp's 64 columns.
template <class E>
__device__ inline void ExpandWide(const ThinArguments& p, const Result<E>& result, const float* h,
                                  int h_stride, int64_t first_row, int warp, int lane) {
  const int lane_rows = p.block_rows / 4, row = lane / 8 * lane_rows;
  for (int64_t strip = warp * 64; strip < p.shape.out; strip += kWarps * 64) {
    const int64_t column = strip + lane % 8 * 4;
    float sums[8][8] = {};
#pragma unroll 1
    for (int rank = 0; rank < p.shape.rank; rank += 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float b[4][4];
        LoadBlock<float>(p.b, rank, p.shape.rank, column + half * 32, p.shape.out, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i < lane_rows) {
            float quad[4];
            LoadQuad(h + (row + i) * h_stride + rank, quad);
#pragma unroll
            for (int d = 0; d < 4; ++d) {
#pragma unroll
              for (int j = 0; j < 4; ++j) sums[i][half * 4 + j] += quad[d] * b[d][j];
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < lane_rows) {
        float left[4], right[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          left[j] = p.expand_scaling * sums[i][j];
          right[j] = p.expand_scaling * sums[i][j + 4];
        }
        result.Write(first_row + row + i, column, left);
        result.Write(first_row + row + i, column + 32, right);
      }
    }
  }
}

// y from hi and lo on tensor cores, 64 columns a warp at a time. Which of the 64 is column n of
// block j is free: n / 2 * 8 + n % 2 * 32 + j makes the 8 blocks' elements of a lane neighbours, in
// B and in y, and 4 lanes' stores whole sectors. Likewise rank 4t + i of each 16, i < 4, plays
// 2t, 2t + 1, 2t + 8 and 2t + 9 for lane t.
template <class E, bool kTransposed>
__device__ inline void ExpandTensor(const ThinArguments& p, const Result<E>& result, const E* hi,
                                    const E* lo, int stride, const float* row_scaling,
                                    int64_t first_row, int warp, int lane) {
  const int g = lane / 4, t = lane % 4, row_blocks = p.block_rows / 16;
  const E* const b_data = static_cast<const E*>(p.b.data);
  const int64_t out = p.shape.out;
  const int rank = p.shape.rank;
  for (int64_t strip = warp * 64; strip < out; strip += kWarps * 64) {
    const int64_t column = strip + g / 2 * 8 + g % 2 * 32;
    float sums[2][8][4] = {};
#pragma unroll 1
    for (int from = 0; from < rank; from += 16) {
      const int own = from + t * 4;
      uint32_t b[8][2];
      if constexpr (!kTransposed) {
        uint4 rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const E* const row = b_data + (own + i) * out + column;
          if (own + i < rank && column < out && p.b_vectors) {
            rows[i] = __ldg(reinterpret_cast<const uint4*>(row));
          } else {
            alignas(16) E elements[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              const bool inside = own + i < rank && column + j < out;
              elements[j] = inside ? row[j] : Rounded<E>(0.0f);
            }
            rows[i] = *reinterpret_cast<uint4*>(elements);
          }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          b[j][0] = Pair(rows[0], rows[1], j);
          b[j][1] = Pair(rows[2], rows[3], j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const E* const row = b_data + (column + j) * rank + own;
          uint2 quad;
          if (own < rank && column + j < out && p.b_vectors) {
            quad = __ldg(reinterpret_cast<const uint2*>(row));
          } else {
            alignas(8) E elements[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const bool inside = own + i < rank && column + j < out;
              elements[i] = inside ? row[i] : Rounded<E>(0.0f);
            }
            quad = *reinterpret_cast<uint2*>(elements);
          }
          b[j][0] = quad.x;
          b[j][1] = quad.y;
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (m < row_blocks) {
          const int at = (m * 16 + g) * stride + own;
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const E* const h = (part ? lo : hi) + at;
            const uint2 upper = *reinterpret_cast<const uint2*>(h);
            const uint2 lower = *reinterpret_cast<const uint2*>(h + 8 * stride);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              Multiply<E>(sums[m][j], upper.x, lower.x, upper.y, lower.y, b[j][0], b[j][1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m < row_blocks) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m * 16 + half * 8 + g;
          const float scaling = row_scaling[row];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float values[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = scaling * sums[m][j][half * 2 + n];
            result.Write(first_row + row, strip + t * 8 + n * 32, values);
          }
        }
      }
    }
  }
}

// value as hi + lo. What is not finite stays what it is.
template <class E>
__device__ inline void Split(float value, E* hi, E* lo) {
  *hi = Rounded<E>(value);
  const float rest = value - ToFloat(*hi);
  *lo = Rounded<E>(isfinite(rest) ? rest : 0.0f);
}

// The same for h16: float16's hi and lo end at ±65504, see gemm_sm90.h. NaN stays NaN.
template <class E>
__device__ inline void SplitClamped(float value, E* hi, E* lo) {
  if constexpr (std::is_same_v<E, __half>) {
    constexpr float kMost = 65504.0f;
    *hi = Rounded<E>(value > kMost ? kMost : value < -kMost ? -kMost : value);
    const float rest = value - ToFloat(*hi);
    *lo = Rounded<E>(rest > kMost ? kMost : rest < -kMost ? -kMost : rest);
  } else {
    Split(value, hi, lo);
  }
}

constexpr int kH16Block = static_cast<int>(GemmSm90Width(1));  // columns of h16, of 16 ranks
static_assert(GemmSm90Width(17) == 2 * kH16Block);
__device__ inline int H16Width(int rank) { return (rank + 15) / 16 * kH16Block; }

// float32 sums of the depth's shares, after the stages; then h, hi and lo in the same memory.
__host__ __device__ inline int SumsStride(int ranks) { return ranks + 4; }
__host__ __device__ inline int SplitStride(int ranks) { return ranks + 8; }

template <class E, bool kWideShrink, int kBlocks, bool kExpand>
__global__ void __launch_bounds__(kThreads, 2)
    ThinKernel(const __grid_constant__ ThinArguments p, const __grid_constant__ Result<E> result) {
  using Tile = std::conditional_t<kWideShrink, float, E>;
  using A = std::conditional_t<kWideShrink, float, E>;
  using T = Thin<Tile, kBlocks>;
  extern __shared__ __align__(16) char memory[];
  __shared__ float row_scaling[32];

  LaunchDependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int ranks = T::Ranks(p.warps_across), warps_deep = kWarps / p.warps_across;
  const int own_rank = warp % p.warps_across * T::kWarpRanks, own_step = warp / p.warps_across;
  const int row_blocks = p.block_rows / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int x_size = T::XTile(p.block_rows), stage_size = x_size + T::ATile(ranks, p.a.transposed);
  Tile* const stages = reinterpret_cast<Tile*>(memory);

  const auto fetch = [&](int64_t step, int stage) {
    Tile* const x_tile = stages + stage * stage_size;
    const int64_t depth = step * T::kDepth;
    Stage(x_tile, p.block_rows, T::kDepth, T::kStride, static_cast<const E*>(p.x), p.x_vectors,
          p.x_quads, first_row, p.shape.rows, depth, p.shape.in);
    if (p.a.transposed) {
      Stage(x_tile + x_size, ranks, T::kDepth, T::kStride, static_cast<const A*>(p.a.data),
            p.a.vectors, p.a.quads, 0, p.shape.rank, depth, p.shape.in);
    } else {
      Stage(x_tile + x_size, T::kDepth, ranks, ranks + T::kChunk, static_cast<const A*>(p.a.data),
            p.a.vectors, p.a.quads, depth, p.shape.in, 0, p.shape.rank);
    }
  };

  using Sums = std::conditional_t<T::kTensor, float[2][kBlocks][4], float[4][kBlocks * 2]>;
  Sums sums = {};
  const int64_t steps = p.shape.rank > 0 ? (p.shape.in + T::kDepth - 1) / T::kDepth : 0;
  for (int step = 0; step < p.stages - 1; ++step) {
    if (step < steps) fetch(step, step);
    CommitCopies();
  }
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    if (p.stages == 4) {
      WaitForCopies<2>();
    } else if (p.stages == 3) {
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();  // this step's tiles are whole, those of the step before are read
    const int ahead = stage == 0 ? p.stages - 1 : stage - 1;
    if (step + p.stages - 1 < steps) fetch(step + p.stages - 1, ahead);
    CommitCopies();
    const Tile* const x_tile = stages + stage * stage_size;
    if constexpr (T::kTensor) {
      MultiplyStageTensor<Tile, kBlocks>(sums, x_tile, x_tile + x_size, p.a.transposed, ranks,
                                         row_blocks, own_rank, own_step, warps_deep, lane);
    } else {
      MultiplyStageWide<kBlocks>(sums, x_tile, x_tile + x_size, p.a.transposed, ranks, row_blocks,
                                 own_rank, own_step, warps_deep, lane);
    }
    if (++stage == p.stages) stage = 0;
  }
  WaitForCopies<0>();
  __syncthreads();  // the tiles are read

  float* const h = reinterpret_cast<float*>(memory);
  const int h_stride = SumsStride(ranks), share = p.block_rows * h_stride;
  {
    float* const own = h + own_step * share + own_rank;
    if constexpr (T::kTensor) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (m < row_blocks) {
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
            float* const at = own + (m * 16 + lane / 4) * h_stride + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(at) = make_float2(sums[m][j][0], sums[m][j][1]);
            *reinterpret_cast<float2*>(at + 8 * h_stride) =
                make_float2(sums[m][j][2], sums[m][j][3]);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < row_blocks * 2) {
#pragma unroll
          for (int j = 0; j < kBlocks * 2; ++j) {
            own[(lane / 4 + i * 8) * h_stride + j / 4 * 16 + lane % 4 * 4 + j % 4] = sums[i][j];
          }
        }
      }
    }
  }
  __syncthreads();  // all shares are there

  const int shift = 31 - __clz(ranks);
  E* const h16 = static_cast<E*>(p.h16);
  const int h16_width = H16Width(p.shape.rank);
  for (int i = threadIdx.x; i < p.block_rows << shift; i += kThreads) {
    const int row = i >> shift, rank = i & (ranks - 1), at = row * h_stride + rank;
    float sum = 0.0f;
    if (rank < p.shape.rank) {
      for (int s = 0; s < warps_deep; ++s) sum += h[s * share + at];
      sum *= p.shrink_scaling;
    }
    h[at] = sum;
    if (first_row + row >= p.shape.rows) continue;
    if (p.h != nullptr && rank < p.shape.rank) {
      p.h[(first_row + row) * p.shape.rank + rank] = sum;
    }
    if constexpr (sizeof(E) == 2) {
      const int to = rank / 16 * 32 + rank % 16;
      if (h16 != nullptr && to < h16_width) {
        E* const pair = h16 + (first_row + row) * h16_width + to;
        SplitClamped(p.h16_scaling * sum, pair, pair + 16);
      }
    }
  }
  if constexpr (kExpand) {
    __syncthreads();  // h is whole
    if constexpr (sizeof(E) == 2) {
      if (!p.b.wide) {
        const int stride = SplitStride(ranks);
        E* const hi = reinterpret_cast<E*>(h + warps_deep * share);
        E* const lo = hi + p.block_rows * stride;
        for (int row = warp; row < p.block_rows; row += kWarps) {
          float factor = 1.0f, back = 1.0f;
          if constexpr (std::is_same_v<E, __half>) {
            float most = 0.0f;
            for (int rank = lane; rank < ranks; rank += 32) {
              const float value = fabsf(h[row * h_stride + rank]);
              most = isfinite(value) ? fmaxf(most, value) : most;
            }
            for (int lanes = 16; lanes > 0; lanes /= 2) {
              most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
            }
            const int exponent = (__float_as_int(most) >> 23) - 127;  // most < 2^(exponent + 1)
            const int up = most > 0.0f ? min(14 - exponent, 126) : 0;
            factor = __int_as_float((127 + up) << 23);
            back = __int_as_float((127 - up) << 23);
          }
          for (int rank = lane; rank < ranks; rank += 32) {
            Split(h[row * h_stride + rank] * factor, hi + row * stride + rank,
                  lo + row * stride + rank);
          }
          if (lane == 0) row_scaling[row] = p.expand_scaling * back;
        }
        __syncthreads();  // hi and lo are whole
        if (p.b.transposed) {
          ExpandTensor<E, true>(p, result, hi, lo, stride, row_scaling, first_row, warp, lane);
        } else {
          ExpandTensor<E, false>(p, result, hi, lo, stride, row_scaling, first_row, warp, lane);
        }
        return;
      }
    }
    ExpandWide(p, result, h, h_stride, first_row, warp, lane);
  }
}

int Multiprocessors(int* shared) {
  // Per device; what another thread stores meanwhile is the same.
  static std::atomic<int64_t> known[64];
  int device = 0, count = 0, memory = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const int64_t before = known[device % 64].load(std::memory_order_relaxed);
  if (before >> 48 == device + 1) {
    *shared = static_cast<int>(before & 0xffffffff);
    return static_cast<int>(before >> 32 & 0xffff);
  }
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return 0;
  }
  known[device % 64].store(
      static_cast<int64_t>(device + 1) << 48 | static_cast<int64_t>(count) << 32 | memory,
      std::memory_order_relaxed);
  *shared = memory;
  return count;
}

template <class E, bool kWideShrink, int kBlocks, bool kExpand>
cudaError_t LaunchThin(cudaStream_t stream, ThinArguments p, const Result<E>& result, int limit) {
  using Tile = std::conditional_t<kWideShrink, float, E>;
  using T = Thin<Tile, kBlocks>;
  p.warps_across = 1;
  while (T::Ranks(p.warps_across) < p.shape.rank) p.warps_across *= 2;
  const int ranks = T::Ranks(p.warps_across);
  const int stage = (T::XTile(p.block_rows) + T::ATile(ranks, p.a.transposed)) * sizeof(Tile);
  int sums = kWarps / p.warps_across * p.block_rows * SumsStride(ranks) * sizeof(float);
  if (kExpand && !p.b.wide && sizeof(E) == 2) {
    sums += 2 * p.block_rows * SplitStride(ranks) * sizeof(E);
  }
  // Two blocks a multiprocessor, as long as that leaves two stages.
  p.stages = std::max(2, std::min(4, std::min(limit, 100 * 1024) / stage));
  const int shared = std::max(sums, p.stages * stage);
  const int64_t blocks = CeilDiv(p.shape.rows, p.block_rows);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return Launch(ThinKernel<E, kWideShrink, kBlocks, kExpand>, dim3(static_cast<unsigned>(blocks)),
                kThreads, shared, stream, false, 1, p, result);
}

template <class E, bool kExpand>
cudaError_t LaunchThin(cudaStream_t stream, const ThinArguments& p, const Result<E>& result,
                       int limit) {
  const bool narrow = p.shape.rank <= 16;
  if constexpr (sizeof(E) == 2) {
    if (!p.a.wide) {
      return narrow ? LaunchThin<E, false, 2, kExpand>(stream, p, result, limit)
                    : LaunchThin<E, false, 4, kExpand>(stream, p, result, limit);
    }
  }
  return narrow ? LaunchThin<E, true, 2, kExpand>(stream, p, result, limit)
                : LaunchThin<E, true, 4, kExpand>(stream, p, result, limit);
}

// ---------------------------------------------------------------------------------------------
// Few rows

struct RowsArguments {
  Shape shape;
  const void* x;
  bool x_quads;
  FactorView a, b;
  float shrink_scaling, expand_scaling;
  float* h;   // may be null
  void* h16;  // may be null
  float h16_scaling;
  bool expand;
  unsigned* tickets;  // to be zeroed
  int64_t ticket_count;
};

// Sums of kRows rows from `row` over begin..end of the depth: sums[row][rank] of the block.
//
// A thread has 4 ranks, of `groups` such, and every `slots`-th of the depth. Neighbouring threads
// have neighbouring ranks, or where A is transposed neighbouring places of the depth.
template <class E, int kRows>
__device__ inline void RowSums(const RowsArguments& p, int64_t row, int64_t begin, int64_t end,
                               float* shares, float* sums) {
  const int rank = p.shape.rank;
  int groups = 1;
  while (groups * 4 < rank) groups *= 2;
  const int slots = kRowThreads / groups, tid = threadIdx.x;
  const int group = p.a.transposed ? tid / slots : tid % groups;
  const int slot = p.a.transposed ? tid % slots : tid / groups;
  const E* const x = static_cast<const E*>(p.x);
  float own[kRows][4] = {};
  const auto add = [&](const auto* a) {
#pragma unroll 4
    for (int64_t i = begin + slot; i < end; i += slots) {
      float quad[4];
      if (p.a.transposed) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool inside = group * 4 + j < rank;
          quad[j] = inside ? ToFloat(a[(group * 4 + j) * p.shape.in + i]) : 0.0f;
        }
      } else {
        LoadQuad(a + i * rank + group * 4, rank - group * 4, p.a.quads, quad);
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (row + m >= p.shape.rows) continue;
        const float value = ToFloat(x[(row + m) * p.shape.in + i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) own[m][j] += value * quad[j];
      }
    }
  };
  if (std::is_same_v<E, float> || p.a.wide) {
    add(static_cast<const float*>(p.a.data));
  } else {
    add(static_cast<const E*>(p.a.data));
  }
  // Over the lanes of a warp that have the same group, then over the warps.
  const int first = p.a.transposed ? 1 : groups;
  const int last = p.a.transposed ? min(slots, 32) : 32;
  for (int lanes = first; lanes < last; lanes *= 2) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) own[m][j] += __shfl_xor_sync(0xffffffff, own[m][j], lanes);
    }
  }
  const int warp_slots = p.a.transposed ? min(slots, 32) : max(32 / groups, 1);  // now the same
  const int share_count = slots / warp_slots;
  if (slot % warp_slots == 0) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        shares[((slot / warp_slots * kRows + m) * groups + group) * 4 + j] = own[m][j];
      }
    }
  }
  __syncthreads();  // all shares are there
  for (int i = tid; i < kRows * groups * 4; i += kRowThreads) {
    const int m = i / (groups * 4), at = i % (groups * 4);
    float sum = 0.0f;
    for (int s = 0; s < share_count; ++s) sum += shares[s * kRows * groups * 4 + i];
    if (at < rank && row + m < p.shape.rows) sums[(row + m) * rank + at] = sum;
  }
  __syncthreads();  // the shares are read
}

// kRows rows of y from `row`, 4 columns from `column`.
template <class E, int kRows>
__device__ inline void RowExpand(const RowsArguments& p, const Result<E>& result, const float* h,
                                 int64_t row, int64_t column) {
  const int rank = p.shape.rank;
  float sums[kRows][4] = {};
#pragma unroll 2
  for (int r = 0; r < rank; r += 4) {
    float b[4][4];
    LoadBlock<E>(p.b, r, rank, column, p.shape.out, b);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (row + m >= p.shape.rows) continue;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const float value = r + d < rank ? h[(row + m) * rank + r + d] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[m][j] += value * b[d][j];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[m][j] *= p.expand_scaling;
    result.Write(row + m, column, sums[m]);
  }
}

// The grid is one cluster, or one block.
template <class E, int kRows>
__global__ void __launch_bounds__(kRowThreads)
    RowsKernel(const __grid_constant__ RowsArguments p, const __grid_constant__ Result<E> result) {
  // Shares of the warps, one block's sums, h: at most 16 · kRows · 128 or 4 · kRows · 256, and
  // twice 16 · 256.
  extern __shared__ __align__(16) float scratch[];
  LaunchDependents();
  const int rank = p.shape.rank, h_size = static_cast<int>(p.shape.rows) * rank;
  float* const sums = scratch;
  float* const h = sums + kFewRows * rank;
  float* const shares = h + kFewRows * rank;
  const int block = blockIdx.x, blocks = gridDim.x;

  for (int64_t i = threadIdx.x + static_cast<int64_t>(block) * kRowThreads; i < p.ticket_count;
       i += static_cast<int64_t>(blocks) * kRowThreads) {
    p.tickets[i] = 0;
  }
  // This block's columns of y. Its part of B is asked for now, for later.
  const int64_t columns = ((p.shape.out + blocks - 1) / blocks + 7) / 8 * 8;
  const int64_t first = block * columns, last = min(first + columns, p.shape.out);
  if (p.expand && !p.b.transposed && first < last) {
    const int64_t lines = (last - first + kPrefetchColumns - 1) / kPrefetchColumns;
    const int64_t width = std::is_same_v<E, float> || p.b.wide ? 4 : sizeof(E);
    for (int64_t i = threadIdx.x; i < lines * rank; i += kRowThreads) {
      const int64_t at = i / lines * p.shape.out + first + i % lines * kPrefetchColumns;
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.b.data) + at * width));
    }
  }

  if (rank > 0) {
    const int64_t part = (p.shape.in + blocks - 1) / blocks;
    const int64_t begin = min(block * part, p.shape.in), end = min(begin + part, p.shape.in);
    for (int64_t row = 0; row < p.shape.rows; row += kRows) {
      RowSums<E, kRows>(p, row, begin, end, shares, sums);
    }
  }
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  if (blocks > 1) cluster.sync();  // every block's sums are there
#endif
  for (int i = threadIdx.x; i < h_size; i += kRowThreads) {
    float sum = 0.0f;
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      float others[kCluster];
#pragma unroll
      for (int b = 0; b < kCluster; ++b) others[b] = cluster.map_shared_rank(sums, b)[i];
#pragma unroll
      for (int b = 0; b < kCluster; ++b) sum += others[b];
    } else {
      sum = sums[i];
    }
#else
    sum = sums[i];
#endif
    sum *= p.shrink_scaling;
    h[i] = sum;
    if (block == 0 && p.h != nullptr) p.h[i] = sum;
  }
  __syncthreads();  // h is whole
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
  if constexpr (sizeof(E) == 2) {
    if (p.h16 != nullptr && block == 0) {
      const int width = H16Width(rank);
      for (int i = threadIdx.x; i < p.shape.rows * width / 2; i += kRowThreads) {
        const int row = i / (width / 2), r = i % (width / 2);
        E* const pair = static_cast<E*>(p.h16) + row * width + r / 16 * 32 + r % 16;
        SplitClamped(r < rank ? p.h16_scaling * h[row * rank + r] : 0.0f, pair, pair + 16);
      }
    }
  }
  if (p.expand) {
    const int64_t quads = (last - first + 3) / 4;
    const int64_t row_groups = (p.shape.rows + kRows - 1) / kRows;
    if (first < last) {
      for (int64_t i = threadIdx.x; i < quads * row_groups; i += kRowThreads) {
        RowExpand<E, kRows>(p, result, h, i / quads * kRows, first + i % quads * 4);
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  // No block may end while another still reads its sums.
  if (blocks > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

template <class E>
cudaError_t LaunchRows(cudaStream_t stream, const RowsArguments& p, const Result<E>& result) {
  const bool one = p.shape.rows == 1;
  int groups = 1;
  while (groups * 4 < p.shape.rank) groups *= 2;
  const int shares = groups <= 32 ? kRowWarps : kRowThreads / groups;
  const size_t shared =
      sizeof(float) * (2 * kFewRows * p.shape.rank + shares * (one ? 1 : 4) * groups * 4);
  const int blocks = HasSm90() ? kCluster : 1;
  return Launch(one ? RowsKernel<E, 1> : RowsKernel<E, 4>, dim3(blocks), kRowThreads, shared,
                stream, false, blocks, p, result);
}

// What both entry points do; y is null for the shrink alone.
cudaError_t LaunchBoth(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                       const Factor& a, const Factor& b, float shrink_scaling, float expand_scaling,
                       const Addend& addend, float* h, void* h16, float h16_scaling, void* y) {
  const bool expand = y != nullptr && sizes.out > 0;
  if (sizes.rank < 0 || sizes.rank > kMaxRank) return cudaErrorInvalidValue;
  if (sizes.rows == 0 || (sizes.rank == 0 && !expand)) return cudaSuccess;
  const Shape shape = {sizes.rows, sizes.in, sizes.out, static_cast<int>(sizes.rank)};
  const FactorView a_view = View(a, sizes.in, sizes.rank), b_view = View(b, sizes.rank, sizes.out);
  const int64_t width = Width(element);
  const bool x_vectors = Vectors(x, sizes.in, width),
             x_quads = Vectors(x, sizes.in, width, width * 4);

  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto result = [&](int count) {
      const int64_t bytes = std::min<int64_t>(16, count * width);
      const bool vectors =
          Vectors(y, sizes.out, width, bytes) &&
          (addend.base == nullptr || Vectors(addend.base, sizes.out, 4)) &&
          (addend.bias == nullptr || Vectors(addend.bias, sizes.out, width, 4 * width));
      return Result<E>{addend.base, addend.bias, static_cast<E*>(y),
                       sizes.rows,  sizes.out,   vectors};
    };
    if (sizes.rows <= kFewRows) {
      RowsArguments p = {};
      p.shape = shape;
      p.x = x;
      p.x_quads = x_quads;
      p.a = a_view;
      p.b = b_view;
      p.shrink_scaling = shrink_scaling;
      p.expand_scaling = expand_scaling;
      p.h = h;
      p.h16 = h16;
      p.h16_scaling = h16_scaling;
      p.expand = expand;
      return LaunchRows(stream, p, result(4));
    }
    int limit = 0;
    const int multiprocessors = Multiprocessors(&limit);
    if (multiprocessors == 0) return cudaGetLastError();
    ThinArguments p = {};
    p.shape = shape;
    p.x = x;
    p.x_vectors = x_vectors;
    p.x_quads = x_quads;
    p.a = a_view;
    p.b = b_view;
    p.shrink_scaling = shrink_scaling;
    p.expand_scaling = expand_scaling;
    p.h = h;
    p.h16 = h16;
    p.h16_scaling = h16_scaling;
    p.block_rows = CeilDiv(sizes.rows, 32) < multiprocessors ? 16 : 32;
    p.b_vectors = b_view.transposed ? b_view.quads : b_view.vectors;
    const bool tensor_expand = sizeof(E) == 2 && !b_view.wide;
    return expand ? LaunchThin<E, true>(stream, p, result(tensor_expand ? 8 : 4), limit)
                  : LaunchThin<E, false>(stream, p, result(4), limit);
  });
}

}  // namespace

bool HasSm90() {
  static std::atomic<int> known[64];  // 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < 64 && known[device] != 0) return known[device] == 2;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, RowsKernel<float, 1>);
  if (error != cudaSuccess) return false;
  // Code compiled while loading, from older PTX, lacks what it was not written with.
  const bool has = attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90;
  if (device < 64) known[device] = has ? 2 : 1;
  return has;
}

cudaError_t LaunchShrinkRows(cudaStream_t stream, Element element, const Sizes& sizes,
                             const void* x, const Factor& a, float scaling, float* h,
                             unsigned* tickets, int64_t ticket_count) {
  const Shape shape = {sizes.rows, sizes.in, 0, static_cast<int>(sizes.rank)};
  const int64_t width = Width(element);
  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    RowsArguments p = {};
    p.shape = shape;
    p.x = x;
    p.x_quads = Vectors(x, sizes.in, width, width * 4);
    p.a = View(a, sizes.in, sizes.rank);
    p.shrink_scaling = scaling;
    p.h = h;
    p.tickets = tickets;
    p.ticket_count = ticket_count;
    return LaunchRows(stream, p, Result<E>());
  });
}

cudaError_t LaunchShrink(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                         const Factor& a, float scaling, float* h, void* h16, float h16_scaling) {
  return LaunchBoth(stream, element, sizes, x, a, Factor{nullptr, element, false}, scaling, 0.0f,
                    Addend{nullptr, nullptr}, h, h16, h16_scaling, nullptr);
}

cudaError_t LaunchShrinkExpand(cudaStream_t stream, Element element, const Sizes& sizes,
                               const void* x, const Factor& a, const Factor& b,
                               float shrink_scaling, float expand_scaling, const Addend& addend,
                               float* h, void* y) {
  return LaunchBoth(stream, element, sizes, x, a, b, shrink_scaling, expand_scaling, addend, h,
                    nullptr, 0.0f, y);
}

}  // namespace jax_fused_lora
