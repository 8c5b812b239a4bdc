// y = s·(x·A)·B alone, number by number: see delta.cuh. For float32, tiles of four rows, and for a
// single row, of 16-bit types too, unless transposed: there delta_mma.cu is faster. A thread has 4
// ranks of every so many-th depth of A, or where A is transposed 4 neighbouring depths of one rank;
// of B it has 4 columns.
#include "native/cuda/delta.cuh"

namespace jax_fused_lora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostRows = 512;  // of float32

// Four elements as they lie in memory.
template <class E>
struct Quad {
  std::conditional_t<sizeof(E) == 4, uint4, uint2> bits;

  __device__ void Load(const E* from) {
    bits = __ldg(reinterpret_cast<const decltype(bits)*>(from));
  }
  __device__ void Clear() { bits = decltype(bits)(); }
  __device__ void Widen(float (&to)[4]) const {
    E elements[4];
    memcpy(elements, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = ToFloat(elements[i]);
  }
};

template <class E>
__device__ inline void Clear(Quad<E>* quad) {
  quad->Clear();
}
template <class E>
__device__ inline void Clear(E* value) {
  *value = Rounded<E>(0.0f);
}

template <class E, bool kTransposed, int kRanks, int kRows>
__global__ void __launch_bounds__(kThreads)
    DeltaFmaKernel(const __grid_constant__ DeltaArguments p) {
#if __CUDA_ARCH__ >= 900  // the others never get it
  constexpr int kSums = kRows * kRanks, kAhead = kRanks < 16 ? 4 : 8;
  constexpr int kAtOnce = kRanks < 16 ? kRanks : 16;  // ranks of B
  __shared__ __align__(16) float shares[kWarps][kSums];
  __shared__ __align__(16) float arrived[kMostParts][kSums];
  __shared__ __align__(16) float h[kSums];
  __shared__ __align__(8) uint64_t barrier;
  const Exchange exchange(&barrier, sizeof(arrived));
  const int tid = threadIdx.x, part = blockIdx.x;
  const int first_row = blockIdx.z * kRows, rows = min(p.rows - first_row, kRows);

  // A row that is not there is another once more; what comes of it is not written.
  const E* x[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    x[m] = static_cast<const E*>(p.x) + (first_row + min(m, rows - 1)) * static_cast<int64_t>(p.in);
  }

  // This block's 4 columns of y a thread, its first here.
  const int all_quads = p.out / 4, share = (all_quads + kMostParts - 1) / kMostParts;
  const int last_quad = min((part + 1) * share, all_quads);
  int quad = part * share + blockIdx.y * kThreads + tid;
  Quad<E> b[kAtOnce];  // transposed: of each column all ranks
  const auto load_b = [&](int rank) {
    const E* const data = static_cast<const E*>(p.b);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if constexpr (kTransposed) {
        constexpr int kRankQuads = kAtOnce / 4;
        const int64_t column = quad * 4 + i / kRankQuads;
        b[i].Load(data + column * kRanks + rank + i % kRankQuads * 4);
      } else {
        b[i].Load(data + (rank + i) * static_cast<int64_t>(p.out) + quad * 4);
      }
    }
  };

  // x·A. All steps are the same for the whole block, but some threads have nothing in the last.
  constexpr int kDepth = kTransposed ? 4 : 1;                // of a thread, in a step
  constexpr int kLanes = kTransposed ? kRanks : kRanks / 4;  // threads with the same depth
  constexpr int kSlots = kThreads / kLanes;
  const int lane = kTransposed ? tid / kSlots : tid % kLanes;
  const int slot = kTransposed ? tid % kSlots : tid / kLanes;
  const int depths = p.in / kDepth, part_depths = (depths + kMostParts - 1) / kMostParts;
  int begin = part * part_depths;
  const int end = min(begin + part_depths, depths);
  const E* const a_data =
      static_cast<const E*>(p.a) + (kTransposed ? lane * static_cast<int64_t>(p.in) : lane * 4);
  Quad<E> a[kAhead];
  std::conditional_t<kTransposed, Quad<E>, E> values[kAhead][kRows];
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int depth = begin + u * kSlots + slot;
      a[u].Clear();
#pragma unroll
      for (int m = 0; m < kRows; ++m) Clear(&values[u][m]);
      if (depth < end) {
        a[u].Load(a_data + depth * static_cast<int64_t>(kTransposed ? 4 : kRanks));
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if constexpr (kTransposed) {
            values[u][m].Load(x[m] + depth * 4);
          } else {
            values[u][m] = __ldg(x[m] + depth);
          }
        }
      }
    }
  };
  load();
  if (quad < last_quad) load_b(0);

  float sums[kRows][kTransposed ? 1 : 4] = {};
#pragma unroll 1
  while (begin < end) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float factor[4];
      a[u].Widen(factor);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if constexpr (kTransposed) {
          float own[4];
          values[u][m].Widen(own);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[m][0] += own[j] * factor[j];
        } else {
          const float own = ToFloat(values[u][m]);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[m][j] += own * factor[j];
        }
      }
    }
    begin += kAhead * kSlots;
    if (begin < end) load();
  }

  // Over the lanes of a warp that have the same ranks, then, where other warps have them, too, over
  // the warps; and to all blocks.
#pragma unroll
  for (int apart = kTransposed ? 1 : kLanes; apart < (kTransposed ? kSlots : 32); apart *= 2) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (float& sum : sums[m]) sum += __shfl_xor_sync(0xffffffff, sum, apart);
    }
  }
  if constexpr (kTransposed) {
    static_assert(kSlots <= 32);
    exchange.Begin();
#pragma unroll
    for (int to = 0; to < kMostParts; to += kSlots) {
      if (to + slot >= kMostParts) continue;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        exchange.Send(sums[m], &arrived[part][m * kRanks + lane], to + slot);
      }
    }
  } else {
    static_assert(kLanes <= 32);
    if (tid % 32 < kLanes) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        *reinterpret_cast<float4*>(&shares[tid / 32][m * kRanks + lane * 4]) =
            make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
      }
    }
    exchange.Begin();
    __syncthreads();  // all shares are there
    for (int i = tid; i < kSums / 4 * kMostParts; i += kThreads) {
      const int at = i / kMostParts * 4;
      const float4 sum = SumShares<kWarps>(kWarps, [&](int warp) { return &shares[warp][at]; });
      exchange.Send({sum.x, sum.y, sum.z, sum.w}, &arrived[part][at], i % kMostParts);
    }
  }
  exchange.Wait();
  static_assert(kSums <= kThreads);
  if (tid < kSums) {
    h[tid] = p.shrink_scaling * SumParts(arrived, tid);
    if (p.h != nullptr && part + blockIdx.y == 0 && tid < rows * kRanks) {
      p.h[first_row * static_cast<int64_t>(kRanks) + tid] = h[tid];
    }
  }
  __syncthreads();  // h is whole

#pragma unroll 1
  while (quad < last_quad) {
    float y[kRows][4] = {};
#pragma unroll
    for (int rank = 0; rank < kRanks; rank += kAtOnce) {
#pragma unroll
      for (int r = 0; r < kAtOnce; r += 4) {
        float block[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          b[kTransposed ? i * (kAtOnce / 4) + r / 4 : r + i].Widen(block[i]);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          float own[4];
          LoadQuad(&h[m * kRanks + rank + r], own);
#pragma unroll
          for (int d = 0; d < 4; ++d) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              y[m][j] += own[d] * (kTransposed ? block[j][d] : block[d][j]);
          }
        }
      }
      if (rank + kAtOnce < kRanks) load_b(rank + kAtOnce);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= rows) break;
      alignas(16) E elements[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) elements[j] = Rounded<E>(p.expand_scaling * y[m][j]);
      StoreVectors(elements,
                   static_cast<E*>(p.y) + (first_row + m) * static_cast<int64_t>(p.out) + quad * 4);
    }
    quad += kThreads * gridDim.y;
    if (quad < last_quad) load_b(0);
  }
#endif
}

template <class E, bool kTransposed>
cudaError_t LaunchPart(cudaStream_t stream, const Pass& pass) {
  return DispatchRank(pass.sizes.rank, [&](auto rank) {
    constexpr int kRanks = decltype(rank)::value;
    const auto launch = [&](auto kernel, int64_t tile) {
      return LaunchDelta(kernel, stream, pass, tile, kThreads * 4, kThreads, 0);
    };
    if constexpr (sizeof(E) == 4) {
      if (pass.sizes.rows > 1) return launch(DeltaFmaKernel<E, kTransposed, kRanks, 4>, 4);
    }
    return launch(DeltaFmaKernel<E, kTransposed, kRanks, 1>, 1);
  });
}

}  // namespace

bool DeltaFmaServes(const Pass& pass) {
  const Sizes& sizes = pass.sizes;
  const int64_t width = Width(pass.element), bytes = 4 * width;
  const bool wide = pass.element == Element::kFloat32, transposed = pass.a.transposed;
  if (sizes.rows > (wide ? kMostRows : 1) || (!wide && transposed)) return false;
  const FactorView a = View(pass.a, sizes.in, sizes.rank), b = View(pass.b, sizes.rank, sizes.out);
  return DeltaTakes(pass) && a.quads && b.quads && Vectors(pass.y, sizes.out, width, bytes) &&
         (!transposed || Vectors(pass.x, sizes.in, width, bytes));
}

cudaError_t LaunchDeltaFma(cudaStream_t stream, const Pass& pass) {
  return Dispatch(pass.element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if constexpr (sizeof(E) == 4) {
      if (pass.a.transposed) return LaunchPart<E, true>(stream, pass);
    }
    return LaunchPart<E, false>(stream, pass);
  });
}

}  // namespace jax_fused_lora
