// What the portable kernels share: loads that guard or vectorize, tensor-core instructions, and
// launches with attributes. Needs sm_80.
#ifndef JAX_FUSED_LORA_NATIVE_CUDA_DEVICE_CUH_
#define JAX_FUSED_LORA_NATIVE_CUDA_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "native/cuda/gpu.h"
#include "native/cuda/kernels.h"

namespace jax_fused_lora {

template <class T>
struct Tag {
  using type = T;
};

// Calls function(Tag<type>()) for the type of an element.
template <class Function>
cudaError_t Dispatch(Element element, const Function& function) {
  switch (element) {
    case Element::kFloat32:
      return function(Tag<float>());
    case Element::kBfloat16:
      return function(Tag<__nv_bfloat16>());
    case Element::kFloat16:
      return function(Tag<__half>());
  }
  return cudaErrorInvalidValue;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline int64_t Width(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Whether each row of a matrix, `columns` elements apart, may be read in vectors of so many bytes.
inline bool Vectors(const void* data, int64_t columns, int64_t width, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && columns * width % bytes == 0;
}

// A factor as the kernels take it.
struct FactorView {
  const void* data;
  bool wide;        // float32, whatever x is
  bool transposed;  // see Factor
  bool vectors;     // 16 bytes at a time
  bool quads;       // 4 elements at a time
};

// `in` and `out` are the factor's own: A is (in, rank), B (rank, out).
inline FactorView View(const Factor& factor, int64_t in, int64_t out) {
  const int64_t columns = factor.transposed ? in : out, width = Width(factor.element);
  return {factor.data, factor.element == Element::kFloat32, factor.transposed,
          Vectors(factor.data, columns, width), Vectors(factor.data, columns, width, 4 * width)};
}

// A launch, `programmatic` as a programmatic dependent of the one before, in clusters if `cluster`
// is more than 1.
template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   cudaStream_t stream, bool programmatic, int cluster, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = AllowShared(reinterpret_cast<const void*>(kernel), shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Whether the code that runs on the current device was compiled for sm_90 or newer, and so has
// clusters and programmatic dependent launches.
bool HasSm90();

// h of LaunchDecode: at most kFewRows rows. Also zeroes the tickets, and lets a programmatic
// dependent start at once.
cudaError_t LaunchShrinkRows(cudaStream_t stream, Element element, const Sizes& sizes,
                             const void* x, const Factor& a, float scaling, float* h,
                             unsigned* tickets, int64_t ticket_count);

#ifdef __CUDACC__

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(__half value) { return __half2float(value); }

template <class T>
__device__ inline T Rounded(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// value as hi + lo. What is not finite stays what it is.
template <class E>
__device__ inline void Split(float value, E* hi, E* lo) {
  *hi = Rounded<E>(value);
  const float rest = value - ToFloat(*hi);
  *lo = Rounded<E>(isfinite(rest) ? rest : 0.0f);
}

// The same for h16: float16's hi and lo end at ±65504, see gemm_sm90.h. NaN stays NaN.
template <class E>
__device__ inline void SplitClamped(float value, E* hi, E* lo) {
  if constexpr (std::is_same_v<E, __half>) {
    constexpr float kMost = 65504.0f;
    *hi = Rounded<E>(value > kMost ? kMost : value < -kMost ? -kMost : value);
    const float rest = value - ToFloat(*hi);
    *lo = Rounded<E>(rest > kMost ? kMost : rest < -kMost ? -kMost : rest);
  } else {
    Split(value, hi, lo);
  }
}

// Four neighbouring elements, aligned to as much.
template <class T>
__device__ inline void LoadQuad(const T* from, float (&to)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 quad = *reinterpret_cast<const float4*>(from);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
  } else {
    const uint2 quad = *reinterpret_cast<const uint2*>(from);
    T elements[4];
    memcpy(elements, &quad, 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = ToFloat(elements[i]);
  }
}

// Four neighbouring elements of which the first `count` exist, zeros for the others.
template <class T>
__device__ inline void LoadQuad(const T* from, int64_t count, bool quads, float (&to)[4]) {
  if (quads && count >= 4) return LoadQuad(from, to);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < count ? ToFloat(from[i]) : 0.0f;
}

// The 4×4 elements from (row, column) of a matrix (rows, columns), zeros outside; transposed it
// lies as (columns, rows).
template <class T>
__device__ inline void LoadBlock(const T* data, bool transposed, bool quads, int64_t row,
                                 int64_t rows, int64_t column, int64_t columns,
                                 float (&block)[4][4]) {
  if (!transposed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t left = row + i < rows ? columns - column : 0;
      LoadQuad(data + (row + i) * columns + column, left, quads, block[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float quad[4];
      const int64_t left = column + j < columns ? rows - row : 0;
      LoadQuad(data + (column + j) * rows + row, left, quads, quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) block[i][j] = quad[i];
    }
  }
}

template <class T>
__device__ inline void LoadBlock(const FactorView& factor, int64_t row, int64_t rows,
                                 int64_t column, int64_t columns, float (&block)[4][4]) {
  if (std::is_same_v<T, float> || factor.wide) {
    LoadBlock(static_cast<const float*>(factor.data), factor.transposed, factor.quads, row, rows,
              column, columns, block);
  } else {
    LoadBlock(static_cast<const T*>(factor.data), factor.transposed, factor.quads, row, rows,
              column, columns, block);
  }
}

// Elements to device memory, 8 or 16 bytes at a time. An assignment of an uint4 nvcc 13 cuts into
// four stores of 4 bytes as often as not.
template <class T, int kCount>
__device__ inline void StoreVectors(const T (&elements)[kCount], T* to) {
  uint32_t words[sizeof(elements) / 4];
  memcpy(words, elements, sizeof(elements));
  if constexpr (sizeof(elements) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements) / 4); i += 4) {
      char* const at = reinterpret_cast<char*>(to) + i * 4;
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(words[i]),
                   "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                   : "memory");
    }
  }
}

// What is added to the low-rank part, and y.
template <class T>
struct Result {
  const float* base;  // may be y
  const void* bias;
  T* y;
  int64_t rows, out;
  bool vectors;  // all of them may be read and written kCount elements at a time

  // y[row, column...] = addend + values, for as many as there are.
  template <int kCount>
  __device__ void Write(int64_t row, int64_t column, float (&values)[kCount]) const {
    static_assert(kCount == 4 || kCount == 8);
    if (row >= rows || column >= out) return;
    const int64_t at = row * out + column;
    const T* const addend = static_cast<const T*>(bias);
    if (vectors && column + kCount <= out) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        float quad[4];
        if (base != nullptr) {
          LoadQuad(base + at + i, quad);
#pragma unroll
          for (int j = 0; j < 4; ++j) values[i + j] += quad[j];
        }
        if (addend != nullptr) {
          LoadQuad(addend + column + i, quad);
#pragma unroll
          for (int j = 0; j < 4; ++j) values[i + j] += quad[j];
        }
      }
      alignas(16) T elements[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) elements[i] = Rounded<T>(values[i]);
      StoreVectors(elements, y + at);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i >= out) continue;
      float value = values[i];
      if (base != nullptr) value += base[at + i];
      if (addend != nullptr) value += ToFloat(addend[column + i]);
      y[at + i] = Rounded<T>(value);
    }
  }
};

// c (16, 8) += a (16, 16) · b (16, 8). Of its lane, with g = lane / 4 and t = lane % 4:
// a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b: (2t.., g), (2t + 8.., g);
// c: (g, 2t..), (g + 8, 2t..); each .. being two neighbours.
template <class T>
__device__ inline void Multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The same of TensorFloat32, (16, 8) · (8, 8). a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
// b: (t, g), (t + 4, g).
__device__ inline void MultiplyTf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// value = hi + lo + less than 2^-21 of it, hi and lo as TensorFloat32 is read.
__device__ inline void SplitTf32(float value, uint32_t* hi, uint32_t* lo) {
  *hi = __float_as_uint(value) & 0xffffe000u;
  const float rest = value - __uint_as_float(*hi);
  // An infinite or missing value stays what it is.
  *lo = isfinite(value) ? __float_as_uint(rest) & 0xffffe000u : 0u;
  if (isnan(value)) *hi = 0x7fffe000u;
}

// Element j of each of two vectors, side by side.
__device__ inline uint32_t Pair(const uint4& low, const uint4& high, int j) {
  const uint32_t l = j < 2 ? low.x : j < 4 ? low.y : j < 6 ? low.z : low.w;
  const uint32_t h = j < 2 ? high.x : j < 4 ? high.y : j < 6 ? high.z : high.w;
  return __byte_perm(l, h, j % 2 ? 0x7632 : 0x5410);
}

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8×8 blocks of 16-bit elements; a lane's address is the row lane % 8 of block lane / 8.
__device__ inline void LoadBlocks(uint32_t (&blocks)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ inline void LoadBlocksTransposed(uint32_t (&blocks)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// 16 bytes from device to shared memory, zeros where there are none.
__device__ inline void CopyAsync(void* to, const void* from, bool some) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(some ? 16 : 0)
               : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What comes after in the stream may start, if it was launched as a programmatic dependent.
__device__ inline void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits for the kernel before, all of it, if this one was launched as its programmatic dependent.
__device__ inline void WaitForKernelBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif  // __CUDACC__

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CUDA_DEVICE_CUH_
