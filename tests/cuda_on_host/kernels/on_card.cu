// For nvcc only, linked with wrappers.cu: runs a wrapper on the card with host buffers, for golden.py to record.
#include <cstdio>

#include <cuda_runtime_api.h>

extern "C" const char *wrapper(int32_t which, const void *in, void *out, int64_t elements, void *stream);

extern "C" const char *wrapper_on_card(int32_t which, const void *in, size_t in_bytes, void *out, size_t out_bytes,
                                       int64_t elements) {
    void *device_in = nullptr, *device_out = nullptr;
    const char *error = nullptr;
    const auto failed = [&error](cudaError_t status) {
        if (status != cudaSuccess && error == nullptr)
            error = cudaGetErrorString(status);
        return error != nullptr;
    };
    if (!failed(cudaMalloc(&device_in, in_bytes)) && !failed(cudaMalloc(&device_out, out_bytes)) &&
        !failed(cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice)) &&
        !failed(cudaMemset(device_out, 0xFF, out_bytes))) {
        error = wrapper(which, device_in, device_out, elements, cudaStreamPerThread);
        if (error == nullptr && !failed(cudaStreamSynchronize(cudaStreamPerThread)))
            failed(cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost));
    }
    cudaFree(device_in);
    cudaFree(device_out);
    return error;
}

// "name; sm_90; driver 13000; runtime 13000"
extern "C" const char *card() {
    static char text[512];
    cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    const cudaError_t status = cudaGetDeviceProperties(&properties, 0);
    if (status != cudaSuccess)
        snprintf(text, sizeof text, "no card: %s", cudaGetErrorString(status));
    else if (cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess)
        snprintf(text, sizeof text, "%s; sm_%d%d; driver %d; runtime %d", properties.name, properties.major,
                 properties.minor, driver, runtime);
    return text;
}
