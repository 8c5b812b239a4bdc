// The kernels for AVX-512.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/kernels_avx3.cc"
#define JAX_FUSED_LORA_SETS (HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3)

#include "hwy/foreach_target.h"  // must come before the header below
#include "native/cpu/kernels-inl.h"
