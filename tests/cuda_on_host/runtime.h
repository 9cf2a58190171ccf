// The machine that runs CUDA kernels on the CPU: one fiber a CUDA thread, one block (or all of them) at a time.
// cuda_on_host.h and verbs.h are written on top of these functions; kernels never see them.
//
// Every `site` is "file:line" of the kernel text. An error found while a kernel runs ends that launch, which then
// returns the message; no function here ends the process.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

#include <vector_types.h>

namespace cuda_on_host {

#define CUDA_ON_HOST_STRING_(text) #text
#define CUDA_ON_HOST_STRING(text) CUDA_ON_HOST_STRING_(text)
#define CUDA_ON_HOST_SITE __FILE__ ":" CUDA_ON_HOST_STRING(__LINE__)

// ---- who is asking (never instrumented, so that reading them is no memory access of the kernel). Constant: a CUDA
// thread keeps its answers for life, so the compiler may ask once.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_dim();
__attribute__((const)) dim3 grid_dim();
__attribute__((const)) unsigned lane();        // 0..31
__attribute__((const)) unsigned warp();        // in the block
__attribute__((const)) unsigned thread();      // linear, in the block
__attribute__((const)) char *shared_memory();  // of the block, 1024-byte aligned, 0xFF at the block's start
__attribute__((const)) size_t shared_bytes();

// ---- errors: records "kind at site, block (x,y,z) thread t: detail" and abandons the launch
[[noreturn]] void fail(const char *kind, const char *site, const char *detail, ...)
    __attribute__((format(printf, 3, 4)));

// ---- meeting points
void barrier_sync(unsigned id, unsigned threads, const char *site);    // threads 0: all that are alive (__syncthreads)
void barrier_arrive(unsigned id, unsigned threads, const char *site);  // bar.arrive: does not wait
// __syncthreads that also counts: of the threads that met, how many there were and of how many `predicate` held.
struct Votes {
    unsigned threads, in_favour;
    bool any() const { return in_favour > 0; }
    bool all() const { return in_favour == threads; }
};
Votes barrier_vote(bool predicate, const char *site);
// All lanes of `mask` meet; the last to come runs `last(lanes, mask)`, lanes[l] being lane l's `mine`. `memory`: the
// meeting also orders memory among the lanes (__syncwarp), which a shuffle alone does not. What `last` reads and writes
// is not checked. Lanes that the block does not have are dropped from the mask.
void warp_meet(unsigned mask, void *mine, void (*last)(void **lanes, unsigned mask), const char *site, bool memory);
// Blocks until ready(arg) holds; re-evaluated now and then, at the latest when no other thread can run. For flags in
// memory. What `ready` reads is not checked: tell the checker by access(…, Access::kAtomic) after it.
void wait_until(bool (*ready)(void *), void *arg, const char *site);
// A thread that only looks again later: __nanosleep, the body of a spin loop. It runs again when the others cannot.
void yield(const char *site);
// After an atomic or volatile access: yields now and then, so that a loop which only looks makes progress.
void poll(const char *site);

// ---- asynchronous work: lands at issue in eager schedules, and as late as the waits allow in the others
enum class Queue { kCopy, kMatrix };  // cp.async of one thread; wgmma of one warp
void async_issue(Queue queue, std::function<void()> work, const char *site);
void async_commit(Queue queue, const char *site);
void async_wait(Queue queue, unsigned groups_left, const char *site);  // 0: everything committed has landed
bool eager();  // this schedule lands asynchronous work at its earliest legal time

// ---- mbarriers (64 bits of shared memory, by address) and bulk copies that complete on them
void mbarrier_init(uint64_t *b, unsigned count, const char *site);
void mbarrier_inval(uint64_t *b, const char *site);
void mbarrier_arrive(uint64_t *b, unsigned expected_bytes, const char *site);  // arrive.expect_tx where bytes > 0
bool mbarrier_test(uint64_t *b, unsigned parity, const char *site);
void mbarrier_wait(uint64_t *b, unsigned parity, const char *site);
// Global -> shared; both 16-byte aligned, bytes a multiple of 16. Counts against b's expected bytes when it lands.
void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *b, const char *site);

// ---- what the checker is told of accesses made on a thread's behalf (asynchronous copies, ldmatrix, wgmma operands):
// bounds, alignment, initialisation and races like those of any load or store; no check in builds without the checker.
// kAtomic is an acquire and a release, and polls in every build.
enum class Access { kRead, kWrite, kAtomic };
void access(const void *p, size_t bytes, Access how, const char *site);

// ---- launching: null, or the first error's message (valid until the next launch in this process). The kernel may read
// `arguments`, which are its address, its copied arguments and what else `body` reads before it calls the kernel.
const char *launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &body, const char *kernel,
                   const void *arguments = nullptr, size_t argument_bytes = 0);

}  // namespace cuda_on_host

// ---- the C control surface, loaded with ctypes beside nf4lora_cuda_*
extern "C" {
// 0: threads in order. Bit 0: one warp runs as far as it can, else a random choice at every switch; bit 1: asynchronous
// work lands early. Other bits: more seed.
void cuda_on_host_schedule(uint32_t seed);
// 1: all blocks of a grid are resident at once and take turns, for kernels whose blocks wait for one another.
void cuda_on_host_resident(int32_t on);
// Device memory. Kernels may touch registered memory, their shared memory, stack, constants, arguments; nothing else.
// `written` 0: reading a byte of it before a kernel has written it is an error. Overlapping ones become one.
void cuda_on_host_register(const void *p, uint64_t bytes, int32_t written, const char *name);
void cuda_on_host_forget_all();
// "plain", "address" or "checker"
const char *cuda_on_host_build();
// After a launch of a checker build: one line "site kind accesses ratio" per access site of the kernel; kind is
// "global load", "global store", "shared load" or "shared store", ratio the sectors (global) or wavefronts (shared)
// moved over the ideal. Empty in other builds.
const char *cuda_on_host_profile();
// Of each launch since the last call: a line "kernel x y z threads shared", kernel as an offset into the library, x y z the
// grid, shared in bytes.
const char *cuda_on_host_launches();
}
