// Stands in for the CUDA runtime: a launch is written down instead of run, with what the real runtime would refuse.
//
// Linked in place of cudart with launchers as they ship, it shows without a GPU which kernel they start, over which grid, with
// how much dynamic shared memory, and whether they asked for that much before. One JSON object a line on the standard output.
#include "recording_runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

namespace {

constexpr int kGrantedSharedBytes = 48 * 1024;  // what a block may have without cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr int kMultiprocessors = 132;

struct Configuration {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks, along the grid's x
};

struct Recording {
  int capability = 90;
  std::string name;                          // of the case whose launches come next
  std::map<const void*, std::string> names;  // of kernels, mangled, by the address of their stub
  std::map<const void*, int> allowed;        // dynamic shared bytes asked for
  Configuration pushed;
};

// In a function, since kernels register themselves before main and in no defined order.
Recording& recording() {
  static Recording the_one;
  return the_one;
}

void print_problem(const std::string& problem) {
  std::printf("{\"case\": \"%s\", \"problem\": \"%s\"}\n", recording().name.c_str(), problem.c_str());
}

cudaError_t record(const void* kernel, const Configuration& launched) {
  const auto allowed = recording().allowed.find(kernel);
  if (launched.grid.x % launched.cluster) print_problem("launch: the grid is no whole number of clusters");
  std::printf(
      "{\"case\": \"%s\", \"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"dynamic_shared\": %zu, "
      "\"allowed_shared\": %d, \"cluster\": %u}\n",
      recording().name.c_str(), recording().names[kernel].c_str(), launched.grid.x, launched.grid.y, launched.grid.z,
      launched.block.x * launched.block.y * launched.block.z, launched.shared_bytes,
      allowed == recording().allowed.end() ? kGrantedSharedBytes : allowed->second, launched.cluster);
  return cudaSuccess;
}

int element_bytes(CUtensorMapDataType type) {
  const bool is_16_bit = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return is_16_bit ? 2 : 4;
}

// What the driver's documentation asks of a tiled tensor map; nullptr where it is fine.
const char* wrong_with(CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                       CUtensorMapSwizzle swizzle) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16) return "tensor map: the address is no multiple of 16 bytes";
  if (rank < 1 || rank > 5) return "tensor map: the rank is not in 1..5";
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32)) return "tensor map: a size is not in 1..2^32";
    if (box[i] == 0 || box[i] > 256) return "tensor map: a side of the box is not in 1..256";
    if (element_strides[i] < 1 || element_strides[i] > 8) return "tensor map: an element stride is not in 1..8";
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (1ull << 40))) {
      return "tensor map: a stride is no multiple of 16 bytes below 2^40";
    }
  }
  const cuuint32_t inner = box[0] * element_bytes(type);
  if (inner % 16) return "tensor map: the inner side of the box is no multiple of 16 bytes";
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && inner > 128) return "tensor map: more than 128 bytes under that swizzle";
  return nullptr;
}

CUresult CUDAAPI encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                              const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                              const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (reinterpret_cast<std::uintptr_t>(map) % 64) {
    print_problem("tensor map: it is not aligned to 64 bytes");
    return CUDA_ERROR_INVALID_VALUE;
  }
  const char* wrong = wrong_with(type, rank, address, sizes, strides, box, element_strides, swizzle);
  if (wrong == nullptr) return CUDA_SUCCESS;
  print_problem(wrong);
  return CUDA_ERROR_INVALID_VALUE;
}

cudaError_t find_driver_function(const char* symbol, void** function, cudaDriverEntryPointQueryResult* status) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (status != nullptr) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (!known) print_problem(std::string("asks the driver for ") + symbol + ", which the recording has not");
  return known ? cudaSuccess : cudaErrorSymbolNotFound;
}

}  // namespace

void start_case(const std::string& name, int capability) {
  recording().name = name;
  recording().capability = capability;
}

void end_case(cudaError_t error) {
  std::printf("{\"case\": \"%s\", \"error\": %d}\n", recording().name.c_str(), static_cast<int>(error));
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  recording().names[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream) {
  recording().pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes, void* stream) {
  const Configuration& pushed = recording().pushed;
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, std::size_t shared_bytes,
                               cudaStream_t stream) {
  return record(kernel, {grid, block, shared_bytes, stream});
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, std::size_t shared_bytes, cudaStream_t stream) {
  return record(stub, {grid, block, shared_bytes, stream});
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void**) {
  Configuration launched{config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id != cudaLaunchAttributeClusterDimension || cluster.x == 0 || cluster.y != 1 || cluster.z != 1) {
      print_problem("launch: an attribute that is no cluster along x, which is all that the recording has");
      return cudaErrorInvalidValue;
    }
    launched.cluster = cluster.x;
  }
  return record(stub, launched);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) recording().allowed[stub] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = recording().capability;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = recording().capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = recording().capability % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; return cudaSuccess;
    default:
      print_problem("asks for device attribute " + std::to_string(attribute) + ", which the recording has not");
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "recorded"; }

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* status) {
  return find_driver_function(symbol, function, status);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return find_driver_function(symbol, function, status);
}

}  // extern "C"
