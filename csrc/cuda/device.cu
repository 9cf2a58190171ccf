// Whether the library can run on the current device, asked of the CUDA runtime without a launch.
#include "../api.h"

#include <cuda_runtime_api.h>

namespace {

__global__ void probe() {}

}  // namespace

const char *nf4lora_cuda_why_not() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess)
        return nullptr;
    cudaGetLastError();  // not to be found again by the next call on this thread
    return cudaGetErrorString(error);
}
