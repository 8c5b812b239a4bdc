// What the kernels of the low-rank part alone have in common that multiply on tensor cores: how
// they hold B, scale h and store y.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_DELTA_MMA_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_DELTA_MMA_CUH_

#include "native/cuda/shrink_expand.cuh"

namespace jax_fused_lora {

#ifdef __CUDACC__

__device__ inline uint32_t Word(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// A lane's part of 16 ranks by 64 columns of B: of 4 ranks 8 columns, or transposed of 8 columns 4
// ranks. Ranks that are not there are zeros.
template <class E, bool kTransposed, int kRanks>
struct BlockOfB {
  uint4 loaded[4];

  __device__ void Load(const E* data, int out, int rank, int column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      loaded[i] = make_uint4(0, 0, 0, 0);
      if (kRanks < 16 && rank >= kRanks) continue;
      if constexpr (kTransposed) {
        const auto ranks = [&](int j) {
          return __ldg(reinterpret_cast<const uint2*>(
              data + static_cast<int64_t>(column + j) * kRanks + rank));
        };
        const uint2 low = ranks(i * 2), high = ranks(i * 2 + 1);
        loaded[i] = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        loaded[i] = __ldg(
            reinterpret_cast<const uint4*>(data + static_cast<int64_t>(rank + i) * out + column));
      }
    }
  }

  // Ranks 2·half and the next, of column j of the lane's.
  __device__ uint32_t Ranks(int half, int j) const {
    if constexpr (kTransposed) return Word(loaded[j / 2], j % 2 * 2 + half);
    return Pair(loaded[half * 2], loaded[half * 2 + 1], j);
  }
};

// Scales a row of float16's h as ScaleOfRow says; the scaling that is returned undoes that. kLanes
// neighbours of a warp have the row.
template <class E, int kLanes, int kCount>
__device__ inline float ScaleRow(float (&values)[kCount], float scaling) {
  if constexpr (std::is_same_v<E, __half>) {
    float most = 0.0f;
#pragma unroll
    for (const float value : values) {
      if (isfinite(value)) most = fmaxf(most, fabsf(value));
    }
#pragma unroll
    for (int apart = 1; apart < kLanes; apart *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, apart));
    }
    const ScaleOfRow scale(most);
#pragma unroll
    for (float& value : values) value *= scale.up;
    scaling *= scale.down;
  }
  return scaling;
}

// A lane's part of 16 rows by 64 columns of y, of its rows `row` and row + 8 those that are.
// at(row): where its first column of a row is.
template <class E, class At>
__device__ inline void StoreRows(const float (&sums)[8][4], const float* row_scaling, int row,
                                 int rows, const At& at) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + half * 8;
    if (own >= rows) break;
    const float scaling = row_scaling[own];
    E* const to = at(own);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      E elements[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) elements[j] = Rounded<E>(scaling * sums[j][half * 2 + side]);
      StoreVectors(elements, to + side * 32);
    }
  }
}

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_DELTA_MMA_CUH_
