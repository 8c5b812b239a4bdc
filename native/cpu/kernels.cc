// Picks the best of the compiled instruction sets that the machine has. The kernels themselves are
// compiled in files beside this one, which a build may do at the same time.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/kernels.cc"

#include "native/cpu/kernels.h"

#include "hwy/foreach_target.h"  // must come before the header below
#include "hwy/highway.h"
#include "native/cpu/amx.h"

HWY_BEFORE_NAMESPACE();
namespace jax_fused_lora {
namespace HWY_NAMESPACE {

const Kernels* TableFor(Storage storage, By by);

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace jax_fused_lora
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace jax_fused_lora {

HWY_EXPORT(TableFor);
HWY_EXPORT(TargetName);

By BestForBfloat16() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const By best = !__builtin_cpu_supports("avx512bf16") ? By::kNumbers
                         : HasTiles()                          ? By::kTiles
                                                               : By::kPairs;
  return best;
#else
  return By::kNumbers;
#endif
}

const Kernels& KernelsFor(Storage storage, By by) {
  return *HWY_DYNAMIC_DISPATCH(TableFor)(storage, by);
}

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace jax_fused_lora
#endif  // HWY_ONCE
