// The low-rank part alone, y = s·(x·A)·B in one dispatch (and dx = t·Aᵀ with its t).
//
// A threadgroup sums h for its 32 rows (16 above rank 128) as in the shrink, keeps it in
// threadgroup memory, writes it out for the backward pass, and goes on to multiply it with B, 64
// columns at a time. Device memory: x, h and y once; A and B once for every 32 (16) rows, which
// the caches serve. Threadgroup memory: h and two tiles, 30 KiB at most.
//
// At few rows this is a single threadgroup, for which jax_fused_lora/forms.py takes the CPU.
#pragma once

template <uint kParts>
inline void low_rank(constant Sizes& s, device const T* x, Factor a, Factor b, device float* h,
                     device T* y, threadgroup float* h_tile, threadgroup float* left_tile,
                     threadgroup float* right_tile, uint group, uint index, uint simd_index) {
  constexpr uint kGroupRows = kThinRows / kParts;
  constexpr uint kBlocks = 8 / kParts;  // column blocks of a simdgroup
  const uint row = group * kGroupRows;
  const uint own_row = simd_index % (4 / kParts) * 8;
  const uint own_column = simd_index / (4 / kParts) * kBlocks * 8;
  const uint h_stride = rank_blocks * 8 + 4;

  ThinSums sums;
  thin_product<kParts, false>(sums, x, a, transposed, row, s.rows, s.in, s.rank, left_tile,
                              right_tile, index, simd_index);
#pragma unroll
  for (uint chunk = 0; chunk < kThinChunks; ++chunk) {
#pragma unroll
    for (uint j = 0; j < kBlocks; ++j) {
      const uint at = thin_block<kParts>(chunk, j, simd_index);
      if (at >= rank_blocks) break;
      simdgroup_store(sums[chunk * kBlocks + j], h_tile + own_row * h_stride + at * 8, h_stride);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // h is whole
  for (uint i = index; i < kGroupRows * s.rank; i += kThreads) {
    const uint r = i / s.rank;
    const uint c = i % s.rank;
    const float value = s.shrink_scaling * h_tile[r * h_stride + c];
    h_tile[r * h_stride + c] = value;
    if (row + r < s.rows) h[ulong(row) * s.rank + i] = value;
  }

  for (uint column = 0; column < s.out; column += kThinColumns) {
    simdgroup_float8x8 tile[kBlocks];
#pragma unroll
    for (uint j = 0; j < kBlocks; ++j) tile[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint begin = 0; begin < rank_blocks * 8; begin += kThinDepth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // h is scaled, the tile is read
      if (transposed) {
        stage<kThinColumns, kThinDepth, kDepthStride>(right_tile, b, column, s.out, begin, s.rank,
                                                      index);
      } else {
        stage<kThinDepth, kThinColumns, kColumnStride>(right_tile, b, begin, s.rank, column, s.out,
                                                       index);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is whole
      const uint b_stride = transposed ? kDepthStride : kColumnStride;
      for (uint d = 0; d < kThinDepth && begin + d < rank_blocks * 8; d += 8) {
        const simdgroup_float8x8 l = tile_block(h_tile, h_stride, own_row, begin + d, false);
#pragma unroll
        for (uint j = 0; j < kBlocks; ++j) {
          const simdgroup_float8x8 r =
              tile_block(right_tile, b_stride, d, own_column + j * 8, transposed);
          simdgroup_multiply_accumulate(tile[j], l, r, tile[j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is read
#pragma unroll
    for (uint j = 0; j < kBlocks; ++j) {
      simdgroup_store(tile[j], right_tile + own_row * kColumnStride + own_column + j * 8,
                      kColumnStride);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // and full again, of y
    for (uint i = index; i < kGroupRows * kThinColumns; i += kThreads) {
      const uint r = i / kThinColumns;
      const uint c = i % kThinColumns;
      if (row + r < s.rows && column + c < s.out) {
        y[ulong(row + r) * s.out + column + c] =
            T(s.expand_scaling * right_tile[r * kColumnStride + c]);
      }
    }
  }
}

kernel void lora_forward(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                         device const char* a [[buffer(2)]], device const char* b [[buffer(3)]],
                         device float* h [[buffer(4)]], device T* y [[buffer(5)]],
                         threadgroup float* h_tile [[threadgroup(0)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint index [[thread_index_in_threadgroup]],
                         uint simd_index [[simdgroup_index_in_threadgroup]]) {
  threadgroup float left_tile[kLeftTile];
  threadgroup float right_tile[kRightTile];
  const Factor shrink_factor = {a, wide_shrink};
  const Factor expand_factor = {b, wide_expand};
  if (rank_blocks <= 16) {
    low_rank<1>(s, x, shrink_factor, expand_factor, h, y, h_tile, left_tile, right_tile, group.x,
                index, simd_index);
  } else {
    low_rank<2>(s, x, shrink_factor, expand_factor, h, y, h_tile, left_tile, right_tile, group.x,
                index, simd_index);
  }
}
