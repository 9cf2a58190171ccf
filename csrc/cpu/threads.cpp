// The pool is the OpenMP runtime that libtorch_cpu.so was linked with, asked by GOMP_parallel, which libgomp, libiomp5 and
// libomp all have. It is asked for no fewer threads than torch's own loops ask for: it ends those that are too many, and
// would start them again for torch. Threads of its own, for each call, has a process without torch, as a test of the
// threading alone, and a forked one, where the pool's are gone but the runtime would wait for them.
#include "threads.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <new>

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

namespace nf4lora {
namespace {

bool forked = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Pool {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread)();   // of the caller in its team
    int (*threads)();  // of a team of torch's
};

int find_torch(dl_phdr_info *library, size_t, void *found) {
    if (!library->dlpi_name || !strstr(library->dlpi_name, "libtorch_cpu."))
        return 0;
    *static_cast<const char **>(found) = library->dlpi_name;
    return 1;
}

template <class Function>
bool find(void *library, const char *name, Function &function) {
    void *const found = dlsym(library, name);
    memcpy(&function, &found, sizeof found);
    return found;
}

Pool find_pool() {
    const char *path = nullptr;
    dl_iterate_phdr(find_torch, &path);
    void *const torch = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;  // never closed: the pool is used for good
    Pool pool{};
    for (void *const library : {RTLD_DEFAULT, torch})  // as the loader did for torch: what was preloaded comes first
        if (torch && find(library, "GOMP_parallel", pool.parallel) && find(library, "omp_get_thread_num", pool.thread) &&
            find(library, "omp_get_max_threads", pool.threads))
            return pool;
    return {};
}

const Pool &pool() {
    static const Pool found = find_pool();
    return found;
}

struct Work;

// The parts that one thread begins with, on a line of the cache of its own.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
    const Work *work;
    pthread_t thread;  // where there is no pool
};

struct Work {
    void (*body)(const void *, int64_t, int);
    const void *data;
    Share *shares;
    int threads;

    void run(int me) const {
        for (int i = 0; i < threads; ++i) {
            Share &share = shares[(me + i) % threads];
            for (int64_t part; (part = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                body(data, part, me);
        }
    }
};

void run_in_pool(void *data) {
    const Work &work = *static_cast<const Work *>(data);
    const int me = pool().thread();
    if (me < work.threads)
        work.run(me);
}

void *run_in_thread(void *data) {
    const Share *const mine = static_cast<const Share *>(data);
    mine->work->run(static_cast<int>(mine - mine->work->shares));
    return nullptr;
}

}  // namespace

void run_parts(int threads, int64_t parts, void (*body)(const void *, int64_t, int), const void *data) {
    constexpr int kMost = 1024;
    threads = static_cast<int>(threads < parts ? threads : parts);
    threads = threads < kMost ? threads : kMost;
    Share *const shares = threads > 1 ? new (std::nothrow) Share[threads] : nullptr;
    if (!shares) {  // one thread, or no memory for more
        for (int64_t part = 0; part < parts; ++part)
            body(data, part, 0);
        return;
    }
    Work work{body, data, shares, threads};
    for (int i = 0; i < threads; ++i) {
        shares[i].next.store(parts * i / threads, std::memory_order_relaxed);
        shares[i].end = parts * (i + 1) / threads;
        shares[i].work = &work;
    }
    if (!forked && pool().parallel) {
        const int usual = pool().threads();
        pool().parallel(run_in_pool, &work, static_cast<unsigned>(threads > usual ? threads : usual), 0);
    } else {
        int started = 1;  // those that cannot be are not missed: the others do their parts
        while (started < threads && !pthread_create(&shares[started].thread, nullptr, run_in_thread, &shares[started]))
            ++started;
        work.run(0);
        while (--started > 0)
            pthread_join(shares[started].thread, nullptr);
    }
    delete[] shares;
}

}  // namespace nf4lora
