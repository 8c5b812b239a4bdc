// What the two custom calls take and return, and every shape and dtype check, once for all
// backends. A backend's handler decodes with ReadForward or ReadBackward and may then trust
// every pointer and size; a mismatch becomes an ffi::Error that names the operand, what it was
// and what was needed.
#ifndef JAX_FUSED_LORA_NATIVE_CALLS_H_
#define JAX_FUSED_LORA_NATIVE_CALLS_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_fused_lora {

namespace ffi = xla::ffi;

// What is added to the low-rank part. `delta`: nothing. `kernel`: the call computes x·W (+ bias)
// itself. `base`: somebody else computed it, in float32, and where the result is float32 too the
// caller may alias the two buffers.
enum class Form { kDelta, kKernel, kBase };

// What both calls have in common.
struct Call {
  int64_t m = 0, k = 0, n = 0, r = 0;
  ffi::DataType dtype;    // of x, A, W, bias, g, y and dx
  ffi::DataType b_dtype;  // of B: dtype, or float32 where a traced scaling was folded into it
  Form form = Form::kDelta;
  float scaling = 1;
  const void* x = nullptr;       // (m, k)
  const void* a = nullptr;       // (k, r)
  const void* b = nullptr;       // (r, n)
  const void* kernel = nullptr;  // (k, n), form kKernel
  float* workspace = nullptr;
  int64_t workspace_size = 0;  // floats
};

// y = [x·W | base] + bias + scaling · h·B,  h = x·A
struct ForwardCall : Call {
  int64_t slices = 1;           // x·W is summed over this many slices of k, then over the slices
  const void* bias = nullptr;   // (n), not with form kDelta, may be absent
  const float* base = nullptr;  // (m, n), form kBase
  void* y = nullptr;            // (m, n)
  float* h = nullptr;           // (m, r)
};

// t = scaling · g·Bᵀ,  dx = [g·Wᵀ | base] + t·Aᵀ,  dA = xᵀ·t,  dB = scaling · hᵀ·g
struct BackwardCall : Call {
  int64_t slices = 1;           // dA and dB are summed over this many row slices, then over these
  const void* g = nullptr;      // (m, n)
  const float* h = nullptr;     // (m, r)
  const float* base = nullptr;  // (m, k), form kBase
  void* dx = nullptr;           // (m, k); null when nobody asked
  void* da = nullptr;           // (k, r), dtype of A
  void* db = nullptr;           // (r, n), dtype of B
};

namespace internal {

using Dims = std::initializer_list<int64_t>;  // no allocation on a call's way

template <class Range>
std::string Shape(const Range& dims) {
  std::string text = "(";
  for (int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + ")";
}

inline std::string Name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F64:
      return "float64";
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

// Collects the first mismatch, so that a reader states what it needs line by line.
class Checker {
 public:
  explicit Checker(std::string_view call) : call_(call) {}

  bool ok() const { return error_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, error_);
  }
  void Fail(const std::string& what) {
    if (ok()) error_ = std::string(call_) + ": " + what;
  }

  // The data of `buffer`, after checking its dtype and shape.
  void* Data(const ffi::AnyBuffer& buffer, std::string_view name, ffi::DataType dtype, Dims shape) {
    const auto dims = buffer.dimensions();
    if (!std::equal(dims.begin(), dims.end(), shape.begin(), shape.end())) {
      Fail(std::string(name) + " has shape " + Shape(dims) + ", needed " + Shape(shape));
    }
    if (buffer.element_type() != dtype) {
      Fail(std::string(name) + " is " + Name(buffer.element_type()) + ", needed " + Name(dtype));
    }
    return buffer.untyped_data();
  }

  // What both calls begin with. The sizes follow from x, the rank from A and the width from B.
  void Operands(const ffi::AnyBuffer& x, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                float scaling, std::string_view form, Call* call) {
    Call& c = *call;
    c.dtype = x.element_type();
    // B in float32 under a 16-bit x is a traced scaling folded in without losing its low bits.
    c.b_dtype = b.element_type() == ffi::DataType::F32 ? ffi::DataType::F32 : c.dtype;
    c.scaling = scaling;
    c.form = ReadForm(form);
    Storage(c.dtype, "x");
    std::tie(c.m, c.k) = Matrix(x, "x");
    c.r = Matrix(a, "lora_a").second;
    c.n = Matrix(b, "lora_b").second;
    c.x = x.untyped_data();
    c.a = Data(a, "lora_a", c.dtype, {c.k, c.r});
    c.b = Data(b, "lora_b", c.b_dtype, {c.r, c.n});
  }

  // The sizes of a two-dimensional operand, from which the needs of the others follow.
  std::pair<int64_t, int64_t> Matrix(const ffi::AnyBuffer& buffer, std::string_view name) {
    const auto dims = buffer.dimensions();
    if (dims.size() != 2) {
      Fail(std::string(name) + " has shape " + Shape(dims) + ", needed two dimensions");
      return {0, 0};
    }
    return {dims[0], dims[1]};
  }

  void Storage(ffi::DataType dtype, std::string_view name) {
    if (dtype != ffi::DataType::F32 && dtype != ffi::DataType::BF16 &&
        dtype != ffi::DataType::F16) {
      Fail(std::string(name) + " is " + Name(dtype) + ", needed float32, bfloat16 or float16");
    }
  }

  // The operand or result at `index`; `fallback`, which reports the failure, where there is none.
  ffi::AnyBuffer Take(const ffi::RemainingArgs& operands, size_t index, ffi::AnyBuffer fallback) {
    auto operand = operands.get<ffi::AnyBuffer>(index);
    if (operand.has_value()) return *operand;
    Fail("operand " + std::to_string(index) + " of the last ones is not a buffer");
    return fallback;
  }
  ffi::AnyBuffer Take(const ffi::RemainingRets& results, size_t index, ffi::AnyBuffer fallback) {
    auto result = results.get<ffi::AnyBuffer>(index);
    if (result.has_value()) return **result;
    Fail("result " + std::to_string(index) + " is not a buffer");
    return fallback;
  }

  Form ReadForm(std::string_view form) {
    if (form == "delta") return Form::kDelta;
    if (form == "kernel") return Form::kKernel;
    if (form == "base") return Form::kBase;
    Fail("form is '" + std::string(form) + "', needed 'delta', 'kernel' or 'base'");
    return Form::kDelta;
  }

  // No more slices than there is to slice, so that products of sizes cannot overflow.
  int64_t Slices(int64_t slices, int64_t most) {
    if (slices < 1 || slices > std::max<int64_t>(most, 1)) {
      Fail("slices is " + std::to_string(slices) + ", needed 1 to " +
           std::to_string(std::max<int64_t>(most, 1)));
      return 1;
    }
    return slices;
  }

  void Count(size_t got, size_t least, size_t most, std::string_view what) {
    if (got < least || got > most) {
      Fail("got " + std::to_string(got) + " " + std::string(what) + ", needed " +
           std::to_string(least) + (most > least ? " to " + std::to_string(most) : ""));
    }
  }

  // The float32 scratch that XLA allotted to the call, as its last result.
  void Workspace(const ffi::AnyBuffer& buffer, float** data, int64_t* size) {
    const int64_t elements = static_cast<int64_t>(buffer.element_count());
    *data = static_cast<float*>(Data(buffer, "workspace", ffi::DataType::F32, {elements}));
    *size = elements;
  }

 private:
  std::string_view call_;
  std::string error_;
};

}  // namespace internal

// Operands: x, A, B, then W or base [, bias]. Results: y, h, workspace.
inline ffi::Error ReadForward(ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                              ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                              ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                              float scaling, std::string_view form, int64_t slices,
                              ForwardCall* call) {
  internal::Checker check("lora_forward");
  ForwardCall& c = *call;
  check.Operands(x, a, b, scaling, form, &c);
  c.slices = check.Slices(slices, c.k);
  c.y = check.Data(*y, "y", c.dtype, {c.m, c.n});
  c.h = static_cast<float*>(check.Data(*h, "h", ffi::DataType::F32, {c.m, c.r}));
  check.Workspace(*workspace, &c.workspace, &c.workspace_size);
  const bool delta = c.form == Form::kDelta;
  check.Count(rest.size(), delta ? 0 : 1, delta ? 0 : 2, "operands after x, lora_a, lora_b");
  if (rest.size() >= 1 && c.form == Form::kKernel) {
    c.kernel = check.Data(check.Take(rest, 0, x), "kernel", c.dtype, {c.k, c.n});
  }
  if (rest.size() >= 1 && c.form == Form::kBase) {
    c.base = static_cast<const float*>(
        check.Data(check.Take(rest, 0, x), "base", ffi::DataType::F32, {c.m, c.n}));
  }
  if (rest.size() >= 2) {
    c.bias = check.Data(check.Take(rest, 1, x), "bias", c.dtype, {c.n});
  }
  return check.error();
}

// Operands: g, x, A, B, h, then W or base. Results: those of dx, dA, dB that are named in `grads`
// by the letters x, a and b, in this order, then workspace.
inline ffi::Error ReadBackward(ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                               ffi::RemainingRets results, float scaling, std::string_view form,
                               std::string_view grads, int64_t slices, BackwardCall* call) {
  internal::Checker check("lora_backward");
  BackwardCall& c = *call;
  check.Operands(x, a, b, scaling, form, &c);
  c.slices = check.Slices(slices, c.m);
  c.g = check.Data(g, "g", c.dtype, {c.m, c.n});
  c.h = static_cast<const float*>(check.Data(h, "h", ffi::DataType::F32, {c.m, c.r}));
  check.Count(rest.size(), c.form == Form::kDelta ? 0 : 1, c.form == Form::kDelta ? 0 : 1,
              "operands after g, x, lora_a, lora_b, h");
  if (rest.size() >= 1 && c.form == Form::kKernel) {
    c.kernel = check.Data(check.Take(rest, 0, x), "kernel", c.dtype, {c.k, c.n});
  }
  if (rest.size() >= 1 && c.form == Form::kBase) {
    c.base = static_cast<const float*>(
        check.Data(check.Take(rest, 0, x), "base", ffi::DataType::F32, {c.m, c.k}));
  }

  const std::string all = "xab";
  size_t at = 0;  // subsequence test: each letter once, in order
  for (char letter : all) {
    if (at < grads.size() && grads[at] == letter) ++at;
  }
  if (at != grads.size()) {
    check.Fail("grads is '" + std::string(grads) + "', needed letters of 'xab' in this order");
  }
  check.Count(results.size(), grads.size() + 1, grads.size() + 1, "results");
  if (!check.ok()) return check.error();

  size_t next = 0;
  if (grads.find('x') != grads.npos) {
    c.dx = check.Data(check.Take(results, next++, x), "dx", c.dtype, {c.m, c.k});
  }
  if (grads.find('a') != grads.npos) {
    c.da = check.Data(check.Take(results, next++, x), "da", c.dtype, {c.k, c.r});
  }
  if (grads.find('b') != grads.npos) {
    c.db = check.Data(check.Take(results, next++, x), "db", c.b_dtype, {c.r, c.n});
  }
  check.Workspace(check.Take(results, next, x), &c.workspace, &c.workspace_size);
  return check.error();
}

// The operands, results and attributes above, bound after whatever `context` a backend asks for.
template <class Context>
auto BindForward(Context context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<ffi::AnyBuffer>()  // lora_a
      .template Arg<ffi::AnyBuffer>()  // lora_b
      .RemainingArgs()                 // kernel or base [, bias]
      .template Ret<ffi::AnyBuffer>()  // y
      .template Ret<ffi::AnyBuffer>()  // h
      .template Ret<ffi::AnyBuffer>()  // workspace
      .template Attr<float>("scaling")
      .template Attr<std::string_view>("form")
      .template Attr<int64_t>("slices");
}

template <class Context>
auto BindBackward(Context context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // g
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<ffi::AnyBuffer>()  // lora_a
      .template Arg<ffi::AnyBuffer>()  // lora_b
      .template Arg<ffi::AnyBuffer>()  // h
      .RemainingArgs()                 // kernel or base
      .RemainingRets()                 // [dx,] [da,] [db,] workspace
      .template Attr<float>("scaling")
      .template Attr<std::string_view>("form")
      .template Attr<std::string_view>("grads")
      .template Attr<int64_t>("slices");
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CALLS_H_
