#include "native/cuda/tma.cuh"

namespace jax_fused_lora {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or null: the library is not linked to the driver.
EncodeTiled FindEncodeTiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  return error == cudaSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
}

EncodeTiled Encode() {
  static const EncodeTiled encode = FindEncodeTiled();
  return encode;
}

}  // namespace

bool HasTma() {
  Gpu gpu;
  return HasSm90() && Encode() != nullptr && ThisGpu(&gpu) == cudaSuccess &&
         gpu.shared >= 2 * kTmaShared;
}

bool MapBoxes(Element element, const void* data, int64_t rows, int64_t columns, int box_rows,
              int box_columns, CUtensorMap* map) {
  const auto type = element == Element::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : element == Element::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t width = Width(element), bytes = box_columns * width;
  const auto swizzle = bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * width)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  return Encode()(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_fused_lora
