// The two custom calls on NVIDIA GPUs: which kernels a call launches, on which operands, and where
// in the call's workspace they keep what they need. The stream is XLA's; nothing is allocated, and
// nobody waits, so XLA may put the launches into a CUDA graph.
//
// The elements of a batch are launched one after the other and take turns with one workspace. That
// is safe because the stream has them in order: an element's first kernel is launched as usual and
// so starts when all before it have ended. The kernels that are programmatic dependents (decode,
// gemm_sm90) come directly after one of their own element, and end after it.

#include "native/calls.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "native/backend.h"
#include "native/cuda/few_sm90.h"
#include "native/cuda/gemm_sm90.h"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {
namespace {

Element ElementOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return Element::kBfloat16;
    case ffi::DataType::F16:
      return Element::kFloat16;
    default:
      return Element::kFloat32;
  }
}

// Whole lines of 128 bytes, so that each part of a workspace begins on one.
int64_t Lines(int64_t floats) { return (floats + 31) / 32 * 32; }

// Rows up to which decode is faster than few_sm90 where both serve, and numbers of W above which it
// is: bfloat16, rank 16, one row of 4096→11008 takes 35.2 µs and 38.8, with the backward pass 80.5
// and 83.2, but of 4096→4096 16.8 and 16.8, 40.9 and 38.3 (rank 64 52 and 46), of 1024→1024 7.0 and
// 5.5; 16 rows of 4096→4096 17.6 and 17.3.
constexpr int64_t kDecodeRows = 8, kDecodeWork = 1 << 24;

int64_t H16Workspace(const Sizes& sizes) {
  return (sizes.rows * GemmSm90Width(sizes.rank) + 1) / 2;
}

// What Launcher::Layer takes.
int64_t LayerWorkspace(const Sizes& sizes, std::string_view form) {
  if (form != "kernel") return 0;
  if (sizes.rows <= kFewRows) return Lines(DecodeWorkspace(sizes));
  return Lines(H16Workspace(sizes)) + Lines(GemmSm90ShrinkScratch(sizes.rows));
}

// What the two calls take, in all: one element, however many there are. That of a backward pass
// begins with t where dx or dA is asked for; the caller may go on with it.
int64_t Workspace(int64_t m, int64_t k, int64_t n, int64_t r, std::string_view form,
                  std::string_view grads) {
  const Sizes straight = {m, k, n, r}, transposed = {m, n, k, r};
  const auto asked = [&](char letter) { return grads.find(letter) != grads.npos; };
  if (grads.empty()) return LayerWorkspace(straight, form);
  // dB may be computed with dx, and then dA alone is cut into more slices.
  const int64_t of_a = asked('a') ? k : 0;
  const int64_t of_grads =
      std::max(GradWorkspace(m, r, {of_a, asked('b') ? n : 0}), GradWorkspace(m, r, {of_a, 0}));
  return (asked('x') || asked('a') ? Lines(m * r) : 0) +
         (asked('x') ? LayerWorkspace(transposed, form) : 0) + Lines(of_grads);
}

// Runs a call's launches one after the other up to the first that fails, and hands out parts of
// its workspace.
class Launcher {
 public:
  Launcher(const char* name, const Call& call, cudaStream_t stream)
      : name_(name), call_(call), stream_(stream) {
    if (call.r > kMaxRank) {
      Fail("the rank is " + std::to_string(call.r) + ", needed at most " +
           std::to_string(kMaxRank));
    }
  }

  bool ok() const { return error_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success()
                : ffi::Error(ffi::ErrorCode::kInvalidArgument,
                             std::string(name_) + " on CUDA: " + error_);
  }
  void Fail(const std::string& what) {
    if (ok()) error_ = what;
  }

  float* Take(int64_t floats) {
    used_ += Lines(floats);
    if (used_ > call_.workspace_size) {
      Fail("workspace has " + std::to_string(call_.workspace_size) + " floats, needed " +
           std::to_string(used_));
    }
    return call_.workspace + (used_ - Lines(floats));
  }

  void Did(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess) Fail(std::string(kernel) + ": " + cudaGetErrorString(error));
  }

  // The factors as a pass on plain or on transposed operands reads them.
  Factor first(bool transposed) const { return transposed ? b(true) : a(false); }
  Factor second(bool transposed) const { return transposed ? a(true) : b(false); }
  Sizes sizes(bool transposed) const {
    return {call_.m, transposed ? call_.n : call_.k, transposed ? call_.k : call_.n, call_.r};
  }
  Element element() const { return ElementOf(call_.dtype); }

  // h = shrink_scaling · x·A alone.
  void Shrink(bool transposed, const void* x, float scaling, float* h) {
    if (!ok()) return;
    Did("shrink", LaunchShrink(stream_, element(), sizes(transposed), x, first(transposed), scaling,
                               h, nullptr, 1.0f));
  }

  // h, and y = [x·W | base |] + bias + expand_scaling · h·B. Transposed: t and dx. A gradient that
  // is computed on the way is taken out of `grad`.
  void Layer(bool transposed, const void* x, float shrink_scaling, float expand_scaling,
             const float* base, const void* bias, float* h, void* y, GemmGrad* grad) {
    const Sizes all = sizes(transposed);
    const Factor a = first(transposed), b = second(transposed);
    if (call_.form != Form::kKernel) {
      if (!ok()) return;
      return Did("shrink_expand",
                 LaunchShrinkExpand(stream_, element(), all, x, a, b, shrink_scaling,
                                    expand_scaling, {base, bias}, h, y));
    }
    Gemm gemm = {element() == Element::kBfloat16,
                 transposed,
                 all.rows,
                 all.in,
                 all.out,
                 all.rank,
                 x,
                 call_.kernel,
                 bias,
                 nullptr,
                 b.data,
                 y};
    GemmShrink shrink = {a.data, shrink_scaling, expand_scaling, h, nullptr, nullptr};
    const bool tensor = element() != Element::kFloat32 && b.element == element();
    const bool shrinks = tensor && a.element == element();
    const bool decodes = call_.m <= kDecodeRows && all.in * all.out > kDecodeWork;
    if (!decodes && shrinks && FewSm90Serves(gemm, shrink)) {
      if (!ok()) return;
      return Did("few_sm90", FewSm90(gemm, shrink, stream_));
    }
    if (call_.m <= kFewRows) {
      float* const scratch = Take(DecodeWorkspace(all));
      if (!ok()) return;
      return Did("decode", LaunchDecode(stream_, element(), all, x, call_.kernel, transposed, bias,
                                        a, b, shrink_scaling, expand_scaling, h, y, scratch));
    }
    // As one product on Hopper's tensor cores, with the shrink beside it, or before, the product
    // starting while the shrink still runs.
    gemm.h16 = shrink.h16 = Take(H16Workspace(all));
    shrink.scratch = Take(GemmSm90ShrinkScratch(all.rows));
    if (!tensor || !GemmSm90Serves(gemm)) {
      Fail("form is 'kernel', for more rows than " + std::to_string(kFewRows) +
           " or operands that the Hopper product does not take");
    }
    if (!ok()) return;
    if (shrinks && grad != nullptr && GemmSm90Sweeps(gemm, shrink, *grad)) {
      Did("gemm_sm90", GemmSm90(gemm, shrink, *grad, stream_));
      grad->gradient = nullptr;
      return;
    }
    if (shrinks && GemmSm90Shrinks(gemm, shrink)) {
      return Did("gemm_sm90", GemmSm90(gemm, shrink, stream_));
    }
    Did("shrink",
        LaunchShrink(stream_, element(), all, x, a, shrink_scaling, h, shrink.h16, expand_scaling));
    if (ok()) Did("gemm_sm90", GemmSm90(gemm, stream_, /*programmatic_dependent=*/true));
  }

  // The gradients of A and B that are not null. A gradient of B is of B's type.
  void Grads(const void* x, const float* t, void* da, const void* g, const float* h, float scaling,
             void* db) {
    Grad grads[2];
    int count = 0;
    if (da) grads[count++] = {call_.k, x, t, 1.0f, element(), false, da};
    if (db) grads[count++] = {call_.n, g, h, scaling, ElementOf(call_.b_dtype), true, db};
    float* const scratch =
        Take(GradWorkspace(call_.m, call_.r, {da ? call_.k : 0, db ? call_.n : 0}));
    if (!ok()) return;
    Did("grads", LaunchGrads(stream_, element(), call_.m, call_.r, grads, count, scratch));
  }

 private:
  Factor a(bool transposed) const { return {call_.a, ElementOf(call_.dtype), transposed}; }
  Factor b(bool transposed) const { return {call_.b, ElementOf(call_.b_dtype), transposed}; }

  const char* name_;
  const Call& call_;
  cudaStream_t stream_;
  int64_t used_ = 0;
  std::string error_;
};

// One element of a batch.
ffi::Error Forward(const ForwardCall& c, cudaStream_t stream) {
  Launcher launcher("lora_forward", c, stream);
  launcher.Layer(false, c.x, 1.0f, c.scaling, c.base, c.bias, c.h, c.y, nullptr);
  return launcher.error();
}

ffi::Error Backward(const BackwardCall& c, cudaStream_t stream) {
  Launcher launcher("lora_backward", c, stream);
  float* const t = c.dx || c.da ? launcher.Take(c.m * c.r) : nullptr;
  GemmGrad of_b = {c.h, c.scaling, c.db};
  if (c.dx) {
    launcher.Layer(true, c.g, c.scaling, 1.0f, c.base, nullptr, t, c.dx, &of_b);
  } else if (c.da) {
    launcher.Shrink(true, c.g, c.scaling, t);
  }
  launcher.Grads(c.x, t, c.da, c.g, c.h, c.scaling, of_b.gradient);
  return launcher.error();
}

ffi::Error LoraForward(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                       float scaling, std::string_view form, int64_t slices) {
  ForwardCall c;
  ffi::Error error = ReadForward(x, a, b, rest, y, h, workspace, scaling, form, slices, &c);
  for (int64_t i = 0; i < c.batch.count && error.success(); ++i) {
    error = Forward(c.Element(i), stream);
  }
  return error;
}

ffi::Error LoraBackward(cudaStream_t stream, ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                        ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                        ffi::RemainingRets results, float scaling, std::string_view form,
                        std::string_view grads, int64_t slices) {
  BackwardCall c;
  ffi::Error error = ReadBackward(g, x, a, b, h, rest, results, scaling, form, grads, slices, &c);
  for (int64_t i = 0; i < c.batch.count && error.success(); ++i) {
    error = Backward(c.Element(i), stream);
  }
  return error;
}

XLA_FFI_DEFINE_HANDLER(kForward, LoraForward,
                       BindForward(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kBackward, LoraBackward,
                       BindBackward(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Backend ThisBackend() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  std::string names;
  bool serves = false, product = true;  // a program may run on any of them
  for (int device = 0; device < count && error == cudaSuccess; ++device) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) break;
    const std::string name = std::string(properties.name) + ", compute capability " +
                             std::to_string(properties.major) + "." +
                             std::to_string(properties.minor);
    serves = serves || properties.major >= 8;
    product = product && GemmSm90RunsOn(properties.major, properties.minor);
    if (names.find(name) == names.npos) names += (names.empty() ? "" : "; ") + name;
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA finds no GPU: ") + cudaGetErrorString(error));
  }
  if (!serves) throw std::runtime_error(names + ": needed compute capability 8.0 or newer");
  Backend backend = {reinterpret_cast<void*>(kForward), reinterpret_cast<void*>(kBackward), names};
  backend.workspace = Workspace;
  backend.product = product;
  return backend;
}

}  // namespace jax_fused_lora
