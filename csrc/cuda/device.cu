// What is asked of the CUDA runtime beside launches: whether the library can run on the current device, and counters.
#include "../api.h"

#include <cuda_runtime_api.h>

#include <mutex>

namespace {

__global__ void probe() {}

// A list, as templates of the standard library would be exported. What was found last is in front.
struct Counters {
    int32_t device;
    void *stream;
    unsigned long long capture;  // 0: none
    uint32_t *zeros;
    Counters *next;
};

Counters *counters_of(int32_t device, void *stream, unsigned long long capture) {
    static Counters *first = nullptr;
    for (Counters **at = &first; *at; at = &(*at)->next) {
        Counters *const found = *at;
        if (found->device == device && found->stream == stream && found->capture == capture) {
            *at = found->next;
            found->next = first;
            return first = found;
        }
    }
    return first = new Counters{device, stream, capture, nullptr, first};
}

}  // namespace

const char *nf4lora_cuda_why_not() {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0 && driver < 12010)
        return "the driver is older than CUDA 12.1 and takes no parameters of more than 4 KiB";
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
    uint32_t *&zeros = counters_of(device, stream, capture)->zeros;
    if (!zeros) {
        constexpr size_t kBytes = nf4lora::kCounters * sizeof(uint32_t);
        void *p = nullptr;
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // an allocation would end this thread's and others' captures
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (cudaMalloc(&p, kBytes) == cudaSuccess && cudaMemsetAsync(p, 0, kBytes, on) == cudaSuccess)
            zeros = static_cast<uint32_t *>(p);
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (!zeros)
            cudaGetLastError();
    }
    if (current != device)
        cudaSetDevice(current);
    return zeros;
}
