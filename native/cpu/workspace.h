// What a call keeps in its workspace, and the operands that it brings there in float32.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_WORKSPACE_H_
#define JAX_FUSED_LORA_NATIVE_CPU_WORKSPACE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "native/calls.h"
#include "native/cpu/kernels.h"

namespace jax_fused_lora {

inline int64_t Blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Columns of a packed factor, whole panels.
inline int64_t Padded(int64_t columns) { return Blocks(columns, 64) * 64; }

inline const Kernels& KernelsFor(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return KernelsFor(Storage::kBfloat16);
    case ffi::DataType::F16:
      return KernelsFor(Storage::kFloat16);
    default:
      return KernelsFor(Storage::kFloat32);
  }
}

// Hands out the parts of the call's workspace.
class Workspace {
 public:
  Workspace(float* data, int64_t size) : data_(data), size_(size) {}

  // Null where the workspace is too small, which Check then reports.
  float* Take(std::initializer_list<int64_t> sizes) {
    const int64_t before = used_;
    if (__builtin_add_overflow(before, Product(sizes), &used_)) {
      used_ = std::numeric_limits<int64_t>::max();
    }
    return used_ <= size_ ? data_ + before : nullptr;
  }

  ffi::Error Check(const char* call) const {
    if (used_ <= size_) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string(call) + ": workspace has " +
                                       std::to_string(size_) + " floats, needed " +
                                       std::to_string(used_));
  }

 private:
  float* data_;
  int64_t size_, used_ = 0;
};

constexpr int64_t kPackBlock = 256;  // rows of A, columns of B, brought to float32 at a time

// A factor or bias in float32, as the passes read it: each matrix that the operand has of its own,
// brought there once, in blocks that any thread may take. A default one stands for an operand that
// is read where it lies, or not at all.
class Widened {
 public:
  enum Layout { kRowMajor, kPacked };

  Widened() = default;
  // `from` is (r, columns), or its transpose.
  Widened(const Batched<const void>& from, ffi::DataType dtype, bool transposed, int64_t r,
          int64_t columns, Layout layout, Workspace* space, int64_t block = kPackBlock)
      : from_(from),
        kernels_(&KernelsFor(dtype)),
        transposed_(transposed),
        r_(r),
        columns_(columns),
        block_(block) {
    const int64_t row = layout == kPacked ? Padded(columns) : columns;
    float* data = space->Take({from.count, r, row});
    apart_ = r * row;
    first_ = layout == kPacked ? Panels<float>::Packed(data, r, kernels_->panel)
                               : Panels<float>::RowMajor(data, columns, kernels_->panel);
  }

  explicit operator bool() const { return kernels_ != nullptr; }
  int64_t blocks() const { return *this ? from_.count * Blocks(columns_, block_) : 0; }
  void Make(int64_t block) const {
    const int64_t blocks = Blocks(columns_, block_), index = block / blocks;
    const int64_t begin = block % blocks * block_, end = std::min(begin + block_, columns_);
    if (transposed_) {
      kernels_->transpose(from_.Own(index), r_, begin, end, Own(index));
    } else {
      kernels_->pack(from_.Own(index), r_, columns_, begin, end, Own(index));
    }
  }

  Panels<float> At(const Batch& batch, int64_t element) const {
    return Own(from_.Index(batch, element));
  }

 private:
  Panels<float> Own(int64_t index) const {
    Panels<float> panels = first_;
    panels.data += index * apart_;
    return panels;
  }

  Batched<const void> from_;
  const Kernels* kernels_ = nullptr;
  bool transposed_ = false;
  int64_t r_ = 0, columns_ = 0, block_ = 1;
  Panels<float> first_ = {};
  int64_t apart_ = 0;  // one from the next, in floats
};

// `operand` in float32, where it lies or as it was brought there.
inline const float* Floats(const Batched<const void>& operand, const Widened& widened,
                           const Batch& batch, int64_t element) {
  return widened ? widened.At(batch, element).data
                 : static_cast<const float*>(operand.At(batch, element));
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_WORKSPACE_H_
