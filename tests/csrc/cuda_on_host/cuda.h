// Stands in for the driver's header of this name: tensor maps of matrices of 16-bit elements.
#pragma once

#include <cstdint>

#include "cuda_runtime_api.h"

enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

// What the driver packs into 128 opaque bytes.
struct CUtensorMap {
  const uint8_t* matrix;
  int rows, columns, row_bytes, box_rows, box_columns;
};

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* matrix, const cuuint64_t* sizes,
                                const cuuint64_t* row_bytes, const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
