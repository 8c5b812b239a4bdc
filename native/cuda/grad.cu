// gradient = s·xᵀ·t, of A, and with g for x and h for t of Bᵀ. Both sum over the rows. Where both
// are asked for one launch has the blocks of both: its start and its last blocks, when memory
// idles, come once.
//
// A block has 128 columns of x (64 where there are more than 128 ranks), a slice of the rows, and
// all ranks. Tiles of 64 or 32 rows of x and t come through a ring of shared memory filled by
// cp.async: at rank 16 some 60 KB a block are always on their way. A warp has 64 of the columns and
// 16 or 32 of the ranks; the warps that are left over share the rows of a tile. The sums over
// warps, and in a second small kernel those over slices, are added in one order. They stay as the
// tensor cores have them until they are whole: each lane's four are 16 bytes in shared and in
// device memory. Device memory: x once; L2: t once for every 128 columns, the gradient in float32
// written and read once for each slice.
//
// A t rounded to 16 bits would miss the project's accuracy rule, so t is multiplied as the sum of
// two, hi + lo. For a bfloat16 x, which lies in memory as the tensor cores read it, they are of
// bfloat16: 2^-18 of t is lost. float16 would run out of exponents, so a float16 or float32 x is
// multiplied as TensorFloat32, of 11 bits: t, and x where it is float32, as hi + lo. (A float16 x
// is exact as it is.) What is left out, lo·lo and the bits behind lo, is below 2^-20 of each
// product. (From Hopper on grad_tma.cu has the tiles of many rows of bfloat16.)
//
// Tried, in chains on an H200: the slices as a cluster that adds its own sums (two: 512 rows, both
// gradients, 7.7 µs, not 7.4; four 10.9; of eight 30 of 32 find room at once), t split once for all
// warps, in its tile (8192 rows: 27.6, not 25.9), and this kernel as a programmatic dependent of
// the one that computes t, inside JAX (512 rows and fewer no difference, 8192 rows 2 % slower).
#include <algorithm>

#include "native/cuda/grad.cuh"

namespace jax_fused_lora {
namespace {

constexpr int64_t kLeastRows = 128;  // of a slice
constexpr int kMemory = 99 * 1024;   // of a block, on every GPU
constexpr int kMostStages = 4;

// Rows of a tile that are copied, and zeros behind the last: as many as a step multiplies.
__device__ inline int WholeSteps(int rows) { return (rows + 15) / 16 * 16; }

// A way down the rows of a matrix in tiles of kRows rows of kChunks times 16 bytes. A row of a tile
// is 16 bytes longer, for other banks.
template <class T, int kRows, int kChunks>
struct Tiles {
  static constexpr int kStride = kChunks * 16 + 16, kSize = kRows * kStride;
  static constexpr int kChunk = 16 / sizeof(T), kRowsApart = kGradThreads / kChunks;

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
    const int first = threadIdx.x / kChunks, rows = min(WholeSteps(rows_left), kRows);
    char* const to = tile + first * kStride + threadIdx.x % kChunks * 16;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kRows; i += kRowsApart) {
        if (first + i >= rows) break;
        const bool some = columns_left > 0 && first + i < rows_left;
        CopyAsync(to + i * kStride, some ? from + i * row_length : source, some);
      }
    } else {
#pragma unroll 1
      for (int i = 0; first + i < rows; i += kRowsApart) {
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

// What a block's memory is for.
template <class E, int kRanks>
struct Layout : GradLayout<E, kRanks> {
  using Places = GradLayout<E, kRanks>;
  static constexpr int kRows = sizeof(E) == 2 && Places::kShares == 4 ? 64 : 32;
  using X = Tiles<E, kRows, Places::kColumns* static_cast<int>(sizeof(E)) / 16>;
  using T = Tiles<float, kRows, kRanks / 4>;
  static constexpr int kStage = X::kSize + T::kSize;
  static constexpr int kStages = kMemory / kStage < kMostStages ? kMemory / kStage : kMostStages;
  static constexpr int kShared =
      kStages * kStage > Places::kSums ? kStages * kStage : Places::kSums;
  static_assert(kStages >= 2 && kShared <= kMemory);
};

// Of the rows. One block on each of an H100's multiprocessors has fewer sums to add, two have more
// on its way. One and two on an H200, µs: rank 16, both gradients, 512 rows 7.4 and 7.9, 8192 rows
// 45.2 and 44.3, one gradient of 2048 rows 10.1 and 11.3; rank 64, one of 8192 rows 51 and 44.
int64_t Slices(int64_t rows, int64_t rank, int64_t column_blocks) {
  const int64_t wanted = rank > 32 ? 264 : 132;
  return std::max<int64_t>(
      1, std::min(wanted / std::max<int64_t>(column_blocks, 1), rows / kLeastRows));
}

// sums += xᵀ·t of 16 rows of a tile.
template <class L>
__device__ inline void MultiplyRows(Quads (&sums)[L::kM][L::kJ], const __nv_bfloat16*,
                                    const char* x_tile, const char* t_tile, int lane) {
  const float* const own_t = reinterpret_cast<const float*>(t_tile) + lane / 4;
  const char* const own_x = x_tile + (lane / 16 * 8 + lane % 8) * L::X::kStride + lane / 8 % 2 * 16;
  MultiplyHalves<L>(
      sums, [&](int row, int j) { return own_t[row * (L::T::kStride / 4) + j * 8]; },
      [&](int m) { return own_x + m * 32; }, lane);
}

// The same of 8 rows, of which 2t plays t and 2t + 1 plays t + 4.
template <class L, class E>
__device__ inline void MultiplyRows(Quads (&sums)[L::kM][L::kJ], const E*, const char* x_tile,
                                    const char* t_tile, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint32_t hi[L::kJ][2], lo[L::kJ][2];
  float x[2][L::kM * 2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t * 2 + half;
    const float* const of_t = reinterpret_cast<const float*>(t_tile + row * L::T::kStride) + g;
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) SplitTf32(of_t[j * 8], &hi[j][half], &lo[j][half]);
    const uint4* const of_x = reinterpret_cast<const uint4*>(x_tile + row * L::X::kStride) + g;
    alignas(16) E elements[L::kM * 2];
#pragma unroll
    for (int i = 0; i < L::kM * 2 / L::kReadElements; ++i) {
      reinterpret_cast<uint4*>(elements)[i] = of_x[i * 8];
    }
#pragma unroll
    for (int i = 0; i < L::kM * 2; ++i) x[half][i] = ToFloat(elements[i]);
  }
#pragma unroll
  for (int m = 0; m < L::kM; ++m) {
    uint32_t x_hi[4];
    if constexpr (sizeof(E) == 4) {
      uint32_t x_lo[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) SplitTf32(x[i / 2][m * 2 + i % 2], &x_hi[i], &x_lo[i]);
#pragma unroll
      for (int j = 0; j < L::kJ; ++j) MultiplyTf32(sums[m][j], x_lo, hi[j][0], hi[j][1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x_hi[i] = __float_as_uint(x[i / 2][m * 2 + i % 2]);
    }
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) {
      MultiplyTf32(sums[m][j], x_hi, lo[j][0], lo[j][1]);
      MultiplyTf32(sums[m][j], x_hi, hi[j][0], hi[j][1]);
    }
  }
}

// kRanks: as many as there is room for.
template <class E, int kRanks>
__global__ void __launch_bounds__(kGradThreads, sizeof(E) == 4 && kRanks > 16 ? 1 : 2)
    GradKernel(const __grid_constant__ GradArguments all) {
  using L = Layout<E, kRanks>;
  extern __shared__ __align__(16) char memory[];
  LaunchDependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int place = warp % L::kPlaces, share = warp / L::kPlaces;
  const unsigned slice = blockIdx.y;
  const bool second = blockIdx.x >= all.parts[0].blocks;
  const unsigned block = blockIdx.x - (second ? all.parts[0].blocks : 0);
  const GradPart& p = all.parts[second];
  // A last slice may have no rows.
  const int64_t begin = min(slice * all.slice_rows, all.rows);
  const int64_t end = min(begin + all.slice_rows, all.rows);
  const int steps = static_cast<int>((end - begin + L::kRows - 1) / L::kRows);

  typename L::X x(static_cast<const E*>(p.x), p.x_vectors, begin,
                  static_cast<int64_t>(block) * L::kColumns, p.in);
  typename L::T t(p.t, p.t_vectors, begin, 0, all.rank);
  const auto tiles_of = [&](int stage) { return memory + stage * L::kStage; };
  const auto rows_of = [&](int step) {
    return static_cast<int>(min(end - begin - int64_t{step} * L::kRows, int64_t{L::kRows}));
  };
  const auto fetch = [&](int step, int stage) {
    x.Fetch(tiles_of(stage), rows_of(step));
    t.Fetch(tiles_of(stage) + L::X::kSize, rows_of(step));
  };
#pragma unroll 1
  for (int step = 0; step < L::kStages - 1; ++step) {
    if (step < steps) fetch(step, step);
    CommitCopies();
  }
  Quads sums[L::kM][L::kJ] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const char* const x_tile = tiles_of(stage);
    const char* const t_tile = x_tile + L::X::kSize;
    WaitForCopies<L::kStages - 2>();
    __syncthreads();  // this step's tiles are whole, those of the step before are read
    const int next = step + L::kStages - 1;
    if (next < steps) fetch(next, stage == 0 ? L::kStages - 1 : stage - 1);
    CommitCopies();
    const int rows = rows_of(step);
#pragma unroll
    for (int i = 0; i < L::kRows; i += L::kShares * L::kStep) {
      const int row = i + share * L::kStep;
      if (row >= rows) break;
      MultiplyRows<L>(sums, static_cast<const E*>(nullptr),
                      x_tile + row * L::X::kStride + L::Column(place) * sizeof(E),
                      t_tile + row * L::T::kStride + L::Rank(place) * 4, lane);
    }
    if (++stage == L::kStages) stage = 0;
  }

  if constexpr (L::kShares > 1) {
    WaitForCopies<0>();
    __syncthreads();  // the tiles are read
  }
  FinishBlock<L, E>(p, all.rank, slice, block, sums, place, share, lane, memory);
}

// The sums over slices. Launched as a programmatic dependent of the kernel above.
template <class E, int kRanks>
__global__ void __launch_bounds__(kGradThreads)
    FinishKernel(const __grid_constant__ GradArguments all) {
  using L = Layout<E, kRanks>;
  constexpr int kBlocks = L::kBlockQuads / kGradThreads;  // of this kernel, for one above
  WaitForKernelBefore();
  const bool second = blockIdx.x >= all.parts[0].blocks * kBlocks;
  const GradPart& p = all.parts[second];
  const unsigned own = blockIdx.x - (second ? all.parts[0].blocks * kBlocks : 0);
  const int64_t size = static_cast<int64_t>(p.blocks) * L::kBlockQuads;
  const float4* from = p.sums + static_cast<int64_t>(own) * kGradThreads + threadIdx.x;
  float4 sum = *from;
#pragma unroll 8
  for (unsigned slice = 1; slice < all.slices; ++slice) Add(*(from += size), &sum);
  WriteQuad<L, E>(p, all.rank, own / kBlocks, own % kBlocks * kGradThreads + threadIdx.x, sum);
}

int64_t ColumnBlocks(int64_t in, int64_t rank) { return CeilDiv(in, ColumnsOf(rank)); }
// Of one slice's sums of a gradient.
int64_t SumsSize(int64_t blocks, int64_t rank) {
  return blocks * ColumnsOf(rank) * RoomForRanks(rank);
}

}  // namespace

int64_t GradWorkspace(int64_t rows, int64_t rank, std::initializer_list<int64_t> columns) {
  int64_t blocks = 0;
  for (const int64_t in : columns) blocks += ColumnBlocks(in, rank);
  const int64_t slices = Slices(rows, rank, blocks);
  return slices == 1 ? 0 : slices * SumsSize(blocks, rank);
}

cudaError_t LaunchGrads(cudaStream_t stream, Element element, int64_t rows, int64_t rank,
                        const Grad* grads, int count, float* workspace) {
  if (rank < 0 || rank > kMaxRank || count > kMostGrads) return cudaErrorInvalidValue;
  if (rank == 0) return cudaSuccess;
  GradArguments all = {};
  all.rows = rows;
  all.rank = static_cast<int>(rank);
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const Grad& grad = grads[i];
    if (grad.element != element && grad.element != Element::kFloat32) return cudaErrorInvalidValue;
    const int64_t own = ColumnBlocks(grad.in, rank);
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
                    static_cast<unsigned>(own)};
    blocks += own;
  }
  if (blocks == 0) return cudaSuccess;
  if (blocks * kMaxRank > INT32_MAX) return cudaErrorInvalidValue;
  all.slices = static_cast<unsigned>(Slices(rows, rank, blocks));
  all.slice_rows = CeilDiv(CeilDiv(rows, all.slices), kRowsTogether) * kRowsTogether;
  for (int i = 0; all.slices > 1 && i < count; ++i) {
    all.parts[i].sums = reinterpret_cast<float4*>(workspace);
    workspace += all.slices * SumsSize(all.parts[i].blocks, rank);
  }

  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto launch = [&](auto ranks) {
      using L = Layout<E, decltype(ranks)::value>;
      const bool tma = std::is_same_v<E, __nv_bfloat16> && GradTmaServes(all);
      const cudaError_t error = tma ? LaunchGradTma(stream, all, blocks)
                                    : Launch(GradKernel<E, decltype(ranks)::value>,
                                             dim3(static_cast<unsigned>(blocks), all.slices),
                                             kGradThreads, L::kShared, stream, false, 1, all);
      if (error != cudaSuccess || all.slices == 1) return error;
      return Launch(FinishKernel<E, decltype(ranks)::value>,
                    dim3(static_cast<unsigned>(blocks * (L::kBlockQuads / kGradThreads))),
                    kGradThreads, 0, stream, HasSm90(), 1, all);
    };
    switch (RoomForRanks(rank)) {
      case 16:
        return launch(std::integral_constant<int, 16>());
      case 32:
        return launch(std::integral_constant<int, 32>());
      case 64:
        return launch(std::integral_constant<int, 64>());
      case 128:
        return launch(std::integral_constant<int, 128>());
      default:
        return launch(std::integral_constant<int, 256>());
    }
  });
}

}  // namespace jax_fused_lora
