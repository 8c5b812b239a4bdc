// What the two custom calls take and return, and every shape and dtype check, once for all
// backends. A backend's handler decodes with ReadForward or ReadBackward and may then trust
// every pointer and size; a mismatch becomes an ffi::Error that names the operand, what it was
// and what was needed.
//
// A call may be a batch of layers: every operand then has the same number of batch axes in front,
// each of the full size or, where all elements along it share the operand, of size 1. Results have
// the full sizes, and each element's gradients are its own.
#ifndef JAX_FUSED_LORA_NATIVE_CALLS_H_
#define JAX_FUSED_LORA_NATIVE_CALLS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_fused_lora {

namespace ffi = xla::ffi;

// What is added to the low-rank part. `delta`: nothing. `kernel`: the call computes x·W (+ bias)
// itself. `base`: somebody else computed it, in float32, and where the result is float32 too the
// caller may alias the two buffers.
enum class Form { kDelta, kKernel, kBase };

// The product of sizes; the largest number there is where it would be larger, as where the sizes
// are those of no buffer that exists.
template <class Sizes = std::initializer_list<int64_t>>
int64_t Product(const Sizes& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) {
      product = std::numeric_limits<int64_t>::max();
    }
  }
  return product;
}

// The batch axes of a call.
struct Batch {
  static constexpr size_t kMaxAxes = 16;

  std::array<int64_t, kMaxAxes> sizes = {};
  size_t axes = 0;
  int64_t count = 1;  // elements to compute: 0 where no result has room for a number
};

// An operand or a result: a matrix, or a row, for each element of the batch. As a pointer it is
// that to the first.
template <class T>
struct Batched {
  Batched(T* data = nullptr) : data(data) {}
  operator T*() const { return data; }

  // Of its own matrices, which there are `count` of.
  T* Own(int64_t index) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + index * bytes);
  }
  // Which of them is that of an element of the batch.
  int64_t Index(const Batch& batch, int64_t element) const {
    if (count == 1) return 0;
    if (count == batch.count) return element;
    int64_t index = 0, stride = 1;
    for (size_t axis = batch.axes; axis-- > 0; element /= batch.sizes[axis]) {
      if (axes[axis] == 1) continue;
      index += element % batch.sizes[axis] * stride;
      stride *= axes[axis];
    }
    return index;
  }
  T* At(const Batch& batch, int64_t element) const { return Own(Index(batch, element)); }

  T* data;
  const int64_t* axes = nullptr;  // each 1 or the batch's; XLA's, who keeps them during the call
  int64_t count = 1;              // their product
  int64_t bytes = 0;              // of a matrix
};

// What both calls have in common. Shapes are those of an element of the batch.
struct Call {
  int64_t m = 0, k = 0, n = 0, r = 0;
  ffi::DataType dtype;    // of x, A, W, bias, g, y and dx
  ffi::DataType b_dtype;  // of B: dtype, or float32 where a traced scaling was folded into it
  Form form = Form::kDelta;
  float scaling = 1;
  Batch batch;
  Batched<const void> x;       // (m, k)
  Batched<const void> a;       // (k, r)
  Batched<const void> b;       // (r, n)
  Batched<const void> kernel;  // (k, n), form kKernel
  float* workspace = nullptr;
  int64_t workspace_size = 0;  // floats

 protected:
  template <class... T>
  void MoveTo(int64_t element, Batched<T>*... each) {
    ((*each = each->At(batch, element)), ...);
    batch = Batch();
  }
};

// y = [x·W | base] + bias + scaling · h·B,  h = x·A
struct ForwardCall : Call {
  int64_t slices = 1;         // of k that sum x·W of few rows separately, on the CPU
  Batched<const void> bias;   // (n), not with form kDelta, may be absent
  Batched<const float> base;  // (m, n), form kBase
  Batched<void> y;            // (m, n)
  Batched<float> h;           // (m, r)

  // One element, as a call of its own.
  ForwardCall Element(int64_t index) const {
    ForwardCall c = *this;
    c.MoveTo(index, &c.x, &c.a, &c.b, &c.kernel, &c.bias, &c.base, &c.y, &c.h);
    return c;
  }
};

// t = scaling · g·Bᵀ,  dx = [g·Wᵀ | base] + t·Aᵀ,  dA = xᵀ·t,  dB = scaling · hᵀ·g
struct BackwardCall : Call {
  int64_t slices = 1;         // of rows, on the CPU: each sums dA and dB, and then these are summed
  Batched<const void> g;      // (m, n)
  Batched<const float> h;     // (m, r)
  Batched<const float> base;  // (m, k), form kBase
  Batched<void> dx;           // (m, k); null when nobody asked
  Batched<void> da;           // (k, r), dtype of A
  Batched<void> db;           // (r, n), dtype of B

  BackwardCall Element(int64_t index) const {
    BackwardCall c = *this;
    c.MoveTo(index, &c.x, &c.a, &c.b, &c.kernel, &c.g, &c.h, &c.base, &c.dx, &c.da, &c.db);
    return c;
  }
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

// Collects the first mismatch, so that a reader states what it needs line by line: operands, which
// tell the sizes of the batch, then results.
class Checker {
 public:
  Checker(std::string_view call, Batch* batch) : call_(call), batch_(*batch) {}

  bool ok() const { return error_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, error_);
  }
  void Fail(const std::string& what) {
    if (ok()) error_ = std::string(call_) + ": " + what;
  }

  // What both calls begin with. The batch axes and sizes follow from x, the rank from A and the
  // width from B.
  void Operands(const ffi::AnyBuffer& x, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                float scaling, std::string_view form, Call* call) {
    Call& c = *call;
    c.dtype = x.element_type();
    // B in float32 under a 16-bit x is a traced scaling folded in without losing its low bits.
    c.b_dtype = b.element_type() == ffi::DataType::F32 ? ffi::DataType::F32 : c.dtype;
    c.scaling = scaling;
    c.form = ReadForm(form);
    Storage(c.dtype, "x");
    const size_t axes = x.dimensions().size();
    if (axes < 2 || axes > 2 + Batch::kMaxAxes) {
      Fail("x has shape " + Shape(x.dimensions()) + ", needed two dimensions after at most " +
           std::to_string(Batch::kMaxAxes) + " batch axes");
    } else {
      batch_.axes = axes - 2;
      std::fill_n(batch_.sizes.begin(), batch_.axes, 1);
    }
    std::tie(c.m, c.k) = Matrix(x, "x");
    c.r = Matrix(a, "lora_a").second;
    c.n = Matrix(b, "lora_b").second;
    c.x = Operand<const void>(x, "x", c.dtype, {c.m, c.k});
    c.a = Operand<const void>(a, "lora_a", c.dtype, {c.k, c.r});
    c.b = Operand<const void>(b, "lora_b", c.b_dtype, {c.r, c.n});
  }

  // `buffer`, after checking its dtype and its shape after the batch axes. Those are the batch's,
  // as far as other operands told, or 1.
  template <class T>
  Batched<T> Operand(const ffi::AnyBuffer& buffer, std::string_view name, ffi::DataType dtype,
                     Dims shape) {
    const auto dims = buffer.dimensions();
    bool fits = EndsIn(dims, shape);
    for (size_t i = 0; fits && i < batch_.axes; ++i) {
      int64_t& full = batch_.sizes[i];
      if (full == 1) full = dims[i];
      fits = dims[i] == 1 || dims[i] == full;
    }
    return Take<T>(buffer, name, dtype, shape, fits, "1 or ");
  }

  // To be called after the last operand and before the first result.
  void CountBatch() { batch_.count = Product(SizesOfBatch()); }

  // The same where batch axes must all be of full size.
  template <class T>
  Batched<T> Result(const ffi::AnyBuffer& buffer, std::string_view name, ffi::DataType dtype,
                    Dims shape) {
    const auto dims = buffer.dimensions();
    const auto sizes = SizesOfBatch();
    const bool fits = EndsIn(dims, shape) && std::equal(sizes.begin(), sizes.end(), dims.begin());
    some_result_ |= Product(dims) != 0;
    return Take<T>(buffer, name, dtype, shape, fits, "");
  }

  // The float32 scratch that XLA allotted to the call, as its last result.
  void Workspace(const ffi::AnyBuffer& buffer, Call* call) {
    const auto dims = buffer.dimensions();
    call->workspace_size = static_cast<int64_t>(buffer.element_count());
    if (dims.size() != 1) {
      Fail("workspace has shape " + Shape(dims) + ", needed " + Shape(Dims{call->workspace_size}));
    }
    Dtype(buffer, "workspace", ffi::DataType::F32);
    call->workspace = static_cast<float*>(buffer.untyped_data());
    if (!some_result_) batch_.count = 0;
  }

  void Storage(ffi::DataType dtype, std::string_view name) {
    if (dtype != ffi::DataType::F32 && dtype != ffi::DataType::BF16 &&
        dtype != ffi::DataType::F16) {
      Fail(std::string(name) + " is " + Name(dtype) + ", needed float32, bfloat16 or float16");
    }
  }

  // The operand or result at `index`; `fallback`, which reports the failure, where there is none.
  ffi::AnyBuffer Get(const ffi::RemainingArgs& operands, size_t index, ffi::AnyBuffer fallback) {
    auto operand = operands.get<ffi::AnyBuffer>(index);
    if (operand.has_value()) return *operand;
    Fail("operand " + std::to_string(index) + " of the last ones is not a buffer");
    return fallback;
  }
  ffi::AnyBuffer Get(const ffi::RemainingRets& results, size_t index, ffi::AnyBuffer fallback) {
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

 private:
  using Span = ffi::Span<const int64_t>;

  Span SizesOfBatch() const { return {batch_.sizes.data(), batch_.axes}; }

  // The sizes of an operand's matrices, from which the needs of the others follow.
  std::pair<int64_t, int64_t> Matrix(const ffi::AnyBuffer& buffer, std::string_view name) {
    const auto dims = buffer.dimensions();
    if (dims.size() != batch_.axes + 2) {
      Fail(std::string(name) + " has shape " + Shape(dims) + ", needed two dimensions" +
           (batch_.axes == 0 ? "" : " after x's " + std::to_string(batch_.axes) + " batch axes"));
      return {0, 0};
    }
    return {dims[batch_.axes], dims[batch_.axes + 1]};
  }

  bool EndsIn(Span dims, Dims shape) const {
    return dims.size() == batch_.axes + shape.size() &&
           std::equal(shape.begin(), shape.end(), dims.begin() + batch_.axes);
  }

  void Dtype(const ffi::AnyBuffer& buffer, std::string_view name, ffi::DataType dtype) {
    if (buffer.element_type() != dtype) {
      Fail(std::string(name) + " is " + Name(buffer.element_type()) + ", needed " + Name(dtype));
    }
  }

  template <class T>
  Batched<T> Take(const ffi::AnyBuffer& buffer, std::string_view name, ffi::DataType dtype,
                  Dims shape, bool fits, std::string_view or_full) {
    const auto dims = buffer.dimensions();
    if (!fits) {
      std::string needed = "(";
      for (int64_t size : SizesOfBatch()) {
        needed += std::string(size == 1 ? "" : or_full) + std::to_string(size) + ", ";
      }
      Fail(std::string(name) + " has shape " + Shape(dims) + ", needed " + needed +
           Shape(shape).substr(1));
    }
    Dtype(buffer, name, dtype);
    Batched<T> matrices(static_cast<T*>(buffer.untyped_data()));
    if (!ok()) return matrices;
    matrices.axes = dims.begin();
    matrices.count = Product(dims.first(batch_.axes));
    matrices.bytes = Product({Product(shape), static_cast<int64_t>(ffi::ByteWidth(dtype))});
    return matrices;
  }

  std::string_view call_;
  Batch& batch_;
  std::string error_;
  bool some_result_ = false;  // one that has an element
};

}  // namespace internal

// Operands: x, A, B, then W or base [, bias]. Results: y, h, workspace.
inline ffi::Error ReadForward(ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                              ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                              ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                              float scaling, std::string_view form, int64_t slices,
                              ForwardCall* call) {
  ForwardCall& c = *call;
  internal::Checker check("lora_forward", &c.batch);
  check.Operands(x, a, b, scaling, form, &c);
  c.slices = check.Slices(slices, c.k);
  const bool delta = c.form == Form::kDelta;
  check.Count(rest.size(), delta ? 0 : 1, delta ? 0 : 2, "operands after x, lora_a, lora_b");
  if (rest.size() >= 1 && c.form == Form::kKernel) {
    c.kernel = check.Operand<const void>(check.Get(rest, 0, x), "kernel", c.dtype, {c.k, c.n});
  }
  if (rest.size() >= 1 && c.form == Form::kBase) {
    c.base =
        check.Operand<const float>(check.Get(rest, 0, x), "base", ffi::DataType::F32, {c.m, c.n});
  }
  if (rest.size() >= 2) {
    c.bias = check.Operand<const void>(check.Get(rest, 1, x), "bias", c.dtype, {c.n});
  }
  check.CountBatch();
  c.y = check.Result<void>(*y, "y", c.dtype, {c.m, c.n});
  c.h = check.Result<float>(*h, "h", ffi::DataType::F32, {c.m, c.r});
  check.Workspace(*workspace, &c);
  return check.error();
}

// Operands: g, x, A, B, h, then W or base. Results: those of dx, dA, dB that are named in `grads`
// by the letters x, a and b, in this order, then workspace.
inline ffi::Error ReadBackward(ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                               ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                               ffi::RemainingRets results, float scaling, std::string_view form,
                               std::string_view grads, int64_t slices, BackwardCall* call) {
  BackwardCall& c = *call;
  internal::Checker check("lora_backward", &c.batch);
  check.Operands(x, a, b, scaling, form, &c);
  c.slices = check.Slices(slices, c.m);
  c.g = check.Operand<const void>(g, "g", c.dtype, {c.m, c.n});
  c.h = check.Operand<const float>(h, "h", ffi::DataType::F32, {c.m, c.r});
  check.Count(rest.size(), c.form == Form::kDelta ? 0 : 1, c.form == Form::kDelta ? 0 : 1,
              "operands after g, x, lora_a, lora_b, h");
  if (rest.size() >= 1 && c.form == Form::kKernel) {
    c.kernel = check.Operand<const void>(check.Get(rest, 0, x), "kernel", c.dtype, {c.k, c.n});
  }
  if (rest.size() >= 1 && c.form == Form::kBase) {
    c.base =
        check.Operand<const float>(check.Get(rest, 0, x), "base", ffi::DataType::F32, {c.m, c.k});
  }
  check.CountBatch();

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
    c.dx = check.Result<void>(check.Get(results, next++, x), "dx", c.dtype, {c.m, c.k});
  }
  if (grads.find('a') != grads.npos) {
    c.da = check.Result<void>(check.Get(results, next++, x), "da", c.dtype, {c.k, c.r});
  }
  if (grads.find('b') != grads.npos) {
    c.db = check.Result<void>(check.Get(results, next++, x), "db", c.b_dtype, {c.r, c.n});
  }
  check.Workspace(check.Get(results, next, x), &c);
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
