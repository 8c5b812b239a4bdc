// The Python face of a native library: one capsule per custom-call target, and what the loader
// must know before it registers them.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "native/backend.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

NB_MODULE(JAX_FUSED_LORA_MODULE, module) {
  module.def("registrations", [] {
    const jax_fused_lora::Backend backend = jax_fused_lora::ThisBackend();
    nb::dict targets;
    targets["lora_forward"] = nb::capsule(backend.forward);
    targets["lora_backward"] = nb::capsule(backend.backward);
    return targets;
  });
  // The FFI headers this library was built with. A jaxlib with older ones must not see it.
  module.def("ffi_api_version",
             [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  module.def("runs", [] { return jax_fused_lora::ThisBackend().runs; });
  module.def("product", [] { return jax_fused_lora::ThisBackend().product; });
  module.def("workspace", [](int64_t m, int64_t k, int64_t n, int64_t r, const std::string& form,
                             const std::string& grads) {
    const auto workspace = jax_fused_lora::ThisBackend().workspace;
    return workspace ? workspace(m, k, n, r, form, grads) : 0;
  });
}
