// What the kernels of a gradient of A or B have in common: how a block's warps lie over it, how
// they multiply, and how their sums become the gradient. See grad.cu.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_GRAD_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_GRAD_CUH_

#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {

constexpr int kGradThreads = 256, kGradWarps = kGradThreads / 32;
constexpr int64_t kRowsTogether = 64;  // a slice has whole tiles

constexpr int ColumnsOf(int64_t rank) { return rank > 128 ? 64 : 128; }  // of a block
constexpr int RoomForRanks(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : rank <= 64 ? 64 : rank <= 128 ? 128 : 256;
}

// How a block's warps lie over its columns and ranks.
template <class E, int kRanks>
struct GradLayout {
  static constexpr bool kBfloat16 = std::is_same_v<E, __nv_bfloat16>;
  static constexpr int kColumns = ColumnsOf(kRanks);
  static constexpr int kM = 4, kJ = kRanks > 16 ? 4 : 2;  // of a warp, in 16 columns and 8 ranks
  static constexpr int kWarpsRanks = kRanks / (kJ * 8), kWarpsColumns = kColumns / (kM * 16);
  static constexpr int kPlaces = kWarpsRanks * kWarpsColumns, kShares = kGradWarps / kPlaces;
  static constexpr int kQuads = kM * kJ, kBlockQuads = kPlaces * kQuads * 32;  // of sums
  static constexpr int kSums = kShares > 1 ? kShares * kBlockQuads * 16 : 0;   // bytes
  static constexpr int kStep = kBfloat16 ? 16 : 8;  // rows that are multiplied at once

  // What a lane reads of x at once, where it is not ldmatrix that reads.
  static constexpr int kReadElements = 16 / sizeof(E);

  __host__ __device__ static constexpr int Column(int place) {
    return place / kWarpsRanks * kM * 16;
  }
  __host__ __device__ static constexpr int Rank(int place) { return place % kWarpsRanks * kJ * 8; }
  // Which of a warp's columns is row g, or where `upper` row g + 8, of block m of xᵀ.
  __host__ __device__ static constexpr int ColumnOf(int m, int upper, int g) {
    if constexpr (kBfloat16) return m * 16 + upper * 8 + g;
    const int i = m * 2 + upper;
    return (i / kReadElements * 8 + g) * kReadElements + i % kReadElements;
  }
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
  float4* sums;  // (slices, blocks, quads of a block), or null where there is one slice: then to
  void* gradient;
  bool wide;  // the gradient, float32
  bool transposed;
  unsigned blocks;
};

struct GradArguments {
  int64_t rows;
  int rank;
  int64_t slice_rows;
  unsigned slices;
  GradPart parts[kMostGrads];
};

// For a bfloat16 x that the copy engine can read, and many rows.
bool GradTmaServes(const GradArguments& all);
// `blocks`: of all gradients.
cudaError_t LaunchGradTma(cudaStream_t stream, const GradArguments& all, int64_t blocks);

#ifdef __CUDACC__

using Quads = float[4];
__device__ inline float4 Quad(const Quads& sums) {
  return make_float4(sums[0], sums[1], sums[2], sums[3]);
}
__device__ inline void Add(const float4& more, float4* sum) {
  sum->x += more.x, sum->y += more.y, sum->z += more.z, sum->w += more.w;
}

// sums += xᵀ·t of 16 rows. of_t(row, j): a lane's t of block j of the ranks; of_x(m): where a lane
// finds block m of x, as LoadBlocksTransposed has it.
template <class L, class OfT, class OfX>
__device__ inline void MultiplyHalves(Quads (&sums)[L::kM][L::kJ], const OfT& of_t, const OfX& of_x,
                                      int lane) {
  const int t = lane % 4;
  uint32_t hi[L::kJ][2], lo[L::kJ][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) {
      const int row = half * 8 + t * 2;
      const float2 values = make_float2(of_t(row, j), of_t(row + 1, j));
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
  for (int m = 0; m < L::kM; ++m) {
    uint32_t x[4];
    LoadBlocksTransposed(x, of_x(m));
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) {
      Multiply<__nv_bfloat16>(sums[m][j], x[0], x[1], x[2], x[3], lo[j][0], lo[j][1]);
    }
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) {
      Multiply<__nv_bfloat16>(sums[m][j], x[0], x[1], x[2], x[3], hi[j][0], hi[j][1]);
    }
  }
}

// Two neighbours of a row of a gradient, the second if it is there.
template <class T>
__device__ inline void WritePair(T* to, float first, float second, bool both, bool aligned) {
  alignas(8) const T pair[2] = {Rounded<T>(first), Rounded<T>(second)};
  if (both && aligned) {
    using Both = std::conditional_t<sizeof(T) == 4, uint2, uint32_t>;
    *reinterpret_cast<Both*>(to) = *reinterpret_cast<const Both*>(pair);
  } else {
    to[0] = pair[0];
    if (both) to[1] = pair[1];
  }
}

// Quad i of a block's sums, which are of two columns and two ranks.
template <class L, class T>
__device__ inline void WriteQuad(const GradPart& p, T* gradient, int ranks, unsigned block, int i,
                                 const float4& sums) {
  const int lane = i % 32, quad = i / 32 % L::kQuads, place = i / 32 / L::kQuads;
  const int m = quad / L::kJ, j = quad % L::kJ;
  const int rank = L::Rank(place) + j * 8 + lane % 4 * 2;
  if (rank >= ranks) return;
  const bool both = rank + 1 < ranks;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int64_t column = static_cast<int64_t>(block) * L::kColumns + L::Column(place) +
                           L::ColumnOf(m, upper, lane / 4);
    if (column >= p.in) continue;
    const float first = p.scaling * (upper ? sums.z : sums.x);
    const float second = p.scaling * (upper ? sums.w : sums.y);
    if (p.transposed) {
      gradient[rank * p.in + column] = Rounded<T>(first);
      if (both) gradient[(rank + 1) * p.in + column] = Rounded<T>(second);
    } else {
      WritePair(gradient + column * ranks + rank, first, second, both, ranks % 2 == 0);
    }
  }
}

template <class L, class E>
__device__ inline void WriteQuad(const GradPart& p, int ranks, unsigned block, int i,
                                 const float4& sums) {
  if (p.wide) {
    WriteQuad<L>(p, static_cast<float*>(p.gradient), ranks, block, i, sums);
  } else {
    WriteQuad<L>(p, static_cast<E*>(p.gradient), ranks, block, i, sums);
  }
}

// The warps' sums of a block, added in one order, to the gradient or to the slices' sums. `memory`
// has room for kSums bytes that nobody reads any more.
template <class L, class E>
__device__ inline void FinishBlock(const GradPart& p, int ranks, unsigned slice, unsigned block,
                                   const Quads (&sums)[L::kM][L::kJ], int place, int share,
                                   int lane, char* memory) {
  const auto write = [&](int i, const float4& sum) {  // quad i of the block
    if (p.sums == nullptr) {
      WriteQuad<L, E>(p, ranks, block, i, sum);
    } else {
      p.sums[(static_cast<int64_t>(slice) * p.blocks + block) * L::kBlockQuads + i] = sum;
    }
  };
  const int own = place * L::kQuads * 32 + lane;
  float4* const shared = reinterpret_cast<float4*>(memory);  // (shares, quads of the block)
#pragma unroll
  for (int m = 0; m < L::kM; ++m) {
#pragma unroll
    for (int j = 0; j < L::kJ; ++j) {
      const int i = own + (m * L::kJ + j) * 32;
      if constexpr (L::kShares > 1) {
        shared[share * L::kBlockQuads + i] = Quad(sums[m][j]);
      } else {
        write(i, Quad(sums[m][j]));
      }
    }
  }
  if constexpr (L::kShares > 1) {
    __syncthreads();  // all sums are there
#pragma unroll 1
    for (int i = threadIdx.x; i < L::kBlockQuads; i += kGradThreads) {
      float4 sum = shared[i];
#pragma unroll
      for (int other = 1; other < L::kShares; ++other) {
        Add(shared[other * L::kBlockQuads + i], &sum);
      }
      write(i, sum);
    }
  }
}

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_GRAD_CUH_
