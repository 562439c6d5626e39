// Stands in for CUDA's header of this name, so that csrc/cuda's streaming passes compile without CUDA, as plain C++: the
// qualifiers mean nothing, and a launch runs the clusters of its grid one after the other (machine.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __device__
#define __global__
#define __shared__
#define __forceinline__
#define __grid_constant__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL 1  // else the kernels are a trap

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNotSupported,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
struct cudaFuncAttributes {
  int ptxVersion;
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct alignas(8) float2 {
  float x, y;
};

inline dim3 threadIdx(0), blockIdx(0);  // of the thread that runs: the host runs one at a time

inline int min(int a, int b) { return a < b ? a : b; }

// ---- what csrc/cuda/launch.cuh asks of the runtime ----

namespace on_host {
inline int shared_bytes_asked_for = 0;
// What a launch asks for; `cluster` neighbours along x run together, `thread` is what each of their threads does.
struct Grid {
  dim3 blocks;
  int cluster, threads;
  size_t shared_bytes;
  void (*thread)(void** arguments);
  void** arguments;
};
void run_grid(const Grid& grid);
void* find_driver_function(const char* name);
}  // namespace on_host

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->ptxVersion = 90, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return on_host::shared_bytes_asked_for = bytes, cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  return *found = on_host::find_driver_function(name), *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
template <typename Maps, typename Pass>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Maps, Pass), Maps& maps, Pass& pass) {
  void* with_kernel[] = {reinterpret_cast<void*>(kernel), &maps, &pass};
  const auto thread = [](void** p) {
    reinterpret_cast<void (*)(Maps, Pass)>(p[0])(*static_cast<const Maps*>(p[1]), *static_cast<const Pass*>(p[2]));
  };
  const int cluster = config->numAttrs == 0 ? 1 : static_cast<int>(config->attrs[0].val.clusterDim.x);
  on_host::run_grid(
      {config->gridDim, cluster, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes, thread, with_kernel});
  return cudaSuccess;
}
template <typename Maps, typename Pass>
cudaError_t cudaLaunchKernel(void (*kernel)(Maps, Pass), dim3 grid, dim3 block, void** arguments, size_t bytes,
                             cudaStream_t stream) {
  const cudaLaunchConfig_t config{grid, block, bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, *static_cast<Maps*>(arguments[0]), *static_cast<Pass*>(arguments[1]));
}

// ---- instructions that are functions of CUDA C++ ----

void __trap();
void __syncthreads();
void __syncwarp();

namespace on_host {
constexpr int MOST_THREADS = 1024;  // of a cluster
int thread_in_cluster();            // that runs

// `value` of another lane of the warp; all lanes call it.
template <typename Value>
Value value_of_lane(Value value, int lane) {
  static Value posted[MOST_THREADS];
  const int thread = thread_in_cluster();
  posted[thread] = value;
  __syncwarp();
  const Value taken = posted[thread / 32 * 32 + lane];
  __syncwarp();  // before anybody posts the next one
  return taken;
}
}  // namespace on_host

template <typename Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return on_host::value_of_lane(value, lane);
}
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return on_host::value_of_lane(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline bool __all_sync(unsigned, bool holds) {
  for (int mask = 1; mask < 32; mask *= 2) holds = __shfl_xor_sync(~0u, holds, mask) && holds;
  return holds;
}
