// Runs what kernels.h declares and checks every result against float64, then times it. Built and
// run, under compute-sanitizer too, by tests/cuda_check.sh.
//
// Usage: kernels_test [--small] [--dtype DTYPE] [--times [NAME] | --no-times]
//
// Every operand is a block of memory of exactly its size, so that memcheck knows its end; results
// and workspaces begin as NaN. The rule is that of jax_fused_lora/accuracy.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "native/cuda/gemm_sm90.h"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

// A fault of the GPU leaves nothing to go on with.
[[noreturn]] void Die(const char* format, ...) {
  std::va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
  std::exit(2);
}

void Check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) Die("%s: %s", what.c_str(), cudaGetErrorString(error));
}

constexpr double kSums = 1e-5;

struct Dtype {
  Element element;
  const char* name;
  size_t width;
  double rounding, tiny;
};

const Dtype kDtypes[] = {
    {Element::kFloat32, "float32", 4, std::ldexp(1, -24), std::ldexp(1, -126)},
    {Element::kBfloat16, "bfloat16", 2, std::ldexp(1, -8), std::ldexp(1, -126)},
    {Element::kFloat16, "float16", 2, std::ldexp(1, -11), std::ldexp(1, -24)},
};
const Dtype& kFloat32 = kDtypes[0];

double Load(const char* element, const Dtype& dtype) {
  const auto as = [&](auto value) {
    std::memcpy(&value, element, sizeof(value));
    return static_cast<double>(static_cast<float>(value));
  };
  if (dtype.element == Element::kFloat16) return as(__half());
  if (dtype.element == Element::kBfloat16) return as(__nv_bfloat16());
  return as(0.0f);
}

void Store(char* element, float value, const Dtype& dtype) {
  const auto as = [&](auto rounded) { std::memcpy(element, &rounded, sizeof(rounded)); };
  if (dtype.element == Element::kFloat16) return as(__half(value));
  if (dtype.element == Element::kBfloat16) return as(__nv_bfloat16(value));
  as(value);
}

// A matrix in float64, and the same formula on absolute values.
struct Truth {
  Truth(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), value(rows * columns), bound(rows * columns) {}

  int64_t rows, columns;
  std::vector<double> value, bound;
};

Truth Transposed(const Truth& a) {
  Truth result(a.columns, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.columns; ++j) {
      result.value[j * a.rows + i] = a.value[i * a.columns + j];
      result.bound[j * a.rows + i] = a.bound[i * a.columns + j];
    }
  }
  return result;
}

Truth Scaled(double factor, Truth a) {
  for (double& value : a.value) value *= factor;
  for (double& bound : a.bound) bound *= std::abs(factor);
  return a;
}

// b may be a single row, which is then added to all.
Truth Sum(Truth a, const Truth& b) {
  for (size_t i = 0; i < a.value.size(); ++i) {
    a.value[i] += b.value[i % b.value.size()];
    a.bound[i] += b.bound[i % b.value.size()];
  }
  return a;
}

Truth Product(const Truth& a, const Truth& b) {
  Truth result(a.rows, b.columns);
  const auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < a.columns; ++k) {
        const double value = a.value[i * a.columns + k], bound = a.bound[i * a.columns + k];
        for (int64_t j = 0; j < b.columns; ++j) {
          result.value[i * b.columns + j] += value * b.value[k * b.columns + j];
          result.bound[i * b.columns + j] += bound * b.bound[k * b.columns + j];
        }
      }
    }
  };
  const int64_t products = a.rows * a.columns * b.columns;
  const int64_t threads =
      products < 1 << 20 ? 1 : std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back(rows, a.rows * i / threads, a.rows * (i + 1) / threads);
  }
  rows(0, a.rows / threads);
  for (std::thread& other : others) other.join();
  return result;
}

class Block {
 public:
  // A result: all NaN, in each of the dtypes.
  explicit Block(size_t bytes) : bytes_(bytes) {
    Check(cudaMalloc(&data_, bytes_), "cudaMalloc");
    if (bytes_ > 0) Check(cudaMemset(data_, 0xff, bytes_), "cudaMemset");
  }
  explicit Block(const std::vector<char>& bytes) : Block(bytes.size()) {
    Check(cudaMemcpy(data_, bytes.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { Check(cudaFree(data_), "cudaFree"); }

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  std::vector<char> Bytes() const {
    std::vector<char> bytes(bytes_);
    Check(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return bytes;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

std::vector<char> Rounded(const Truth& exact, const Dtype& dtype) {
  std::vector<char> bytes(exact.value.size() * dtype.width);
  for (size_t i = 0; i < exact.value.size(); ++i) {
    Store(&bytes[i * dtype.width], static_cast<float>(exact.value[i]), dtype);
  }
  return bytes;
}

// A random operand: its bytes on the GPU, as they are and transposed, and the truth they say.
struct Operand {
  Operand(int64_t rows, int64_t columns, const Dtype& dtype, std::mt19937& random, double scale = 1)
      : dtype(dtype), truth(rows, columns) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (double& value : truth.value) value = scale * uniform(random);
    const std::vector<char> bytes = Rounded(truth, dtype);
    for (size_t i = 0; i < truth.value.size(); ++i) {
      truth.value[i] = Load(&bytes[i * dtype.width], dtype);
      truth.bound[i] = std::abs(truth.value[i]);
    }
    straight = std::make_unique<Block>(bytes);
    across = std::make_unique<Block>(Rounded(Transposed(truth), dtype));
  }

  void* data(bool transposed = false) const { return (transposed ? across : straight)->data(); }
  Factor factor(bool transposed) const { return {data(transposed), dtype.element, transposed}; }

  const Dtype& dtype;
  Truth truth;
  std::unique_ptr<Block> straight, across;
};

struct Tally {
  int calls = 0, results = 0, failures = 0;
  double worst = 0;
  std::string worst_name = "none";

  void Compare(const Block& block, const Dtype& dtype, const Truth& truth,
               const std::string& name) {
    const std::vector<char> bytes = block.Bytes();
    std::vector<double> values(truth.value.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = Load(&bytes[i * dtype.width], dtype);
    Compare(values, dtype, truth, name);
  }

  void Compare(const std::vector<double>& values, const Dtype& dtype, const Truth& truth,
               const std::string& name) {
    double most = 0;
    size_t at = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const double error = std::abs(values[i] - truth.value[i]);
      const double allowed =
          kSums * truth.bound[i] + dtype.rounding * std::abs(truth.value[i]) + dtype.tiny;
      // NaN compares false with everything; a result that nobody wrote is one.
      const double ratio = error <= std::numeric_limits<double>::max()
                               ? error / allowed
                               : std::numeric_limits<double>::infinity();
      if (ratio > most) {
        most = ratio;
        at = i;
      }
    }
    ++results;
    if (most >= worst) {
      worst = most;
      worst_name = name;
    }
    if (most <= 1) return;
    if (++failures > 30) return;
    std::printf("FAILED %s: at (%zu, %zu) %.9g, needed %.9g; error/allowed %.3g\n", name.c_str(),
                at / truth.columns, at % truth.columns, values[at], truth.value[at], most);
  }

  void Same(const Block& a, const Block& b, const std::string& name) {
    ++results;
    if (a.Bytes() == b.Bytes()) return;
    if (++failures <= 30) std::printf("FAILED %s: another result the second time\n", name.c_str());
  }
};

void Wait(cudaError_t error, const std::string& name, Tally* tally) {
  Check(error, name);
  Check(cudaDeviceSynchronize(), name);
  ++tally->calls;
}

constexpr float kShrinkScaling = 1.5f, kExpandScaling = 0.7f;

struct Case {
  Sizes sizes;
  // Of x and the factors: float16 runs out of exponents first.
  double scale = 1;
};

const Case kCases[] = {
    {{1, 1, 1, 1}},
    {{1, 1024, 1024, 8}},
    {{1, 1024, 513, 8}},
    {{1, 2048, 2048, 16}},
    {{3, 60, 129, 5}},
    {{8, 513, 1024, 40}},
    {{8, 200, 60, 256}},
    {{9, 7, 60, 8}},
    {{9, 129, 1, 16}},
    {{16, 4096, 1024, 16}},
    {{16, 513, 1030, 64}},
    {{16, 1000, 1032, 200}},
    {{2, 8, 8, 8}},
    {{4, 100, 300, 60}},
    {{7, 40, 1032, 16}},
    {{5, 1048, 520, 24}},
    {{16, 2072, 136, 64}},
    {{2, 264, 12440, 8}},
    {{3, 264, 12440, 40}},
    {{1, 1000, 520, 8}},
    {{1, 4096, 1024, 64}},
    {{1, 100, 12000, 32}},
    {{2, 772, 1000, 32}},
    {{5, 2816, 9024, 16}},
    {{10, 260, 9028, 64}},
    {{2, 520, 4100, 24}},
    {{4, 4096, 520, 16}},
    {{17, 1024, 513, 16}},
    {{31, 2312, 264, 16}},
    {{32, 520, 200, 24}},
    {{33, 60, 7, 1}},
    {{33, 513, 129, 64}},
    {{63, 1000, 72, 33}},
    {{64, 64, 64, 16}},
    {{61, 260, 100, 16}},
    {{65, 4104, 1040, 16}},
    {{40, 96, 64, 8}},
    {{130, 2720, 576, 32}},
    {{64, 1024, 1024, 32}},
    {{100, 129, 200, 40}},
    {{100, 1, 1024, 200}},
    {{200, 513, 60, 128}},
    {{200, 200, 513, 256}},
    {{200, 1024, 1024, 128}},
    {{127, 1288, 136, 8}},
    {{128, 640, 520, 64}},
    {{129, 200, 1000, 256}},
    {{480, 160, 192, 64}},
    {{481, 160, 192, 64}},
    {{512, 1024, 520, 16}},
    {{512, 1032, 520, 24}},
    {{700, 264, 136, 128}},
    {{1100, 136, 72, 256}},
    {{1087, 1288, 200, 16}},
    {{1089, 1160, 1032, 48}},
    {{4300, 136, 72, 16}},
    {{4333, 60, 129, 5}},
    {{4300, 72, 136, 64}},
    {{8500, 33, 70, 200}},
    {{0, 60, 60, 8}},
    {{8, 0, 60, 8}},
    {{8, 60, 0, 8}},
    {{8, 60, 60, 0}},
    {{64, 0, 60, 8}},
    {{64, 60, 0, 8}},
    {{64, 60, 60, 0}},
    {{0, 0, 0, 0}},
    {{64, 0, 64, 0}},
    {{16, 512, 512, 16}, 1e-3},
    {{100, 512, 512, 16}, 1e-3},
    {{100, 128, 128, 40}, 16.0},
    // delta_tma.cu: tiles of up to 32 rows in four parts and in two, of up to 64 in four, in two
    // and whole.
    {{500, 384, 192, 16}},
    {{485, 128, 64, 8}},
    {{1000, 640, 576, 64}},
    {{1500, 896, 128, 32}},
    {{1090, 384, 320, 64}},
    {{2100, 1152, 64, 8}},
    {{1100, 2176, 2048, 16}},
    {{4300, 256, 64, 16}},
    {{5000, 128, 128, 64}},
    {{4240, 384, 192, 32}},
    {{8500, 256, 64, 8}},
    {{8460, 128, 128, 32}},
    {{8500, 128, 64, 64}},
};

// For tools under which a GPU is slow. Still two steps of every loop.
const Case kSmallCases[] = {
    {{1, 300, 72, 8}},    {{3, 40, 70, 5}},      {{8, 1040, 72, 16}},   {{5, 1041, 66, 16}},
    {{33, 290, 129, 40}}, {{70, 200, 584, 72}},  {{17, 65, 70, 136}},   {{300, 136, 72, 16}},
    {{257, 61, 70, 9}},   {{1090, 264, 72, 16}}, {{2200, 40, 70, 16}},  {{20, 96, 64, 16}},
    {{1, 64, 128, 64}},   {{0, 8, 8, 8}},        {{8, 0, 8, 8}},        {{8, 8, 0, 8}},
    {{40, 8, 8, 0}},      {{500, 128, 64, 16}},  {{520, 384, 128, 64}},
};

void RunCase(const Case& given, const Dtype& dtype, bool wide_a, bool wide_b, std::mt19937& random,
             Tally* tally) {
  const Sizes& sizes = given.sizes;
  const int64_t m = sizes.rows, k = sizes.in, n = sizes.out, r = sizes.rank;
  const Operand x(m, k, dtype, random, given.scale);
  const Operand a(k, r, wide_a ? kFloat32 : dtype, random, given.scale);
  const Operand b(r, n, wide_b ? kFloat32 : dtype, random);
  const Operand base(m, n, kFloat32, random, given.scale), bias(1, n, dtype, random, given.scale);
  const std::string where = std::string(dtype.name) + (wide_a ? " A float32" : "") +
                            (wide_b ? " B float32" : "") + " rows " + std::to_string(m) + " in " +
                            std::to_string(k) + " out " + std::to_string(n) + " rank " +
                            std::to_string(r);

  const Truth h = Scaled(kShrinkScaling, Product(x.truth, a.truth));
  const Truth low_rank = Scaled(kExpandScaling, Product(h, b.truth));

  for (const bool transposed : {false, true}) {
    const std::string how = where + (transposed ? " transposed" : "");
    if (!wide_b) {  // it has no B
      const int64_t width = GemmSm90Width(r);
      const Block out_h(m * r * 4), out_h16(m * width * 2);
      const bool with_h16 = dtype.width == 2;
      Wait(LaunchShrink(nullptr, dtype.element, sizes, x.data(), a.factor(transposed),
                        kShrinkScaling, out_h.floats(), with_h16 ? out_h16.data() : nullptr,
                        kExpandScaling),
           how + ": shrink", tally);
      tally->Compare(out_h, kFloat32, h, how + ": shrink's h");
      if (with_h16) {
        // hi + lo must be the scaled h as h16 can hold it.
        const std::vector<char> bytes = out_h16.Bytes();
        std::vector<double> sums(m * r);
        bool padded = true;
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < width / 2; ++j) {
            const char* hi = &bytes[(i * width + j / 16 * 32 + j % 16) * 2];
            const double value = Load(hi, dtype), rest = Load(hi + 32, dtype);
            if (j < r) sums[i * r + j] = value + rest;
            if (j >= r && (value != 0 || rest != 0)) padded = false;
          }
        }
        Dtype pair = kFloat32;
        pair.rounding = std::ldexp(1, dtype.element == Element::kBfloat16 ? -17 : -21);
        pair.tiny = std::ldexp(1, dtype.element == Element::kBfloat16 ? -126 : -24);
        tally->Compare(sums, pair, Scaled(kExpandScaling, h), how + ": shrink's h16");
        ++tally->results;
        if (!padded && ++tally->failures <= 30) {
          std::printf("FAILED %s: h16 has no zeros behind its ranks\n", how.c_str());
        }
      }
    }

    for (int addend = 0; addend < 4; ++addend) {
      const bool has_base = addend & 1, has_bias = addend & 2;
      const std::string name =
          how + ": delta" + (has_base ? " with base" : "") + (has_bias ? " with bias" : "");
      Truth truth = low_rank;
      if (has_base) truth = Sum(truth, base.truth);
      if (has_bias) truth = Sum(truth, bias.truth);
      // A float32 y may be base itself.
      const bool alias = has_base && dtype.width == 4;
      for (int in_place = 0; in_place <= alias; ++in_place) {
        const Block out_h(m * r * 4);
        const Block y(in_place ? Rounded(base.truth, kFloat32)
                               : std::vector<char>(m * n * dtype.width, '\xff'));
        const float* const from = in_place ? y.floats() : static_cast<float*>(base.data());
        Wait(LaunchShrinkExpand(nullptr, dtype.element, sizes, x.data(), a.factor(transposed),
                                b.factor(transposed), kShrinkScaling, kExpandScaling,
                                Addend{has_base ? from : nullptr, has_bias ? bias.data() : nullptr},
                                out_h.floats(), y.data()),
             name, tally);
        tally->Compare(y, dtype, truth, name + (in_place ? " in place: y" : ": y"));
        tally->Compare(out_h, kFloat32, h, name + ": h");
      }
    }
  }

  if (m <= kFewRows) {
    const Operand w(k, n, dtype, random);
    const Truth product = Sum(Product(x.truth, w.truth), low_rank);
    const Truth with_bias = Sum(product, bias.truth);
    for (int form = 0; form < 8; ++form) {
      const bool transposed = form & 1, factors = form & 2, has_bias = form & 4;
      const std::string name = where + ": decode" + (transposed ? " transposed" : "") +
                               (factors ? " factors transposed" : "") +
                               (has_bias ? " with bias" : "");
      const Block out_h(m * r * 4), y(m * n * dtype.width), again(m * n * dtype.width);
      const Block workspace(DecodeWorkspace(sizes) * 4);
      for (const Block* result : {&y, &again}) {
        Wait(LaunchDecode(nullptr, dtype.element, sizes, x.data(), w.data(transposed), transposed,
                          has_bias ? bias.data() : nullptr, a.factor(factors), b.factor(factors),
                          kShrinkScaling, kExpandScaling, out_h.floats(), result->data(),
                          workspace.floats()),
             name, tally);
      }
      tally->Compare(y, dtype, has_bias ? with_bias : product, name + ": y");
      tally->Compare(out_h, kFloat32, h, name + ": h");
      tally->Same(y, again, name);
    }
  }

  if (!wide_b) {
    const Operand t(m, r, kFloat32, random, given.scale);
    const Truth gradient = Scaled(kShrinkScaling, Product(Transposed(x.truth), t.truth));
    const Dtype& to = wide_a ? kFloat32 : dtype;
    // Alone, as A's and as B's, and beside one of another matrix and another type.
    const Operand g(m, n, dtype, random, given.scale);
    const Truth beside = Scaled(kExpandScaling, Transposed(Product(Transposed(g.truth), t.truth)));
    const float* const of_rank = static_cast<const float*>(t.data());
    for (int form = 0; form < 3; ++form) {
      const bool transposed = form == 1, both = form == 2;
      const std::string name = where + ": gradient" + (transposed ? " transposed" : "") +
                               (both ? " beside another" : "");
      const Block out(k * r * to.width), again(k * r * to.width), other(n * r * dtype.width);
      const Block workspace(GradWorkspace(m, r, {k, both ? n : 0}) * 4);
      for (const Block* result : {&out, &again}) {
        const Grad grads[] = {
            {k, x.data(), of_rank, kShrinkScaling, to.element, transposed, result->data()},
            {n, g.data(), of_rank, kExpandScaling, dtype.element, true, other.data()}};
        Wait(LaunchGrads(nullptr, dtype.element, m, r, grads, both ? 2 : 1, workspace.floats()),
             name, tally);
      }
      tally->Compare(out, to, transposed ? Transposed(gradient) : gradient, name);
      tally->Same(out, again, name);
      if (both) tally->Compare(other, dtype, beside, name + ": the other");
    }
  }
}

// `only` is a dtype's name; empty for all.
int CheckAll(bool small, const std::string& only) {
  const std::vector<Case> cases =
      small ? std::vector<Case>(std::begin(kSmallCases), std::end(kSmallCases))
            : std::vector<Case>(std::begin(kCases), std::end(kCases));
  int failures = 0;
  for (const Dtype& dtype : kDtypes) {
    if (!only.empty() && only != dtype.name) continue;
    std::mt19937 random(1);
    Tally tally;
    for (const Case& given : cases) {
      RunCase(given, dtype, false, false, random, &tally);
      if (dtype.width == 4) continue;
      RunCase(given, dtype, false, true, random, &tally);
      RunCase(given, dtype, true, false, random, &tally);
    }
    std::printf("%s: %d calls, %d results, %d failures, worst error/allowed %.3f (%s)\n",
                dtype.name, tally.calls, tally.results, tally.failures, tally.worst,
                tally.worst_name.c_str());
    std::fflush(stdout);
    failures += tally.failures;
  }
  return failures;
}

// Two threads that launch one kernel, which takes another amount of shared memory for each of them.
// How many of their launches fail.
int CheckThreads() {
  constexpr int kLaunches = 20000;
  const int64_t rows = 600, in = 1000;
  const Block x(rows * in * 2), a(in * kMaxRank * 2);
  std::atomic<int> failures = 0;
  const auto launch = [&](int64_t rank) {
    const Block h(rows * rank * sizeof(float));
    cudaStream_t stream;
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (int i = 0; i < kLaunches; ++i) {
      const cudaError_t error =
          LaunchShrink(stream, Element::kBfloat16, {rows, in, in, rank}, x.data(),
                       {a.data(), Element::kBfloat16, false}, 1.0f, h.floats(), nullptr, 1.0f);
      if (error != cudaSuccess) ++failures;
    }
    Check(cudaStreamSynchronize(stream), "two threads");
    Check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  };
  std::thread other(launch, 64);
  launch(128);
  other.join();
  std::printf("two threads: %d launches, %d failures\n", 2 * kLaunches, failures.load());
  return failures;
}

// ---------------------------------------------------------------------------------------------
// Times: a chain of launches on different operands, captured as a graph, median of 20 runs.

constexpr int kSets = 8, kRuns = 20;

__global__ void Fill(uint16_t* to, int64_t count, uint32_t seed, bool wide, bool half) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u + seed;
    bits = (bits ^ bits >> 15) * 2246822519u;
    bits = (bits ^ bits >> 13) * 3266489917u;
    const float value = ((bits ^ bits >> 16) & 0xffffff) * (2.0f / 0x1000000) - 1.0f;
    if (wide) {
      reinterpret_cast<float*>(to)[i] = value;
    } else if (half) {
      reinterpret_cast<__half*>(to)[i] = __float2half(value);
    } else {
      reinterpret_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(value);
    }
  }
}

std::unique_ptr<Block> Random(int64_t count, const Dtype& dtype, uint32_t seed) {
  auto block = std::make_unique<Block>(count * dtype.width);
  Fill<<<1024, 256>>>(static_cast<uint16_t*>(block->data()), count, seed * 7919u + 17,
                      dtype.width == 4, dtype.element == Element::kFloat16);
  Check(cudaDeviceSynchronize(), "random data");
  return block;
}

// Microseconds of one launch, as part of a chain.
double Time(const std::function<cudaError_t(cudaStream_t, int)>& launch) {
  constexpr int kLength = kSets * 4;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kLength; ++i) Check(launch(stream, i % kSets), "captured launch");
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  std::vector<float> times;
  for (int run = -3; run < kRuns; ++run) {
    Check(cudaEventRecord(begin, stream), "event");
    Check(cudaGraphLaunch(executable, stream), "graph");
    Check(cudaEventRecord(end, stream), "event");
    Check(cudaStreamSynchronize(stream), "graph");
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (run >= 0) times.push_back(milliseconds);
  }
  Check(cudaGraphExecDestroy(executable), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  Check(cudaEventDestroy(begin), "event");
  Check(cudaEventDestroy(end), "event");
  Check(cudaStreamDestroy(stream), "stream");
  std::sort(times.begin(), times.end());
  return (times[kRuns / 2 - 1] + times[kRuns / 2]) / 2 * 1000 / kLength;
}

void Report(const char* name, double microseconds, double bytes) {
  std::printf("time %-44s %8.2f us %8.0f GB/s\n", name, microseconds, bytes / microseconds / 1e3);
  std::fflush(stdout);
}

enum class Work { kDelta, kShrink, kDecode, kDecodeTransposed, kGrad, kGrads };

// Times of names with this in them; null for all.
const char* timed = nullptr;

void TimeWork(const char* name, Work work, const Dtype& dtype, const Sizes& sizes,
              bool wide_b = false) {
  if (timed != nullptr && std::strstr(name, timed) == nullptr) return;
  const int64_t m = sizes.rows, k = sizes.in, n = sizes.out, r = sizes.rank;
  const bool decode = work == Work::kDecode || work == Work::kDecodeTransposed;
  const Dtype& b_dtype = wide_b ? kFloat32 : dtype;
  struct Set {
    std::unique_ptr<Block> x, a, b, w, t, h, h16, y, gradient, g, other;
  };
  std::vector<Set> sets(kSets);
  const bool both = work == Work::kGrads, grad = work == Work::kGrad || both;
  const int64_t scratch = std::max(DecodeWorkspace(sizes), GradWorkspace(m, r, {k, both ? k : 0}));
  const Block workspace(scratch * 4);
  for (int i = 0; i < kSets; ++i) {
    Set& set = sets[i];
    set.x = Random(m * k, dtype, i * 8);
    set.a = Random(k * r, dtype, i * 8 + 1);
    set.b = Random(r * n, b_dtype, i * 8 + 2);
    if (decode) set.w = Random(k * n, dtype, i * 8 + 3);
    if (grad) set.t = Random(m * r, kFloat32, i * 8 + 4);
    set.h = std::make_unique<Block>(m * r * 4);
    if (dtype.width == 2) set.h16 = std::make_unique<Block>(m * GemmSm90Width(r) * 2);
    set.y = std::make_unique<Block>(m * n * dtype.width);
    set.gradient = std::make_unique<Block>(k * r * dtype.width);
    if (both) {  // as many columns as x has
      set.g = Random(m * k, dtype, i * 8 + 5);
      set.other = std::make_unique<Block>(k * r * dtype.width);
    }
  }
  const double microseconds = Time([&](cudaStream_t stream, int i) {
    const Set& set = sets[i];
    const Factor a = {set.a->data(), dtype.element, false};
    const Factor b = {set.b->data(), b_dtype.element, false};
    switch (work) {
      case Work::kDelta:
        return LaunchShrinkExpand(stream, dtype.element, sizes, set.x->data(), a, b, 1, 0.5f,
                                  Addend{nullptr, nullptr}, set.h->floats(), set.y->data());
      case Work::kShrink:
        return LaunchShrink(stream, dtype.element, sizes, set.x->data(), a, 1, set.h->floats(),
                            set.h16 ? set.h16->data() : nullptr, 0.5f);
      case Work::kDecode:
      case Work::kDecodeTransposed:
        return LaunchDecode(stream, dtype.element, sizes, set.x->data(), set.w->data(),
                            work == Work::kDecodeTransposed, nullptr, a, b, 1, 0.5f,
                            set.h->floats(), set.y->data(), workspace.floats());
      case Work::kGrad:
      case Work::kGrads: {
        const Grad grads[] = {
            {k, set.x->data(), set.t->floats(), 1, dtype.element, false, set.gradient->data()},
            {k, both ? set.g->data() : nullptr, set.t->floats(), 1, dtype.element, true,
             both ? set.other->data() : nullptr}};
        return LaunchGrads(stream, dtype.element, m, r, grads, both ? 2 : 1, workspace.floats());
      }
    }
    return cudaErrorInvalidValue;
  });
  // What has to cross the memory bus.
  const double width = dtype.width;
  double bytes = m * k * width + k * r * width;
  if (grad || work == Work::kShrink) bytes += m * r * 4;
  if (both) bytes *= 2;
  if (work == Work::kDelta || decode) bytes += r * n * b_dtype.width + m * n * width + m * r * 4;
  if (decode) bytes += k * n * width;
  Report(name, microseconds, bytes);
}

void Times() {
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("times on %s, %d multiprocessors: a launch of a chain of %d, median of %d\n",
              device.name, device.multiProcessorCount, kSets * 4, kRuns);
  const Dtype &bf16 = kDtypes[1], &f16 = kDtypes[2];
  TimeWork("delta 8192, 4096->4096, rank 16, bf16", Work::kDelta, bf16, {8192, 4096, 4096, 16});
  TimeWork("delta 8192, 4096->4096, rank 16, f16", Work::kDelta, f16, {8192, 4096, 4096, 16});
  TimeWork("delta 8192, 4096->4096, rank 16, bf16, B f32", Work::kDelta, bf16,
           {8192, 4096, 4096, 16}, true);
  TimeWork("delta 8192, 4096->4096, rank 64, bf16", Work::kDelta, bf16, {8192, 4096, 4096, 64});
  TimeWork("delta 2048, 4096->4096, rank 16, bf16", Work::kDelta, bf16, {2048, 4096, 4096, 16});
  TimeWork("delta 512, 4096->4096, rank 16, bf16", Work::kDelta, bf16, {512, 4096, 4096, 16});
  TimeWork("delta 2048, 1024->1024, rank 8, f32", Work::kDelta, kFloat32, {2048, 1024, 1024, 8});
  TimeWork("delta 1, 1024->1024, rank 8, f32", Work::kDelta, kFloat32, {1, 1024, 1024, 8});
  TimeWork("delta 1, 4096->4096, rank 16, bf16", Work::kDelta, bf16, {1, 4096, 4096, 16});
  TimeWork("delta 16, 4096->4096, rank 16, bf16", Work::kDelta, bf16, {16, 4096, 4096, 16});
  TimeWork("decode 1, 4096->4096, rank 16, bf16", Work::kDecode, bf16, {1, 4096, 4096, 16});
  TimeWork("decode 4, 4096->4096, rank 16, bf16", Work::kDecode, bf16, {4, 4096, 4096, 16});
  TimeWork("decode 16, 4096->4096, rank 16, bf16", Work::kDecode, bf16, {16, 4096, 4096, 16});
  TimeWork("decode 16, 4096->4096, rank 64, bf16", Work::kDecode, bf16, {16, 4096, 4096, 64});
  TimeWork("decode 1, 4096->4096, rank 16, bf16, W^T", Work::kDecodeTransposed, bf16,
           {1, 4096, 4096, 16});
  TimeWork("decode 16, 4096->4096, rank 16, bf16, W^T", Work::kDecodeTransposed, bf16,
           {16, 4096, 4096, 16});
  TimeWork("decode 1, 4096->4096, rank 16, f32", Work::kDecode, kFloat32, {1, 4096, 4096, 16});
  TimeWork("decode 1, 1024->1024, rank 8, f32", Work::kDecode, kFloat32, {1, 1024, 1024, 8});
  TimeWork("shrink 8192, 4096, rank 16, bf16", Work::kShrink, bf16, {8192, 4096, 0, 16});
  TimeWork("shrink 8192, 4096, rank 64, bf16", Work::kShrink, bf16, {8192, 4096, 0, 64});
  TimeWork("shrink 2048, 4096, rank 16, bf16", Work::kShrink, bf16, {2048, 4096, 0, 16});
  TimeWork("shrink 512, 4096, rank 16, bf16", Work::kShrink, bf16, {512, 4096, 0, 16});
  TimeWork("grad 8192, 4096, rank 16, bf16", Work::kGrad, bf16, {8192, 4096, 0, 16});
  TimeWork("grad 2048, 4096, rank 16, bf16", Work::kGrad, bf16, {2048, 4096, 0, 16});
  TimeWork("grad 8192, 4096, rank 64, bf16", Work::kGrad, bf16, {8192, 4096, 0, 64});
  TimeWork("grad 8192, 4096, rank 32, bf16", Work::kGrad, bf16, {8192, 4096, 0, 32});
  TimeWork("grad 1024, 4096, rank 32, bf16", Work::kGrad, bf16, {1024, 4096, 0, 32});
  TimeWork("grad 8192, 1024, rank 16, bf16", Work::kGrad, bf16, {8192, 1024, 0, 16});
  TimeWork("grad 2048, 4096, rank 16, f32", Work::kGrad, kFloat32, {2048, 4096, 0, 16});
  TimeWork("both grads 16, 4096, rank 16, bf16", Work::kGrads, bf16, {16, 4096, 0, 16});
  TimeWork("both grads 64, 4096, rank 64, bf16", Work::kGrads, bf16, {64, 4096, 0, 64});
  TimeWork("both grads 128, 4096, rank 16, bf16", Work::kGrads, bf16, {128, 4096, 0, 16});
  TimeWork("both grads 256, 1024, rank 16, bf16", Work::kGrads, bf16, {256, 1024, 0, 16});
  TimeWork("both grads 2048, 1024, rank 16, bf16", Work::kGrads, bf16, {2048, 1024, 0, 16});
  TimeWork("both grads 512, 4096, rank 16, bf16", Work::kGrads, bf16, {512, 4096, 0, 16});
  TimeWork("both grads 2048, 4096, rank 16, bf16", Work::kGrads, bf16, {2048, 4096, 0, 16});
  TimeWork("both grads 8192, 4096, rank 16, bf16", Work::kGrads, bf16, {8192, 4096, 0, 16});
}

int Main(int count, char** arguments) {
  bool small = false, check = true, times = true;
  std::string only;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--small") {
      small = true;
      times = false;
    } else if (argument == "--dtype" && i + 1 < count) {
      only = arguments[++i];
      const auto named = [&](const Dtype& dtype) { return only == dtype.name; };
      if (std::none_of(std::begin(kDtypes), std::end(kDtypes), named)) {
        Die("no dtype %s", only.c_str());
      }
    } else if (argument == "--times") {
      check = false;
      if (i + 1 < count && arguments[i + 1][0] != '-') timed = arguments[++i];
    } else if (argument == "--no-times") {
      times = false;
    } else {
      Die("usage: %s [--small] [--dtype DTYPE] [--times [NAME] | --no-times]", arguments[0]);
    }
  }
  int failures = check ? CheckAll(small, only) : 0;
  if (check && !small) failures += CheckThreads();
  if (times) Times();
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_fused_lora

int main(int count, char** arguments) { return jax_fused_lora::Main(count, arguments); }
