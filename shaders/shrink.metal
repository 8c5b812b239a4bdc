// h = s·x·A (forward) and t = s·g·Bᵀ (backward), for many rows.
//
// A thin product with 32 rows of x a threadgroup. Device memory: x once, h once; A once for every
// 32 rows, which the caches serve.
#pragma once

kernel void shrink(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                   device const char* a [[buffer(2)]], device float* h [[buffer(3)]],
                   uint2 group [[threadgroup_position_in_grid]],
                   uint index [[thread_index_in_threadgroup]],
                   uint simd_index [[simdgroup_index_in_threadgroup]]) {
  threadgroup float left_tile[kLeftTile];
  threadgroup float right_tile[kRightTile];
  const uint row = group.x * kThinRows;
  ThinSums sums;
  thin_product<1, false>(sums, x, Factor{a, wide_shrink}, transposed, row, s.rows, s.in, s.rank,
                         left_tile, right_tile, index, simd_index);
#pragma unroll
  for (uint chunk = 0; chunk < kThinChunks; ++chunk) {
    if (chunk * 8 >= rank_blocks) break;
    thin_collect(sums, chunk, right_tile, simd_index);
    for (uint i = index; i < kThinRows * kThinColumns; i += kThreads) {
      const uint r = i / kThinColumns;
      const uint c = i % kThinColumns;
      const uint column = chunk * kThinColumns + c;
      if (row + r < s.rows && column < s.rank) {
        h[ulong(row + r) * s.rank + column] = s.shrink_scaling * right_tile[r * kColumnStride + c];
      }
    }
  }
}
