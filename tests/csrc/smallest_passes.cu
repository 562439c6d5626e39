// The smallest kernels that do what the passes' kernels are asked for: one TMA load, one product, registers moved.
#include <cuda.h>
#include <cuda_runtime.h>

#include "stream.h"

namespace vmf::cuda {
namespace {

constexpr int kThreads = 384, kSharedBytes = 200 * 1024;

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) pass_kernel(const __grid_constant__ CUtensorMap map, float* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char tile[];
  __shared__ unsigned long long barrier;
  const unsigned at = __cvta_generic_to_shared(tile), arrived = __cvta_generic_to_shared(&barrier);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %3}], [%2];" ::"r"(at),
        "l"(&map), "r"(arrived), "r"(0)
        : "memory");
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  float sums[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "l"(0x4000000000010000ull));
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  out[threadIdx.x] = sums[0] + sums[1] + sums[2] + sums[3] + kWidth;
#endif
}

cudaError_t launch(const void* features, int width, int rows, float* out, cudaStream_t stream) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major != 9) return cudaErrorNotSupported;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
  const cuuint64_t sizes[] = {cuuint64_t(width), cuuint64_t(rows)}, strides[] = {2ull * width};
  const cuuint32_t box[] = {64, 64}, steps[] = {1, 1};
  CUtensorMap map;
  const CUresult encoded = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(features), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (encoded != CUDA_SUCCESS) return cudaErrorInvalidValue;
  cudaFuncSetAttribute(pass_kernel<64>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  pass_kernel<64><<<rows / 64, kThreads, kSharedBytes, stream>>>(map, out);
  return cudaGetLastError();
}

}  // namespace

int row_tile() { return 128; }
int prototype_tile(int, bool) { return 64; }
cudaError_t row_pass(const RowPass& pass, cudaStream_t stream) {
  return launch(pass.features, pass.width, pass.rows, pass.statistics, stream);
}
cudaError_t column_pass(const ColumnPass& pass, cudaStream_t stream) {
  return launch(pass.teacher_features, pass.width, pass.teacher_rows, pass.usage, stream);
}

}  // namespace vmf::cuda
