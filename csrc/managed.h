// Arguments of nf4lora_cuda_managed_* (csrc/cuda/managed_memory.cu): memory that the driver moves between GPU and host.
// nf4lora/managed.py has the same structs. Places are device numbers, or kManagedHome, the host.
#pragma once
#include <cstdint>

namespace nf4lora {

constexpr int32_t kManagedHome = -1;
constexpr int64_t kManagedAlignment = 2 << 20;  // of arenas; their sizes are rounded up to it
constexpr int64_t kManagedPiece = 64 << 20;     // the most that is cleared, or moved by one call

struct ManagedArena {
    void **tensor;          // DLManagedTensor * [1], out: [numel] zeros, whose deleter gives the memory back
    int64_t *id;            // int64 [1], out; in for release
    int64_t numel;          // 1 and more
    int32_t device;         // whose kernels may use it
    int32_t preferred;      // place that the driver keeps it in when it is not told otherwise
    int32_t place;          // where it is to be at first
    int32_t dlpack_device;  // kDLCUDA, or what a test runs on
    int32_t dlpack_code;    // of the dtype
    int32_t bits;
};

struct ManagedRange {
    void *data;      // uint8 [nbytes], inside an arena
    int64_t nbytes;  // 1 and more
    int32_t place;
    int64_t *found;  // int64 [2], out: the places of last_prefetch and preferred; kManagedNowhere: none, or not one for all
};

constexpr int32_t kManagedNowhere = -2;

struct ManagedRoom {
    int64_t *found;  // int64 [5], out: ManagedFound
    int32_t device;
};

enum ManagedFound : int32_t { kConcurrent = 0, kFree = 1, kTotal = 2, kHeld = 3, kResident = 4 };

struct ManagedHandle {
    void **handle;  // cudaEvent_t or cudaStream_t [1]: create writes it, destroy clears it
    int32_t device;
};

}  // namespace nf4lora
