// Of operands as CUTLASS describes them.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_STRIDES_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_STRIDES_CUH_

#include <cstdint>
#include <type_traits>

#include "cute/tensor.hpp"

namespace jax_fused_lora {

// Of a right operand, (n, k): the distance of its rows as they lie in memory, whichever of the two
// those are along.
template <class Stride>
Stride RightStride(int64_t row) {
  Stride stride{};
  if constexpr (std::is_same_v<std::decay_t<decltype(cute::get<0>(stride))>, int64_t>) {
    cute::get<0>(stride) = row;
  } else {
    cute::get<1>(stride) = row;
  }
  return stride;
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_STRIDES_CUH_
