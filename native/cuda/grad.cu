// gradient = s·xᵀ·t, of A, and with g for x and h for t of Bᵀ. Both sum over the rows. Where both
// are asked for one launch has the blocks of both: its start and its last blocks, when memory
// idles, come once.
//
// A block has 128 columns of x (64 where there are more than 128 ranks), a slice of the rows, and
// all ranks. Tiles of 64 or 32 rows of x and t come through a ring of shared memory filled by
// cp.async: at rank 16 some 60 KB a block, two blocks on each multiprocessor, are always on their
// way. A warp has 64 of the columns and 16 or 32 of the ranks; the warps that are left over share
// the rows of a tile. The sums over warps, and in a second small kernel those over slices, are
// added in one order. Device memory: x once; L2: t once for every 128 columns, the gradient in
// float32 written and read once for each slice.
//
// A t rounded to 16 bits would miss the project's accuracy rule, so t is multiplied as the sum of
// two, hi + lo. For a bfloat16 x, which lies in memory as the tensor cores read it, they are of
// bfloat16: 2^-18 of t is lost. float16 would run out of exponents, so a float16 or float32 x is
// multiplied as TensorFloat32, of 11 bits: t, and x where it is float32, as hi + lo. (A float16 x
// is exact as it is.) What is left out, lo·lo and the bits behind lo, is below 2^-20 of each
// product.
#include <algorithm>

#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpColumns = 64;
constexpr int64_t kWantedBlocks = 264;  // two on each of an H100's multiprocessors
constexpr int64_t kLeastRows = 128;     // of a slice
constexpr int64_t kRowsTogether = 64;   // a slice has whole tiles
constexpr int kMemory = 99 * 1024;      // of a block, on every GPU

// A way down the rows of a matrix in tiles of kRows rows of kChunks times 16 bytes. A row of a tile
// is 16 bytes longer, for other banks.
template <class T, int kRows, int kChunks>
struct Tiles {
  static constexpr int kStride = kChunks * 16 + 16, kSize = kRows * kStride;
  static constexpr int kChunk = 16 / sizeof(T), kRowsApart = kThreads / kChunks;

  const T* source;
  const T* from;
  int64_t row_length;
  int columns_left;
  bool vectors;

  // All columns from `column` on, or as many as there is room for.
  __device__ Tiles(const T* matrix, bool vectors, int64_t row, int64_t column, int64_t row_length)
      : source(matrix), row_length(row_length), vectors(vectors) {
    const int chunk = threadIdx.x % kChunks * kChunk;
    from = source + (row + threadIdx.x / kChunks) * row_length + column + chunk;
    columns_left = static_cast<int>(min(row_length - column, int64_t{kChunks * kChunk})) - chunk;
  }

  // The next tile, zeros behind rows_left.
  __device__ void Fetch(char* tile, int rows_left) {
    const int first = threadIdx.x / kChunks;
    char* const to = tile + first * kStride + threadIdx.x % kChunks * 16;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kRows; i += kRowsApart) {
        if (kRowsApart > kRows && first >= kRows) break;
        const bool some = columns_left > 0 && first + i < rows_left;
        CopyAsync(to + i * kStride, some ? from + i * row_length : source, some);
      }
    } else {
#pragma unroll 1
      for (int i = 0; first + i < kRows; i += kRowsApart) {
        alignas(16) T elements[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const bool some = j < columns_left && first + i < rows_left;
          elements[j] = some ? from[i * row_length + j] : Rounded<T>(0.0f);
        }
        *reinterpret_cast<uint4*>(to + i * kStride) = *reinterpret_cast<uint4*>(elements);
      }
    }
    from += kRows * row_length;
  }
};

// How a block's warps lie over the ranks, the columns, and the rows of a tile.
template <class E, int kRanks>
struct Layout {
  static constexpr int kBlocks = kRanks > 16 ? 4 : 2;  // of 8 ranks, of a warp
  static constexpr int kWarpsRanks = kRanks / (kBlocks * 8);
  static constexpr int kWarpsColumns = kWarpsRanks == kWarps ? 1 : 2;
  static constexpr int kWarpsRows = kWarps / kWarpsRanks / kWarpsColumns;
  static constexpr int kColumns = kWarpsColumns * kWarpColumns;
  static constexpr int kRows = kWarpsRows == 4 && sizeof(E) == 2 ? 64 : 32;
  static constexpr int kXChunks = kColumns / (16 / sizeof(E));
  using X = Tiles<E, kRows, kXChunks>;
  using T = Tiles<float, kRows, kRanks / 4>;
  static constexpr int kStage = X::kSize + T::kSize;
  static constexpr int kStages = kMemory / kStage < 4 ? kMemory / kStage : 4;
  static constexpr int kSumsStride = kRanks + 1, kShare = kColumns * kSumsStride;
  static constexpr int kRing = kStages * kStage, kSums = kWarpsRows * kShare * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
  static_assert(kStages >= 2 && kShared <= kMemory);
};

constexpr int kMostGrads = 2;

// One gradient's part of a launch.
struct GradPart {
  int64_t in;
  const void* x;
  bool x_vectors;
  const float* t;
  bool t_vectors;
  float scaling;
  float* slices;  // (slices, in, rank), or null where there is one slice: then straight to
  void* gradient;
  bool wide;  // the gradient, float32
  bool transposed;
  unsigned blocks, finish_blocks;
};

struct GradArguments {
  int64_t rows;
  int rank;
  int64_t slice_rows;
  GradPart parts[kMostGrads];
};

int64_t ColumnBlocks(int64_t in, int64_t rank) {
  return CeilDiv(in, rank > 128 ? kWarpColumns : 2 * kWarpColumns);
}

int Slices(int64_t rows, int64_t column_blocks) {
  return static_cast<int>(std::max<int64_t>(
      1, std::min(kWantedBlocks / std::max<int64_t>(column_blocks, 1), rows / kLeastRows)));
}

// Which of a warp's columns is row g, or where `upper` row g + 8, of block m of xᵀ.
template <class E>
__device__ inline int ColumnOf(int m, int upper, int g) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) return m * 16 + upper * 8 + g;
  const int i = m * 2 + upper;  // of what a lane reads at once
  return sizeof(E) == 2 ? g * 8 + i : i / 4 * 32 + g * 4 + i % 4;
}

// sums += xᵀ·t of 16 rows of a tile.
template <int kBlocks>
__device__ inline void MultiplyRows(float (&sums)[4][kBlocks][4], const __nv_bfloat16*,
                                    const char* x_tile, int x_stride, const char* t_tile,
                                    int t_stride, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint32_t hi[kBlocks][2], lo[kBlocks][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* const upper =
        reinterpret_cast<const float*>(t_tile + (half * 8 + t * 2) * t_stride) + g;
    const float* const lower = upper + t_stride / 4;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float2 values = make_float2(upper[j * 8], lower[j * 8]);
      const __nv_bfloat162 top = __float22bfloat162_rn(values);
      const float2 back = __bfloat1622float2(top);
      const float2 rest = make_float2(values.x - back.x, values.y - back.y);
      // An infinite or missing value stays what it is.
      const __nv_bfloat162 low = __float22bfloat162_rn(
          make_float2(isfinite(rest.x) ? rest.x : 0.0f, isfinite(rest.y) ? rest.y : 0.0f));
      memcpy(&hi[j][half], &top, 4);
      memcpy(&lo[j][half], &low, 4);
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    uint32_t x[4];
    LoadBlocksTransposed(
        x, x_tile + (lane / 16 * 8 + lane % 8) * x_stride + (m * 2 + lane / 8 % 2) * 16);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      Multiply<__nv_bfloat16>(sums[m][j], x[0], x[1], x[2], x[3], lo[j][0], lo[j][1]);
      Multiply<__nv_bfloat16>(sums[m][j], x[0], x[1], x[2], x[3], hi[j][0], hi[j][1]);
    }
  }
}

// The same of 8 rows, of which 2t plays t and 2t + 1 plays t + 4.
template <class E, int kBlocks>
__device__ inline void MultiplyRows(float (&sums)[4][kBlocks][4], const E*, const char* x_tile,
                                    int x_stride, const char* t_tile, int t_stride, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint32_t hi[kBlocks][2], lo[kBlocks][2];
  float x[2][8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t * 2 + half;
    const float* const of_t = reinterpret_cast<const float*>(t_tile + row * t_stride) + g;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) SplitTf32(of_t[j * 8], &hi[j][half], &lo[j][half]);
    const uint4* const of_x = reinterpret_cast<const uint4*>(x_tile + row * x_stride) + g;
    alignas(16) E elements[8];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements) / 16); ++i) {
      reinterpret_cast<uint4*>(elements)[i] = of_x[i * 8];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[half][i] = ToFloat(elements[i]);
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    uint32_t x_hi[4];
    if constexpr (sizeof(E) == 4) {
      uint32_t x_lo[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) SplitTf32(x[i / 2][m * 2 + i % 2], &x_hi[i], &x_lo[i]);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) MultiplyTf32(sums[m][j], x_lo, hi[j][0], hi[j][1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x_hi[i] = __float_as_uint(x[i / 2][m * 2 + i % 2]);
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      MultiplyTf32(sums[m][j], x_hi, lo[j][0], lo[j][1]);
      MultiplyTf32(sums[m][j], x_hi, hi[j][0], hi[j][1]);
    }
  }
}

template <class E>
__device__ inline void WriteGradient(const GradPart& p, int64_t ranks, int64_t column, int rank,
                                     float sum) {
  const int64_t at = p.transposed ? rank * p.in + column : column * ranks + rank;
  if (p.wide) {
    static_cast<float*>(p.gradient)[at] = p.scaling * sum;
  } else {
    static_cast<E*>(p.gradient)[at] = Rounded<E>(p.scaling * sum);
  }
}

// kRanks: as many as there is room for.
template <class E, int kRanks>
__global__ void __launch_bounds__(kThreads, sizeof(E) == 4 && kRanks > 16 ? 1 : 2)
    GradKernel(const __grid_constant__ GradArguments all) {
  using L = Layout<E, kRanks>;
  constexpr int kStep = std::is_same_v<E, __nv_bfloat16> ? 16 : 8;
  extern __shared__ __align__(16) char memory[];
  LaunchDependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_rank = warp % L::kWarpsRanks * L::kBlocks * 8;
  const int own_column = warp / L::kWarpsRanks % L::kWarpsColumns * kWarpColumns;
  const int own_step = warp / (L::kWarpsRanks * L::kWarpsColumns);
  const bool second = blockIdx.x >= all.parts[0].blocks;
  const GradPart& p = all.parts[second];
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - (second ? all.parts[0].blocks : 0)) * L::kColumns;
  const int64_t begin = blockIdx.y * all.slice_rows, end = min(begin + all.slice_rows, all.rows);
  const int steps = static_cast<int>((end - begin + L::kRows - 1) / L::kRows);

  typename L::X x(static_cast<const E*>(p.x), p.x_vectors, begin, first, p.in);
  typename L::T t(p.t, p.t_vectors, begin, 0, all.rank);
  int64_t rows_left = end - begin;
  const auto fetch = [&](int stage) {
    char* const tiles = memory + stage * L::kStage;
    const int left = static_cast<int>(min(rows_left, int64_t{L::kRows}));
    x.Fetch(tiles, left);
    t.Fetch(tiles + L::X::kSize, left);
    rows_left -= L::kRows;
  };
#pragma unroll 1
  for (int stage = 0; stage < L::kStages - 1; ++stage) {
    if (stage < steps) fetch(stage);
    CommitCopies();
  }
  float sums[4][L::kBlocks][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    WaitForCopies<L::kStages - 2>();
    __syncthreads();  // this step's tiles are whole, those of the step before are read
    if (step + L::kStages - 1 < steps) fetch(stage == 0 ? L::kStages - 1 : stage - 1);
    CommitCopies();
    const char* const x_tile = memory + stage * L::kStage;
    const char* const t_tile = x_tile + L::X::kSize;
#pragma unroll
    for (int i = 0; i < L::kRows; i += L::kWarpsRows * kStep) {
      const int row = i + own_step * kStep;
      MultiplyRows(sums, static_cast<const E*>(nullptr),
                   x_tile + row * L::X::kStride + own_column * sizeof(E), L::X::kStride,
                   t_tile + row * L::T::kStride + own_rank * 4, L::T::kStride, lane);
    }
    if (++stage == L::kStages) stage = 0;
  }
  WaitForCopies<0>();
  __syncthreads();  // the tiles are read

  float* const shared = reinterpret_cast<float*>(memory);  // (warps over rows, columns, ranks)
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int j = 0; j < L::kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = own_column + ColumnOf<E>(m, i / 2, lane / 4);
        const int rank = own_rank + j * 8 + lane % 4 * 2 + i % 2;
        shared[own_step * L::kShare + column * L::kSumsStride + rank] = sums[m][j][i];
      }
    }
  }
  __syncthreads();  // all sums are there
#pragma unroll 2
  for (int i = threadIdx.x; i < L::kColumns * kRanks; i += kThreads) {
    // Neighbouring threads write neighbouring elements.
    const bool along = p.transposed && p.slices == nullptr;
    const int c = along ? i % L::kColumns : i / kRanks, rank = along ? i / L::kColumns : i % kRanks;
    if (rank >= all.rank || first + c >= p.in) continue;
    float sum = 0.0f;
#pragma unroll
    for (int share = 0; share < L::kWarpsRows; ++share) {
      sum += shared[share * L::kShare + c * L::kSumsStride + rank];
    }
    if (p.slices == nullptr) {
      WriteGradient<E>(p, all.rank, first + c, rank, sum);
    } else {
      p.slices[(blockIdx.y * p.in + first + c) * all.rank + rank] = sum;
    }
  }
}

// The sums over slices. Launched as a programmatic dependent of the kernel above.
template <class E>
__global__ void __launch_bounds__(kThreads)
    FinishKernel(const __grid_constant__ GradArguments all, int slices) {
  WaitForKernelBefore();
  const bool second = blockIdx.x >= all.parts[0].finish_blocks;
  const GradPart& p = all.parts[second];
  const int64_t size = p.in * all.rank;
  const unsigned block = blockIdx.x - (second ? all.parts[0].finish_blocks : 0);
  const int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t column = p.transposed ? i % p.in : i / all.rank;
  const int rank = static_cast<int>(p.transposed ? i / p.in : i % all.rank);
  const float* from = p.slices + column * all.rank + rank;
  float sum = 0.0f;
#pragma unroll 8
  for (int slice = 0; slice < slices; ++slice, from += size) sum += *from;
  WriteGradient<E>(p, all.rank, column, rank, sum);
}

}  // namespace

int64_t GradWorkspace(int64_t rows, int64_t rank, std::initializer_list<int64_t> columns) {
  int64_t blocks = 0, all = 0;
  for (const int64_t in : columns) blocks += ColumnBlocks(in, rank), all += in;
  const int64_t slices = Slices(rows, blocks);
  return slices == 1 ? 0 : slices * all * rank;
}

cudaError_t LaunchGrads(cudaStream_t stream, Element element, int64_t rows, int64_t rank,
                        const Grad* grads, int count, float* workspace) {
  if (rank < 0 || rank > kMaxRank || count > kMostGrads) return cudaErrorInvalidValue;
  if (rank == 0) return cudaSuccess;
  GradArguments all = {};
  all.rows = rows;
  all.rank = static_cast<int>(rank);
  int64_t blocks = 0, finish_blocks = 0;
  for (int i = 0; i < count; ++i) {
    const Grad& grad = grads[i];
    if (grad.element != element && grad.element != Element::kFloat32) return cudaErrorInvalidValue;
    const int64_t own = ColumnBlocks(grad.in, rank), finish = CeilDiv(grad.in * rank, kThreads);
    all.parts[i] = {grad.in,
                    grad.x,
                    Vectors(grad.x, grad.in, Width(element)),
                    grad.t,
                    Vectors(grad.t, rank, 4),
                    grad.scaling,
                    nullptr,
                    grad.gradient,
                    grad.element == Element::kFloat32,
                    grad.transposed,
                    static_cast<unsigned>(own),
                    static_cast<unsigned>(finish)};
    blocks += own;
    finish_blocks += finish;
  }
  if (blocks == 0) return cudaSuccess;
  if (finish_blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int slices = Slices(rows, blocks);
  all.slice_rows = CeilDiv(CeilDiv(rows, slices), kRowsTogether) * kRowsTogether;
  for (int i = 0; slices > 1 && i < count; ++i) {
    all.parts[i].slices = workspace;
    workspace += slices * grads[i].in * rank;
  }

  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto launch = [&](auto kernel, int shared) {
      const cudaError_t error = Launch(kernel, dim3(static_cast<unsigned>(blocks), slices),
                                       kThreads, shared, stream, false, 1, all);
      if (error != cudaSuccess || slices == 1) return error;
      return Launch(FinishKernel<E>, dim3(static_cast<unsigned>(finish_blocks)), kThreads, 0,
                    stream, HasSm90(), 1, all, slices);
    };
    if (rank <= 16) return launch(GradKernel<E, 16>, Layout<E, 16>::kShared);
    if (rank <= 32) return launch(GradKernel<E, 32>, Layout<E, 32>::kShared);
    if (rank <= 64) return launch(GradKernel<E, 64>, Layout<E, 64>::kShared);
    if (rank <= 128) return launch(GradKernel<E, 128>, Layout<E, 128>::kShared);
    return launch(GradKernel<E, 256>, Layout<E, 256>::kShared);
  });
}

}  // namespace jax_fused_lora
