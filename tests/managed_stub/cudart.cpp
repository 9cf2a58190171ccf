// The functions of the CUDA runtime that csrc/cuda/managed_memory.cu calls, over memory of the host, for tests.
//
// Every call is written down, and call number `fail_at` fails. Streams and events are numbers with vector clocks: whatever
// touches a page must come after what touched it last, and a kernel finds its pages on the device, else the record has a
// violation. Moves happen at once; that a page is where it was told to go is all that is modelled of time.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define CONTROL extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint64_t kPage = 2 << 20;
constexpr int kHost = -1, kNowhere = -2;
constexpr uintptr_t kHostClock = ~uintptr_t{0};  // the host, as a stream
using Clock = std::map<uintptr_t, uint64_t>;

struct Page {
    int place = kNowhere, told = kNowhere, preferred = kNowhere, accessed_by = kNowhere;
    uintptr_t stream = 0;  // of what touched it last, at that stream's time `tick`
    uint64_t tick = 0;
    bool missed = false;  // the last move of it failed, so that a kernel may find it by a fault
};

struct Allocation {
    void *mapped;
    size_t mapped_bytes, bytes;
};

struct State {
    std::recursive_mutex one;
    std::map<uintptr_t, Allocation> allocations;
    std::map<uint64_t, Page> pages;
    std::map<uintptr_t, Clock> streams;
    std::map<uintptr_t, Clock> events;
    std::set<uintptr_t> live_streams;
    std::map<uintptr_t, int> device_of;  // of streams and events that were made
    uintptr_t last_handle = 1000;
    std::vector<std::string> record, violations;
    int64_t calls = 0, fail_at = 0;
    cudaError_t with = cudaErrorMemoryAllocation, last = cudaSuccess;
    int64_t card = int64_t{8} << 30, others = 0, most_resident = 0;
    int concurrent = 1, device = 0;
    uintptr_t capturing = ~uintptr_t{0} - 1;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    size_t offset = 4096;  // of what is allocated from a multiple of 2 MiB
    std::string text;
};

State &state() {
    static State *const only = new State;  // never destroyed: deleters run late
    return *only;
}

template <typename... Args>
std::string formatted(const char *format, Args... args) {
    char line[256];
    std::snprintf(line, sizeof line, format, args...);
    return line;
}

void violation(const std::string &what) { state().violations.push_back(what); }

cudaError_t error_of(cudaError_t error) {
    if (error != cudaSuccess)
        state().last = error;
    return error;
}

// Memory comes and goes in the relaxed mode only, unless it was the change of mode that failed.
void wants_relaxed() {
    State &s = state();
    if (s.mode != cudaStreamCaptureModeRelaxed && (s.fail_at == 0 || s.calls < s.fail_at))
        violation("memory is allocated or freed in a mode that ends captures");
}

// Writes a call down; whether it is the one that fails.
bool fails(const std::string &call) {
    State &s = state();
    s.record.push_back(call);
    if (s.last != cudaSuccess)
        violation("an error was left for this call to find: " + call);
    if (++s.calls != s.fail_at)
        return false;
    s.record.back() += " FAILS";
    s.last = s.with;
    return true;
}

int64_t resident() {
    int64_t n = 0;
    for (const auto &page : state().pages)
        n += page.second.place >= 0 ? static_cast<int64_t>(kPage) : 0;
    return n;
}

void merge(Clock &to, const Clock &from) {
    for (const auto &entry : from)
        to[entry.first] = std::max(to[entry.first], entry.second);
}

// A stream's clock at its next operation, which the host issues now.
Clock &tick(uintptr_t stream) {
    Clock &clock = state().streams[stream];
    merge(clock, state().streams[kHostClock]);
    ++clock[stream];
    return clock;
}

uintptr_t number(const void *handle) { return reinterpret_cast<uintptr_t>(handle); }

// What an operation does to pages: it must come after the last on each.
template <typename Change>
cudaError_t touch(const char *what, const void *data, size_t n, uintptr_t stream, Change change) {
    State &s = state();
    const uintptr_t at = number(data);
    const auto holder = s.allocations.upper_bound(at);
    if (holder == s.allocations.begin() || at + n > std::prev(holder)->first + std::prev(holder)->second.bytes || n == 0)
        return error_of(cudaErrorInvalidValue);
    Clock &clock = tick(stream);
    for (uint64_t p = at / kPage; p <= (at + n - 1) / kPage; ++p) {
        Page &page = s.pages[p];
        if (page.tick > clock[page.stream])
            violation(formatted("%s on stream %zu does not wait for what stream %zu does", what, stream, page.stream));
        page.stream = stream;
        page.tick = clock[stream];
        change(page);
    }
    const int64_t there = resident();
    s.most_resident = std::max(s.most_resident, there);
    if (there > s.card - s.others)
        violation(formatted("%s: more on the device than it has", what));
    return cudaSuccess;
}

cudaError_t advise(const void *data, size_t n, cudaMemoryAdvise advice, int place) {
    const std::lock_guard<std::recursive_mutex> lock(state().one);
    if (fails(formatted("cudaMemAdvise %zu advice %d place %d", n, static_cast<int>(advice), place)))
        return state().last;
    for (uint64_t p = number(data) / kPage; p <= (number(data) + n - 1) / kPage; ++p)
        (advice == cudaMemAdviseSetAccessedBy ? state().pages[p].accessed_by : state().pages[p].preferred) = place;
    return cudaSuccess;
}

cudaError_t prefetch(const void *data, size_t n, int place, cudaStream_t stream) {
    const std::lock_guard<std::recursive_mutex> lock(state().one);
    if (fails(formatted("cudaMemPrefetchAsync %zu place %d stream %zu", n, place, number(stream)))) {
        for (uint64_t p = number(data) / kPage; p <= (number(data) + n - 1) / kPage; ++p)
            state().pages[p].missed = true;
        return state().last;
    }
    if (number(stream) == state().capturing)
        return error_of(cudaErrorStreamCaptureUnsupported);
    return touch("a move", data, n, number(stream), [place](Page &page) {
        page.place = page.told = place;
        page.missed = false;
    });
}

}  // namespace

#if CUDART_VERSION >= 13000
namespace {
int place_of(cudaMemLocation location) {
    return location.type == cudaMemLocationTypeHost ? kHost : location.type == cudaMemLocationTypeDevice ? location.id : 99;
}
}  // namespace
cudaError_t CUDARTAPI cudaMemAdvise(const void *data, size_t n, cudaMemoryAdvise advice, cudaMemLocation location) {
    return advise(data, n, advice, place_of(location));
}
cudaError_t CUDARTAPI cudaMemPrefetchAsync(const void *data, size_t n, cudaMemLocation location, unsigned flags,
                                           cudaStream_t stream) {
    return flags ? error_of(cudaErrorInvalidValue) : prefetch(data, n, place_of(location), stream);
}
#else
cudaError_t CUDARTAPI cudaMemAdvise(const void *data, size_t n, cudaMemoryAdvise advice, int place) {
    return advise(data, n, advice, place);
}
cudaError_t CUDARTAPI cudaMemPrefetchAsync(const void *data, size_t n, int place, cudaStream_t stream) {
    return prefetch(data, n, place, stream);
}
#endif

#define ENTER(...)                                                 \
    State &s = state();                                            \
    const std::lock_guard<std::recursive_mutex> lock(s.one);       \
    const bool failing = fails(formatted(__VA_ARGS__))
#define ENTER_OR_FAIL(...) \
    ENTER(__VA_ARGS__);    \
    if (failing)           \
    return s.last

cudaError_t CUDARTAPI cudaMallocManaged(void **out, size_t n, unsigned flags) {
    ENTER_OR_FAIL("cudaMallocManaged %zu flags %u", n, flags);
    if (n == 0 || flags != cudaMemAttachGlobal)
        return error_of(cudaErrorInvalidValue);
    wants_relaxed();
    const size_t mapped = n + 2 * kPage;
    void *const p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return error_of(cudaErrorMemoryAllocation);
    const uintptr_t at = (number(p) + kPage - 1) / kPage * kPage + s.offset;
    s.allocations[at] = {p, mapped, n};
    for (uint64_t page = at / kPage; page <= (at + n - 1) / kPage; ++page)
        s.pages[page] = Page{};
    std::memset(reinterpret_cast<void *>(at), 0xFF, std::min<size_t>(n, 3 << 20));  // that it is not cleared shows
    *out = reinterpret_cast<void *>(at);
    return cudaSuccess;
}

// This and what destroys do their work even when they fail, as the error is of what ran before.
cudaError_t CUDARTAPI cudaFree(void *p) {
    ENTER("cudaFree");
    const auto found = s.allocations.find(number(p));
    if (found == s.allocations.end()) {
        violation("cudaFree of what is not allocated");
        return error_of(cudaErrorInvalidValue);
    }
    wants_relaxed();
    const uintptr_t end = found->first + found->second.bytes;
    for (uint64_t page = found->first / kPage; page <= (end - 1) / kPage; ++page)
        s.pages.erase(page);
    munmap(found->second.mapped, found->second.mapped_bytes);
    s.allocations.erase(found);
    return failing ? s.last : cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void *data, int value, size_t n, cudaStream_t stream) {
    ENTER_OR_FAIL("cudaMemsetAsync %zu stream %zu", n, number(stream));
    std::memset(data, value, n);
    return touch("a memset", data, n, number(stream), [&s](Page &page) { page.place = s.device; });
}

cudaError_t CUDARTAPI cudaMemRangeGetAttribute(void *out, size_t size, cudaMemRangeAttribute attribute, const void *data,
                                               size_t n) {
    ENTER_OR_FAIL("cudaMemRangeGetAttribute %d of %zu", static_cast<int>(attribute), n);
    if (size != sizeof(int))
        return error_of(cudaErrorInvalidValue);
    std::set<int> places;
    for (uint64_t p = number(data) / kPage; p <= (number(data) + n - 1) / kPage; ++p)
        places.insert(attribute == cudaMemRangeAttributePreferredLocation ? s.pages[p].preferred : s.pages[p].told);
    *static_cast<int *>(out) = places.size() == 1 ? *places.begin() : cudaInvalidDeviceId;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemGetInfo(size_t *free, size_t *total) {
    ENTER_OR_FAIL("cudaMemGetInfo");
    *total = static_cast<size_t>(s.card);
    *free = static_cast<size_t>(s.card - s.others - resident());
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    ENTER_OR_FAIL("cudaDeviceGetAttribute %d device %d", static_cast<int>(attribute), device);
    *value = attribute == cudaDevAttrConcurrentManagedAccess ? s.concurrent : -1;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetDevice(int *device) {
    ENTER_OR_FAIL("cudaGetDevice");
    *device = s.device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
    ENTER_OR_FAIL("cudaSetDevice %d", device);
    if (device < 0 || device > 1)
        return error_of(cudaErrorInvalidDevice);
    s.device = device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    ENTER_OR_FAIL("cudaThreadExchangeStreamCaptureMode %d", static_cast<int>(*mode));
    std::swap(*mode, s.mode);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    ENTER_OR_FAIL("cudaStreamIsCapturing stream %zu", number(stream));
    *status = number(stream) == s.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    ENTER_OR_FAIL("cudaStreamCreateWithFlags %u", flags);
    *stream = reinterpret_cast<cudaStream_t>(++s.last_handle);
    s.live_streams.insert(s.last_handle);
    s.device_of[s.last_handle] = s.device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) {
    ENTER("cudaStreamDestroy %zu", number(stream));
    if (!s.live_streams.erase(number(stream)))
        violation("cudaStreamDestroy of what is no stream");
    s.streams.erase(number(stream));
    return failing ? s.last : cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    ENTER_OR_FAIL("cudaEventCreateWithFlags %u", flags);
    *event = reinterpret_cast<cudaEvent_t>(++s.last_handle);
    s.events[s.last_handle] = {};
    s.device_of[s.last_handle] = s.device;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER_OR_FAIL("cudaEventRecord %zu stream %zu", number(event), number(stream));
    if (!s.events.count(number(event)) || (number(stream) > 1000 && !s.live_streams.count(number(stream)))) {
        violation("cudaEventRecord of what is destroyed");
        return error_of(cudaErrorInvalidResourceHandle);
    }
    const auto on = s.device_of.find(number(stream));
    if (s.device_of[number(event)] != (on != s.device_of.end() ? on->second : s.device)) {  // null is the current device's
        violation("cudaEventRecord of an event of another device than the stream's");
        return error_of(cudaErrorInvalidResourceHandle);
    }
    s.events[number(event)] = tick(number(stream));
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    ENTER_OR_FAIL("cudaStreamWaitEvent stream %zu event %zu flags %u", number(stream), number(event), flags);
    if (!s.events.count(number(event)))
        return error_of(cudaErrorInvalidResourceHandle);
    merge(tick(number(stream)), s.events[number(event)]);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t event) {
    ENTER_OR_FAIL("cudaEventSynchronize %zu", number(event));
    merge(s.streams[kHostClock], s.events[number(event)]);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event) {
    ENTER("cudaEventDestroy %zu", number(event));
    if (!s.events.erase(number(event)))
        violation("cudaEventDestroy of what is no event");
    return failing ? s.last : cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetLastError() {
    State &s = state();
    const std::lock_guard<std::recursive_mutex> lock(s.one);
    return std::exchange(s.last, cudaSuccess);
}

const char *CUDARTAPI cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorCudartUnloading: return "cudaErrorCudartUnloading";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        default: return "cudaErrorUnknown";
    }
}

// ---- what tests ask and set

CONTROL void stub_fail(int64_t at, int32_t with) {
    State &s = state();
    s.calls = 0;
    s.fail_at = at;
    s.with = static_cast<cudaError_t>(with);
}

CONTROL void stub_set(const char *name, int64_t value) {
    State &s = state();
    const std::string what = name;
    if (what == "card")
        s.card = value;
    else if (what == "others")
        s.others = value;
    else if (what == "concurrent")
        s.concurrent = static_cast<int>(value);
    else if (what == "device")
        s.device = static_cast<int>(value);
    else if (what == "capturing")
        s.capturing = static_cast<uintptr_t>(value);
    else if (what == "most_resident")
        s.most_resident = value;
    else if (what == "offset")
        s.offset = static_cast<size_t>(value);
    else
        violation("no such setting: " + what);
}

CONTROL int64_t stub_get(const char *name) {
    const State &s = state();
    const std::string what = name;
    if (what == "calls")
        return s.calls;
    if (what == "device")
        return s.device;
    if (what == "mode")
        return s.mode;
    if (what == "last")
        return s.last;
    if (what == "resident")
        return resident();
    if (what == "most_resident")
        return s.most_resident;
    return what == "live" ? static_cast<int64_t>(s.allocations.size() + s.events.size() + s.live_streams.size()) : -1;
}

// The calls so far, or what was wrong with them, a line each; then forgotten.
CONTROL const char *stub_lines(int32_t violations) {
    State &s = state();
    s.text.clear();
    for (const std::string &line : violations ? s.violations : s.record)
        s.text += line + "\n";
    (violations ? s.violations : s.record).clear();
    return s.text.c_str();
}

// A kernel: all pages that it uses have to be on the device, unless a move of them failed or it may read them at home.
CONTROL void stub_kernel(const void *data, uint64_t n, void *stream, int32_t anywhere) {
    const std::lock_guard<std::recursive_mutex> lock(state().one);
    const cudaError_t error = touch("a kernel", data, n, number(stream), [anywhere](Page &page) {
        if (page.missed)
            page.place = state().device;
        if (!anywhere && page.place < 0)
            violation("a kernel uses a page that is not on the device");
    });
    if (error != cudaSuccess)
        violation("a kernel uses what is no managed memory");
    state().last = cudaSuccess;
}

// The host reads, which draws pages home.
CONTROL void stub_host(const void *data, uint64_t n) {
    const std::lock_guard<std::recursive_mutex> lock(state().one);
    touch("the host", data, n, kHostClock, [](Page &page) { page.place = kHost; });
}

// Place of the pages of a range: device, -1 host, -2 none, -3 several.
CONTROL int32_t stub_place(const void *data, uint64_t n) {
    std::set<int> places;
    for (uint64_t p = number(data) / kPage; p <= (number(data) + n - 1) / kPage; ++p)
        places.insert(state().pages[p].place);
    return places.size() == 1 ? *places.begin() : -3;
}

// A DLManagedTensor for the end of the process, when the library is unloaded: its deleter runs after the exit handlers, and
// what was called from then on is written to the file NF4LORA_STUB_LOG.
static void *kept = nullptr;

CONTROL void stub_keep(void *tensor) { kept = tensor; }

__attribute__((destructor)) static void unloaded() {
    const char *const path = std::getenv("NF4LORA_STUB_LOG");
    if (!path)
        return;
    State &s = state();
    s.record.clear();
    if (kept)
        (*reinterpret_cast<void (**)(void *)>(static_cast<char *>(kept) + 56))(kept);
    if (FILE *const file = std::fopen(path, "w")) {
        for (const std::string &line : s.record)
            std::fprintf(file, "%s\n", line.c_str());
        std::fprintf(file, "%zu held\n", s.allocations.size());
        std::fclose(file);
    }
}
