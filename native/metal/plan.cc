#include "native/metal/plan.h"

#include <limits>
#include <string>
#include <tuple>

namespace jax_fused_lora {
namespace {

// As the shaders have them: rows up to which the row kernels serve, and the tiles of the others.
constexpr uint32_t kFewRows = 8, kRowRanks = 8, kRowColumns = 64, kTransposedColumns = 32;
constexpr uint32_t kThinRows = 32, kShortThinRows = 16, kShortRank = 128, kTile = 64;
constexpr uint32_t kThreads = 128, kRowThreads = 256;
constexpr int64_t kMaxRank = 256;

int64_t Width(ffi::DataType dtype) { return dtype == ffi::DataType::F32 ? 4 : 2; }

uint32_t Blocks(uint32_t size, uint32_t block) { return size / block + (size % block != 0); }

// Fills a plan in. Operands are added first; dispatches name them by what Add returned.
class Planner {
 public:
  Planner(const Call& call, Plan* plan) : call_(call), plan_(*plan) {
    plan_ = Plan();
    plan_.batch = call.batch;
  }

  ffi::Error Check(const char* name) const {
    const auto refuse = [&](const std::string& what) {
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string(name) + " on Metal: " + what);
    };
    if (call_.r > kMaxRank) {
      return refuse("the rank is " + std::to_string(call_.r) + ", needed at most " +
                    std::to_string(kMaxRank));
    }
    for (int64_t size : {call_.m, call_.k, call_.n}) {
      if (size > std::numeric_limits<int32_t>::max()) {
        return refuse("a size is " + std::to_string(size) + ", needed less than 2^31");
      }
    }
    // XLA's own product is not the better one here, so nobody asks for it.
    if (call_.form == Form::kBase) return refuse("form is 'base', needed 'delta' or 'kernel'");
    return ffi::Error::Success();
  }

  template <class T>
  int Read(const char* name, const Batched<T>& of, int64_t elements, ffi::DataType dtype) {
    return Add(name, of, elements, dtype, false);
  }
  template <class T>
  int Write(const char* name, const Batched<T>& of, int64_t elements, ffi::DataType dtype) {
    return Add(name, of, elements, dtype, true);
  }

  // h (rows, rank) = scaling · x·A. A factor that is read transposed is B.
  void Shrink(bool transposed, float scaling, int x, int a, int h) {
    Dispatch d = Pass(transposed);
    d.sizes.shrink_scaling = scaling;
    d.arguments = {x, a, h, Dispatch::kNone, Dispatch::kNone, Dispatch::kNone};
    if (Few()) {
      Launch(d, "shrink_rows", Blocks(d.sizes.rank, kRowRanks), d.sizes.rows, kRowThreads);
    } else {
      Launch(d, "shrink", d.sizes.rank ? Blocks(d.sizes.rows, kThinRows) : 0, 1, kThreads);
    }
  }

  // y (rows, out) = x·W + bias + scaling · h·B
  void Expand(bool transposed, float scaling, int x, int w, int bias, int h, int b, int y) {
    Dispatch d = Pass(transposed);
    d.sizes.expand_scaling = scaling;
    d.constants.has_bias = bias != Dispatch::kNone;
    d.arguments = {x, w, bias, h, b, y};
    if (Few()) {
      const uint32_t columns = transposed ? kTransposedColumns : kRowColumns;
      Launch(d, "expand_rows", Blocks(d.sizes.out, columns), d.sizes.rows ? 1 : 0, kRowThreads);
    } else {
      Launch(d, "gemm_expand", Blocks(d.sizes.out, kTile), Blocks(d.sizes.rows, kTile), kThreads);
    }
  }

  // h = shrink_scaling · x·A and y = expand_scaling · h·B
  void ShrinkExpand(bool transposed, float shrink_scaling, float expand_scaling, int x, int a,
                    int b, int h, int y) {
    Dispatch d = Pass(transposed);
    d.sizes.shrink_scaling = shrink_scaling;
    d.sizes.expand_scaling = expand_scaling;
    d.arguments = {x, a, b, h, y, Dispatch::kNone};
    const uint32_t rows = d.sizes.rank <= kShortRank ? kThinRows : kShortThinRows;
    d.threadgroup_bytes = rows * (d.constants.rank_blocks * 8 + 4) * sizeof(float);
    Launch(d, "lora_forward", Blocks(d.sizes.rows, rows), 1, kThreads);
  }

  // scaling · xᵀ·t (in, rank), the gradient of A, or its transpose, the gradient of B
  void Grad(bool of_b, float scaling, int x, int t, int gradient) {
    Dispatch d = Pass(of_b);
    d.sizes.shrink_scaling = scaling;
    d.arguments = {x, t, gradient, Dispatch::kNone, Dispatch::kNone, Dispatch::kNone};
    Launch(d, "grad", d.sizes.rank ? Blocks(d.sizes.in, kThinRows) : 0, 1, kThreads);
  }

 private:
  bool Few() const { return call_.m <= kFewRows; }

  // `elements` of a matrix
  template <class T>
  int Add(const char* name, const Batched<T>& of, int64_t elements, ffi::DataType dtype,
          bool result) {
    Operand& operand = plan_.operands[plan_.operand_count];
    operand.name = name;
    operand.data = const_cast<void*>(static_cast<const void*>(of.data));
    operand.axes = of.axes;
    operand.count = of.count;
    operand.bytes = elements * Width(dtype);
    operand.result = result;
    return plan_.operand_count++;
  }

  // Transposed, what was summed over N is summed over K: `in` and `out` change places, and so do
  // the factors, of which B alone may be float32 where x is not.
  Dispatch Pass(bool transposed) const {
    const uint32_t k = static_cast<uint32_t>(call_.k), n = static_cast<uint32_t>(call_.n);
    const bool wide_b = call_.b_dtype == ffi::DataType::F32;
    const bool wide_a = call_.dtype == ffi::DataType::F32;
    Dispatch d;
    d.sizes.rows = static_cast<uint32_t>(call_.m);
    d.sizes.in = transposed ? n : k;
    d.sizes.out = transposed ? k : n;
    d.sizes.rank = static_cast<uint32_t>(call_.r);
    d.constants.transposed = transposed;
    d.constants.wide_shrink = transposed ? wide_b : wide_a;
    d.constants.wide_expand = transposed ? wide_a : wide_b;
    d.constants.rank_blocks = Blocks(d.sizes.rank, 8);
    return d;
  }

  void Launch(Dispatch dispatch, const char* kernel, uint32_t x, uint32_t y, uint32_t threads) {
    if (x == 0 || y == 0) return;  // nothing to write
    dispatch.kernel = kernel;
    dispatch.groups[0] = x;
    dispatch.groups[1] = y;
    dispatch.threads = threads;
    plan_.dispatches[plan_.dispatch_count++] = dispatch;
  }

  const Call& call_;
  Plan& plan_;
};

}  // namespace

bool Constants::operator<(const Constants& other) const {
  const auto key = [](const Constants& c) {
    return std::tie(c.transposed, c.wide_shrink, c.wide_expand, c.has_bias, c.rank_blocks);
  };
  return key(*this) < key(other);
}

ffi::Error PlanForward(const ForwardCall& c, Plan* plan) {
  Planner planner(c, plan);
  ffi::Error error = planner.Check("lora_forward");
  if (error.failure() || c.batch.count == 0) return error;
  const int x = planner.Read("x", c.x, c.m * c.k, c.dtype);
  const int a = planner.Read("lora_a", c.a, c.k * c.r, c.dtype);
  const int b = planner.Read("lora_b", c.b, c.r * c.n, c.b_dtype);
  const int h = planner.Write("h", c.h, c.m * c.r, ffi::DataType::F32);
  const int y = planner.Write("y", c.y, c.m * c.n, c.dtype);
  if (c.form == Form::kDelta) {
    planner.ShrinkExpand(false, 1, c.scaling, x, a, b, h, y);
    return ffi::Error::Success();
  }
  const int w = planner.Read("kernel", c.kernel, c.k * c.n, c.dtype);
  const int bias = c.bias ? planner.Read("bias", c.bias, c.n, c.dtype) : Dispatch::kNone;
  planner.Shrink(false, 1, x, a, h);
  planner.Expand(false, c.scaling, x, w, bias, h, b, y);
  return ffi::Error::Success();
}

ffi::Error PlanBackward(const BackwardCall& c, Plan* plan) {
  Planner planner(c, plan);
  ffi::Error error = planner.Check("lora_backward");
  if (error.failure() || c.batch.count == 0) return error;
  const bool need_t = c.dx || c.da;
  if (need_t && c.workspace_size < c.m * c.r) {
    return ffi::Error::InvalidArgument("lora_backward: workspace has " +
                                       std::to_string(c.workspace_size) + " floats, needed " +
                                       std::to_string(c.m * c.r));
  }
  const int g = planner.Read("g", c.g, c.m * c.n, c.dtype);
  const int b = planner.Read("lora_b", c.b, c.r * c.n, c.b_dtype);
  if (c.db) {
    const int h = planner.Read("h", c.h, c.m * c.r, ffi::DataType::F32);
    planner.Grad(true, c.scaling, g, h, planner.Write("db", c.db, c.r * c.n, c.b_dtype));
  }
  if (!need_t) return ffi::Error::Success();
  const int t = planner.Write("t", Batched<float>(c.workspace), c.m * c.r, ffi::DataType::F32);
  const int a = planner.Read("lora_a", c.a, c.k * c.r, c.dtype);
  const int dx = c.dx ? planner.Write("dx", c.dx, c.m * c.k, c.dtype) : Dispatch::kNone;
  if (c.dx && c.form == Form::kDelta) {
    planner.ShrinkExpand(true, c.scaling, 1, g, b, a, t, dx);
  } else {
    planner.Shrink(true, c.scaling, g, b, t);
  }
  if (c.dx && c.form == Form::kKernel) {
    const int w = planner.Read("kernel", c.kernel, c.k * c.n, c.dtype);
    planner.Expand(true, 1, g, w, Dispatch::kNone, t, a, dx);
  }
  if (c.da) {
    const int x = planner.Read("x", c.x, c.m * c.k, c.dtype);
    planner.Grad(false, 1, x, t, planner.Write("da", c.da, c.k * c.r, c.dtype));
  }
  return ffi::Error::Success();
}

}  // namespace jax_fused_lora
