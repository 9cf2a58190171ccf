// What is asked of the CUDA runtime beside launches: whether the library can run on the current device, and counters.
#include "../api.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>

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

// Not of torch's allocator, whose pools for graphs want every block back.
uint32_t *nf4lora_cuda_counters(int32_t device, void *stream) {
    static std::mutex one;
    static std::map<std::tuple<int32_t, void *, unsigned long long>, uint32_t *> made;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    int current = device;
    if (cudaGetDevice(&current) != cudaSuccess || (current != device && cudaSetDevice(device) != cudaSuccess)) {
        cudaGetLastError();
        return nullptr;
    }
    if (cudaStreamGetCaptureInfo(on, &status, &capture) != cudaSuccess)
        cudaGetLastError();
    if (status != cudaStreamCaptureStatusActive)
        capture = 0;
    const std::lock_guard<std::mutex> lock(one);
    uint32_t *&counters = made[{device, stream, capture}];
    if (!counters) {
        constexpr size_t kBytes = nf4lora::kCounters * sizeof(uint32_t);
        void *p = nullptr;
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // an allocation would end this thread's and others' captures
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (cudaMalloc(&p, kBytes) == cudaSuccess && cudaMemsetAsync(p, 0, kBytes, on) == cudaSuccess)
            counters = static_cast<uint32_t *>(p);
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (!counters)
            cudaGetLastError();
    }
    if (current != device)
        cudaSetDevice(current);
    return counters;
}
