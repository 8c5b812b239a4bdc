// What the host passes to every kernel by value. Included by the shaders and by native/metal.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
using uint = uint32_t;
#endif

// The sizes of a pass, by the part they play in it: a pass on transposed operands (backward) has
// `in` and `out` exchanged.
struct Sizes {
  uint rows;  // M
  uint in;    // what x·W and x·A sum over
  uint out;   // columns of y
  uint rank;
  float shrink_scaling;  // of h = x·A, and of a gradient of A or B
  float expand_scaling;  // of h·B
};
