// What the binding asks of CUDA's runtime. Errors are returned and none stays pending.
#include <cuda_runtime.h>

#include "cuda/block.h"

namespace gcl {
namespace {

int cleared(cudaError_t error) {
  cudaGetLastError();
  return error;
}

}  // namespace

const char* const DEVICE_TYPE = "cuda";

int device_count(int* count) { return cleared(cudaGetDeviceCount(count)); }

int use_device(int device) { return cleared(cudaSetDevice(device)); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace gcl
