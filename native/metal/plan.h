// What a call does on the GPU, as data: which kernels run in which order, on which operands, over
// which grid. The plan is that of one element of a batch; the next one's has other matrices of the
// same operands, and the same scratch. Plain C++, so that whatever launches kernels can follow the
// same plan: the Objective-C++ host, and a check of the shaders on another GPU.
#ifndef JAX_FUSED_LORA_NATIVE_METAL_PLAN_H_
#define JAX_FUSED_LORA_NATIVE_METAL_PLAN_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "native/calls.h"
#include "shaders/params.h"

namespace jax_fused_lora {

// A buffer of the call. Results are written, and read again by later dispatches.
struct Operand : Batched<void> {
  const char* name = nullptr;
  bool result = false;

  size_t size() const { return static_cast<size_t>(count * bytes); }
};

// The kernels' function constants, in the order of their index in the shaders.
struct Constants {
  bool transposed = false;   // W and the factors are read transposed; a gradient is written so
  bool wide_shrink = false;  // the factor of the shrink is float32, or the gradient is
  bool wide_expand = false;  // the factor of the expand is float32
  bool has_bias = false;
  uint32_t rank_blocks = 0;  // the rank in blocks of 8, rounded up

  bool operator<(const Constants& other) const;
};

struct Dispatch {
  static constexpr int kNone = -1;  // an argument that this dispatch does not use

  const char* kernel = nullptr;  // its name in the shaders
  Constants constants;
  Sizes sizes = {};                // [[buffer(0)]]
  std::array<int, 6> arguments;    // of [[buffer(1)]] to [[buffer(6)]]: indices of operands
  uint32_t groups[2] = {0, 0};     // threadgroups, x and y
  uint32_t threads = 0;            // of a threadgroup
  uint32_t threadgroup_bytes = 0;  // [[threadgroup(0)]], 0 where the kernel has none
};

struct Plan {
  Batch batch;
  std::array<Operand, 10> operands;
  int operand_count = 0;
  std::array<Dispatch, 4> dispatches;
  int dispatch_count = 0;
};

ffi::Error PlanForward(const ForwardCall& call, Plan* plan);
ffi::Error PlanBackward(const BackwardCall& call, Plan* plan);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_METAL_PLAN_H_
