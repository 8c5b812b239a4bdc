// Few rows (kFewRows at most): no matrix tiles, which would be mostly empty; W is read at memory
// speed, once for all rows, the sums split over the simdgroups of a threadgroup.
#pragma once

constant constexpr uint kFewRows = 8;
constant constexpr uint kRowThreads = 256;
constant constexpr uint kSimdgroups = kRowThreads / kLanes;
constant constexpr uint kRowRanks = 8;     // ranks of a threadgroup of shrink_rows
constant constexpr uint kRowColumns = 64;  // columns of a threadgroup of expand_rows
constant constexpr uint kLaneColumns = 4;  // columns of a simdgroup where W is read transposed

// One row of h = s·x·A, 8 ranks a threadgroup: every thread sums its share of the depth, simd_sum
// adds those of a simdgroup. Device memory: A once a row, x once for every 8 ranks.
kernel void shrink_rows(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                        device const char* a [[buffer(2)]], device float* h [[buffer(3)]],
                        uint2 group [[threadgroup_position_in_grid]],
                        uint index [[thread_index_in_threadgroup]],
                        uint simd_index [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[kSimdgroups * kRowRanks];
  const Factor factor = {a, wide_shrink};
  const uint rank = group.x * kRowRanks;
  float sums[kRowRanks] = {0.0f};
  for (uint i = index; i < s.in; i += kRowThreads) {
    const float value = float(x[ulong(group.y) * s.in + i]);
#pragma unroll
    for (uint j = 0; j < kRowRanks; ++j) {
      if (rank + j < s.rank) {
        const ulong at = transposed ? ulong(rank + j) * s.in + i : ulong(i) * s.rank + rank + j;
        sums[j] += value * element(factor, at);
      }
    }
  }
#pragma unroll
  for (uint j = 0; j < kRowRanks; ++j) {
    const float sum = simd_sum(sums[j]);
    if (lane == 0) partial[simd_index * kRowRanks + j] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // every simdgroup's sums are there
  if (index < kRowRanks && rank + index < s.rank) {
    float sum = 0.0f;
    for (uint i = 0; i < kSimdgroups; ++i) sum += partial[i * kRowRanks + index];
    h[ulong(group.y) * s.rank + rank + index] = s.shrink_scaling * sum;
  }
}

// W as it lies: a lane has two columns, a simdgroup every eighth of the depth; s·h·B is so much
// more depth. Device memory: W, B and y once, x and h once a threadgroup.
inline void expand_straight(constant Sizes& s, device const T* x, device const T* w,
                            device const T* bias, device const float* h, Factor factor, device T* y,
                            threadgroup float* partial, uint group, uint index, uint simd_index,
                            uint lane) {
  const uint column = group * kRowColumns + lane;
  const bool inside[2] = {column < s.out, column + kLanes < s.out};
  float sums[kFewRows][2] = {{0.0f}};
  for (uint i = simd_index; i < s.in; i += kSimdgroups) {
    const ulong at = ulong(i) * s.out + column;
    const float w0 = inside[0] ? float(w[at]) : 0.0f;
    const float w1 = inside[1] ? float(w[at + kLanes]) : 0.0f;
#pragma unroll
    for (uint m = 0; m < kFewRows; ++m) {
      if (m >= s.rows) break;
      const float value = float(x[ulong(m) * s.in + i]);
      sums[m][0] += value * w0;
      sums[m][1] += value * w1;
    }
  }
  for (uint i = simd_index; i < s.rank; i += kSimdgroups) {
    const ulong at = ulong(i) * s.out + column;
    const float b0 = inside[0] ? element(factor, at) : 0.0f;
    const float b1 = inside[1] ? element(factor, at + kLanes) : 0.0f;
#pragma unroll
    for (uint m = 0; m < kFewRows; ++m) {
      if (m >= s.rows) break;
      const float value = s.expand_scaling * h[m * s.rank + i];
      sums[m][0] += value * b0;
      sums[m][1] += value * b1;
    }
  }
#pragma unroll
  for (uint m = 0; m < kFewRows; ++m) {
    partial[(simd_index * kFewRows + m) * kRowColumns + lane] = sums[m][0];
    partial[(simd_index * kFewRows + m) * kRowColumns + lane + kLanes] = sums[m][1];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // every simdgroup's sums are there
  for (uint i = index; i < s.rows * kRowColumns; i += kRowThreads) {
    const uint y_column = group * kRowColumns + i % kRowColumns;
    if (y_column >= s.out) continue;
    float sum = has_bias ? float(bias[y_column]) : 0.0f;
    for (uint g = 0; g < kSimdgroups; ++g) sum += partial[g * kFewRows * kRowColumns + i];
    y[ulong(i / kRowColumns) * s.out + y_column] = T(sum);
  }
}

// W transposed, for dx = g·Wᵀ + t·Aᵀ, which has no bias: a column of Wᵀ lies in a row, which the
// lanes of a simdgroup share and simd_sum brings together. Device memory: W, A and dx once, g and t
// once for every 4 columns, which the caches serve.
inline void expand_transposed(constant Sizes& s, device const T* x, device const T* w,
                              device const float* h, Factor factor, device T* y, uint group,
                              uint simd_index, uint lane) {
  const uint column = (group * kSimdgroups + simd_index) * kLaneColumns;
  float sums[kFewRows][kLaneColumns] = {{0.0f}};
  for (uint i = lane; i < s.in; i += kLanes) {
    float weights[kLaneColumns];
#pragma unroll
    for (uint c = 0; c < kLaneColumns; ++c) {
      weights[c] = column + c < s.out ? float(w[ulong(column + c) * s.in + i]) : 0.0f;
    }
#pragma unroll
    for (uint m = 0; m < kFewRows; ++m) {
      if (m >= s.rows) break;
      const float value = float(x[ulong(m) * s.in + i]);
#pragma unroll
      for (uint c = 0; c < kLaneColumns; ++c) sums[m][c] += value * weights[c];
    }
  }
  for (uint i = lane; i < s.rank; i += kLanes) {
#pragma unroll
    for (uint c = 0; c < kLaneColumns; ++c) {
      if (column + c >= s.out) break;
      const float weight = element(factor, ulong(column + c) * s.rank + i);
#pragma unroll
      for (uint m = 0; m < kFewRows; ++m) {
        if (m >= s.rows) break;
        sums[m][c] += s.expand_scaling * h[m * s.rank + i] * weight;
      }
    }
  }
#pragma unroll
  for (uint m = 0; m < kFewRows; ++m) {
    if (m >= s.rows) break;
#pragma unroll
    for (uint c = 0; c < kLaneColumns; ++c) {
      const float sum = simd_sum(sums[m][c]);
      if (lane == 0 && column + c < s.out) y[ulong(m) * s.out + column + c] = T(sum);
    }
  }
}

kernel void expand_rows(constant Sizes& s [[buffer(0)]], device const T* x [[buffer(1)]],
                        device const T* w [[buffer(2)]], device const T* bias [[buffer(3)]],
                        device const float* h [[buffer(4)]], device const char* b [[buffer(5)]],
                        device T* y [[buffer(6)]], uint2 group [[threadgroup_position_in_grid]],
                        uint index [[thread_index_in_threadgroup]],
                        uint simd_index [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float partial[kSimdgroups * kFewRows * kRowColumns];
  const Factor factor = {b, wide_expand};
  if (transposed) {
    expand_transposed(s, x, w, h, factor, y, group.x, simd_index, lane);
  } else {
    expand_straight(s, x, w, bias, h, factor, y, partial, group.x, index, simd_index, lane);
  }
}
