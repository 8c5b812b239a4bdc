// What a native library offers to Python. Each backend defines ThisBackend once and is linked
// with module.cc into a module of its own.
#ifndef JAX_FUSED_LORA_NATIVE_BACKEND_H_
#define JAX_FUSED_LORA_NATIVE_BACKEND_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace jax_fused_lora {

struct Backend {
  void* forward;     // XLA_FFI_Handler of lora_forward
  void* backward;    // XLA_FFI_Handler of lora_backward
  std::string runs;  // what the kernels run on, for a person to read
  // Of GPUs only:
  bool product = false;  // form "kernel" serves any number of rows of the 16-bit types
  // Floats of workspace that a call needs, lora_forward where `grads` is empty.
  int64_t (*workspace)(int64_t m, int64_t k, int64_t n, int64_t r, std::string_view form,
                       std::string_view grads) = nullptr;
};

// Throws std::runtime_error, saying why, where this machine has nothing that the kernels run on.
Backend ThisBackend();

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_BACKEND_H_
