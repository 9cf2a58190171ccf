// Memory that the driver moves between the GPU and the host: arenas that become torch's tensors, moves, and what orders them.
// Operands:      csrc/managed.h
// Rounding:      none; an arena begins as zeros
// Preconditions: ranges lie in arenas; streams and events are of the arena's device; the device has concurrentManagedAccess
// Memory:        an arena takes its bytes rounded up to 2 MiB, and 2 MiB of addresses more to begin at a multiple of them
// Budget:        an arena is cleared in pieces, each moved to its place before the next, so that a piece of the GPU is enough
//
// Nothing of it waits for the device but event_synchronize and cudaFree. In a child of fork, where the driver is of no
// use, every function refuses; there and once exit handlers run, what is given back is left to the end of the process.
#include "../api.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>

namespace nf4lora {
namespace {

// ---- the two structs of DLPack that hand memory to torch, as DLPack 1.x and 0.x have them

struct DLTensor {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(DLManagedTensor *);
};

static_assert(sizeof(DLTensor) == 48 && sizeof(DLManagedTensor) == 64 && offsetof(DLTensor, shape) == 24);

constexpr int32_t kDLCPU = 1;

// ---- calls whose arguments changed: CUDA 13 names a place by a struct, CUDA 12 by a device's number

template <typename Location>
Location location_of(int place) {
    Location location{};
    location.type = static_cast<decltype(location.type)>(place == kManagedHome ? 2 : 1);  // host, device; 12.0 lacks the names
    location.id = place == kManagedHome ? 0 : place;
    return location;
}

template <typename Location>
cudaError_t prefetch_by(cudaError_t (*call)(const void *, size_t, Location, unsigned, cudaStream_t), const void *data, size_t n,
                        int place, cudaStream_t stream) {
    return call(data, n, location_of<Location>(place), 0, stream);
}

[[maybe_unused]] cudaError_t prefetch_by(cudaError_t (*call)(const void *, size_t, int, cudaStream_t), const void *data, size_t n,
                                         int place, cudaStream_t stream) {
    return call(data, n, place == kManagedHome ? cudaCpuDeviceId : place, stream);
}

template <typename Location>
cudaError_t advise_by(cudaError_t (*call)(const void *, size_t, cudaMemoryAdvise, Location), const void *data, size_t n,
                      cudaMemoryAdvise advice, int place) {
    return call(data, n, advice, location_of<Location>(place));
}

[[maybe_unused]] cudaError_t advise_by(cudaError_t (*call)(const void *, size_t, cudaMemoryAdvise, int), const void *data, size_t n,
                                       cudaMemoryAdvise advice, int place) {
    return call(data, n, advice, place == kManagedHome ? cudaCpuDeviceId : place);
}

// ---- errors, processes, devices

const char *failed(cudaError_t error) {
    if (error == cudaSuccess)
        return nullptr;
    cudaGetLastError();  // not to be found again by the next call on this thread
    return cudaGetErrorName(error);
}

std::atomic<bool> leaving{false};

bool mine() {
    static std::atomic<pid_t> owner{0};
    pid_t none = 0;
    const pid_t self = getpid();
    return owner.compare_exchange_strong(none, self) || none == self;
}

const char *refused() {
    return mine() ? nullptr : "this process was forked from one that uses managed memory, which is not shared: use spawn";
}

// A device, for as long as this lives.
class Current {
public:
    explicit Current(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != device) {
            error = cudaSetDevice(device);
            moved = error == cudaSuccess;
        }
    }
    ~Current() {  // an error may be of what ran before, so one is no reason to leave things as they are
        if (moved && cudaSetDevice(before) != cudaSuccess) {
            cudaGetLastError();
            failed(cudaSetDevice(before));
        }
    }
    Current(const Current &) = delete;

    cudaError_t error;

private:
    int before = 0;
    bool moved = false;
};

// The same; and what is called meanwhile ends no capture of this or another thread.
class On : public Current {
public:
    explicit On(int device) : Current(device) {
        if (error == cudaSuccess) {
            error = cudaThreadExchangeStreamCaptureMode(&mode);
            relaxed = error == cudaSuccess;
        }
    }
    ~On() {
        if (relaxed && cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess && mode != cudaStreamCaptureModeRelaxed) {
            cudaGetLastError();
            failed(cudaThreadExchangeStreamCaptureMode(&mode));
        }
    }

private:
    bool relaxed = false;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

// ---- moves

cudaError_t move(char *data, int64_t nbytes, int place, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (int64_t at = 0; at < nbytes && error == cudaSuccess; at += kManagedPiece) {
        const int64_t n = nbytes - at < kManagedPiece ? nbytes - at : kManagedPiece;
        error = prefetch_by(cudaMemPrefetchAsync, data + at, static_cast<size_t>(n), place, stream);
    }
    return error;
}

cudaError_t clear(char *data, int64_t nbytes, int device, int place, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (int64_t at = 0; at < nbytes && error == cudaSuccess; at += kManagedPiece) {
        const int64_t n = nbytes - at < kManagedPiece ? nbytes - at : kManagedPiece;
        error = move(data + at, n, device, stream);  // else every page would be a fault
        if (error == cudaSuccess)
            error = cudaMemsetAsync(data + at, 0, static_cast<size_t>(n), stream);
        if (error == cudaSuccess && place != device)
            error = move(data + at, n, place, stream);
    }
    return error;
}

cudaError_t last_prefetch(const char *data, int64_t nbytes, int *place) {
    const size_t n = static_cast<size_t>(nbytes);
    return cudaMemRangeGetAttribute(place, sizeof *place, cudaMemRangeAttributeLastPrefetchLocation, data, n);
}

// Bytes of a range whose last prefetch was to the device, found by halves.
cudaError_t resident(const char *data, int64_t nbytes, int device, int64_t *found) {
    int place = kManagedNowhere;
    cudaError_t error = last_prefetch(data, nbytes, &place);
    if (error != cudaSuccess || place == device) {
        *found += place == device ? nbytes : 0;
        return error;
    }
    const int64_t half = nbytes / 2 / kManagedAlignment * kManagedAlignment;
    if (place != cudaInvalidDeviceId || half == 0)
        return error;
    error = resident(data, half, device, found);
    return error == cudaSuccess ? resident(data + half, nbytes - half, device, found) : error;
}

// ---- arenas: a list, for release and for what is held

struct Arena {
    DLManagedTensor tensor;
    void *memory;  // what cudaFree takes
    int64_t nbytes, shape, stride, id;
    int device;
    Arena *next;
};

std::mutex one;
Arena *arenas = nullptr;
int64_t last_id = 0;

// Out of the list, by whoever comes first: torch's deleter, or the caller that could not make a tensor of it.
Arena *taken_out(const Arena *wanted, int64_t id) {
    const std::lock_guard<std::mutex> lock(one);
    for (Arena **at = &arenas; *at; at = &(*at)->next) {
        if (*at == wanted || (*at)->id == id) {
            Arena *const found = *at;
            *at = found->next;
            return found;
        }
    }
    return nullptr;
}

void give_back(Arena *arena) {
    if (!arena)
        return;
    {
        const On on(arena->device);
        failed(on.error);
        failed(cudaFree(arena->memory));  // also tells of what failed before it; at exit, that the runtime is gone
    }
    delete arena;
}

void deleter(DLManagedTensor *tensor) {
    if (mine() && !leaving)
        give_back(taken_out(static_cast<Arena *>(tensor->manager_ctx), 0));
}

cudaError_t filled(Arena *arena, const ManagedArena &p, cudaStream_t stream) {
    char *const data = static_cast<char *>(arena->tensor.dl_tensor.data);
    const size_t n = static_cast<size_t>(arena->nbytes);
    cudaError_t error = advise_by(cudaMemAdvise, data, n, cudaMemAdviseSetPreferredLocation, p.preferred);
    if (error == cudaSuccess)
        error = advise_by(cudaMemAdvise, data, n, cudaMemAdviseSetAccessedBy, p.device);
    return error == cudaSuccess ? clear(data, arena->nbytes, p.device, p.place, stream) : error;
}

}  // namespace
}  // namespace nf4lora

using namespace nf4lora;

const char *nf4lora_cuda_managed_room(const ManagedRoom *p) {
    if (const char *why_not = refused())
        return why_not;
    int concurrent = 0;
    size_t free = 0, total = 0;
    const On on(p->device);
    cudaError_t error = on.error;
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, p->device);
    if (error == cudaSuccess)
        error = cudaMemGetInfo(&free, &total);
    int64_t held = 0, there = 0;
    const std::lock_guard<std::mutex> lock(one);
    for (const Arena *a = arenas; a && error == cudaSuccess; a = a->next) {
        if (a->device == p->device) {
            held += a->nbytes;
            error = resident(static_cast<const char *>(a->tensor.dl_tensor.data), a->nbytes, p->device, &there);
        }
    }
    p->found[kConcurrent] = concurrent;
    p->found[kFree] = static_cast<int64_t>(free);
    p->found[kTotal] = static_cast<int64_t>(total);
    p->found[kHeld] = held;
    p->found[kResident] = there;
    return failed(error);
}

const char *nf4lora_cuda_managed_allocate(const ManagedArena *p, void *stream) {
    if (const char *why_not = refused())
        return why_not;
    static const int at_exit = std::atexit([] { leaving = true; });
    static_cast<void>(at_exit);
    if (p->numel < 1 || p->bits < 8 || p->numel > INT64_MAX / 2 / p->bits)
        return "found no such number of bytes";
    const int64_t wanted = p->numel * p->bits / 8;
    Arena *const arena = new (std::nothrow) Arena{};
    if (!arena)
        return "no memory of the host for a list";
    const On on(p->device);
    cudaError_t error = on.error;
    arena->nbytes = (wanted + kManagedAlignment - 1) / kManagedAlignment * kManagedAlignment;
    if (error == cudaSuccess)
        error = cudaMallocManaged(&arena->memory, static_cast<size_t>(arena->nbytes + kManagedAlignment), cudaMemAttachGlobal);
    if (error != cudaSuccess) {
        delete arena;
        return failed(error);
    }
    const uintptr_t mask = static_cast<uintptr_t>(kManagedAlignment) - 1;
    arena->shape = p->numel;
    arena->stride = 1;
    arena->device = p->device;
    const int32_t id = p->dlpack_device == kDLCPU ? 0 : p->device;
    void *const data = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(arena->memory) + mask) & ~mask);
    arena->tensor = {{data, p->dlpack_device, id, 1, static_cast<uint8_t>(p->dlpack_code), static_cast<uint8_t>(p->bits), 1,
                      &arena->shape, &arena->stride, 0},
                     arena,
                     deleter};
    error = filled(arena, *p, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
        const char *const message = failed(error);
        failed(cudaFree(arena->memory));
        delete arena;
        return message;
    }
    const std::lock_guard<std::mutex> lock(one);
    arena->id = ++last_id;
    arena->next = arenas;
    arenas = arena;
    *p->tensor = &arena->tensor;
    *p->id = arena->id;
    return nullptr;
}

const char *nf4lora_cuda_managed_release(const ManagedArena *p) {
    if (mine() && !leaving)
        give_back(taken_out(nullptr, *p->id));
    return nullptr;
}

const char *nf4lora_cuda_managed_advise(const ManagedRange *p) {
    if (const char *why_not = refused())
        return why_not;
    return failed(advise_by(cudaMemAdvise, p->data, static_cast<size_t>(p->nbytes), cudaMemAdviseSetPreferredLocation, p->place));
}

const char *nf4lora_cuda_managed_prefetch(const ManagedRange *p, void *stream) {
    if (const char *why_not = refused())
        return why_not;
    return failed(move(static_cast<char *>(p->data), p->nbytes, p->place, static_cast<cudaStream_t>(stream)));
}

const char *nf4lora_cuda_managed_places(const ManagedRange *p) {
    if (const char *why_not = refused())
        return why_not;
    int last = kManagedNowhere, preferred = kManagedNowhere;
    const size_t n = static_cast<size_t>(p->nbytes);
    cudaError_t error = last_prefetch(static_cast<const char *>(p->data), p->nbytes, &last);
    if (error == cudaSuccess)
        error = cudaMemRangeGetAttribute(&preferred, sizeof preferred, cudaMemRangeAttributePreferredLocation, p->data, n);
    p->found[0] = last;
    p->found[1] = preferred;
    return failed(error);
}

const char *nf4lora_cuda_managed_capture(void *stream) {
    if (const char *why_not = refused())
        return why_not;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (const char *message = failed(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status)))
        return message;
    return status == cudaStreamCaptureStatusNone
               ? nullptr
               : "a CUDA graph is being captured on the current stream, and moves of managed memory cannot be part of one";
}

const char *nf4lora_cuda_managed_stream_create(const ManagedHandle *p) {
    if (const char *why_not = refused())
        return why_not;
    const On on(p->device);
    if (on.error != cudaSuccess)
        return failed(on.error);
    return failed(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t *>(p->handle), cudaStreamNonBlocking));
}

const char *nf4lora_cuda_managed_stream_destroy(const ManagedHandle *p) {
    const cudaStream_t stream = static_cast<cudaStream_t>(*p->handle);
    *p->handle = nullptr;
    return stream && mine() && !leaving ? failed(cudaStreamDestroy(stream)) : nullptr;
}

const char *nf4lora_cuda_managed_event_create(const ManagedHandle *p) {
    if (const char *why_not = refused())
        return why_not;
    const On on(p->device);
    if (on.error != cudaSuccess)
        return failed(on.error);
    return failed(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t *>(p->handle), cudaEventDisableTiming));
}

const char *nf4lora_cuda_managed_event_record(const ManagedHandle *p, void *stream) {
    if (const char *why_not = refused())
        return why_not;
    const Current on(p->device);  // of whose default stream the handle is null, as that of every device is
    if (on.error != cudaSuccess)
        return failed(on.error);
    return failed(cudaEventRecord(static_cast<cudaEvent_t>(*p->handle), static_cast<cudaStream_t>(stream)));
}

const char *nf4lora_cuda_managed_event_wait(const ManagedHandle *p, void *stream) {
    if (const char *why_not = refused())
        return why_not;
    const Current on(p->device);
    if (on.error != cudaSuccess)
        return failed(on.error);
    return failed(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(*p->handle), 0));
}

const char *nf4lora_cuda_managed_event_synchronize(const ManagedHandle *p) {
    if (const char *why_not = refused())
        return why_not;
    return failed(cudaEventSynchronize(static_cast<cudaEvent_t>(*p->handle)));
}

const char *nf4lora_cuda_managed_event_destroy(const ManagedHandle *p) {
    const cudaEvent_t event = static_cast<cudaEvent_t>(*p->handle);
    *p->handle = nullptr;
    return event && mine() && !leaving ? failed(cudaEventDestroy(event)) : nullptr;
}
