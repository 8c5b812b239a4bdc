// y = x·W + bias + s·h·B for at most 16 rows: one pass over W, at memory speed.
//
// A block has 64 columns and a part of the depth, which its eight warps take in turns, 32 at a
// time. Its sums go to the workspace; the block that comes last for its columns, which a ticket
// tells, adds the parts in their order, then bias and s·h·B, and writes y. So y does not depend on
// which block that is. Device memory: W once; L2: x once for every 64 columns, a part of y written
// and read once for each of the `splits`.
//
// h comes from a small kernel of its own, launched first, which also zeroes the tickets. This one
// is its programmatic dependent: it reads W meanwhile and waits for h only before it takes a
// ticket. That is right because the small kernel is launched as usual, after everything before it
// in the stream, and writes nothing but h and the tickets; y is written after the wait.
//
// Sixteen-bit operands are multiplied on tensor cores, for one row too: their layout lets a lane
// load 16 bytes of W and multiply them from where they are, in fewer instructions than multiplying
// one by one. float32 and what is not aligned goes one by one.
#include <algorithm>

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
  p.b = View(b, sizes.rank, sizes.out);
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
    const bool vectors = Vectors(y, sizes.out, width, 4 * width) &&
                         (bias == nullptr || Vectors(bias, sizes.out, width, 4 * width));
    const Result<E> result = {nullptr, bias, static_cast<E*>(y), sizes.rows, sizes.out, vectors};
    const auto launch = [&](auto kernel) {
      return Launch(kernel, grid, kThreads, 0, stream, programmatic, 1, p, result);
    };
    if constexpr (sizeof(E) == 2) {
      if (Vectors(x, sizes.in, width) && Vectors(w, transposed ? sizes.in : sizes.out, width)) {
        return transposed ? launch(DecodeTensor<E, true>) : launch(DecodeTensor<E, false>);
      }
    }
    if (sizes.rows == 1) return launch(DecodeWide<E, 1>);
    return sizes.rows <= 4 ? launch(DecodeWide<E, 4>) : launch(DecodeWide<E, 16>);
  });
}

}  // namespace jax_fused_lora
