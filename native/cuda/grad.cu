// gradient = s·xᵀ·t, of A, and with g for x and h for t of Bᵀ. Both sum over the rows.
//
// A block has 64 columns of x, a slice of the rows, and all ranks: 16 or 32 a warp, the warps that
// are left over sharing the rows, eight at a time. x and t go from device memory straight into the
// registers that multiply them: a lane's 16 bytes of x are 8 columns of one row, of which each pair
// is its place in two rows of one block of xᵀ. The sums over warps, and in a second small kernel
// those over slices, are added in one order. Device memory: x once; L2: t once for every 64
// columns, the gradient in float32 written and read once for each slice.
//
// The products are TensorFloat32's, of numbers cut in two so that no float32 bit that counts is
// lost: t, and x where it is float32, as hi + lo, of 11 bits each. (A 16-bit x is exact as it is.)
// What is left out, lo·lo and the bits behind lo, is below 2^-20 of each product. A 16-bit t would
// run out of float16's exponents instead.
#include <algorithm>

#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;            // of x, a block
constexpr int kStep = 8;                // rows of a multiplication
constexpr int64_t kWantedBlocks = 264;  // two on each of an H100's multiprocessors
constexpr int64_t kLeastRows = 128;     // of a slice

struct GradArguments {
  int64_t rows, in;
  int rank;
  const void* x;
  bool x_vectors;
  const float* t;
  float scaling;
  int warps_across;  // over the ranks
  int64_t slice_rows;
  float* slices;  // (slices, in, rank), or null where there is one slice: then straight to
  void* gradient;
  bool transposed;
};

int Slices(const Sizes& sizes) {
  const int64_t blocks = std::max<int64_t>(CeilDiv(sizes.in, kColumns), 1);
  return static_cast<int>(
      std::max<int64_t>(1, std::min(kWantedBlocks / blocks, sizes.rows / kLeastRows)));
}

// value = hi + lo + less than 2^-21 of it, hi and lo as the tensor cores read them.
__device__ inline void Split(float value, uint32_t* hi, uint32_t* lo) {
  *hi = __float_as_uint(value) & 0xffffe000u;
  const float rest = value - __uint_as_float(*hi);
  // An infinite or missing value stays what it is.
  *lo = isfinite(value) ? __float_as_uint(rest) & 0xffffe000u : 0u;
  if (isnan(value)) *hi = 0x7fffe000u;
}

// Columns column..column + 7 of a row of x, zeros where there are none.
template <class E>
__device__ inline void LoadColumns(const GradArguments& p, int64_t row, int64_t end, int64_t column,
                                   float (&values)[8]) {
  const E* const from = static_cast<const E*>(p.x) + row * p.in + column;
  const int64_t count = row < end ? p.in - column : 0;
  if (p.x_vectors && count >= 8) {
    alignas(16) E elements[8];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements) / 16); ++i) {
      reinterpret_cast<uint4*>(elements)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = ToFloat(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? ToFloat(from[i]) : 0.0f;
  }
}

template <class G>
__device__ inline void WriteGradient(const GradArguments& p, int64_t column, int rank, float sum) {
  const int64_t at = p.transposed ? rank * p.in + column : column * p.rank + rank;
  static_cast<G*>(p.gradient)[at] = Rounded<G>(p.scaling * sum);
}

// kBlocks blocks of 8 ranks a warp; G is the gradient's type.
template <class E, class G, int kBlocks>
__global__ void __launch_bounds__(kThreads, 2) GradKernel(const __grid_constant__ GradArguments p) {
  constexpr int kRankStride = 8 + 1;
  __shared__ float shared[kWarps][kColumns * kRankStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warps_deep = kWarps / p.warps_across;
  const int own_rank = warp % p.warps_across * kBlocks * 8, own_step = warp / p.warps_across;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns, column = first + g * 8;
  const int64_t begin = blockIdx.y * p.slice_rows, end = min(begin + p.slice_rows, p.rows);

  // Block m of xᵀ has column 8g + 2m of the 64 for its row g, and 8g + 2m + 1 for row g + 8.
  float sums[4][kBlocks][4] = {};
  if (own_rank < p.rank) {
#pragma unroll 2
    for (int64_t step = begin + own_step * kStep; step < end; step += warps_deep * kStep) {
      float x[2][8], factor[2][kBlocks];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = step + half * 4 + t;
        LoadColumns<E>(p, row, end, column, x[half]);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const int rank = own_rank + j * 8 + g;
          factor[half][j] = row < end && rank < p.rank ? __ldg(p.t + row * p.rank + rank) : 0.0f;
        }
      }
      uint32_t t_hi[2][kBlocks], t_lo[2][kBlocks];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) Split(factor[half][j], &t_hi[half][j], &t_lo[half][j]);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t hi[4];
        if constexpr (sizeof(E) == 4) {
          uint32_t lo[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) Split(x[i / 2][m * 2 + i % 2], &hi[i], &lo[i]);
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
            MultiplyTf32(sums[m][j], lo, t_hi[0][j], t_hi[1][j]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) hi[i] = __float_as_uint(x[i / 2][m * 2 + i % 2]);
        }
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          MultiplyTf32(sums[m][j], hi, t_lo[0][j], t_lo[1][j]);
          MultiplyTf32(sums[m][j], hi, t_hi[0][j], t_hi[1][j]);
        }
      }
    }
  }

  // 8 ranks of each warp at a time.
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    __syncthreads();  // the ranks before are read
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[warp][(g * 8 + m * 2 + i / 2) * kRankStride + t * 2 + i % 2] = sums[m][j][i];
      }
    }
    __syncthreads();  // these are there
    for (int i = threadIdx.x; i < p.warps_across * kColumns * 8; i += kThreads) {
      // Neighbouring threads write neighbouring elements of a gradient that is written here.
      const bool along = p.transposed && p.slices == nullptr;
      const int across = i / (kColumns * 8), at = i % (kColumns * 8);
      const int c = along ? at % kColumns : at / 8, r = along ? at / kColumns : at % 8;
      const int rank = (across * kBlocks + j) * 8 + r;
      if (rank >= p.rank || first + c >= p.in) continue;
      float sum = 0.0f;
      for (int s = 0; s < warps_deep; ++s) {
        sum += shared[s * p.warps_across + across][c * kRankStride + r];
      }
      if (p.slices == nullptr) {
        WriteGradient<G>(p, first + c, rank, sum);
      } else {
        p.slices[(blockIdx.y * p.in + first + c) * p.rank + rank] = sum;
      }
    }
  }
}

// The sums over slices.
template <class G>
__global__ void __launch_bounds__(kThreads)
    FinishKernel(const __grid_constant__ GradArguments p, int slices) {
  const int64_t size = p.in * p.rank;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t column = p.transposed ? i % p.in : i / p.rank;
  const int rank = static_cast<int>(p.transposed ? i / p.in : i % p.rank);
  const float* from = p.slices + column * p.rank + rank;
  float sum = 0.0f;
#pragma unroll 4
  for (int slice = 0; slice < slices; ++slice, from += size) sum += *from;
  WriteGradient<G>(p, column, rank, sum);
}

}  // namespace

int64_t GradWorkspace(const Sizes& sizes) {
  const int64_t slices = Slices(sizes);
  return slices == 1 ? 0 : slices * sizes.in * sizes.rank;
}

cudaError_t LaunchGrad(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                       const float* t, float scaling, Element gradient_element, bool transposed,
                       void* gradient, float* workspace) {
  if (sizes.rank < 0 || sizes.rank > kMaxRank ||
      (gradient_element != element && gradient_element != Element::kFloat32)) {
    return cudaErrorInvalidValue;
  }
  if (sizes.in == 0 || sizes.rank == 0) return cudaSuccess;
  const int slices = Slices(sizes), blocks_wide = sizes.rank <= 16 ? 2 : 4;
  GradArguments p = {};
  p.rows = sizes.rows;
  p.in = sizes.in;
  p.rank = static_cast<int>(sizes.rank);
  p.x = x;
  p.x_vectors = Vectors(x, sizes.in, Width(element));
  p.t = t;
  p.scaling = scaling;
  p.warps_across = 1;
  while (p.warps_across * blocks_wide * 8 < sizes.rank) p.warps_across *= 2;
  p.slice_rows = CeilDiv(CeilDiv(sizes.rows, slices), kStep) * kStep;
  p.slices = slices == 1 ? nullptr : workspace;
  p.gradient = gradient;
  p.transposed = transposed;
  const int64_t blocks = CeilDiv(sizes.in, kColumns);
  const int64_t finish_blocks = CeilDiv(sizes.in * sizes.rank, kThreads);
  if (finish_blocks > INT32_MAX) return cudaErrorInvalidValue;

  return Dispatch(element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto launch = [&](auto gradient_tag) {
      using G = typename decltype(gradient_tag)::type;
      const cudaError_t error =
          Launch(blocks_wide == 2 ? GradKernel<E, G, 2> : GradKernel<E, G, 4>,
                 dim3(static_cast<unsigned>(blocks), slices), kThreads, 0, stream, false, 1, p);
      if (error != cudaSuccess || slices == 1) return error;
      return Launch(FinishKernel<G>, dim3(static_cast<unsigned>(finish_blocks)), kThreads, 0,
                    stream, false, 1, p, slices);
    };
    return gradient_element == Element::kFloat32 ? launch(Tag<float>()) : launch(Tag<E>());
  });
}

}  // namespace jax_fused_lora
