// y = x·W + bias + s·h·B (and dx = g·Wᵀ + t·Aᵀ), for many rows: [x | s·h]·[W ; B] as one product.
//
// A threadgroup has 64×64 of y, each of its four simdgroups 32×32 of them as 4×4 blocks of 8×8
// sums. A step brings 64 bytes of depth (16 float, 32 half or bfloat) of x and W into threadgroup
// memory; the last steps bring s·h and B, in float32. Device memory: x once for every 64 columns,
// W once for every 64 rows, y once. Threadgroup memory: 10 KiB.
#pragma once

constant constexpr uint kTile = 64;
constant constexpr uint kStep = 64 / sizeof(T);
constant constexpr uint kRankStep = 16;
constant constexpr uint kTileFloats = kTile * (kRankStep + 4);  // one of two, whatever its type
constant constexpr uint kOutStride = 36;

// Adds the product of a step to the sums of the simdgroup whose corner is (row, column). The left
// tile has 64 rows, the right one 64 columns, or 64 rows where it is transposed.
template <uint kDepth, class E, class Left, class Right>
inline void multiply_step(thread simdgroup_float8x8 (&sums)[4][4], threadgroup float* left_tile,
                          threadgroup float* right_tile, Left left, uint left_row, uint left_rows,
                          Right right, uint right_column, uint right_columns, uint begin,
                          uint depth, uint row, uint column, uint index) {
  constexpr uint kPad = 16 / sizeof(E);
  constexpr uint kLeftStride = kDepth + kPad;
  const uint right_stride = (transposed ? kDepth : kTile) + kPad;
  threadgroup E* l_tile = reinterpret_cast<threadgroup E*>(left_tile);
  threadgroup E* r_tile = reinterpret_cast<threadgroup E*>(right_tile);

  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles of the step before are read
  stage<kTile, kDepth, kLeftStride>(l_tile, left, left_row, left_rows, begin, depth, index);
  if (transposed) {
    stage<kTile, kDepth, kDepth + kPad>(r_tile, right, right_column, right_columns, begin, depth,
                                        index);
  } else {
    stage<kDepth, kTile, kTile + kPad>(r_tile, right, begin, depth, right_column, right_columns,
                                       index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles are whole
#pragma unroll
  for (uint d = 0; d < kDepth; d += 8) {
    simdgroup_matrix<E, 8, 8> l[4];
    simdgroup_matrix<E, 8, 8> r[4];
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      l[i] = tile_block(l_tile, kLeftStride, row + i * 8, d, false);
      r[i] = tile_block(r_tile, right_stride, d, column + i * 8, transposed);
    }
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
#pragma unroll
      for (uint j = 0; j < 4; ++j) {
        simdgroup_multiply_accumulate(sums[i][j], l[i], r[j], sums[i][j]);
      }
    }
  }
}

kernel void gemm_expand(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                        device const T* w [[buffer(2)]], device const T* bias [[buffer(3)]],
                        device const float* h [[buffer(4)]], device const char* b [[buffer(5)]],
                        device T* y [[buffer(6)]], uint2 group [[threadgroup_position_in_grid]],
                        uint index [[thread_index_in_threadgroup]],
                        uint simd_index [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float left_tile[kTileFloats];
  threadgroup float right_tile[kTileFloats];
  const uint group_row = group.y * kTile;
  const uint group_column = group.x * kTile;
  const uint row = simd_index / 2 * 32;
  const uint column = simd_index % 2 * 32;

  simdgroup_float8x8 sums[4][4];
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
#pragma unroll
    for (uint j = 0; j < 4; ++j) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint begin = 0; begin < s.in; begin += kStep) {
    multiply_step<kStep, T>(sums, left_tile, right_tile, x, group_row, s.rows, w, group_column,
                            s.out, begin, s.in, row, column, index);
  }
  const Scaled scaled_h = {h, s.expand_scaling};
  const Factor factor = {b, wide_expand};
  for (uint begin = 0; begin < s.rank; begin += kRankStep) {
    multiply_step<kRankStep, float>(sums, left_tile, right_tile, scaled_h, group_row, s.rows,
                                    factor, group_column, s.out, begin, s.rank, row, column, index);
  }

  // Out through threadgroup memory, 8 rows at a time and each simdgroup by itself, since which
  // element a thread holds is the hardware's affair.
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles are read
  threadgroup float* out = left_tile + simd_index * 8 * kOutStride;
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
#pragma unroll
    for (uint j = 0; j < 4; ++j) simdgroup_store(sums[i][j], out + j * 8, kOutStride);
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the rows are there
    const uint y_column = group_column + column + lane;
    for (uint r = 0; r < 8; ++r) {
      const uint y_row = group_row + row + i * 8 + r;
      if (y_row < s.rows && y_column < s.out) {
        const float value = out[r * kOutStride + lane] + (has_bias ? float(bias[y_column]) : 0.0f);
        y[ulong(y_row) * s.out + y_column] = T(value);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // and read
  }
}
