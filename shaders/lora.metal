// The kernels of the Apple GPU backend, for one element type T (float, half or bfloat) a library:
// the host compiles this text with ELEMENT defined.
//
// y = x·W + bias + s·(x·A)·B, x (rows, in), W (in, out), A (in, rank), B (rank, out). Sums are
// float32 whatever T is and are rounded once, on the way out; h = x·A stays float32.
//
// The backward pass is the same mathematics on transposed operands, read so where they lie:
//   t = s·g·Bᵀ  is a shrink,  dx = g·Wᵀ + t·Aᵀ  an expand,  dA = xᵀ·t and dB = s·hᵀ·g  the third.
//
// What each call dispatches is in native/metal/plan.cc.
// clang-format off: each of these needs those before it
#include <metal_stdlib>
#include <metal_simdgroup_matrix>

using namespace metal;
using T = ELEMENT;  // no macro T, a name that Metal's own headers give to template parameters

#include "params.h"
#include "tiles.h"
#include "thin.h"
#include "shrink.metal"
#include "grad.metal"
#include "forward.metal"
#include "expand.metal"
#include "rows.metal"
