// The two custom calls on the CPU. The elements of a batch are more ranges of rows.

#include "native/calls.h"

#include <string_view>

#include "native/backend.h"
#include "native/cpu/backward.h"
#include "native/cpu/forward.h"
#include "native/cpu/kernels.h"
#include "native/cpu/workspace.h"

namespace jax_fused_lora {
namespace {

ffi::Error LoraForward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                       float scaling, std::string_view form, int64_t slices) {
  ForwardCall c;
  ffi::Error error = ReadForward(x, a, b, rest, y, h, workspace, scaling, form, slices, &c);
  if (error.failure() || c.batch.count == 0) return error;
  Workspace space(c.workspace, c.workspace_size);
  const Forward forward(c, pool.num_threads(), &space);
  error = space.Check("lora_forward");
  if (error.success()) forward.Run(pool);
  return error;
}

ffi::Error LoraBackward(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a,
                        ffi::AnyBuffer b, ffi::AnyBuffer h, ffi::RemainingArgs rest,
                        ffi::RemainingRets results, float scaling, std::string_view form,
                        std::string_view grads, int64_t slices) {
  BackwardCall c;
  ffi::Error error = ReadBackward(g, x, a, b, h, rest, results, scaling, form, grads, slices, &c);
  if (error.failure() || c.batch.count == 0) return error;
  Workspace space(c.workspace, c.workspace_size);
  const Backward backward(c, pool.num_threads(), &space);
  error = space.Check("lora_backward");
  if (error.success()) backward.Run(pool);
  return error;
}

XLA_FFI_DEFINE_HANDLER(kForward, LoraForward, BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, LoraBackward,
                       BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

Backend ThisBackend() {
  return {reinterpret_cast<void*>(kForward), reinterpret_cast<void*>(kBackward), InstructionSet()};
}

}  // namespace jax_fused_lora
