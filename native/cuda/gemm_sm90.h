// The product with the low-rank part inside it, on Hopper's tensor cores (sm_90a), for the two
// 16-bit types:
//
//   y = x·W (+ bias) + sh·B        x (m, k)   W (k, n)   B (r, n)   y (m, n)
//
// or, transposed, with W given as (n, k) and B as (n, r): dx = g·Wᵀ + t·Aᵀ reads W and A as they
// lie. All row-major. Sums are float32; y is rounded once. What sh comes from, x·A or g·Bᵀ, the
// same kernel can compute on the way (GemmShrink).
//
// sh, the scaled h or t, is float32 everywhere else. Rounded to 16 bits it would miss the project's
// accuracy rule, so it comes as the sum of two 16-bit numbers, in the matrix `h16`:
//
//   h16 (m, GemmSm90Width(r)):  for every 16 ranks, 16 columns `hi` and then 16 columns `lo`,
//                               hi = round(sh), lo = round(sh - hi), zero for ranks that are not.
//
// bfloat16 keeps sh to 2^-18 of itself that way. float16 keeps it to 2^-22 down to |sh| = 1/8, and
// below to 2^-25 absolutely: 1e-5 of sh from 3e-3 up, and less than the last place of a float16 y
// as long as Σ|B| over the ranks is at most 2. Above 65504 float16's hi would be infinite and lo
// the opposite infinity, whose sum is NaN, even against the zeros of a fresh B. So the writer
// should clamp a finite hi and lo to ±65504: sh is then right to 1e-5 up to 67552, to 2e-4 up to
// 131008, where it stays. For an infinite or NaN sh, hi = sh and lo = 0.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_H_
#define JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace jax_fused_lora {

struct Gemm {
  bool bf16;        // or float16
  bool transposed;  // W (n, k) and B (n, r)
  int64_t m, k, n, r;
  const void *x, *w;
  const void* bias;     // (n), may be null
  const void *h16, *b;  // read only where r > 0
  void* y;
};

// Columns of h16. Rank i has its hi in column i / 16 * 32 + i % 16 and its lo 16 further.
constexpr int64_t GemmSm90Width(int64_t r) { return (r + 15) / 16 * 32; }

// h = scaling · x·A, and h16 from h16_scaling · h, computed beside x·W on multiprocessors that it
// leaves free: the product does not wait for a kernel that reads x before.
struct GemmShrink {
  const void* a;  // (k, r), or for a transposed product B as (r, k); of x's type
  float scaling, h16_scaling;
  float* h;        // (m, r)
  void* h16;       // as above, Gemm's
  float* scratch;  // GemmSm90ShrinkScratch floats
};

int64_t GemmSm90ShrinkScratch(int64_t m);

// gradient (r, k) = scaling · hᵀ·x, of B where x is g, in the same sweep as the shrink.
struct GemmGrad {
  const float* h;  // (m, r)
  float scaling;
  void* gradient;  // of x's type; null for none
};

constexpr int kGemmTiles = 5;  // that a plan may have

// Which kernel, and in which order its blocks take the tiles of y.
struct GemmPlan {
  int tile;      // 0: 128×256, 1: 256×128, 2: 128×128, ping-pong, 3: 128×128, 4: 64×128
  int swizzle;   // 1, 2, 4 or 8 tiles side by side before the order goes on
  bool along_n;  // consecutive blocks lie along n
};

// Whether a device of this compute capability can run it.
bool GemmSm90RunsOn(int major, int minor);

// Whether the current device can run it, and TMA read and write these operands: every row a
// multiple of 16 bytes, every pointer aligned to as much. Where W is straight, any rank will do;
// transposed, multiples of 8.
bool GemmSm90Serves(const Gemm& gemm);

// The measured choice, on a device of this many multiprocessors.
GemmPlan GemmSm90Plan(const Gemm& gemm, int multiprocessors);

// Whether h is computed beside the product of this shape: few ranks, and multiprocessors enough
// that it leaves free.
bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     int multiprocessors);
bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink);

// Whether the gradient is, too: of a transposed product, in bfloat16, of at most 16 ranks and 4096
// columns.
bool GemmSm90Sweeps(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad);

// Launches on the current device; needs no workspace, allocates nothing and waits for nothing.
// `programmatic_dependent` says that the kernel launched just before writes h16 and may still run
// when this one starts; that kernel must not be launched so itself (see gemm_sm90_kernel.cu).
cudaError_t GemmSm90(const Gemm& gemm, cudaStream_t stream, bool programmatic_dependent);
cudaError_t GemmSm90(const Gemm& gemm, const GemmPlan& plan, cudaStream_t stream,
                     bool programmatic_dependent);

// The same with h computed beside it, where GemmSm90Shrinks.
cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream);
cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     cudaStream_t stream);

// And with the gradient, where GemmSm90Sweeps.
cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad,
                     cudaStream_t stream);

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_GEMM_SM90_H_
