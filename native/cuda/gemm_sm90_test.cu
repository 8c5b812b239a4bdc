// Values and times of the product on a Hopper GPU; gemm_sm90_test.sh builds and runs it.
//
// Values: against float64 sums of the very operands, by the project's rule (accuracy.py), with h
// in float32, so that its two 16-bit halves are judged too. Results start as NaN, every operand
// lies between NaNs, and what surrounds the result must stay as it was.
//
// Times: chains of 8 layers with a W each, as one CUDA graph, so that W comes from memory; the
// sides take turns, and the median of the runs counts.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "native/cuda/few_sm90.h"
#include "native/cuda/gemm_sm90.h"

namespace jax_fused_lora {
namespace {

#define CHECK(call)                                                                         \
  do {                                                                                      \
    const cudaError_t error = (call);                                                       \
    if (error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(2);                                                                         \
    }                                                                                       \
  } while (0)

// Device memory between two margins; all of it starts as NaN, whatever the type.
class Buffer {
 public:
  static constexpr size_t kMargin = 4096;

  explicit Buffer(size_t bytes) : bytes_(bytes) {
    CHECK(cudaMalloc(&memory_, bytes + 2 * kMargin));
    Poison();
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = void>
  T* get() const {
    return reinterpret_cast<T*>(memory_ + kMargin);
  }
  void Poison() const { CHECK(cudaMemset(memory_, 0xff, bytes_ + 2 * kMargin)); }

  // Whether the margins are as they were.
  bool Whole() const {
    std::vector<unsigned char> margin(2 * kMargin);
    CHECK(cudaMemcpy(margin.data(), memory_, kMargin, cudaMemcpyDefault));
    CHECK(cudaMemcpy(margin.data() + kMargin, memory_ + kMargin + bytes_, kMargin,
                     cudaMemcpyDefault));
    return std::all_of(margin.begin(), margin.end(), [](unsigned char c) { return c == 0xff; });
  }

 private:
  size_t bytes_;
  char* memory_ = nullptr;
};

__device__ double Wide(float v) { return v; }
__device__ double Wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ double Wide(__half v) { return __half2float(v); }

__device__ void Narrow(float v, float* to) { *to = v; }
__device__ void Narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }
__device__ void Narrow(float v, __half* to) { *to = __float2half_rn(v); }

__device__ uint32_t Hash(uint32_t v) {
  v = (v ^ 61) ^ (v >> 16);
  v *= 9;
  v ^= v >> 4;
  v *= 0x27d4eb2d;
  return v ^ (v >> 15);
}

// Normally distributed values.
template <class T>
__global__ void FillKernel(T* to, size_t size, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < size;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t first = Hash(uint32_t(i) ^ Hash(seed)), second = Hash(first + 0x9e3779b9u);
    const float radius = sqrtf(-2 * logf((first + 1.f) / 4294967808.f));
    Narrow(scale * radius * cospif(second / 2147483648.f), to + i);
  }
}

template <class T>
void Fill(const Buffer& to, size_t size, uint32_t seed, float scale) {
  FillKernel<<<1024, 256>>>(to.get<T>(), size, seed, scale);
  CHECK(cudaGetLastError());
}

template <class T>
__global__ void TransposeKernel(const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i % columns * rows + i / columns] = from[i];
  }
}

// h as gemm_sm90.h wants it. Lets its dependents start at once and then dawdles for `delay`
// nanoseconds.
template <class T>
__global__ void SplitKernel(const float* h, int64_t m, int64_t r, T* h16, int64_t width,
                            uint64_t delay) {
  asm volatile("griddepcontrol.launch_dependents;");
  uint64_t start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < delay);
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < m * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t column = i % width, rank = column / 32 * 16 + column % 16;
    const float whole = rank < r ? h[i / width * r + rank] : 0;
    T hi;
    Narrow(whole, &hi);
    if (column % 32 < 16) {
      h16[i] = hi;
    } else {
      Narrow(whole - float(Wide(hi)), h16 + i);
    }
  }
}

template <class T>
__global__ void TruthKernel(const T* x, const T* w, const float* h, const T* b, int64_t m,
                            int64_t k, int64_t n, int64_t r, double* truth, double* bound) {
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, row = blockIdx.y;
  if (column >= n) return;
  double sum = 0, size = 0;
  const auto add = [&](double left, double right) {
    sum += left * right;
    size += fabs(left * right);
  };
  for (int64_t i = 0; i < k; ++i) add(Wide(x[row * k + i]), Wide(w[i * n + column]));
  for (int64_t i = 0; i < r; ++i) add(Wide(h[row * r + i]), Wide(b[i * n + column]));
  truth[row * n + column] = sum;
  bound[row * n + column] = size;
}

// h = scaling · x·A in float64, and what its terms add up to.
template <class T>
__global__ void ShrinkTruthKernel(const T* x, const T* a, int64_t m, int64_t k, int64_t r,
                                  double scaling, double* truth, double* bound) {
  const int64_t rank = threadIdx.x, row = blockIdx.x;
  if (rank >= r) return;
  double sum = 0, size = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double product = scaling * Wide(x[row * k + i]) * Wide(a[i * r + rank]);
    sum += product;
    size += fabs(product);
  }
  truth[row * r + rank] = sum;
  bound[row * r + rank] = size;
}

// Adds scaling · h·B to the truth of y, which has x·W.
template <class T>
__global__ void ExpandTruthKernel(const double* h, const double* h_bound, const T* b, int64_t n,
                                  int64_t r, double scaling, double* truth, double* bound) {
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, row = blockIdx.y;
  if (column >= n) return;
  for (int64_t i = 0; i < r; ++i) {
    truth[row * n + column] += scaling * h[row * r + i] * Wide(b[i * n + column]);
    bound[row * n + column] += fabs(scaling * h_bound[row * r + i] * Wide(b[i * n + column]));
  }
}

// scaling · hᵀ·x in float64, and what its terms add up to.
template <class T>
__global__ void GradTruthKernel(const float* h, const T* x, int64_t m, int64_t k, int64_t r,
                                double scaling, double* truth, double* bound) {
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, rank = blockIdx.y;
  if (column >= k) return;
  double sum = 0, size = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double product = scaling * h[i * r + rank] * Wide(x[i * k + column]);
    sum += product;
    size += fabs(product);
  }
  truth[rank * k + column] = sum;
  bound[rank * k + column] = size;
}

struct Verdict {
  unsigned wrong, worst;  // entries; the bits of a float, error over what is allowed
};

template <class T>
__global__ void JudgeKernel(const T* y, const T* bias, const double* truth, const double* bound,
                            int64_t m, int64_t n, double rounding, double tiny, Verdict* verdict) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < m * n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const double added = bias ? Wide(bias[i % n]) : 0, right = truth[i] + added;
    const double error = fabs(Wide(y[i]) - right);
    const double allowed = 1e-5 * (bound[i] + fabs(added)) + rounding * fabs(right) + tiny;
    const float excess = error / allowed;
    if (!(error <= allowed)) atomicAdd(&verdict->wrong, 1);
    atomicMax(&verdict->worst, __float_as_uint(isnan(excess) ? INFINITY : fabsf(excess)));
  }
}

std::string Describe(const GemmPlan& plan) {
  static const char* const kTiles[] = {"128x256", "256x128", "128x128pp", "128x128", "64x128"};
  return std::string(kTiles[plan.tile]) + "/" + std::to_string(plan.swizzle) +
         (plan.along_n ? "n" : "m");
}

int failed = 0, passed = 0, shrunk = 0, swept = 0, few = 0;

// h beside the product, alone and with a gradient, and all in one kernel: y, h and the gradient,
// twice over, since what is ready when differs.
template <class T>
void TestShrink(int64_t m, int64_t k, int64_t n, int64_t r, cudaStream_t stream) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr float kScaling = .25f, kH16Scaling = 4.f, kGradScaling = .5f;
  if (r == 0) return;
  Buffer x(m * k * 2), w(k * n * 2), wt(k * n * 2), a(k * r * 2), at(k * r * 2), b(r * n * 2),
      bt(r * n * 2), bias(n * 2);
  Buffer h(m * r * 4), h16(m * GemmSm90Width(r) * 2), y(m * n * 2);
  Buffer scratch(GemmSm90ShrinkScratch(m) * 4), of_h(m * r * 4), gradient(r * k * 2);
  Buffer gradient_truth(r * k * 8), gradient_bound(r * k * 8);
  Buffer h_truth(m * r * 8), h_bound(m * r * 8), truth(m * n * 8), bound(m * n * 8);
  Buffer verdict(sizeof(Verdict));
  Fill<T>(x, m * k, 1, 1);
  Fill<T>(w, k * n, 2, 1);
  Fill<T>(a, k * r, 3, 1);
  Fill<T>(b, r * n, 4, 1);
  Fill<T>(bias, n, 5, 8);
  Fill<float>(of_h, m * r, 6, 1);
  TransposeKernel<<<1024, 256>>>(w.get<T>(), k, n, wt.get<T>());
  TransposeKernel<<<1024, 256>>>(a.get<T>(), k, r, at.get<T>());
  TransposeKernel<<<1024, 256>>>(b.get<T>(), r, n, bt.get<T>());
  const dim3 columns((n + 127) / 128, m);
  TruthKernel<<<columns, 128>>>(x.get<T>(), w.get<T>(), h.get<float>(), b.get<T>(), m, k, n, 0,
                                truth.get<double>(), bound.get<double>());
  ShrinkTruthKernel<<<m, 256>>>(x.get<T>(), a.get<T>(), m, k, r, kScaling, h_truth.get<double>(),
                                h_bound.get<double>());
  ExpandTruthKernel<<<columns, 128>>>(h_truth.get<double>(), h_bound.get<double>(), b.get<T>(), n,
                                      r, kH16Scaling, truth.get<double>(), bound.get<double>());
  GradTruthKernel<<<dim3((k + 127) / 128, r), 128>>>(of_h.get<float>(), x.get<T>(), m, k, r,
                                                     kGradScaling, gradient_truth.get<double>(),
                                                     gradient_bound.get<double>());
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  int multiprocessors;
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));

  for (bool transposed : {false, true}) {
    const Buffer &right = transposed ? wt : w, &factor = transposed ? bt : b;
    Gemm gemm = {kBf16,     transposed,   m,      k, n, r, x.get(), right.get(), nullptr,
                 h16.get(), factor.get(), y.get()};
    const GemmShrink shrink = {transposed ? at.get() : a.get(),
                               kScaling,
                               kH16Scaling,
                               h.get<float>(),
                               h16.get(),
                               scratch.get<float>()};
    using Way = std::function<cudaError_t(const Gemm&)>;
    std::vector<std::pair<std::string, Way>> ways;
    std::vector<GemmPlan> plans = {GemmSm90Plan(gemm, multiprocessors)};
    for (int tile = 0; tile < kGemmTiles; ++tile) {
      for (bool along_n : {false, true}) plans.push_back({tile, 1, along_n});
    }
    plans.push_back({1, 4, true});  // of a large W
    for (const GemmPlan& plan : plans) {
      if (!GemmSm90Shrinks(gemm, shrink, plan, multiprocessors)) continue;
      ways.push_back({"h beside, " + Describe(plan), [&, plan](const Gemm& gemm) {
                        return GemmSm90(gemm, shrink, plan, stream);
                      }});
    }
    shrunk += 2 * ways.size();
    const GemmGrad grad = {of_h.get<float>(), kGradScaling, gradient.get()};
    if (GemmSm90Sweeps(gemm, shrink, grad)) {
      ways.push_back({"gradient beside",
                      [&](const Gemm& gemm) { return GemmSm90(gemm, shrink, grad, stream); }});
      swept += 2;
    }
    if (FewSm90Serves(gemm, shrink)) {
      const Way way = [&](const Gemm& gemm) { return FewSm90(gemm, shrink, stream); };
      ways.push_back({"in one kernel", way});
      ways.push_back({"in one kernel, bias", way});
      few += 4;
    }
    for (const auto& [name, way] : ways) {
      gemm.bias = name.find("bias") != name.npos ? bias.get() : nullptr;
      const bool sweeps = name.find("gradient") != name.npos;
      std::vector<char> first;
      for (int turn = 0; turn < 2; ++turn) {
        for (const Buffer* buffer : {&y, &h, &h16, &gradient}) buffer->Poison();
        if (turn == 0) scratch.Poison();  // then as the turn before has left it
        CHECK(cudaDeviceSynchronize());
        CHECK(way(gemm));
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemset(verdict.get(), 0, sizeof(Verdict)));
        JudgeKernel<T><<<1024, 256>>>(
            y.get<T>(), static_cast<const T*>(gemm.bias), truth.get<double>(), bound.get<double>(),
            m, n, kBf16 ? 0x1p-8 : 0x1p-11, kBf16 ? 0x1p-126 : 0x1p-24, verdict.get<Verdict>());
        JudgeKernel<float><<<1024, 256>>>(h.get<float>(), nullptr, h_truth.get<double>(),
                                          h_bound.get<double>(), m, r, 0x1p-24, 0,
                                          verdict.get<Verdict>());
        if (sweeps) {
          JudgeKernel<T><<<1024, 256>>>(gradient.get<T>(), nullptr, gradient_truth.get<double>(),
                                        gradient_bound.get<double>(), r, k, 0x1p-8, 0x1p-126,
                                        verdict.get<Verdict>());
        }
        CHECK(cudaGetLastError());
        Verdict result;
        CHECK(cudaMemcpy(&result, verdict.get(), sizeof result, cudaMemcpyDefault));
        std::vector<char> now(m * n * 2 + m * r * 4 + sweeps * r * k * 2);
        CHECK(cudaMemcpy(now.data(), y.get(), m * n * 2, cudaMemcpyDefault));
        CHECK(cudaMemcpy(now.data() + m * n * 2, h.get(), m * r * 4, cudaMemcpyDefault));
        CHECK(cudaMemcpy(now.data() + m * n * 2 + m * r * 4, gradient.get(), sweeps * r * k * 2,
                         cudaMemcpyDefault));
        if (turn == 0) first = now;
        const bool whole =
            y.Whole() && h.Whole() && h16.Whole() && scratch.Whole() && gradient.Whole();
        const bool ok = result.wrong == 0 && whole && now == first;
        ok ? ++passed : ++failed;
        if (!ok) {
          std::printf("FAILED %s %lld x %lld -> %lld rank %lld %s %s: %u entries off%s%s\n",
                      kBf16 ? "bf16" : "f16", (long long)m, (long long)k, (long long)n,
                      (long long)r, name.c_str(), transposed ? "transposed" : "straight",
                      result.wrong, whole ? "" : ", wrote outside",
                      now == first ? "" : ", not the same again");
        }
      }
    }
  }
}

template <class T>
void TestShape(int64_t m, int64_t k, int64_t n, int64_t r, cudaStream_t stream) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const int64_t width = GemmSm90Width(r);
  Buffer x(m * k * 2), w(k * n * 2), wt(k * n * 2), b(r * n * 2), bt(r * n * 2), bias(n * 2);
  Buffer h(m * r * 4), h16(m * width * 2), y(m * n * 2), truth(m * n * 8), bound(m * n * 8);
  Buffer verdict(sizeof(Verdict));
  Fill<T>(x, m * k, 1, 1);
  Fill<T>(w, k * n, 2, 1);
  Fill<T>(b, r * n, 3, 1);
  Fill<T>(bias, n, 4, 8);
  Fill<float>(h, m * r, 5, 8);
  TransposeKernel<<<1024, 256>>>(w.get<T>(), k, n, wt.get<T>());
  if (r > 0) TransposeKernel<<<1024, 256>>>(b.get<T>(), r, n, bt.get<T>());
  TruthKernel<<<dim3((n + 127) / 128, m), 128>>>(x.get<T>(), w.get<T>(), h.get<float>(), b.get<T>(),
                                                 m, k, n, r, truth.get<double>(),
                                                 bound.get<double>());
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  double worst = 0;

  const auto judge = [&](const char* what, bool with_bias, const char* form) {
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemset(verdict.get(), 0, sizeof(Verdict)));
    JudgeKernel<<<1024, 256>>>(y.get<T>(), with_bias ? bias.get<T>() : nullptr, truth.get<double>(),
                               bound.get<double>(), m, n, kBf16 ? 0x1p-8 : 0x1p-11,
                               kBf16 ? 0x1p-126 : 0x1p-24, verdict.get<Verdict>());
    CHECK(cudaGetLastError());
    Verdict result;
    CHECK(cudaMemcpy(&result, verdict.get(), sizeof result, cudaMemcpyDefault));
    float excess;
    std::memcpy(&excess, &result.worst, sizeof excess);
    worst = std::max<double>(worst, excess);
    const bool whole = y.Whole(), ok = result.wrong == 0 && whole;
    ok ? ++passed : ++failed;
    if (!ok) {
      std::printf("FAILED %s %lld x %lld -> %lld rank %lld %s %s%s: %u entries off, worst %.3g%s\n",
                  kBf16 ? "bf16" : "f16", (long long)m, (long long)k, (long long)n, (long long)r,
                  what, form, with_bias ? " bias" : "", result.wrong, excess,
                  whole ? "" : ", wrote outside");
    }
  };

  for (bool transposed : {false, true}) {
    const Buffer &right = transposed ? wt : w, &factor = transposed ? bt : b;
    Gemm gemm = {kBf16,     transposed,   m,      k, n, r, x.get(), right.get(), nullptr,
                 h16.get(), factor.get(), y.get()};
    const char* form = transposed ? "transposed" : "straight";
    if (transposed && r % 8 != 0) {
      GemmSm90Serves(gemm) ? ++failed : ++passed;
      continue;
    }
    for (bool with_bias : {false, true}) {
      gemm.bias = with_bias ? bias.get() : nullptr;
      for (int tile = 0; tile < kGemmTiles; ++tile) {
        for (int order = 0; order < 2; ++order) {
          y.Poison();
          h16.Poison();
          CHECK(cudaDeviceSynchronize());
          if (r > 0) {
            SplitKernel<<<64, 256, 0, stream>>>(h.get<float>(), m, r, h16.get<T>(), width, 0);
            CHECK(cudaGetLastError());
          }
          CHECK(GemmSm90(gemm, {tile, order ? 4 : 1, order == 1}, stream, false));
          const std::string name =
              "tile " + std::to_string(tile) + " order " + std::to_string(order);
          judge(name.c_str(), with_bias, form);
        }
      }
      y.Poison();
      h16.Poison();
      CHECK(cudaDeviceSynchronize());
      if (r > 0) {  // a writer that lets the product start long before it writes
        SplitKernel<<<16, 256, 0, stream>>>(h.get<float>(), m, r, h16.get<T>(), width, 200000);
        CHECK(cudaGetLastError());
      }
      CHECK(GemmSm90(gemm, stream, true));
      judge("after a late writer", with_bias, form);
    }
  }
  std::printf("%-4s %5lld x %5lld -> %5lld rank %3lld  worst %.3f of what is allowed\n",
              kBf16 ? "bf16" : "f16", (long long)m, (long long)k, (long long)n, (long long)r,
              worst);
}

// cuBLAS, where it is found: CUBLAS names the library.
struct Cublas {
  void* handle = nullptr;
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
              int, const void*, void*, int, int, int, int) = nullptr;

  explicit Cublas(cudaStream_t stream, const Buffer& workspace, size_t bytes) {
    void* library = nullptr;
    const char* named = std::getenv("CUBLAS");
    for (const char* name : {named ? named : "", "libcublas.so.13", "libcublas.so.12"}) {
      if (!library && *name) library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    }
    if (!library) {
      std::printf("no cuBLAS: %s\n", dlerror());
      return;
    }
    const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
    const auto set_stream =
        reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(library, "cublasSetStream_v2"));
    const auto set_workspace =
        reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(library, "cublasSetWorkspace_v2"));
    if (create(&handle) != 0 || set_stream(handle, stream) != 0 ||
        set_workspace(handle, workspace.get(), bytes) != 0) {
      std::printf("cuBLAS does not start\n");
      return;
    }
    gemm = reinterpret_cast<decltype(gemm)>(dlsym(library, "cublasGemmEx"));
  }

  void operator()(const Gemm& g) const {
    // Row-major y = x·W is column-major yᵀ = Wᵀ·xᵀ. 14: bfloat16, 2: float16, 68: float32 sums.
    const float one = 1, zero = 0;
    const int type = g.bf16 ? 14 : 2;
    const int status = gemm(handle, g.transposed, 0, int(g.n), int(g.m), int(g.k), &one, g.w, type,
                            int(g.transposed ? g.k : g.n), g.x, type, int(g.k), &zero, g.y, type,
                            int(g.n), 68, -1);
    if (status != 0) {
      std::printf("cublasGemmEx: %d\n", status);
      std::exit(2);
    }
  }
};

class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& launch) : stream_(stream) {
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    cudaGraph_t graph;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&graph_, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventCreate(&start_));
    CHECK(cudaEventCreate(&stop_));
  }
  ~Graph() {
    cudaGraphExecDestroy(graph_);
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  Graph(const Graph&) = delete;

  double Microseconds() const {
    CHECK(cudaEventRecord(start_, stream_));
    CHECK(cudaGraphLaunch(graph_, stream_));
    CHECK(cudaEventRecord(stop_, stream_));
    CHECK(cudaEventSynchronize(stop_));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e3;
  }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_;
  cudaEvent_t start_, stop_;
};

// The median of each side, µs a layer.
std::vector<double> Interleave(const std::vector<Graph*>& sides, int runs, int layers) {
  std::vector<std::vector<double>> times(sides.size());
  for (int run = -3; run < runs; ++run) {
    for (size_t i = 0; i < sides.size(); ++i) {
      const double time = sides[i]->Microseconds() / layers;
      if (run >= 0) times[i].push_back(time);
    }
  }
  std::vector<double> medians;
  for (auto& t : times) {
    std::nth_element(t.begin(), t.begin() + t.size() / 2, t.end());
    medians.push_back(t[t.size() / 2]);
  }
  return medians;
}

std::vector<std::string> table;

template <class T>
void Time(int64_t m, int64_t width, int64_t r, bool transposed, cudaStream_t stream,
          const Cublas& cublas) {
  constexpr int kLayers = 8, kRuns = 31, kSweepRuns = 9;
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const float scale = 1 / std::sqrt(float(width));
  Buffer x(m * width * 2), y(m * width * 2), z(m * width * 2), w(kLayers * width * width * 2);
  Buffer b(kLayers * r * width * 2), h(m * r * 4), h16(m * GemmSm90Width(r) * 2);
  Fill<T>(x, m * width, 1, 1);
  Fill<T>(w, kLayers * width * width, 2, scale);
  Fill<T>(b, kLayers * r * width, 3, .1f / std::sqrt(float(r)));
  Fill<float>(h, m * r, 4, 1);
  SplitKernel<<<64, 256>>>(h.get<float>(), m, r, h16.get<T>(), GemmSm90Width(r), 0);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());

  const auto chain = [&](const std::function<void(const Gemm&)>& layer, bool with_rank) {
    return new Graph(stream, [&] {
      const void* from = x.get();
      for (int i = 0; i < kLayers; ++i) {
        void* to = i % 2 ? y.get() : z.get();
        layer({kBf16, transposed, m, width, width, with_rank ? r : 0, from,
               w.get<T>() + i * width * width, nullptr, h16.get(), b.get<T>() + i * r * width, to});
        from = to;
      }
    });
  };
  int multiprocessors;
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const Gemm shape = {kBf16, transposed, m, width, width, r};
  const GemmPlan plan = GemmSm90Plan(shape, multiprocessors);
  // With h beside, too: A, the scratch memory and what comes out.
  Buffer a(kLayers * width * r * 2), h_out(m * r * 4), h16_out(m * GemmSm90Width(r) * 2);
  Buffer scratch(GemmSm90ShrinkScratch(m) * 4);
  Fill<T>(a, kLayers * width * r, 5, scale);
  CHECK(cudaDeviceSynchronize());
  const auto beside = [&](const GemmPlan& plan) {
    return [&, plan](Gemm gemm) {
      const int64_t layer = (static_cast<const T*>(gemm.w) - w.get<T>()) / (width * width);
      gemm.h16 = h16_out.get();
      const GemmShrink shrink = {a.get<T>() + layer * width * r,
                                 1,
                                 1,
                                 h_out.get<float>(),
                                 h16_out.get(),
                                 scratch.get<float>()};
      CHECK(GemmSm90(gemm, shrink, plan, stream));
    };
  };
  Buffer gradient(r * width * 2);
  const auto swept = [&](Gemm gemm) {
    const int64_t layer = (static_cast<const T*>(gemm.w) - w.get<T>()) / (width * width);
    gemm.h16 = h16_out.get();
    CHECK(GemmSm90(gemm,
                   {a.get<T>() + layer * width * r, 1, 1, h_out.get<float>(), h16_out.get(),
                    scratch.get<float>()},
                   {h.get<float>(), 1, gradient.get()}, stream));
  };
  const auto shrinks = [&](const GemmPlan& plan) {
    return GemmSm90Shrinks({kBf16, transposed, m, width, width, r, x.get(), w.get(), nullptr,
                            h16.get(), b.get(), y.get()},
                           {a.get(), 1, 1, nullptr, nullptr, scratch.get<float>()}, plan,
                           multiprocessors);
  };
  const auto ours = [&](const GemmPlan& plan) {
    return [&stream, plan](const Gemm& gemm) { CHECK(GemmSm90(gemm, plan, stream, false)); };
  };

  // Every plan, to revise GemmSm90Plan by.
  std::vector<GemmPlan> plans;
  std::vector<Graph*> graphs;
  for (int tile = 0; tile < kGemmTiles; ++tile) {
    for (int swizzle : {1, 2, 4, 8}) {
      for (bool along_n : {false, true}) {
        plans.push_back({tile, swizzle, along_n});
        graphs.push_back(chain(ours(plans.back()), true));
      }
    }
  }
  const std::vector<double> sweep = Interleave(graphs, kSweepRuns, kLayers);
  for (Graph* graph : graphs) delete graph;
  std::vector<size_t> order(plans.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return sweep[i] < sweep[j]; });
  std::printf("plans for %lld rows, %lld, rank %lld%s:", (long long)m, (long long)width,
              (long long)r, transposed ? ", transposed" : "");
  for (size_t i = 0; i < order.size(); ++i) {
    std::printf("%s %s %.1f", i ? "," : "", Describe(plans[order[i]]).c_str(), sweep[order[i]]);
  }
  std::printf("\n");

  {
    std::vector<GemmPlan> beside_plans;
    std::vector<Graph*> beside_graphs;
    for (const GemmPlan& each : plans) {
      if (!shrinks(each)) continue;
      beside_plans.push_back(each);
      beside_graphs.push_back(chain(beside(each), true));
    }
    const bool sweeps = GemmSm90Sweeps({kBf16, transposed, m, width, width, r, x.get(), w.get(),
                                        nullptr, h16_out.get(), b.get(), y.get()},
                                       {a.get(), 1, 1, h_out.get<float>(), h16_out.get()},
                                       {h.get<float>(), 1, gradient.get()});
    if (sweeps) beside_graphs.push_back(chain(swept, true));
    if (cublas.gemm) beside_graphs.push_back(chain(std::cref(cublas), false));
    const std::vector<double> times = Interleave(beside_graphs, kRuns, kLayers);
    for (Graph* graph : beside_graphs) delete graph;
    char line[200];
    std::string text;
    for (size_t i = 0; i < beside_plans.size(); ++i) {
      std::snprintf(line, sizeof line, " %s %.1f (%.3f)", Describe(beside_plans[i]).c_str(),
                    times[i], cublas.gemm ? times[i] / times.back() : NAN);
      text += line;
    }
    if (sweeps) {
      const double time = times[beside_plans.size()];
      std::snprintf(line, sizeof line, "; with the gradient %.1f (%.3f)", time,
                    cublas.gemm ? time / times.back() : NAN);
      text += line;
    }
    std::snprintf(line, sizeof line, "h beside, %lld rows, %lld, rank %lld%s:", (long long)m,
                  (long long)width, (long long)r, transposed ? ", transposed" : "");
    table.push_back(line + text);
  }

  const GemmPlan best = plans[order[0]];
  std::vector<Graph*> sides = {chain(ours(plan), true), chain(ours(plan), false),
                               chain(ours(best), true), chain(ours(best), false)};
  if (cublas.gemm) sides.push_back(chain(std::cref(cublas), false));
  std::vector<double> medians = Interleave(sides, kRuns, kLayers);
  for (Graph* graph : sides) delete graph;
  const double base = cublas.gemm ? medians[4] : NAN;
  char line[256];
  std::snprintf(line, sizeof line,
                "%-4s %-8s %5lld %5lld %4lld %8.1f %8.1f %8.1f %7.3f  %-14s %8.1f %8.1f %7.3f  %s",
                kBf16 ? "bf16" : "f16", transposed ? "transp." : "straight", (long long)m,
                (long long)width, (long long)r, base, medians[1], medians[0], medians[0] / base,
                Describe(plan).c_str(), medians[3], medians[2], medians[2] / base,
                Describe(best).c_str());
  table.push_back(line);
}

// How much of a writer of h16 that holds 16 multiprocessors for a while the product hides, in a
// graph, and that it still computes the same.
void TimeOverlap(int64_t m, int64_t width, int64_t r, cudaStream_t stream) {
  using T = __nv_bfloat16;
  constexpr int kLayers = 8;
  Buffer x(m * width * 2), y(m * width * 2), w(kLayers * width * width * 2), b(r * width * 2);
  Buffer h(m * r * 4), h16(m * GemmSm90Width(r) * 2);
  Fill<T>(x, m * width, 1, 1);
  Fill<T>(w, kLayers * width * width, 2, 1 / std::sqrt(float(width)));
  Fill<T>(b, r * width, 3, 1);
  Fill<float>(h, m * r, 4, 1);
  CHECK(cudaDeviceSynchronize());
  for (uint64_t delay : {20000, 60000}) {
    std::vector<Graph*> graphs;
    for (int side = 0; side < 3; ++side) {
      graphs.push_back(new Graph(stream, [&] {
        for (int i = 0; i < kLayers; ++i) {
          if (side > 0) {
            SplitKernel<<<16, 256, 0, stream>>>(h.get<float>(), m, r, h16.get<T>(),
                                                GemmSm90Width(r), delay);
            CHECK(cudaGetLastError());
          }
          CHECK(GemmSm90({true, false, m, width, width, r, x.get(), w.get<T>() + i * width * width,
                          nullptr, h16.get(), b.get(), y.get()},
                         stream, side == 2));
        }
      }));
    }
    std::vector<char> results[2];
    for (int side : {1, 2}) {
      h16.Poison();
      y.Poison();
      CHECK(cudaDeviceSynchronize());
      graphs[side]->Microseconds();
      results[side - 1].resize(m * width * 2);
      CHECK(cudaMemcpy(results[side - 1].data(), y.get(), m * width * 2, cudaMemcpyDefault));
    }
    const bool same = results[0] == results[1];
    same ? ++passed : ++failed;
    const std::vector<double> medians = Interleave(graphs, 31, kLayers);
    for (Graph* graph : graphs) delete graph;
    char line[200];
    std::snprintf(
        line, sizeof line,
        "%lld rows, %lld, rank %lld: product %.1f, a writer of %d µs and then the product "
        "%.1f, the product overlapping it %.1f%s",
        (long long)m, (long long)width, (long long)r, medians[0], int(delay / 1000), medians[1],
        medians[2], same ? "" : ", WRONG");
    table.push_back(line);
  }
}

// Few rows: all in one kernel, h beside, and a kernel of h before, against cuBLAS's bare product.
void TimeFew(int64_t m, int64_t width, int64_t r, bool transposed, cudaStream_t stream,
             const Cublas& cublas) {
  using T = __nv_bfloat16;
  constexpr int kLayers = 16;
  const float scale = 1 / std::sqrt(float(width));
  Buffer x(m * width * 2), y(m * width * 2), z(m * width * 2), w(kLayers * width * width * 2);
  Buffer a(kLayers * width * r * 2), b(kLayers * r * width * 2), h(m * r * 4);
  Buffer h16(m * GemmSm90Width(r) * 2), scratch(GemmSm90ShrinkScratch(m) * 4);
  Fill<T>(x, m * width, 1, 1);
  Fill<T>(w, kLayers * width * width, 2, scale);
  Fill<T>(a, kLayers * width * r, 3, scale);
  Fill<T>(b, kLayers * r * width, 4, .1f / std::sqrt(float(r)));
  CHECK(cudaDeviceSynchronize());
  using Layer = std::function<void(const Gemm&, const GemmShrink&)>;
  const auto chain = [&](const Layer& layer) {
    return new Graph(stream, [&] {
      const void* from = x.get();
      for (int i = 0; i < kLayers; ++i) {
        void* to = i % 2 ? y.get() : z.get();
        layer({true, transposed, m, width, width, r, from, w.get<T>() + i * width * width, nullptr,
               h16.get(), b.get<T>() + i * r * width, to},
              {a.get<T>() + i * width * r, 1, 1, h.get<float>(), h16.get(), scratch.get<float>()});
        from = to;
      }
    });
  };
  std::vector<Graph*> sides;
  std::string text;
  const auto side = [&](const char* name, const Layer& layer) {
    sides.push_back(chain(layer));
    text += (text.empty() ? " " : ", ") + std::string(name) + " %.1f";
  };
  const Gemm gemm = {true,    transposed, m,       width,     width,   r,
                     x.get(), w.get(),    nullptr, h16.get(), b.get(), y.get()};
  const GemmShrink shrink = {a.get(), 1, 1, nullptr, nullptr, scratch.get<float>()};
  if (cublas.gemm) side("cuBLAS", [&](const Gemm& g, const GemmShrink&) { cublas(g); });
  if (FewSm90Serves(gemm, shrink)) {
    side("one kernel", [&](const Gemm& g, const GemmShrink& s) { CHECK(FewSm90(g, s, stream)); });
  }
  if (GemmSm90Shrinks(gemm, shrink)) {
    side("h beside", [&](const Gemm& g, const GemmShrink& s) { CHECK(GemmSm90(g, s, stream)); });
  }
  side("h given", [&](const Gemm& g, const GemmShrink&) { CHECK(GemmSm90(g, stream, false)); });
  const std::vector<double> medians = Interleave(sides, 31, kLayers);
  for (Graph* graph : sides) delete graph;
  text = "%lld rows, %lld, rank %lld%s:" + text;
  char line[300];
  std::snprintf(line, sizeof line, text.c_str(), (long long)m, (long long)width, (long long)r,
                transposed ? ", transposed" : "", medians[0], medians.size() > 1 ? medians[1] : 0,
                medians.size() > 2 ? medians[2] : 0, medians.size() > 3 ? medians[3] : 0);
  std::printf("%s\n", line);
}

int Main(int argc, char** argv) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const std::string what = argc > 1 ? argv[1] : "";
  const bool small = what == "small";  // for compute-sanitizer

  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  constexpr int64_t kShapes[][4] = {
      {1, 64, 64, 8},        {1, 8, 8, 8},          {3, 72, 136, 1},        {37, 200, 264, 3},
      {129, 136, 520, 16},   {200, 512, 384, 16},   {255, 1032, 1000, 17},  {257, 64, 8, 32},
      {300, 320, 264, 33},   {130, 448, 776, 40},   {384, 256, 256, 48},    {128, 256, 512, 0},
      {700, 264, 1544, 256}, {512, 4096, 4096, 16}, {1000, 4096, 1024, 64}, {2048, 4096, 4096, 200},
  };
  // One tile of the shrink and many, of few and of many blocks; rows, columns and depths that no
  // tile divides; more tiles of the product than blocks.
  constexpr int64_t kShrinkShapes[][4] = {
      {1, 1536, 4096, 8},     {129, 1544, 1672, 16}, {300, 2048, 1024, 24},  {515, 4104, 2056, 32},
      {640, 5000, 1288, 16},  {1000, 4096, 3000, 1}, {4099, 2000, 4096, 16}, {3000, 2048, 8192, 8},
      {1000, 4096, 4096, 16}, {2048, 3000, 4096, 8}, {4099, 3072, 5000, 16}, {1, 2632, 8, 8},
      {129, 4000, 8, 16},     {300, 2832, 64, 16},
  };
  // Of few rows, for all in one kernel; the depth in one, two and four parts.
  constexpr int64_t kFewShapes[][4] = {
      {5, 8, 8, 8},          {17, 72, 136, 8},      {16, 4096, 4096, 16},  {37, 200, 264, 24},
      {64, 512, 1032, 64},   {63, 1000, 520, 40},   {65, 136, 776, 16},    {100, 2056, 4096, 32},
      {33, 72, 8, 8},        {128, 4096, 1000, 64}, {40, 264, 9000, 8},    {128, 264, 9000, 16},
      {129, 264, 136, 8},    {200, 1000, 1032, 24}, {256, 512, 4096, 32},  {250, 328, 3000, 16},
      {1, 4104, 4096, 16},   {24, 200, 136, 16},    {50, 1144, 1032, 16},  {131, 1144, 1032, 8},
      {9, 1160, 392, 24},    {17, 1160, 200, 64},   {2, 1096, 1600, 16},   {40, 2056, 1672, 40},
      {190, 1160, 200, 8},   {300, 1032, 1544, 24}, {450, 2056, 1000, 16}, {520, 264, 520, 64},
      {1000, 776, 1000, 16},
  };
  const auto skip = [&](int64_t m, int64_t k, int64_t n) { return small && m * k * n > 4 << 20; };
  for (const auto& [m, k, n, r] : kShapes) {
    if (skip(m, k, n)) continue;
    TestShape<__nv_bfloat16>(m, k, n, r, stream);
    TestShape<__half>(m, k, n, r, stream);
    TestShrink<__nv_bfloat16>(m, k, n, r, stream);
    TestShrink<__half>(m, k, n, r, stream);
  }
  for (const auto& [m, k, n, r] : kShrinkShapes) {
    if (skip(m, k, n)) continue;
    TestShrink<__nv_bfloat16>(m, k, n, r, stream);
    TestShrink<__half>(m, k, n, r, stream);
  }
  for (const auto& [m, k, n, r] : kFewShapes) {
    if (skip(m, k, n)) continue;
    TestShrink<__nv_bfloat16>(m, k, n, r, stream);
    TestShrink<__half>(m, k, n, r, stream);
  }
  std::printf("%d of them with h beside, %d with a gradient too, %d in one kernel\n", shrunk, swept,
              few);
  if (shrunk == 0 || swept == 0 || few == 0) ++failed;
  std::printf("%d results right, %d wrong\n", passed, failed);
  if (small || what == "values") return failed != 0;

  constexpr size_t kWorkspace = 64 << 20;
  Buffer workspace(kWorkspace);
  const Cublas cublas(stream, workspace, kWorkspace);
  if (what != "transposed") {
    for (bool transposed : {false, true}) {
      for (int64_t m : {1, 16, 32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 448, 640, 1000}) {
        TimeFew(m, 4096, 16, transposed, stream, cublas);
      }
    }
    for (int64_t width : {512, 768, 1024, 1536, 2048}) {
      for (int64_t m : {16, 64, 128, 256, 512, 1024}) TimeFew(m, width, 16, false, stream, cublas);
    }
    for (int64_t r : {32, 64}) {
      for (int64_t m : {1, 16, 64}) TimeFew(m, 4096, r, false, stream, cublas);
    }
    TimeFew(128, 4096, 32, false, stream, cublas);
    TimeFew(128, 4096, 64, false, stream, cublas);
    TimeFew(64, 8192, 16, false, stream, cublas);
    TimeFew(256, 4096, 32, false, stream, cublas);
  }
  if (what == "few") return failed != 0;
  if (what != "transposed") {
    for (int64_t m : {512, 2048, 8192}) {
      for (int64_t r : {16, 32, 64}) Time<__nv_bfloat16>(m, 4096, r, false, stream, cublas);
    }
    Time<__nv_bfloat16>(8192, 8192, 16, false, stream, cublas);
  }
  for (int64_t m : {512, 2048, 8192}) Time<__nv_bfloat16>(m, 4096, 16, true, stream, cublas);
  Time<__nv_bfloat16>(8192, 8192, 16, true, stream, cublas);
  if (what != "transposed") {
    Time<__half>(8192, 4096, 16, false, stream, cublas);
    for (int64_t m : {512, 2048, 8192}) TimeOverlap(m, 4096, 16, stream);
  }

  std::printf("\nµs a layer; cuBLAS and plain compute x·W alone\n");
  std::printf("%-4s %-8s %5s %5s %4s %8s %8s %8s %7s  %-14s %8s %8s %7s  %s\n", "type", "W", "rows",
              "width", "rank", "cuBLAS", "plain", "fused", "ratio", "plan", "plain", "fused",
              "ratio", "best plan");
  for (const std::string& line : table) std::printf("%s\n", line.c_str());
  std::printf("%d results right, %d wrong\n", passed, failed);
  return failed != 0;
}

}  // namespace
}  // namespace jax_fused_lora

int main(int argc, char** argv) { return jax_fused_lora::Main(argc, argv); }
