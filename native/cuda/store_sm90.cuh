// How a tile of y is stored by CUTLASS's kernels: y = sums + bias, in float32, rounded once.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_STORE_SM90_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_STORE_SM90_CUH_

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/numeric_conversion.h"

namespace jax_fused_lora {

// Where rows are no whole tiles, the last tile begins earlier, and computes the rows that it shares
// with the one before a second time, to the same bits: rows that are not there cost more than rows,
// as the copy engine writes their zeros more slowly than it brings what is there.
//
// A tile's first row is its number times its height, and so x and h16 are described to the
// engine as two matrices each, `Missing` rows apart. The first begins so many rows before what is
// there, none of which is ever asked for, and has the last tile; the second has the others.
template <int tile_rows>
struct LastTile {
  CUTE_HOST_DEVICE static int Missing(int m) {
    return m > tile_rows ? cute::ceil_div(m, tile_rows) * tile_rows - m : 0;
  }
  CUTE_HOST_DEVICE static int FirstRow(int m, int tile) {
    return tile * tile_rows - (tile < m / tile_rows ? 0 : Missing(m));
  }
  // Which of the two has a tile.
  CUTE_HOST_DEVICE static int Matrix(int m, int tile) {
    return Missing(m) > 0 && tile < m / tile_rows ? 1 : 0;
  }
  static auto Shape(int m, int columns) {
    return cute::make_shape(m + Missing(m), columns, Missing(m) > 0 ? 2 : 1);
  }
  template <class T>
  static T* Begin(T* matrix, int m, int64_t row) {
    // An address alone, as it may lie outside of what there is.
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(matrix) - Missing(m) * row * sizeof(T));
  }
  template <class Stride>
  static Stride Strides(Stride stride, int m) {
    cute::get<2>(stride) = Missing(m) * cute::get<0>(stride);
    return stride;
  }
};

// An epilogue, as CUTLASS calls it, in which no warp waits for another one: each rounds its 16 rows
// of the 64 of a matrix instruction and has the copy engine store them, 64 columns at a time.
// (Where the warps stored them themselves, out of the same memory, layers in JAX took as long, to
// what runs differ by.)
template <class TileShape, class Element_>
class WarpwiseStore {
 public:
  using ElementC = void;
  using ElementD = Element_;
  using StrideC = cute::Stride<int64_t, cute::Int<1>, int64_t>;
  using StrideD = StrideC;

  static constexpr int kWarps = 8;  // of two warpgroups, which may have a tile each
  static constexpr int kRows = 16, kColumns = 64, kBuffers = 2;
  using Box = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>;
  using BoxLayout =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<ElementD>{}, Box{}));

  struct SharedStorage {
    alignas(1024) ElementD boxes[kWarps][kBuffers][kRows * kColumns];
  };

  struct Arguments {
    const ElementD* bias;  // (n), may be null
    ElementD* y;
  };

  static auto MapOf(ElementD* y, int m, int n) {
    return cute::make_tma_copy(cute::SM90_TMA_STORE{},
                               cute::make_tensor(cute::make_gmem_ptr(y), cute::make_shape(m, n),
                                                 cute::make_stride(int64_t{n}, cute::_1{})),
                               BoxLayout{}, Box{}, cute::_1{});
  }

  struct Params {
    decltype(MapOf(nullptr, 0, 0)) map;
    const ElementD* bias;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& given, void*) {
    auto [m, n, k] = problem;
    return {MapOf(given.y, m, n), given.bias};
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem, class... Rest>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, Rest...) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit WarpwiseStore(const Params& params) : params_(params) {}

  // A warpgroup's part of a tile.
  template <class Problem, class Tile, class Coord, class Sums, class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(const Problem& problem, const Tile&, const Coord& coord,
                                 const Sums& sums, TiledMma, const Residue&, int thread,
                                 char* shared) {
    using namespace cute;
    constexpr int kTileM = size<0>(TileShape{}), kTileN = size<1>(TileShape{});
    constexpr int kGroup = cutlass::NumThreadsPerWarpGroup;
    constexpr int kStepM = size(TiledMma{}) / kGroup * 64;  // rows of one instruction of each group
    const int m = get<0>(problem), n = get<1>(problem);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 - 4;  // the first warpgroup fetches
    auto& boxes = reinterpret_cast<SharedStorage*>(shared)->boxes[warp];
    const int row = LastTile<kTileM>::FirstRow(m, get<0>(coord)) + thread / 32 * kRows;
    const int column = get<1>(coord) * kTileN;

    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileM / kStepM; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kTileN / kColumns; ++j) {
        ElementD* const box = boxes[(i * (kTileN / kColumns) + j) % kBuffers];
        if (lane == 0) tma_store_wait<kBuffers - 1>();
        __syncwarp();
        CUTLASS_PRAGMA_UNROLL
        for (int c = 0; c < kColumns / 16; ++c) {
          // Four matrices of 8×8: rows 0 and 8, columns 0 and 8 from here.
          uint32_t packed[4];
          CUTLASS_PRAGMA_UNROLL
          for (int p = 0; p < 4; ++p) {
            const int eight = j * (kColumns / 8) + c * 2 + p / 2;
            float low = sums(make_coord(0, p % 2, eight), i, 0);
            float high = sums(make_coord(1, p % 2, eight), i, 0);
            if (params_.bias != nullptr && column + eight * 8 < n) {
              const ElementD* const bias = params_.bias + column + eight * 8 + lane % 4 * 2;
              low += float(bias[0]);
              high += float(bias[1]);
            }
            packed[p] = Round(low, high);
          }
          const int r = lane % 16, sixteen_bytes = (c * 2 + lane / 16) ^ (r % 8);
          SM90_U32x4_STSM_N::copy(
              packed[0], packed[1], packed[2], packed[3],
              reinterpret_cast<uint128_t&>(box[r * kColumns + sixteen_bytes * 8]));
        }
        tma_store_fence();
        __syncwarp();
        if (lane == 0) {
          SM90_TMA_STORE_2D::copy(params_.map.get_tma_descriptor(), box, column + j * kColumns,
                                  row + i * kStepM);
          tma_store_arrive();
        }
      }
    }
  }

 private:
  CUTLASS_DEVICE static uint32_t Round(float low, float high) {
    cutlass::Array<float, 2> pair;
    pair[0] = low;
    pair[1] = high;
    const auto rounded = cutlass::NumericArrayConverter<ElementD, float, 2>{}(pair);
    return reinterpret_cast<const uint32_t&>(rounded);
  }

  const Params& params_;
};

// With what CUTLASS's kernels want of an epilogue besides.
template <class Store>
struct StoreOf : cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Store> {
  using Base = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Store>;
  using Base::Base;

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const typename Store::Params& params) {
    cute::prefetch_tma_descriptor(params.map.get_tma_descriptor());
  }
  // Of each warp: what it stored lies in the block's memory until it is read.
  template <class Load, class LoadState, class Stores, class StoreState>
  CUTLASS_DEVICE auto store_tail(Load, LoadState load, Stores, StoreState stores) {
    if (threadIdx.x % 32 == 0) cute::tma_store_wait<0>();
    return cute::make_tuple(load, stores);
  }
};

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_STORE_SM90_CUH_
