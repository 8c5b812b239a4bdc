// What a native library offers to Python. Each backend defines ThisBackend once and is linked
// with module.cc into a module of its own.
#ifndef JAX_FUSED_LORA_NATIVE_BACKEND_H_
#define JAX_FUSED_LORA_NATIVE_BACKEND_H_

#include <string>

namespace jax_fused_lora {

struct Backend {
  void* forward;         // XLA_FFI_Handler of lora_forward
  void* backward;        // XLA_FFI_Handler of lora_backward
  std::string runs;      // what the kernels run on, for a person to read
  bool product = false;  // on a GPU: form "kernel" serves any number of rows of the 16-bit types
};

// Throws std::runtime_error, saying why, where this machine has nothing that the kernels run on.
Backend ThisBackend();

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_BACKEND_H_
