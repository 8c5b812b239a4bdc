// h = s·x·A (also t = s·g·Bᵀ), alone or with y = addend + s·h·B behind it in the same kernel, for
// few rows: 16 at most. There the time is what the steps that wait for each other take, not
// memory's.
//
// Small A (64 KB): every block computes all of h, A being read out of L2 as often as there are
// blocks, and then a part of y. That has two barriers of a block behind one another and no more.
// Larger A, from sm_90 on: a cluster of 8 blocks. Each sums an eighth of the depth, all add the
// eight sums through distributed shared memory, and each writes an eighth of y. What a thread needs
// first of B it asks for before it begins with x.
#include <cooperative_groups.h>

#include <atomic>

#include "native/cuda/shrink_expand.cuh"

namespace jax_fused_lora {
namespace {

constexpr int kThreadsShift = 9, kThreads = 1 << kThreadsShift;
constexpr int kWarps = kThreads / 32;
constexpr int kPrefetchColumns = 32;
constexpr int64_t kSmallFactor = 64 * 1024;  // bytes of A that each block may read for itself
constexpr int64_t kBlockColumns = 128;       // of y, of such a block
constexpr int64_t kMostBlocks = 32;

struct RowsArguments {
  int rows, in, out, rank;
  int columns;       // of y, a block's
  int groups_shift;  // logarithm: groups of 4 ranks, a power of two
  const void* x;
  FactorView a, b;
  float shrink_scaling, expand_scaling;
  float* h;   // may be null
  void* h16;  // may be null
  float h16_scaling;
  bool clustered;     // the grid is one cluster
  unsigned* tickets;  // to be zeroed
  int ticket_count;
};

// In shared memory, its pads zero.
__host__ __device__ inline int HStride(int rank) { return (rank + 7) / 8 * 8; }

// Sums of kRows rows from `row` over begin..end of the depth, as to(row, rank, sum). What
// meanwhile() does comes between asking for the first of them and waiting.
//
// A thread has 4 ranks, of `groups` such, and every `slots`-th of the depth. Neighbouring threads
// have neighbouring ranks, or where A is transposed neighbouring places of the depth.
template <class E, class A, int kRows, class Meanwhile, class To>
__device__ inline void RowSums(const RowsArguments& p, int row, int begin, int end, float* shares,
                               const Meanwhile& meanwhile, const To& to) {
  constexpr int kAhead = 4;  // of the depth, at once
  const int tid = threadIdx.x, shift = p.groups_shift;
  const int groups = 1 << shift, slots = kThreads >> shift;
  const int group = p.a.transposed ? tid >> (kThreadsShift - shift) : tid & (groups - 1);
  const int slot = p.a.transposed ? tid & (slots - 1) : tid >> shift;
  const int rank = group * 4;
  const E* const x = static_cast<const E*>(p.x);
  float own[kRows][4] = {};
  const A* const a = static_cast<const A*>(p.a.data);
  float quads[kAhead][4], values[kAhead][kRows];
  const auto load = [&](int first) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * slots;
      const bool inside = i < end;
      if (p.a.transposed) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool some = inside && rank + j < p.rank;
          quads[u][j] = some ? ToFloat(a[(rank + j) * static_cast<int64_t>(p.in) + i]) : 0.0f;
        }
      } else {
        const A* const from = a + i * static_cast<int64_t>(p.rank) + rank;
        if (p.a.quads) {
#pragma unroll
          for (int j = 0; j < 4; ++j) quads[u][j] = 0.0f;
          if (inside && rank < p.rank) LoadQuad(from, quads[u]);
        } else {
          LoadQuad(from, inside ? p.rank - rank : 0, false, quads[u]);
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const bool some = inside && row + m < p.rows;
        values[u][m] = some ? ToFloat(x[(row + m) * static_cast<int64_t>(p.in) + i]) : 0.0f;
      }
    }
  };
  load(begin + slot);
  meanwhile();
#pragma unroll 1
  for (int first = begin + slot; first < end;) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) own[m][j] += values[u][m] * quads[u][j];
      }
    }
    first += kAhead * slots;
    if (first < end) load(first);
  }
  // Over the lanes of a warp that have the same group, then over the warps.
  const int first = p.a.transposed ? 1 : groups, last = p.a.transposed ? min(slots, 32) : 32;
  for (int lanes = first; lanes < last; lanes *= 2) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) own[m][j] += __shfl_xor_sync(0xffffffff, own[m][j], lanes);
    }
  }
  // A power of two, as are all of these.
  const int slots_shift = p.a.transposed ? min(kThreadsShift - shift, 5) : max(5 - shift, 0);
  const int share_count = slots >> slots_shift;  // at most kWarps
  const int share_size = kRows * groups * 4;
  if (row > 0) __syncthreads();  // the shares of the rows before are read
  if ((slot & ((1 << slots_shift) - 1)) == 0) {
    float* const share = shares + (slot >> slots_shift) * share_size + rank;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      *reinterpret_cast<float4*>(share + m * groups * 4) =
          make_float4(own[m][0], own[m][1], own[m][2], own[m][3]);
    }
  }
  __syncthreads();  // all shares are there
  for (int i = tid; i < kRows * groups; i += kThreads) {
    const int m = i >> shift, at = (i & (groups - 1)) * 4;
    if (row + m >= p.rows) continue;
    const float4 sum = SumShares<kWarps>(
        share_count, [&](int share) { return shares + share * share_size + i * 4; });
    const float quad[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (at + j < p.rank) to(row + m, at + j, quad[j]);
    }
  }
}

// Some ranks by 4 columns of B: as many as a thread has registers for while it sums.
template <class E, int kRows>
struct BlockOfB {
  static constexpr int kRanks = kRows == 1 && sizeof(E) == 4 ? 8 : 4;
  float value[kRanks / 4][4][4];

  __device__ void Load(const RowsArguments& p, int rank, int column) {
    if (std::is_same_v<E, float> || p.b.wide) {
      LoadFrom(static_cast<const float*>(p.b.data), p, rank, column);
    } else {
      LoadFrom(static_cast<const E*>(p.b.data), p, rank, column);
    }
  }

  template <class T>
  __device__ void LoadFrom(const T* data, const RowsArguments& p, int rank, int column) {
    const bool plain = p.b.quads && !p.b.transposed;  // then without a branch for each load
    const T* const from = data + rank * static_cast<int64_t>(p.out) + column;
#pragma unroll
    for (int i = 0; i < kRanks / 4; ++i) {
      if (plain) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
#pragma unroll
          for (int j = 0; j < 4; ++j) value[i][d][j] = 0.0f;
          if (rank + i * 4 + d < p.rank) {
            LoadQuad(from + (i * 4 + d) * static_cast<int64_t>(p.out), value[i][d]);
          }
        }
      } else {
        LoadBlock(data, p.b.transposed, p.b.quads, rank + i * 4, p.rank, column, p.out, value[i]);
      }
    }
  }

  __device__ void Multiply(const float* h, int h_stride, int rows, float (&sums)[kRows][4]) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= rows) continue;
#pragma unroll
      for (int i = 0; i < kRanks / 4; ++i) {
        float quad[4];
        LoadQuad(h + m * h_stride + i * 4, quad);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[m][j] += quad[d] * value[i][d][j];
        }
      }
    }
  }
};

template <class E, class A, int kRows>
__global__ void __launch_bounds__(kThreads)
    RowsKernel(const __grid_constant__ RowsArguments p, const __grid_constant__ Result<E> result) {
  // Sums of a block of a cluster, h, shares of the warps.
  extern __shared__ __align__(16) float scratch[];
  LaunchDependents();
  const int rank = p.rank, h_stride = HStride(rank), h_size = p.rows * h_stride;
  float* const h = scratch;
  float* const sums = h + h_size;
  float* const shares = sums + (p.clustered ? h_size : 0);
  const int block = blockIdx.x, blocks = gridDim.x, tid = threadIdx.x;

  // This block's columns of y. A thread takes 4 of them in some rows at a time, here its first, for
  // which it asks for B at once. The rest of B is asked for now, for later.
  const int first = min(block * p.columns, p.out), last = min(first + p.columns, p.out);
  const int quads = (last - first + 3) / 4;
  int own_row = 0, own_quad = tid;
  const auto find = [&] {
    for (; own_quad >= quads && own_row < p.rows; own_quad -= quads) own_row += kRows;
    return own_row < p.rows;
  };
  BlockOfB<E, kRows> ahead;
  const auto meanwhile = [&] {
    if (find()) ahead.Load(p, 0, first + own_quad * 4);
    if (!p.b.transposed && (rank > ahead.kRanks || quads > kThreads)) {
      const int lines = (last - first + kPrefetchColumns - 1) / kPrefetchColumns;
      const int width = std::is_same_v<E, float> || p.b.wide ? 4 : sizeof(E);
#pragma unroll 1
      for (int i = tid; i < lines * rank; i += kThreads) {
        const int64_t at =
            i / lines * static_cast<int64_t>(p.out) + first + i % lines * kPrefetchColumns;
        asm volatile(
            "prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.b.data) + at * width));
      }
    }
    if (h_stride > rank) {
#pragma unroll 1
      for (int i = tid; i < h_size; i += kThreads) {
        if (i % h_stride >= rank) h[i] = 0.0f;
      }
    }
  };
  const auto finish = [&](int row, int at, float sum) {
    sum *= p.shrink_scaling;
    h[row * h_stride + at] = sum;
    if (block == 0 && p.h != nullptr) p.h[row * rank + at] = sum;
  };
  // This block's part of the depth.
  const int part = p.clustered ? (p.in + kMostParts - 1) / kMostParts : p.in;
  const int begin = p.clustered ? min(block * part, p.in) : 0, end = min(begin + part, p.in);
#pragma unroll 1
  for (int row = 0; row < p.rows && rank > 0; row += kRows) {
    RowSums<E, A, kRows>(
        p, row, begin, end, shares,
        [&] {
          if (row == 0) meanwhile();
        },
        [&](int row, int at, float sum) {
          if (p.clustered) {
            sums[row * h_stride + at] = sum;
          } else {
            finish(row, at, sum);
          }
        });
  }
#if __CUDA_ARCH__ >= 900
  if (p.clustered) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();  // every block's sums are there
    for (int i = tid; i < h_size; i += kThreads) {
      const int row = i / h_stride, at = i % h_stride;
      if (at >= rank) continue;
      float others[kMostParts], sum = 0.0f;
#pragma unroll
      for (int b = 0; b < kMostParts; ++b) others[b] = cluster.map_shared_rank(sums, b)[i];
#pragma unroll
      for (int b = 0; b < kMostParts; ++b) sum += others[b];
      finish(row, at, sum);
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
#endif
#pragma unroll 1
  for (int i = tid + block * kThreads; i < p.ticket_count; i += blocks * kThreads) {
    p.tickets[i] = 0;
  }
  __syncthreads();  // h is whole

  if constexpr (sizeof(E) == 2) {
    if (p.h16 != nullptr && block == 0) {
      const int width = H16Width(rank);
      for (int i = tid; i < p.rows * width / 2; i += kThreads) {
        const int row = i / (width / 2), r = i % (width / 2);
        E* const pair = static_cast<E*>(p.h16) + row * width + r / 16 * kH16Block + r % 16;
        SplitClamped(r < rank ? p.h16_scaling * h[row * h_stride + r] : 0.0f, pair,
                     pair + kH16Block / 2);
      }
    }
  }
  for (bool ready = true; find(); own_quad += kThreads, ready = false) {
    const int column = first + own_quad * 4;
    float values[kRows][4] = {};
#pragma unroll 1
    for (int r = 0; r < rank; r += ahead.kRanks) {
      if (!ready || r > 0) ahead.Load(p, r, column);
      ahead.Multiply(h + own_row * h_stride + r, h_stride, p.rows - own_row, values);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[m][j] *= p.expand_scaling;
      result.Write(own_row + m, column, values[m]);
    }
  }
#if __CUDA_ARCH__ >= 900
  // No block may end while another still reads its sums.
  if (p.clustered) asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

cudaError_t LaunchRows(cudaStream_t stream, const Pass& pass, unsigned* tickets,
                       int64_t ticket_count) {
  const Sizes& sizes = pass.sizes;
  if (std::max({sizes.in, sizes.out, ticket_count}) > kMostLength) return cudaErrorInvalidValue;
  RowsArguments p = {};
  p.rows = static_cast<int>(sizes.rows);
  p.in = static_cast<int>(sizes.in);
  p.out = pass.y == nullptr ? 0 : static_cast<int>(sizes.out);
  p.rank = static_cast<int>(sizes.rank);
  while (4 << p.groups_shift < p.rank) ++p.groups_shift;
  p.x = pass.x;
  p.a = View(pass.a, sizes.in, sizes.rank);
  p.b = View(pass.b, sizes.rank, sizes.out);
  p.shrink_scaling = pass.shrink_scaling;
  p.expand_scaling = pass.expand_scaling;
  p.h = pass.h;
  p.h16 = pass.h16;
  p.h16_scaling = pass.h16_scaling;
  p.clustered = sizes.in * sizes.rank * Width(pass.a.element) > kSmallFactor && HasSm90();
  p.tickets = tickets;
  p.ticket_count = static_cast<int>(ticket_count);

  const bool one = sizes.rows == 1;
  const int groups = 1 << p.groups_shift, shares = std::min(kWarps, kThreads / groups);
  const size_t shared = sizeof(float) * ((p.clustered ? 2 : 1) * sizes.rows * HStride(p.rank) +
                                         shares * (one ? 1 : 4) * groups * 4);
  int64_t blocks = 1;
  if (p.clustered) {
    blocks = kMostParts;
  } else if (p.out > 0) {
    blocks = std::min(kMostBlocks, CeilDiv(p.out, kBlockColumns));
  }
  p.columns = static_cast<int>(CeilDiv(CeilDiv(p.out, blocks), 8) * 8);
  return Dispatch(pass.element, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto launch = [&](auto kernel) {
      return Launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream, false,
                    p.clustered ? kMostParts : 1, p, ResultOf<E>(pass, 4));
    };
    if constexpr (sizeof(E) == 2) {
      if (!p.a.wide) return one ? launch(RowsKernel<E, E, 1>) : launch(RowsKernel<E, E, 4>);
    }
    return one ? launch(RowsKernel<E, float, 1>) : launch(RowsKernel<E, float, 4>);
  });
}

}  // namespace

bool HasSm90() {
  static std::atomic<int> known[64];  // 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < 64 && known[device] != 0) return known[device] == 2;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, RowsKernel<float, float, 1>);
  if (error != cudaSuccess) return false;
  // Code compiled while loading, from older PTX, lacks what it was not written with.
  const bool has = attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90;
  if (device < 64) known[device] = has ? 2 : 1;
  return has;
}

cudaError_t LaunchRows(cudaStream_t stream, const Pass& pass) {
  return LaunchRows(stream, pass, nullptr, 0);
}

cudaError_t LaunchShrinkRows(cudaStream_t stream, Element element, const Sizes& sizes,
                             const void* x, const Factor& a, float scaling, float* h,
                             unsigned* tickets, int64_t ticket_count) {
  Pass pass = {};
  pass.element = element;
  pass.sizes = {sizes.rows, sizes.in, 0, sizes.rank};
  pass.x = x;
  pass.a = a;
  pass.b = {nullptr, element, false};
  pass.shrink_scaling = scaling;
  pass.h = h;
  return LaunchRows(stream, pass, tickets, ticket_count);
}

}  // namespace jax_fused_lora
