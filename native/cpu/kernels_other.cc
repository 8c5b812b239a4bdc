// The kernels for what has neither AVX2 nor AVX-512: older x86, and Arm.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/kernels_other.cc"
#define JAX_FUSED_LORA_SETS (!HWY_ARCH_X86 || HWY_TARGET > HWY_AVX2)

#include "hwy/foreach_target.h"  // must come before the header below
#include "native/cpu/kernels-inl.h"
