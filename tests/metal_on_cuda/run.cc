// Runs the plans of native/metal/plan.cc with the Metal shaders on an NVIDIA GPU and checks every
// result against float64. What for, and how it is built: run.sh.
//
// Usage: run [--small] [--dtype float32|float16|bfloat16] [--short]
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "native/calls.h"
#include "native/metal/plan.h"

namespace jax_fused_lora {
namespace {

using ffi::DataType;

// Of a threadgroup, on every Apple GPU.
constexpr size_t kThreadgroupMemory = 32768;

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

// The rule of jax_fused_lora/accuracy.py: float32 sums, and one rounding to the result's dtype.
// TINY is where a dtype's relative precision ends.
constexpr double kSums = 1e-5;

struct Dtype {
  DataType type;
  const char* name;
  size_t width;
  double rounding, tiny;
  Shaders (*shaders)();
};

const Dtype kDtypes[] = {
    {DataType::F32, "float32", 4, std::ldexp(1, -24), std::ldexp(1, -126), FloatShaders},
    {DataType::F16, "float16", 2, std::ldexp(1, -11), std::ldexp(1, -24), HalfShaders},
    {DataType::BF16, "bfloat16", 2, std::ldexp(1, -8), std::ldexp(1, -126), BfloatShaders},
};
const Dtype& kFloat32 = kDtypes[0];

double Load(const char* element, const Dtype& dtype) {
  const auto as = [&](auto value) {
    std::memcpy(&value, element, sizeof(value));
    return static_cast<double>(static_cast<float>(value));
  };
  if (dtype.type == DataType::F16) return as(__half());
  if (dtype.type == DataType::BF16) return as(__nv_bfloat16());
  return as(0.0f);
}

void Store(char* element, float value, const Dtype& dtype) {
  const auto as = [&](auto rounded) { std::memcpy(element, &rounded, sizeof(rounded)); };
  if (dtype.type == DataType::F16) return as(__half(value));
  if (dtype.type == DataType::BF16) return as(__nv_bfloat16(value));
  as(value);
}

// A matrix in float64, and the same formula on absolute values: what the rounding errors of sums
// of products are proportional to.
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

// --short: blocks lack their last two bytes, which memcheck should notice.
size_t missing_bytes = 0;

// A block of GPU memory of exactly so many bytes, so that memcheck knows its end.
class Block {
 public:
  // A result: all NaN, in each of the dtypes.
  explicit Block(size_t bytes) : bytes_(bytes) {
    Check(cudaMalloc(&data_, bytes_ - missing_bytes), "cudaMalloc");
    Check(cudaMemset(data_, 0xff, bytes_ - missing_bytes), "cudaMemset");
  }
  explicit Block(const std::vector<char>& bytes) : Block(bytes.size()) {
    Check(cudaMemcpy(data_, bytes.data(), bytes_ - missing_bytes, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { Check(cudaFree(data_), "cudaFree"); }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  std::vector<char> Bytes() const {
    std::vector<char> bytes(bytes_);
    Check(cudaMemcpy(bytes.data(), data_, bytes_ - missing_bytes, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return bytes;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// A random operand: its bytes on the GPU and, as those say it, its truth.
struct Operand64 {
  Operand64(int64_t rows, int64_t columns, const Dtype& dtype, std::mt19937& random)
      : Operand64(Uniform(rows, columns, random), dtype) {}
  Operand64(const Truth& exact, const Dtype& dtype)
      : truth(exact.rows, exact.columns), block(Rounded(exact, dtype)) {
    const std::vector<char> bytes = Rounded(exact, dtype);
    for (size_t i = 0; i < truth.value.size(); ++i) {
      truth.value[i] = Load(&bytes[i * dtype.width], dtype);
      truth.bound[i] = std::abs(truth.value[i]);
    }
  }

  Truth truth;
  Block block;

 private:
  static Truth Uniform(int64_t rows, int64_t columns, std::mt19937& random) {
    Truth result(rows, columns);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (double& value : result.value) value = uniform(random);
    return result;
  }
  static std::vector<char> Rounded(const Truth& exact, const Dtype& dtype) {
    std::vector<char> bytes(exact.value.size() * dtype.width);
    for (size_t i = 0; i < exact.value.size(); ++i) {
      Store(&bytes[i * dtype.width], static_cast<float>(exact.value[i]), dtype);
    }
    return bytes;
  }
};

// Launches what a plan says, as native/metal/host.mm does.
class Gpu {
 public:
  explicit Gpu(const Shaders& shaders) : shaders_(shaders) {}

  // `blocks` are the operands: the plan must have their sizes.
  void Run(const Plan& plan, const std::vector<const Block*>& blocks, const std::string& name) {
    std::map<const void*, size_t> sizes;
    for (const Block* block : blocks) sizes[block->data()] = block->bytes();
    for (int i = 0; i < plan.operand_count; ++i) {
      const Operand& operand = plan.operands[i];
      const auto found = sizes.find(operand.data);
      if (found == sizes.end() || found->second != operand.size()) {
        Die("%s: the plan's %s is not one of the call's operands", name.c_str(), operand.name);
      }
    }
    for (int i = 0; i < plan.dispatch_count; ++i) {
      Launch(plan, plan.dispatches[i], name + ", " + plan.dispatches[i].kernel);
    }
  }

 private:
  void Launch(const Plan& plan, const Dispatch& dispatch, const std::string& name) {
    const void* function = nullptr;
    for (const Shaders::Kernel& kernel : shaders_.kernels) {
      if (std::strcmp(kernel.name, dispatch.kernel) == 0) {
        function = reinterpret_cast<const void*>(kernel.function);
      }
    }
    if (function == nullptr) Die("%s: there is no such kernel", name.c_str());

    cudaFuncAttributes attributes;
    Check(cudaFuncGetAttributes(&attributes, function), name);
    const size_t memory = attributes.sharedSizeBytes + dispatch.threadgroup_bytes;
    if (memory > kThreadgroupMemory) {
      Die("%s: %zu bytes of threadgroup memory, Apple GPUs have %zu", name.c_str(), memory,
          kThreadgroupMemory);
    }

    const Constants& c = dispatch.constants;
    const void* const constants[] = {&c.transposed, &c.wide_shrink, &c.wide_expand, &c.has_bias,
                                     &c.rank_blocks};
    for (int i = 0; i < 5; ++i) Check(shaders_.set_constant(i, constants[i]), name);

    Sizes sizes = dispatch.sizes;
    Arguments arguments = {};
    for (size_t i = 0; i < dispatch.arguments.size(); ++i) {
      const int operand = dispatch.arguments[i];
      if (operand != Dispatch::kNone) arguments.at[i + 1] = plan.operands[operand].data;
    }
    void* values[] = {&sizes, &arguments};
    Check(cudaLaunchKernel(function, dim3(dispatch.groups[0], dispatch.groups[1]),
                           dim3(dispatch.threads), values, dispatch.threadgroup_bytes, nullptr),
          name);
    Check(cudaDeviceSynchronize(), name);
  }

  const Shaders shaders_;
};

// What the calls with x of one dtype came to.
struct Tally {
  int calls = 0, results = 0, failures = 0;
  double worst = 0;
  std::string worst_name = "none";

  void Compare(const Block& block, const Dtype& dtype, const Truth& truth,
               const std::string& name) {
    const std::vector<char> bytes = block.Bytes();
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < truth.value.size(); ++i) {
      const double error = std::abs(Load(&bytes[i * dtype.width], dtype) - truth.value[i]);
      const double allowed =
          kSums * truth.bound[i] + dtype.rounding * std::abs(truth.value[i]) + dtype.tiny;
      // NaN compares false with everything; a result that nobody wrote is one.
      const double ratio = error <= std::numeric_limits<double>::max()
                               ? error / allowed
                               : std::numeric_limits<double>::infinity();
      if (ratio > worst) {
        worst = ratio;
        at = i;
      }
    }
    ++results;
    if (worst >= this->worst) {
      this->worst = worst;
      worst_name = name;
    }
    if (worst <= 1) return;
    ++failures;
    if (failures <= 20) {
      std::printf("FAILED %s: at (%zu, %zu) %.9g, needed %.9g; error/allowed %.3g\n", name.c_str(),
                  at / truth.columns, at % truth.columns, Load(&bytes[at * dtype.width], dtype),
                  truth.value[at], worst);
    }
  }
};

struct Shape {
  int64_t rows, in, out, rank;
};

// Rows on both sides of what the row kernels serve (8) and of a tile (16, 32, 64), ranks of less
// and more than one block (8), of a step (16, 32), a chunk (64), and above 128, where the fused
// forward kernel takes fewer rows.
const Shape kShapes[] = {
    {1, 1, 1, 1},        {1, 1024, 513, 8},    {3, 60, 129, 5},      {8, 513, 1024, 40},
    {8, 200, 60, 256},   {9, 7, 60, 8},        {9, 129, 1, 16},      {33, 60, 7, 1},
    {33, 513, 129, 64},  {64, 64, 64, 16},     {100, 129, 200, 40},  {100, 1, 1024, 200},
    {200, 513, 60, 128}, {200, 200, 513, 256}, {512, 1024, 513, 16}, {512, 60, 1024, 136},
};

// For tools under which a GPU is slow. Still two steps of every loop.
const Shape kSmallShapes[] = {
    {3, 40, 70, 5}, {8, 33, 66, 16}, {33, 70, 129, 40}, {70, 40, 66, 72}, {17, 65, 70, 136},
};

// All calls on one shape and choice of dtypes.
void RunShape(const Shape& shape, const Dtype& dtype, const Dtype& b_dtype, Gpu& gpu,
              std::mt19937& random, Tally* tally) {
  const int64_t m = shape.rows, k = shape.in, n = shape.out, r = shape.rank;
  const float scaling = 0.7f;
  const Operand64 x(m, k, dtype, random), a(k, r, dtype, random), b(r, n, b_dtype, random);
  const Operand64 w(k, n, dtype, random), bias(1, n, dtype, random), g(m, n, dtype, random);

  const Truth h = Product(x.truth, a.truth);
  const Operand64 given_h(h, kFloat32);
  const Truth low_rank = Scaled(scaling, Product(h, b.truth));
  const Truth base = Product(x.truth, w.truth);
  const Truth t = Scaled(scaling, Product(g.truth, Transposed(b.truth)));
  const Truth dx_low_rank = Product(t, Transposed(a.truth));
  const Truth dx_base = Product(g.truth, Transposed(w.truth));
  const Truth da = Product(Transposed(x.truth), t);
  const Truth db = Scaled(scaling, Product(Transposed(given_h.truth), g.truth));

  const std::string where = std::string(dtype.name) + (&b_dtype == &dtype ? "" : " B float32") +
                            " rows " + std::to_string(m) + " in " + std::to_string(k) + " out " +
                            std::to_string(n) + " rank " + std::to_string(r);
  const auto common = [&](Form form, auto* call) {
    call->m = m;
    call->k = k;
    call->n = n;
    call->r = r;
    call->dtype = dtype.type;
    call->b_dtype = b_dtype.type;
    call->form = form;
    call->scaling = scaling;
    call->x = x.block.data();
    call->a = a.block.data();
    call->b = b.block.data();
    if (form == Form::kKernel) call->kernel = w.block.data();
    ++tally->calls;
  };
  const auto check = [](const ffi::Error& error, const std::string& name) {
    if (error.failure()) Die("%s: %s", name.c_str(), error.message().c_str());
  };

  for (const bool delta : {true, false}) {
    const Form form = delta ? Form::kDelta : Form::kKernel;
    for (const bool has_bias : {false, true}) {
      if (delta && has_bias) continue;
      const std::string name =
          where + " forward " + (delta ? "delta" : "kernel") + (has_bias ? " with bias" : "");
      const Block y(m * n * dtype.width), out_h(m * r * 4);
      ForwardCall call;
      common(form, &call);
      if (has_bias) call.bias = bias.block.data();
      call.y = y.data();
      call.h = static_cast<float*>(out_h.data());
      Plan plan;
      check(PlanForward(call, &plan), name);
      gpu.Run(plan, {&x.block, &a.block, &b.block, &w.block, &bias.block, &y, &out_h}, name);
      Truth truth = delta ? low_rank : Sum(base, low_rank);
      if (has_bias) truth = Sum(truth, bias.truth);
      tally->Compare(y, dtype, truth, name + ": y");
      tally->Compare(out_h, kFloat32, h, name + ": h");
    }

    // Without dx the plan of form delta is another one.
    for (const bool need_dx : {true, false}) {
      if (!need_dx && !delta) continue;
      const std::string name =
          where + " backward " + (delta ? "delta" : "kernel") + (need_dx ? "" : " without dx");
      const Block dx(m * k * dtype.width), out_a(k * r * dtype.width), out_b(r * n * b_dtype.width);
      const Block workspace(m * r * 4);
      BackwardCall call;
      common(form, &call);
      call.g = g.block.data();
      call.h = static_cast<const float*>(given_h.block.data());
      if (need_dx) call.dx = dx.data();
      call.da = out_a.data();
      call.db = out_b.data();
      call.workspace = static_cast<float*>(workspace.data());
      call.workspace_size = m * r;
      Plan plan;
      check(PlanBackward(call, &plan), name);
      gpu.Run(plan,
              {&x.block, &a.block, &b.block, &w.block, &g.block, &given_h.block, &dx, &out_a,
               &out_b, &workspace},
              name);
      if (need_dx) {
        tally->Compare(dx, dtype, delta ? dx_low_rank : Sum(dx_base, dx_low_rank), name + ": dx");
      }
      tally->Compare(out_a, dtype, da, name + ": dA");
      tally->Compare(out_b, b_dtype, db, name + ": dB");
    }
  }
}

int Main(int count, char** arguments) {
  bool small = false;
  std::string only;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--small") {
      small = true;
    } else if (argument == "--short") {
      missing_bytes = 2;
    } else if (argument == "--dtype" && i + 1 < count) {
      only = arguments[++i];
    } else {
      Die("usage: %s [--small] [--dtype float32|float16|bfloat16] [--short]", arguments[0]);
    }
  }
  const std::vector<Shape> shapes =
      small ? std::vector<Shape>(std::begin(kSmallShapes), std::end(kSmallShapes))
            : std::vector<Shape>(std::begin(kShapes), std::end(kShapes));

  int calls = 0, failures = 0;
  for (const Dtype& dtype : kDtypes) {
    if (!only.empty() && only != dtype.name) continue;
    Gpu gpu(dtype.shaders());
    std::mt19937 random(1);
    Tally tally;
    for (const Shape& shape : shapes) {
      RunShape(shape, dtype, dtype, gpu, random, &tally);
      if (dtype.width == 2) RunShape(shape, dtype, kFloat32, gpu, random, &tally);
    }
    std::printf("%s: %d calls, %d results, %d failures, worst error/allowed %.3f (%s)\n",
                dtype.name, tally.calls, tally.results, tally.failures, tally.worst,
                tally.worst_name.c_str());
    std::fflush(stdout);
    calls += tally.calls;
    failures += tally.failures;
  }
  if (calls == 0) Die("no calls: is '%s' a dtype?", only.c_str());
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_fused_lora

int main(int count, char** arguments) { return jax_fused_lora::Main(count, arguments); }
