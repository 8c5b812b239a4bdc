// The portable kernels (sm_80 and newer), as the calls launch them. Nothing here allocates or
// waits; each function returns what CUDA says of its launch.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_KERNELS_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace jax_fused_lora {

enum class Element { kFloat32, kBfloat16, kFloat16 };

// By the part they play in a pass: on transposed operands (backward) `in` and `out` change places.
struct Sizes {
  int64_t rows, in, out, rank;
};

// A or B, float32 where a traced scaling was folded into B. As the first factor of a pass it is
// (in, rank), as the second (rank, out); transposed it lies as (rank, in) or (out, rank).
struct Factor {
  const void* data;
  Element element;
  bool transposed;
};

// What a pass adds to the low-rank part; null for nothing.
struct Addend {
  const float* base;  // (rows, out), may be y itself
  const void* bias;   // (out), x's element
};

constexpr int64_t kMaxRank = 256;
constexpr int64_t kFewRows = 16;  // rows that LaunchDecode serves

// h (rows, rank) = scaling · x·A. Where h16 is not null also h16_scaling · h as the pairs of 16-bit
// numbers that gemm_sm90.h describes.
cudaError_t LaunchShrink(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                         const Factor& a, float scaling, float* h, void* h16, float h16_scaling);

// h = shrink_scaling · x·A and y = addend + expand_scaling · h·B in one launch, x read once.
cudaError_t LaunchShrinkExpand(cudaStream_t stream, Element element, const Sizes& sizes,
                               const void* x, const Factor& a, const Factor& b,
                               float shrink_scaling, float expand_scaling, const Addend& addend,
                               float* h, void* y);

// The same with y = x·W + bias + expand_scaling · h·B, for few rows: one pass over W (in, out), or
// where `transposed` (out, in). The workspace is zeros-free scratch of DecodeWorkspace floats.
int64_t DecodeWorkspace(const Sizes& sizes);
cudaError_t LaunchDecode(cudaStream_t stream, Element element, const Sizes& sizes, const void* x,
                         const void* w, bool transposed, const void* bias, const Factor& a,
                         const Factor& b, float shrink_scaling, float expand_scaling, float* h,
                         void* y, float* workspace);

// gradient (in, rank) = scaling · xᵀ·t, or where `transposed` (rank, in).
struct Grad {
  int64_t in;
  const void* x;   // (rows, in)
  const float* t;  // (rows, rank)
  float scaling;
  Element element;  // of the gradient: x's or float32
  bool transposed;
  void* gradient;
};

// One or two gradients in one launch. Sums over slices of rows lie in the workspace, of
// GradWorkspace floats for gradients of so many columns and aligned to 16 bytes, and are added in
// one order, so that the result does not depend on the run.
int64_t GradWorkspace(int64_t rows, int64_t rank, std::initializer_list<int64_t> columns);
cudaError_t LaunchGrads(cudaStream_t stream, Element element, int64_t rows, int64_t rank,
                        const Grad* grads, int count, float* workspace);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_KERNELS_H_
