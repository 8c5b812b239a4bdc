// A product whose result is as narrow as the rank: left (., depth) · right (depth, rank).
//
// A threadgroup has 32 rows of the result and all of its columns, so that left, the large operand,
// is read exactly once; right is read once a threadgroup and comes out of the caches. Each of the
// four simdgroups sums 8 of the rows. Above rank 128 the fused forward kernel, which keeps h in
// threadgroup memory, takes 16 rows, and two simdgroups share 8 of them (kParts = 2).
//
// A step brings 32 of the depth: left (32, 32) and up to 64 columns of right at a time.
#pragma once

constant constexpr uint kThinRows = 32;
constant constexpr uint kThinDepth = 32;
constant constexpr uint kThinColumns = 64;
constant constexpr uint kThinChunks = kMaxRank / kThinColumns;
// Rows of a tile are 4 floats longer than they need be: blocks of 8 rows then fall on different
// banks.
constant constexpr uint kDepthStride = kThinDepth + 4;
constant constexpr uint kColumnStride = kThinColumns + 4;
constant constexpr uint kLeftTile = kThinRows * kDepthStride;
constant constexpr uint kRightTile = kThinColumns * kDepthStride;  // ≥ kThinDepth · kColumnStride

// The block sums of one simdgroup: at [chunk · 8/kParts + j] those of the column block that
// thin_block says.
using ThinSums = simdgroup_float8x8[kMaxRank / 8];

template <uint kParts>
inline uint thin_block(uint chunk, uint j, uint simd_index) {
  return chunk * 8 + simd_index / (4 / kParts) * (8 / kParts) + j;
}

// left is (rows, depth) and the group's rows of it begin at `row`; transposed it lies as (depth,
// rows). right is (depth, rank); transposed it lies as (rank, depth).
template <uint kParts, bool kLeftTransposed, class Left, class Right>
inline void thin_product(thread ThinSums& sums, Left left, Right right, bool right_transposed,
                         uint row, uint rows, uint depth, uint rank, threadgroup float* left_tile,
                         threadgroup float* right_tile, uint index, uint simd_index) {
  constexpr uint kGroupRows = kThinRows / kParts;
  const uint own_row = simd_index % (4 / kParts) * 8;
#pragma unroll
  for (uint i = 0; i < kMaxRank / 8; ++i) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

  for (uint begin = 0; begin < depth; begin += kThinDepth) {
#pragma unroll
    for (uint chunk = 0; chunk < kThinChunks; ++chunk) {
      if (chunk * 8 >= rank_blocks) break;
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles of the step before are read
      if (chunk == 0 && kLeftTransposed) {
        stage<kThinDepth, kGroupRows, kDepthStride>(left_tile, left, begin, depth, row, rows,
                                                    index);
      } else if (chunk == 0) {
        stage<kGroupRows, kThinDepth, kDepthStride>(left_tile, left, row, rows, begin, depth,
                                                    index);
      }
      const uint column = chunk * kThinColumns;
      if (right_transposed) {
        stage<kThinColumns, kThinDepth, kDepthStride>(right_tile, right, column, rank, begin, depth,
                                                      index);
      } else {
        stage<kThinDepth, kThinColumns, kColumnStride>(right_tile, right, begin, depth, column,
                                                       rank, index);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles are whole
      const uint right_stride = right_transposed ? kDepthStride : kColumnStride;
      for (uint d = 0; d < kThinDepth; d += 8) {
        const simdgroup_float8x8 l =
            tile_block(left_tile, kDepthStride, own_row, d, kLeftTransposed);
#pragma unroll
        for (uint j = 0; j < 8 / kParts; ++j) {
          const uint at = thin_block<kParts>(chunk, j, simd_index);
          if (at >= rank_blocks) break;
          const simdgroup_float8x8 r =
              tile_block(right_tile, right_stride, d, (at - chunk * 8) * 8, right_transposed);
          thread simdgroup_float8x8& sum = sums[chunk * (8 / kParts) + j];
          simdgroup_multiply_accumulate(sum, l, r, sum);
        }
      }
    }
  }
}

// Lays 64 columns of the result into the right tile, whose stride is then kColumnStride. For
// kParts = 1.
inline void thin_collect(thread ThinSums& sums, uint chunk, threadgroup float* right_tile,
                         uint simd_index) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is read
#pragma unroll
  for (uint j = 0; j < 8; ++j) {
    if (chunk * 8 + j >= rank_blocks) break;
    simdgroup_store(sums[chunk * 8 + j], right_tile + simd_index * 8 * kColumnStride + j * 8,
                    kColumnStride);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // and full again
}
