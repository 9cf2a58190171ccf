// What the CUDA runtime says without a launch: whether the library can run on the current device, and of graph captures.
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

uint64_t nf4lora_cuda_capture(void *stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    if (cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id) != cudaSuccess)
        cudaGetLastError();
    return status == cudaStreamCaptureStatusActive ? id : 0;
}
