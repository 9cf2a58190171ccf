// Fibers, schedules, meeting points and launches.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <utility>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "machine.h"

#if !defined(__x86_64__)
#error "tests/cuda_on_host switches fibers with x86-64 code: write cuda_on_host_switch for this processor"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_HOST_ADDRESS 1
#else
#define CUDA_ON_HOST_ADDRESS 0
#endif

// Saves what a call must preserve, keeps the stack pointer in *from, and goes on where `to` was saved.
extern "C" void cuda_on_host_switch(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .hidden cuda_on_host_switch
    .globl cuda_on_host_switch
    .type cuda_on_host_switch, @function
cuda_on_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_on_host_switch, . - cuda_on_host_switch
)");

namespace cuda_on_host {

Machine machine;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 256 << 10;   // touched pages only take memory
constexpr size_t kGuardedStacks = 1 << 14;  // two mappings each, of the 65,530 that Linux allows a process
constexpr size_t kKeptStacks = 1 << 12;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kSharedAlignment = 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr uint64_t kMaxYields = 1 << 17, kMaxYieldsPerThread = 1 << 10;  // while nothing else happens
constexpr uint64_t kMaxYieldsInAll = 1 << 28;                            // for loops that also meet at barriers
constexpr unsigned kPollsPerYield = 16;
constexpr unsigned kSwitchesPerLook = 64;  // at the flags of wait_until, while other threads can run

std::mutex g_one_launch;
std::string g_launches;  // since cuda_on_host_launches was last called
bool g_resident = false;
uint32_t g_schedule = 0;

// ---- the threads that can run, in the order the schedule wants
class ReadyThreads {
  public:
    void start(size_t threads, size_t warps, uint32_t seed) {
        in_order_ = seed == 0;
        greedy_ = seed & 1;
        if (greedy_) {
            lanes_.assign(warps, 0);
            ranked_.assign((warps + 63) / 64, 0);
            warp_of_rank_.resize(warps);
            rank_of_warp_.resize(warps);
            for (size_t w = 0; w < warps; ++w)
                warp_of_rank_[w] = static_cast<unsigned>(w);
            for (size_t w = warps; w > 1; --w)
                std::swap(warp_of_rank_[w - 1], warp_of_rank_[next_random() % w]);
            for (size_t w = 0; w < warps; ++w)
                rank_of_warp_[warp_of_rank_[w]] = static_cast<unsigned>(w);
        } else {
            size_t room = 1;
            while (room < threads)
                room *= 2;
            if (ring_.size() < room)
                ring_.resize(room);
        }
        head_ = tail_ = 0;
        warp_ = 0;
    }

    // The base of all threads, and how many a block has: a warp never spans blocks.
    void lay_out(Thread *threads, unsigned per_block) {
        threads_ = threads;
        per_block_ = per_block;
        warps_per_block_ = (per_block + kWarpLanes - 1) / kWarpLanes;
    }

    void push(Thread *t) {
        if (!greedy_) {
            ring_[tail_++ & (ring_.size() - 1)] = t;
            return;
        }
        const size_t block = static_cast<size_t>(t - threads_) / per_block_,
                     warp = block * warps_per_block_ + t->id / kWarpLanes;
        lanes_[warp] |= 1u << t->id % kWarpLanes;
        const unsigned rank = rank_of_warp_[warp];
        ranked_[rank / 64] |= uint64_t{1} << rank % 64;
    }

    Thread *pop() {
        if (greedy_)
            return pop_of_first_warp();
        if (head_ == tail_)
            return nullptr;
        const size_t mask = ring_.size() - 1;
        if (!in_order_)
            std::swap(ring_[head_ & mask], ring_[(head_ + next_random() % (tail_ - head_)) & mask]);
        return ring_[head_++ & mask];
    }

    bool greedy() const { return greedy_; }

  private:
    // The warp that ran goes on; where it cannot, the first of the seed's order that can.
    Thread *pop_of_first_warp() {
        if (!lanes_[warp_]) {
            size_t i = 0;
            while (i < ranked_.size() && !ranked_[i])
                ++i;
            if (i == ranked_.size())
                return nullptr;
            warp_ = warp_of_rank_[i * 64 + static_cast<size_t>(__builtin_ctzll(ranked_[i]))];
        }
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(lanes_[warp_])), rank = rank_of_warp_[warp_];
        lanes_[warp_] &= lanes_[warp_] - 1;
        if (!lanes_[warp_])
            ranked_[rank / 64] &= ~(uint64_t{1} << rank % 64);
        return threads_ + warp_ / warps_per_block_ * per_block_ + warp_ % warps_per_block_ * kWarpLanes + lane;
    }

    bool in_order_ = true, greedy_ = false;
    std::vector<Thread *> ring_;
    size_t head_ = 0, tail_ = 0;
    // One warp as far as it can:
    Thread *threads_ = nullptr;
    size_t per_block_ = 1, warps_per_block_ = 1;
    std::vector<unsigned> lanes_, warp_of_rank_, rank_of_warp_;
    std::vector<uint64_t> ranked_;  // by rank, a bit for each warp that has lanes here
    size_t warp_ = 0;               // which ran last
};

ReadyThreads g_ready;
std::vector<Thread> g_threads;
std::vector<Thread *> g_waiters;  // in wait_until
std::vector<Thread *> g_parked;   // yielded
uint64_t g_yields = 0;            // since a thread ended, a barrier was complete, a condition held or a copy landed
uint64_t g_yields_in_all = 0;
unsigned g_switches = 0;
size_t g_alive = 0;

// ---- contexts
Context g_main;
Context *g_running = &g_main;
std::deque<Context> g_contexts;
std::vector<Context *> g_idle;

void context_entry();

void *fresh_stack_pointer(const Context &context, size_t number) {
    // Stacks lie a power of two apart: without a shift of each, their tops would share a few cache sets.
    const size_t shift = number * 192 % kPage;
    void **sp = reinterpret_cast<void **>(context.stack + context.bytes - 64 - shift);
    sp -= reinterpret_cast<uintptr_t>(sp) / sizeof *sp % 2 ? 1 : 2;
    *--sp = nullptr;  // whom context_entry would return to: nobody; leaves the stack as a call does
    *--sp = reinterpret_cast<void *>(context_entry);
    for (int saved = 0; saved < 6; ++saved)
        *--sp = nullptr;
    return sp;
}

bool make_context() {
    void *memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    if (g_contexts.size() < kGuardedStacks)
        mprotect(memory, kPage, PROT_NONE);
    g_contexts.emplace_back();
    Context &made = g_contexts.back();
    made.stack = static_cast<char *>(memory) + kPage;
    made.bytes = kStackBytes;
    made.sp = fresh_stack_pointer(made, g_contexts.size());
    g_idle.push_back(&made);
    return true;
}

Context *take_context() {
    if (g_idle.empty() && !make_context())
        fail("out of memory", "its start", "no stack beside the %zu of other threads", g_contexts.size());
    Context *taken = g_idle.back();
    g_idle.pop_back();
    return taken;
}

// Whatever is on the stacks is dropped, and most of them are given back after a launch that needed very many.
void reset_contexts() {
    g_idle.clear();
#if CUDA_ON_HOST_ADDRESS
    for (const Context &context : g_contexts)
        __asan_unpoison_memory_region(context.stack, context.bytes);
#endif
    for (; g_contexts.size() > kKeptStacks; g_contexts.pop_back())
        munmap(g_contexts.back().stack - kPage, kPage + kStackBytes);
    size_t number = 0;
    for (Context &context : g_contexts) {
        context.fake_stack = nullptr;
        context.sp = fresh_stack_pointer(context, ++number);
        g_idle.push_back(&context);
    }
}

// AddressSanitizer learns here where the launching thread's stack is, from the first fiber that left it.
inline void arrived([[maybe_unused]] void *fake_stack) {
#if CUDA_ON_HOST_ADDRESS
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    if (!g_main.stack) {
        g_main.stack = static_cast<char *>(const_cast<void *>(bottom));
        g_main.bytes = bytes;
    }
#endif
}

void jump(Context &from, Context &to) {
    g_running = &to;
#if CUDA_ON_HOST_ADDRESS
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#endif
    cuda_on_host_switch(&from.sp, to.sp);
    arrived(from.fake_stack);
}

void run(Thread *next) {
    if (!next->context)
        next->context = take_context();
    machine.current = next;
    if (next->context != g_running)
        jump(*g_running, *next->context);
}

[[noreturn]] void abandon() {
    machine.current = nullptr;
    jump(*g_running, g_main);
    __builtin_unreachable();
}

// ---- who runs next
void make_ready(Thread *t) {
    t->waits = false;
    g_ready.push(t);
}

bool look_at_flags() {
    Quiet quiet;
    size_t left = 0;
    for (Thread *t : g_waiters)
        if (t->ready(t->ready_arg))
            make_ready(t);
        else
            g_waiters[left++] = t;
    const bool any = left < g_waiters.size();
    g_waiters.resize(left);
    if (any)
        g_yields = 0;
    return any;
}

bool unpark() {
    if (g_parked.empty())
        return false;
    if (g_yields > kMaxYields + kMaxYieldsPerThread * g_alive || g_yields_in_all > kMaxYieldsInAll)
        fail_as(*g_parked[0], "no progress", g_parked[0]->site,
                "%zu threads look again and again, and no other can run", g_parked.size());
    for (Thread *t : g_parked)
        make_ready(t);
    g_parked.clear();
    return true;
}

Thread *next_thread() {
    if (!g_waiters.empty() && !g_ready.greedy() && ++g_switches % kSwitchesPerLook == 0)
        look_at_flags();
    for (;;) {
        if (Thread *t = g_ready.pop())
            return t;
        if (!g_waiters.empty() && look_at_flags())
            continue;
        if (land_one_bulk_copy())
            g_yields = 0;
        else if (!unpark())
            return nullptr;
    }
}

[[noreturn]] void deadlock() {
    const Thread *first = nullptr;
    size_t waiting = 0, shown = 0;
    std::string others;
    for (const Thread &t : g_threads) {
        if (!t.alive || !t.waits)
            continue;
        ++waiting;
        if (!first)
            first = &t;
        else if (shown < 3 && (t.site != first->site || t.what != first->what) &&
                 others.find(t.site) == std::string::npos) {
            others += "; thread " + std::to_string(t.id) + " waits for " + t.what + " at " + t.site;
            ++shown;
        }
    }
    fail_as(*first, "deadlock", first->site, "waits for %s, and so do all %zu threads left%s", first->what, waiting,
            others.c_str());
}

void run_next() {
    Thread *next = next_thread();
    if (!next)
        deadlock();
    run(next);
}

void wait_for(const char *what, const char *site) {
    Thread &me = *machine.current;
    me.waits = true;
    me.what = what;
    me.site = site;
    run_next();
}

// ---- barriers
void complete(Block &block, Barrier &barrier) {
    const Votes votes{barrier.arrived, barrier.votes};
    g_yields = 0;
    if (!barrier.threads) {
        --block.open_barriers;
        check_barrier(block);
    }
    for (Thread *t : barrier.waiting) {
        if (barrier.threads)
            check_acquire(*t, barrier.sync);
        t->votes = votes;
        make_ready(t);
    }
    barrier.waiting.clear();
    barrier.sync.reset();
    barrier.arrived = barrier.votes = barrier.threads = 0;
}

// True where the barrier is now complete.
bool arrive(Block &block, unsigned id, unsigned threads, bool predicate, const char *site) {
    Thread &me = *machine.current;
    if (id >= kNamedBarriers)
        fail("bad barrier", site, "barrier %u of %u", id, kNamedBarriers);
    if (threads % kWarpLanes)
        fail("bad barrier", site, "barrier %u counts %u threads, which are not whole warps", id, threads);
    Barrier &barrier = block.barriers[id];
    if (!barrier.arrived) {
        barrier.threads = threads;
        barrier.site = site;
        block.open_barriers += !threads;
    } else if (barrier.threads != threads) {
        fail("bad barrier", site, "barrier %u counts %u threads here and %u at %s", id, threads, barrier.threads,
             barrier.site);
    } else if (!threads && barrier.site != site && strcmp(barrier.site, site)) {
        fail("divergent barrier", site, "thread %u waits at %s", barrier.waiting[0]->id, barrier.site);
    }
    if (threads)
        check_release(me, barrier.sync);
    barrier.votes += predicate;
    return ++barrier.arrived == (threads ? threads : block.alive);
}

// ---- the life of a thread
void begin_thread(Thread &t) {
    t.context = nullptr;
    t.alive = true;
    t.waits = false;
    t.polls = 0;
}

void begin_block(Block &block, unsigned linear) {
    block.linear = linear;
    block.index = uint3{linear % machine.grid.x, linear / machine.grid.x % machine.grid.y,
                        linear / machine.grid.x / machine.grid.y};
    block.alive = machine.threads;
    memset(block.shared, 0xFF, machine.shared_bytes);  // NaN: a read of what nobody wrote shows in the results
    for (Warp &warp : block.warps)
        warp.alive = warp.lanes;
    block.mbarriers.clear();
    check_block(block);
    for (unsigned id = 0; id < machine.threads; ++id) {
        begin_thread(block.threads[id]);
        g_ready.push(block.threads + id);
    }
    g_alive += machine.threads;
}

void end_thread(Thread &t) {
    Block &block = *t.block;
    Warp &warp = block.warps[t.id / kWarpLanes];
    const unsigned bit = 1u << t.id % kWarpLanes;
    async_thread_ends(t);
    for (const Meeting &meeting : warp.meetings)
        if (meeting.mask & bit)
            fail_as(t, "bad warp mask", meeting.site,
                    "the mask 0x%08x names this lane, which ends while others wait for it", meeting.mask);
    warp.alive &= ~bit;
    if (!warp.alive)
        async_warp_ends(t, warp);
    t.alive = false;
    g_yields = 0;
    --g_alive;
    if (--block.alive == 0) {
        async_block_ends(t, block);
        check_block_ends(block);
    } else if (block.open_barriers) {
        for (Barrier &barrier : block.barriers)
            if (barrier.arrived && !barrier.threads && barrier.arrived == block.alive)
                complete(block, barrier);
    }
}

// Every stack's first and only frame: one CUDA thread after another, as long as there are some that have not begun.
#if CUDA_ON_HOST_ADDRESS
__attribute__((no_sanitize("address")))
#endif
void context_entry() {
    arrived(nullptr);
    for (;;) {
        (*machine.body)();
        end_thread(*machine.current);
        Context *mine = g_running;
        Thread *next = next_thread();
        if (next && !next->context) {
            next->context = mine;
            machine.current = next;
            continue;
        }
        if (!next && g_alive)
            deadlock();
        g_idle.push_back(mine);
        if (next) {
            run(next);
        } else {
            machine.current = nullptr;
            jump(*mine, g_main);
        }
    }
}

// ---- faults of kernel code: the launch is abandoned and says where, the process goes on
#if !CUDA_ON_HOST_ADDRESS
constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction g_before[3];

void record(const Thread &who, const char *kind, const char *site, const char *detail);

void on_fault(int signal, siginfo_t *info, void *raw) {
    Thread *me = machine.current;
    if (!me) {  // not a kernel's: happens again under the handlers that were there before
        for (int i = 0; i < 3; ++i)
            sigaction(kFaults[i], &g_before[i], nullptr);
        return;
    }
    greg_t *registers = static_cast<ucontext_t *>(raw)->uc_mcontext.gregs;
    const uintptr_t pc = static_cast<uintptr_t>(registers[REG_RIP]);
    char site[512], detail[128];
    Dl_info library;
    if (dladdr(reinterpret_cast<void *>(pc), &library))
        snprintf(site, sizeof site, "%s+0x%zx", library.dli_fname,
                 pc + 1 - reinterpret_cast<uintptr_t>(library.dli_fbase));
    else
        snprintf(site, sizeof site, "0x%zx", pc);
    const char *address = static_cast<char *>(info->si_addr), *stack = me->context->stack;
    const bool overflow = signal == SIGSEGV && address >= stack - kPage && address < stack;
    snprintf(detail, sizeof detail,
             signal == SIGFPE ? "an integer division has no result"
             : overflow       ? "more than %zu bytes of local memory"
                              : "address %#zx",
             overflow ? kStackBytes : reinterpret_cast<size_t>(address));
    record(*me, overflow ? "stack overflow" : signal == SIGFPE ? "arithmetic fault" : "memory fault", site, detail);
    machine.current = nullptr;
    // On return from the handler the launch's context goes on, as if abandon() had been called.
    static void *dropped;
    registers[REG_RIP] = reinterpret_cast<greg_t>(cuda_on_host_switch);
    registers[REG_RDI] = reinterpret_cast<greg_t>(&dropped);
    registers[REG_RSI] = reinterpret_cast<greg_t>(g_main.sp);
    registers[REG_RSP] = reinterpret_cast<greg_t>(g_main.sp) - 512;
    g_running = &g_main;
}

// While one lives, on_fault is in place, on a stack of its own as that of the fiber may be full.
class FaultHandlers {
  public:
    FaultHandlers() {
        static char stack[64 << 10];
        stack_t mine = {};
        mine.ss_sp = stack;
        mine.ss_size = sizeof stack;
        sigaltstack(&mine, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; ++i)
            sigaction(kFaults[i], &action, &g_before[i]);
    }
    ~FaultHandlers() {
        for (int i = 0; i < 3; ++i)
            sigaction(kFaults[i], &g_before[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
    FaultHandlers(const FaultHandlers &) = delete;
    void operator=(const FaultHandlers &) = delete;

  private:
    stack_t stack_before_ = {};
};
#else
struct FaultHandlers {};  // AddressSanitizer has its own
#endif

// ---- shared memory of the resident blocks; its slack is poisoned, so that AddressSanitizer sees the exact end
class SharedMemory {
  public:
    char *of(size_t block) { return memory_ + block * stride_; }
    void start(size_t blocks, size_t bytes) {
        const size_t stride = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment + kSharedAlignment;
        poison(false);
        if (stride * blocks > room_) {
            if (room_)
                munmap(memory_, room_);
            room_ = stride * blocks;
            void *memory =
                mmap(nullptr, room_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            memory_ = memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
            room_ = memory_ ? room_ : 0;
        }
        stride_ = stride, blocks_ = room_ ? blocks : 0, bytes_ = bytes;
        poison(true);
    }
    bool failed() const { return !memory_; }

  private:
    void poison([[maybe_unused]] bool on) {
#if CUDA_ON_HOST_ADDRESS
        for (size_t block = 0; block < blocks_; ++block)
            if (on)
                __asan_poison_memory_region(of(block) + bytes_, stride_ - bytes_);
            else
                __asan_unpoison_memory_region(of(block), stride_);
#endif
    }
    char *memory_ = nullptr;
    size_t room_ = 0, stride_ = 0, blocks_ = 0, bytes_ = 0;
};
SharedMemory g_shared;

// ---- launching
std::string formatted(const char *format, va_list values) {
    char text[1536];
    vsnprintf(text, sizeof text, format, values);
    return text;
}

void set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void set_error(const char *format, ...) {
    va_list values;
    va_start(values, format);
    machine.error = formatted(format, values);
    va_end(values);
}

// The first error stays.
void record(const Thread &who, const char *kind, const char *site, const char *detail) {
    const uint3 b = who.block->index;
    if (machine.error.empty())
        set_error("%s at %s, block (%u,%u,%u) thread %u: %s (kernel %s)", kind, site ? site : "?", b.x, b.y, b.z,
                  who.id, detail, machine.kernel.c_str());
}

bool legal(dim3 grid, dim3 block, size_t shared_bytes) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    const char *why = nullptr;
    if (!threads || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads)
        why = "a block has 1 to 1024 threads, at most 1024 x 1024 x 64";
    else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        why = "a grid has at least one block, and at most 2147483647 x 65535 x 65535";
    else if (shared_bytes > kMaxShared)
        why = "a block has at most 227 KiB of shared memory";
    else if (blocks > 0x7fffffffu)
        why = "the machine runs at most 2147483647 blocks";
    else if (CUDA_ON_HOST_CHECKED && blocks * (threads + 1) > 0x7fffffffu)
        why = "the checker numbers at most 2147483647 threads";
    if (why)
        set_error("bad launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of shared memory: %s (kernel %s)", grid.x,
                  grid.y, grid.z, block.x, block.y, block.z, shared_bytes, why, machine.kernel.c_str());
    return !why;
}

void lay_out(size_t blocks) {
    const unsigned warps = (machine.threads + kWarpLanes - 1) / kWarpLanes;
    g_threads.clear();
    g_threads.resize(blocks * machine.threads);
    machine.blocks.clear();
    machine.blocks.resize(blocks);
    for (size_t b = 0; b < blocks; ++b) {
        Block &block = machine.blocks[b];
        block.shared = g_shared.of(b);
        block.threads = g_threads.data() + b * machine.threads;
        block.warps.resize(warps);
        for (unsigned w = 0; w < warps; ++w) {
            const unsigned lanes = machine.threads - w * kWarpLanes;
            block.warps[w].lanes = lanes >= kWarpLanes ? ~0u : (1u << lanes) - 1;
        }
        for (unsigned id = 0; id < machine.threads; ++id) {
            Thread &t = block.threads[id];
            t.id = id;
            t.block = &block;
            t.index = uint3{id % machine.block.x, id / machine.block.x % machine.block.y,
                            id / machine.block.x / machine.block.y};
        }
    }
    g_ready.lay_out(g_threads.data(), machine.threads);
}

uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b)
        a = std::exchange(b, a % b);
    return a;
}

void run_grid() {
    const uint64_t total = uint64_t{machine.grid.x} * machine.grid.y * machine.grid.z;
    const uint64_t resident = machine.resident ? total : 1;
    const uint64_t threads = resident * machine.threads;
    g_shared.start(resident, machine.shared_bytes);
    if (g_shared.failed() || (g_idle.empty() && !make_context())) {
        set_error("out of memory: %zu resident blocks of %zu bytes of shared memory", size_t{resident},
                  machine.shared_bytes);
        return;
    }
    lay_out(resident);
    // Blocks in order, or under a seed in a scattered one: first + i * stride covers them all.
    uint64_t first = 0, stride = 1;
    if (machine.seed) {
        first = next_random() % total;
        stride = next_random() % total | 1;
        while (greatest_common_divisor(stride, total) != 1)
            stride += 2;
    }
    for (uint64_t done = 0; done < total && machine.error.empty(); done += resident) {
        g_ready.start(threads, resident * machine.blocks[0].warps.size(), machine.seed);
        for (uint64_t b = 0; b < resident; ++b)
            begin_block(machine.blocks[b], static_cast<unsigned>((first + (done + b) * stride) % total));
        Thread *next = next_thread();
        next->context = take_context();
        machine.current = next;
        jump(g_main, *next->context);
    }
}

}  // namespace

uint64_t next_random() {
    machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
    return machine.random >> 33;
}

bool inside_shared(const Block &block, const void *p, size_t bytes) {
    const char *first = static_cast<const char *>(p);
    return first >= block.shared && first + bytes <= block.shared + machine.shared_bytes;
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_dim() { return machine.block; }
dim3 grid_dim() { return machine.grid; }
unsigned lane() { return machine.current->id % kWarpLanes; }
unsigned warp() { return machine.current->id / kWarpLanes; }
unsigned thread() { return machine.current->id; }
char *shared_memory() { return machine.current->block->shared; }
size_t shared_bytes() { return machine.shared_bytes; }

void fail(const char *kind, const char *site, const char *detail, ...) {
    va_list values;
    va_start(values, detail);
    const std::string text = formatted(detail, values);
    va_end(values);
    fail_as(*machine.current, kind, site, "%s", text.c_str());
}

void fail_as(const Thread &who, const char *kind, const char *site, const char *detail, ...) {
    va_list values;
    va_start(values, detail);
    record(who, kind, site, formatted(detail, values).c_str());
    va_end(values);
    abandon();
}

void barrier_sync(unsigned id, unsigned threads, const char *site) {
    Block &block = *machine.current->block;
    Barrier &barrier = block.barriers[id % kNamedBarriers];
    const bool last = arrive(block, id, threads, false, site);
    if (last) {
        if (threads)
            check_acquire(*machine.current, barrier.sync);
        complete(block, barrier);
    } else {
        barrier.waiting.push_back(machine.current);
        wait_for(threads ? "a named barrier" : "__syncthreads", site);
    }
}

void barrier_arrive(unsigned id, unsigned threads, const char *site) {
    Block &block = *machine.current->block;
    if (!threads)
        fail("bad barrier", site, "an arrival needs a count of threads");
    if (arrive(block, id, threads, false, site))
        complete(block, block.barriers[id]);
}

Votes barrier_vote(bool predicate, const char *site) {
    Thread &me = *machine.current;
    Barrier &barrier = me.block->barriers[0];
    if (arrive(*me.block, 0, 0, predicate, site)) {
        const Votes votes{barrier.arrived, barrier.votes};
        complete(*me.block, barrier);
        return votes;
    }
    barrier.waiting.push_back(&me);
    wait_for("__syncthreads", site);
    return me.votes;
}

void warp_meet(unsigned mask, void *mine, void (*last)(void **lanes, unsigned mask), const char *site, bool memory) {
    Thread &me = *machine.current;
    Warp &warp = me.block->warps[me.id / kWarpLanes];
    const unsigned lane = me.id % kWarpLanes, bit = 1u << lane;
    mask &= warp.lanes;
    if (!(mask & bit))
        fail("bad warp mask", site, "the mask 0x%08x does not name the calling lane %u", mask, lane);
    if (mask & ~warp.alive)
        fail("bad warp mask", site, "the mask 0x%08x names lane %d, which has ended", mask,
             __builtin_ctz(mask & ~warp.alive));
    Meeting *meeting = nullptr;
    for (Meeting &open : warp.meetings)
        if (open.mask & mask)
            meeting = &open;
    if (!meeting) {
        warp.meetings.push_back({mask, 0, site, {}});
        meeting = &warp.meetings.back();
    } else if (meeting->mask != mask || (meeting->site != site && strcmp(meeting->site, site))) {
        fail("divergent warp operation", site,
             "lane %u with the mask 0x%08x, while lane %d waits at %s with the mask 0x%08x", lane, mask,
             __builtin_ctz(meeting->here), meeting->site, meeting->mask);
    }
    meeting->lanes[lane] = mine;
    meeting->here |= bit;
    if (meeting->here != mask) {
        wait_for("the other lanes of its warp", site);
        return;
    }
    if (last) {
        Quiet quiet;
        last(meeting->lanes, mask);
    }
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
    if (memory)
        check_meeting(*me.block, me.id / kWarpLanes, mask);
    Thread *lanes = &me - lane;
    for (unsigned others = mask & ~bit; others; others &= others - 1)
        make_ready(lanes + __builtin_ctz(others));
}

void wait_until(bool (*ready)(void *), void *arg, const char *site) { wait_until_as("a condition", ready, arg, site); }

void wait_until_as(const char *what, bool (*ready)(void *), void *arg, const char *site) {
    Thread &me = *machine.current;
    {
        Quiet quiet;
        if (ready(arg))
            return;
    }
    me.ready = ready;
    me.ready_arg = arg;
    g_waiters.push_back(&me);
    wait_for(what, site);
}

void yield(const char *site) {
    machine.current->site = site;
    ++g_yields;
    ++g_yields_in_all;
    g_parked.push_back(machine.current);
    run_next();
}

void poll(const char *site) {
    if (!machine.quiet && ++machine.current->polls % kPollsPerYield == 0)
        yield(site);
}

void access(const void *p, size_t bytes, Access how, const char *site) {
    check_access(p, bytes, how, site);
    if (how == Access::kAtomic)
        poll(site);
}

static void note_launch(const void *arguments) {
    void *kernel = nullptr;
    Dl_info library;
    if (arguments)
        memcpy(&kernel, arguments, sizeof kernel);
    if (!kernel || !dladdr(kernel, &library))
        return;
    char line[128];
    snprintf(line, sizeof line, "%zx %u %u %u %d %zu\n",
             static_cast<size_t>(static_cast<char *>(kernel) - static_cast<char *>(library.dli_fbase)), machine.grid.x,
             machine.grid.y, machine.grid.z, static_cast<int>(machine.threads), machine.shared_bytes);
    if (g_launches.size() > 1 << 22)  // nobody reads them
        g_launches.clear();
    g_launches += line;
}

const char *launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &body, const char *kernel,
                   const void *arguments, size_t argument_bytes) {
    std::lock_guard<std::mutex> one(g_one_launch);
    machine.error.clear();
    machine.kernel = kernel;
    if (machine.kernel.front() == '(')  // one with commas in its template arguments
        machine.kernel = machine.kernel.substr(1, machine.kernel.size() - 2);
    if (!legal(grid, block, shared_bytes))
        return machine.error.c_str();
    machine.grid = grid;
    machine.block = block;
    machine.threads = block.x * block.y * block.z;
    machine.shared_bytes = shared_bytes;
    machine.body = &body;
    machine.resident = g_resident;
    machine.seed = g_schedule;
    machine.random = g_schedule * uint64_t{0x9E3779B97F4A7C15} + 1;
    g_main = Context{};
    g_running = &g_main;
    g_yields = g_yields_in_all = g_switches = 0;
    check_launch(arguments, argument_bytes);
    note_launch(arguments);
    {
        FaultHandlers handlers;
        (void)handlers;
        run_grid();
    }
    machine.current = nullptr;
    if (machine.error.empty()) {
        if (g_contexts.size() > kKeptStacks)
            reset_contexts();
        return nullptr;
    }
    machine.quiet = 0;
    g_alive = 0;
    g_waiters.clear();
    g_parked.clear();
    reset_contexts();
    return machine.error.c_str();
}

}  // namespace cuda_on_host

extern "C" {
void cuda_on_host_schedule(uint32_t seed) { cuda_on_host::g_schedule = seed; }
void cuda_on_host_resident(int32_t on) { cuda_on_host::g_resident = on != 0; }
const char *cuda_on_host_launches() {
    static std::string told;
    std::lock_guard<std::mutex> one(cuda_on_host::g_one_launch);
    told.swap(cuda_on_host::g_launches);
    cuda_on_host::g_launches.clear();
    return told.c_str();
}
const char *cuda_on_host_build() {
    return CUDA_ON_HOST_CHECKED ? "checker" : CUDA_ON_HOST_ADDRESS ? "address" : "plain";
}
}
