// The inside of the machine, shared by runtime.cpp, async.cpp and checker.cpp. Kernels and verbs see runtime.h only.
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

#if defined(CUDA_ON_HOST_CHECKER)
#define CUDA_ON_HOST_CHECKED 1
#else
#define CUDA_ON_HOST_CHECKED 0
#endif

namespace cuda_on_host {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kNamedBarriers = 16;

struct Block;
struct Thread;

// What a release publishes and an acquire takes over; the checker fills it, other builds keep it empty.
struct Published;
using Sync = std::shared_ptr<Published>;

// A stack and the place where it stopped.
struct Context {
    void *sp = nullptr;
    char *stack = nullptr;
    size_t bytes = 0;
    void *fake_stack = nullptr;  // AddressSanitizer's
};

// Asynchronous work in the order of its issue: `ends` closes the committed groups. In eager schedules the work is null,
// as it has landed; the groups are kept all the same, so that a missing wait is found in every schedule.
struct AsyncQueue {
    struct Work {
        std::function<void()> land;
        const char *site;
    };
    std::deque<Work> works;
    std::deque<size_t> ends;  // counted since the start of the thread or warp
    size_t issued = 0, landed = 0;
};

struct Thread {
    uint3 index = {};
    unsigned id = 0;  // linear, in the block
    Block *block = nullptr;
    Context *context = nullptr;  // null until it first runs: it takes over the stack of one that ended, where it can
    bool alive = false;
    bool waits = false;
    const char *site = nullptr;  // where it waits
    const char *what = nullptr;  // for what
    bool (*ready)(void *) = nullptr;
    void *ready_arg = nullptr;
    unsigned polls = 0;
    Votes votes = {};  // of the last barrier
    std::unique_ptr<AsyncQueue> copies;
};

struct Barrier {
    unsigned threads = 0;  // 0: all that are alive
    unsigned arrived = 0;
    unsigned votes = 0;
    const char *site = nullptr;
    std::vector<Thread *> waiting;
    Sync sync;
};

struct Meeting {
    unsigned mask, here;
    const char *site;
    void *lanes[kWarpLanes];
};

struct Warp {
    unsigned lanes = 0, alive = 0;  // masks: those the block has, those that have not ended
    std::vector<Meeting> meetings;
    std::unique_ptr<AsyncQueue> matrix;
};

struct MBarrier {
    unsigned count = 0, pending = 0, phase = 0;
    int64_t bytes = 0;  // expected and not yet landed; below zero while a copy is ahead of its expect_tx
};

struct BulkCopy {
    char *to;
    const char *from;
    uint32_t bytes;
    uint64_t *barrier;
    Thread *issuer;
    const char *site;
    Sync before;  // what the issuer knew
};

struct Block {
    uint3 index = {};
    unsigned linear = 0;
    char *shared = nullptr;
    unsigned alive = 0;
    unsigned open_barriers = 0;  // of those that wait for all that are alive
    Barrier barriers[kNamedBarriers];
    std::vector<Warp> warps;
    Thread *threads = nullptr;
    std::unordered_map<uint64_t *, MBarrier> mbarriers;
    std::vector<BulkCopy> bulk;
};

struct Machine {
    dim3 grid, block;
    unsigned threads = 0;  // of a block
    size_t shared_bytes = 0;
    const std::function<void()> *body = nullptr;
    std::string kernel;
    std::vector<Block> blocks;  // the resident ones
    Thread *current = nullptr;
    int quiet = 0;  // above 0: the machine's own work is under way, loads and stores are not the kernel's
    uint64_t random = 0;
    bool resident = false;
    uint32_t seed = 0;
    std::string error;
};
extern Machine machine;

// While it lives, instrumented code is at work for the machine, not for the kernel.
struct Quiet {
    Quiet() { ++machine.quiet; }
    ~Quiet() { --machine.quiet; }
};

[[noreturn]] void fail_as(const Thread &who, const char *kind, const char *site, const char *detail, ...)
    __attribute__((format(printf, 4, 5)));
void wait_until_as(const char *what, bool (*ready)(void *), void *arg, const char *site);
uint64_t next_random();
bool inside_shared(const Block &block, const void *p, size_t bytes);

// async.cpp
bool land_one_bulk_copy();
void async_thread_ends(Thread &thread);
void async_warp_ends(Thread &last, Warp &warp);
void async_block_ends(Thread &last, Block &block);

// checker.cpp: the order of memory accesses, told where threads meet. No-ops without the checker.
#if CUDA_ON_HOST_CHECKED
void check_launch(const void *arguments, size_t bytes);
void check_block(Block &block);
void check_block_ends(Block &block);
void check_barrier(Block &block);                                // all that are alive have met
void check_meeting(Block &block, unsigned warp, unsigned mask);  // the lanes have met
void check_release(Thread &thread, Sync &sync);                  // adds what the thread knows
void check_acquire(Thread &thread, const Sync &sync);
void check_release_at(Thread &thread, const void *p);  // the same, by the address that threads synchronize on
void check_acquire_at(Thread &thread, const void *p);
void check_bulk_copy(const BulkCopy &copy);  // lands, on behalf of the copy engine
void check_access(const void *p, size_t bytes, Access how, const char *site);
#else
inline void check_launch(const void *, size_t) {}
inline void check_block(Block &) {}
inline void check_block_ends(Block &) {}
inline void check_barrier(Block &) {}
inline void check_meeting(Block &, unsigned, unsigned) {}
inline void check_release(Thread &, Sync &) {}
inline void check_acquire(Thread &, const Sync &) {}
inline void check_release_at(Thread &, const void *) {}
inline void check_acquire_at(Thread &, const void *) {}
inline void check_bulk_copy(const BulkCopy &) {}
inline void check_access(const void *, size_t, Access, const char *) {}
#endif

}  // namespace cuda_on_host
