// What all kernels share: flags, element access, blocks of matrices in threadgroup memory.
#pragma once

constant bool transposed [[function_constant(0)]];   // W and the factors are read transposed
constant bool wide_shrink [[function_constant(1)]];  // the shrink's factor is float32, not T
constant bool wide_expand [[function_constant(2)]];  // the expand's factor is float32, not T
constant bool has_bias [[function_constant(3)]];
constant uint rank_blocks [[function_constant(4)]];  // the rank in blocks of 8, rounded up

constant constexpr uint kLanes = 32;     // threads of a simdgroup, on every Apple GPU
constant constexpr uint kThreads = 128;  // of a threadgroup, but for the row kernels
constant constexpr uint kMaxRank = 256;

// A or B: float32 where a traced scaling was folded into B, else T.
struct Factor {
  device const char* data;
  bool wide;
};

// h or t on its way into the expand.
struct Scaled {
  device const float* data;
  float scaling;
};

template <class E>
inline E element(device const E* source, ulong index) {
  return source[index];
}
inline float element(Factor source, ulong index) {
  return source.wide ? reinterpret_cast<device const float*>(source.data)[index]
                     : float(reinterpret_cast<device const T*>(source.data)[index]);
}
inline float element(Scaled source, ulong index) { return source.data[index] * source.scaling; }

// Copies the block that begins at (row, column) of a row-major (rows, columns) matrix into a tile,
// as it lies. Zeros stand for what is outside, and add nothing to a product.
template <uint kTileRows, uint kTileColumns, uint kTileStride, class E, class Source>
inline void stage(threadgroup E* tile, Source source, uint row, uint rows, uint column,
                  uint columns, uint index) {
  for (uint i = index; i < kTileRows * kTileColumns; i += kThreads) {
    const uint r = i / kTileColumns;
    const uint c = i % kTileColumns;
    const bool inside = row + r < rows && column + c < columns;
    tile[r * kTileStride + c] =
        inside ? E(element(source, ulong(row + r) * columns + column + c)) : E(0.0f);
  }
}

// The 8×8 block at (row, column) of a tile, or of the tile's transpose.
template <class E>
inline simdgroup_matrix<E, 8, 8> tile_block(threadgroup const E* tile, uint stride, uint row,
                                            uint column, bool of_transpose) {
  simdgroup_matrix<E, 8, 8> result;
  if (of_transpose) {
    simdgroup_load(result, tile + column * stride + row, stride, ulong2(0), true);
  } else {
    simdgroup_load(result, tile + row * stride + column, stride);
  }
  return result;
}
