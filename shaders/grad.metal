// dA = xᵀ·t, and dB = s·hᵀ·g written transposed: both sum over the rows.
//
// A thin product with 32 columns of x (or g) a threadgroup, transposed: no partial sums, so no
// temporary, and a result that does not depend on the order of threadgroups. Device memory: x (or
// g) once, the gradient once; t (or h) once for every 32 columns, which the caches serve.
//
// g is swept once here and once by the shrink that makes t. One sweep for both would need dB or t
// summed over threadgroups: a temporary many times t's size, or atomic additions in any order.
#pragma once

kernel void grad(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                 device const float* t [[buffer(2)]], device char* gradient [[buffer(3)]],
                 uint2 group [[threadgroup_position_in_grid]],
                 uint index [[thread_index_in_threadgroup]],
                 uint simd_index [[simdgroup_index_in_threadgroup]]) {
  threadgroup float left_tile[kLeftTile];
  threadgroup float right_tile[kRightTile];
  const uint row = group.x * kThinRows;  // of xᵀ·t
  ThinSums sums;
  thin_product<1, true>(sums, x, t, false, row, s.in, s.rows, s.rank, left_tile, right_tile, index,
                        simd_index);
#pragma unroll
  for (uint chunk = 0; chunk < kThinChunks; ++chunk) {
    if (chunk * 8 >= rank_blocks) break;
    thin_collect(sums, chunk, right_tile, simd_index);
    for (uint i = index; i < kThinRows * kThinColumns; i += kThreads) {
      // Neighbouring threads write neighbouring elements, whichever way the gradient lies.
      const uint r = transposed ? i % kThinRows : i / kThinColumns;
      const uint c = transposed ? i / kThinRows : i % kThinColumns;
      const uint column = chunk * kThinColumns + c;
      if (row + r >= s.in || column >= s.rank) continue;
      const ulong at =
          transposed ? ulong(column) * s.in + row + r : ulong(row + r) * s.rank + column;
      const float value = s.shrink_scaling * right_tile[r * kColumnStride + c];
      if (wide_shrink) {
        reinterpret_cast<device float*>(gradient)[at] = value;
      } else {
        reinterpret_cast<device T*>(gradient)[at] = T(value);
      }
    }
  }
}
