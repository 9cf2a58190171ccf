// Small kernels that test the machine itself (tests/test_cuda_on_host.py): each takes (T *out, const T *in, int n).
#pragma once
#include "ptx.cuh"

// shape: grid x, y, z, block x, y, z, bytes of shared memory
#define MACHINE_ENTRY(kernel, T)                                                                              \
    extern "C" const char *run_##kernel(const uint32_t *shape, T *out, const T *in, int n) {                  \
        return NF4LORA_LAUNCH(kernel, dim3(shape[0], shape[1], shape[2]), dim3(shape[3], shape[4], shape[5]), \
                              shape[6], nullptr, out, in, n);                                                 \
    }
