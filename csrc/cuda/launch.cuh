// Host side of the streaming passes: tensor maps, checks, and the one function that launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "stream.h"
#include "tile.cuh"

namespace vmf::cuda {

constexpr int MOST_SPLITS = 65535;  // of a grid's second dimension

inline bool are_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

// cuTensorMapEncodeTiled of the driver that is loaded: linking to libcuda would keep the module from loading without one.
inline cudaError_t find_encoder(decltype(&cuTensorMapEncodeTiled)& encode) {
  void* p = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned SINCE = 12000;  // version of the driver's interface that has the function
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, SINCE, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(p);
  return cudaSuccess;
}

// Boxes [box_rows, 64] of a matrix [rows, pass.width], swizzled over 128 bytes.
template <typename Pass>
cudaError_t encode_map(CUtensorMap& map, const Pass& pass, const void* matrix, int rows, int box_rows) {
  decltype(&cuTensorMapEncodeTiled) encode;
  if (auto error = find_encoder(encode)) return error;
  const auto element = pass.element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(pass.width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(pass.width) * 2};
  const cuuint32_t box[] = {BOX, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, element, 2, const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Whether what was loaded for the current device is the code for sm_90a, and not what a part without it would trap in.
template <typename Kernel>
cudaError_t check_device(Kernel kernel) {
  int device, major, minor;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (auto error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  if (major != 9 || minor != 0) return cudaErrorNotSupported;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // it is reported here; left behind, somebody's next check would find it
    return cudaErrorNotSupported;
  }
  if (error != cudaSuccess) return error;
  return attributes.ptxVersion >= 90 ? cudaSuccess : cudaErrorNotSupported;
}

// BLOCKS neighbours along the grid's x, which they divide, in a cluster.
template <int BLOCKS, typename Maps, typename Pass>
cudaError_t launch(void (*kernel)(Maps, Pass), dim3 grid, size_t shared, cudaStream_t stream, Maps maps, Pass pass) {
  const int bytes = static_cast<int>(shared);
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  if constexpr (BLOCKS == 1) {
    void* arguments[] = {&maps, &pass};
    return cudaLaunchKernel(kernel, grid, dim3(BLOCK_THREADS), arguments, shared, stream);
  } else {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {BLOCKS, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(BLOCK_THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, maps, pass);
  }
}

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

// visit(blocks of a cluster) as a constant: what the pass asks for, or 1 where its blocks, so many, run alone all the same.
template <int WIDTH, typename Pass, typename Visit>
cudaError_t by_cluster(const Pass& pass, int blocks, Visit visit) {
  if constexpr (WIDTH >= NARROWEST_IN_CLUSTERS)
    if (pass.blocks_in_cluster == 2 && blocks % 2 == 0) return visit(Constant<2>{});
  return visit(Constant<1>{});
}

inline bool has_valid_cluster(int blocks) { return blocks == 1 || blocks == MOST_BLOCKS_IN_CLUSTER; }

// visit(width, element) with both as constants.
template <typename Pass, typename Visit>
cudaError_t by_width_and_element(const Pass& pass, Visit visit) {
  const auto by_element = [&](auto width) {
    return pass.element == Element::bf16 ? visit(width, Constant<Element::bf16>{}) : visit(width, Constant<Element::fp16>{});
  };
  switch (pass.width) {
    case 64: return by_element(Constant<64>{});
    case 128: return by_element(Constant<128>{});
    case 192: return by_element(Constant<192>{});
    case 256: return by_element(Constant<256>{});
    case 384: return by_element(Constant<384>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace vmf::cuda
