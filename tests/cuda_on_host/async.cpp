// Asynchronous work: queues of groups (cp.async of a thread, wgmma of a warp), mbarriers, and bulk copies that land on
// them.
#include <cstring>

#include "machine.h"

namespace cuda_on_host {

namespace {

AsyncQueue &queue_of(Queue kind) {
    Thread &me = *machine.current;
    std::unique_ptr<AsyncQueue> &queue = kind == Queue::kCopy ? me.copies : me.block->warps[me.id / kWarpLanes].matrix;
    if (!queue)
        queue.reset(new AsyncQueue);
    return *queue;
}

void nothing_in_flight(const Thread &who, std::unique_ptr<AsyncQueue> &queue, const char *kind) {
    if (!queue)
        return;
    if (queue->issued != queue->landed)
        fail_as(who, kind, queue->works.front().site, "%zu not waited for", queue->issued - queue->landed);
    queue.reset();
}

void must_be_aligned(const void *p, size_t bytes, const char *of, const char *site) {
    if (reinterpret_cast<uintptr_t>(p) % bytes)
        fail("misaligned", site, "%s %p is not on %zu bytes", of, p, bytes);
}

MBarrier &mbarrier_at(Block &block, const Thread &who, uint64_t *b, const char *site) {
    const auto found = block.mbarriers.find(b);
    if (found == block.mbarriers.end())
        fail_as(who, "uninitialised mbarrier", site, "nobody has initialised the one at shared%+td",
                reinterpret_cast<char *>(b) - block.shared);
    return found->second;
}

void turn_if_complete(MBarrier &m) {
    if (m.pending == 0 && m.bytes == 0) {
        m.phase ^= 1;
        m.pending = m.count;
    }
}

void land(Block &block, const BulkCopy &copy) {
    MBarrier &m = mbarrier_at(block, *copy.issuer, copy.barrier, copy.site);
    check_bulk_copy(copy);
    memcpy(copy.to, copy.from, copy.bytes);
    m.bytes -= copy.bytes;
    turn_if_complete(m);
}

}  // namespace

bool eager() { return machine.seed & 2; }

void async_issue(Queue kind, std::function<void()> work, const char *site) {
    AsyncQueue &queue = queue_of(kind);
    ++queue.issued;
    if (eager()) {
        Quiet quiet;
        work();
        work = nullptr;
    }
    queue.works.push_back({std::move(work), site});
}

void async_commit(Queue kind, const char *) {
    AsyncQueue &queue = queue_of(kind);
    queue.ends.push_back(queue.issued);
}

void async_wait(Queue kind, unsigned groups_left, const char *) {
    AsyncQueue &queue = queue_of(kind);
    Quiet quiet;
    for (; queue.ends.size() > groups_left; queue.ends.pop_front())
        for (; queue.landed < queue.ends.front(); ++queue.landed) {
            const AsyncQueue::Work work = std::move(queue.works.front());
            queue.works.pop_front();
            if (work.land)
                work.land();
        }
}

void async_thread_ends(Thread &thread) { nothing_in_flight(thread, thread.copies, "cp.async in flight at exit"); }

void async_warp_ends(Thread &last, Warp &warp) { nothing_in_flight(last, warp.matrix, "wgmma in flight at exit"); }

void async_block_ends(Thread &last, Block &block) {
    if (!block.bulk.empty())
        fail_as(last, "bulk copy in flight at exit", block.bulk[0].site, "%zu not waited for", block.bulk.size());
}

// ---- mbarriers

void mbarrier_init(uint64_t *b, unsigned count, const char *site) {
    Block &block = *machine.current->block;
    must_be_aligned(b, sizeof *b, "an mbarrier at", site);
    if (!inside_shared(block, b, sizeof *b))
        fail("bad mbarrier", site, "%p is not in the block's shared memory", static_cast<void *>(b));
    if (count == 0 || count >= 1u << 20)
        fail("bad mbarrier", site, "a count of %u arrivals", count);
    check_access(b, sizeof *b, Access::kWrite, site);
    block.mbarriers[b] = MBarrier{count, count, 0, 0};
}

void mbarrier_inval(uint64_t *b, const char *site) {
    Block &block = *machine.current->block;
    mbarrier_at(block, *machine.current, b, site);
    check_access(b, sizeof *b, Access::kWrite, site);
    block.mbarriers.erase(b);
}

void mbarrier_arrive(uint64_t *b, unsigned expected_bytes, const char *site) {
    Thread &me = *machine.current;
    MBarrier &m = mbarrier_at(*me.block, me, b, site);
    check_release_at(me, b);
    if (!m.pending)
        fail("too many arrivals", site, "the mbarrier at shared%+td takes %u in a phase",
             reinterpret_cast<char *>(b) - me.block->shared, m.count);
    --m.pending;
    m.bytes += expected_bytes;
    turn_if_complete(m);
}

bool mbarrier_test(uint64_t *b, unsigned parity, const char *site) {
    Thread &me = *machine.current;
    if (mbarrier_at(*me.block, me, b, site).phase == (parity & 1))
        return false;
    check_acquire_at(me, b);
    return true;
}

void mbarrier_wait(uint64_t *b, unsigned parity, const char *site) {
    struct Wait {
        Thread *who;
        uint64_t *b;
        unsigned parity;
        const char *site;
    } wait{machine.current, b, parity & 1, site};
    wait_until_as(
        "an mbarrier",
        [](void *raw) {
            const Wait &w = *static_cast<Wait *>(raw);
            return mbarrier_at(*w.who->block, *w.who, w.b, w.site).phase != w.parity;
        },
        &wait, site);
    check_acquire_at(*machine.current, b);
}

// ---- bulk copies

void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *b, const char *site) {
    Thread &me = *machine.current;
    must_be_aligned(shared, 16, "a bulk copy to", site);
    must_be_aligned(global, 16, "a bulk copy from", site);
    if (bytes % 16)
        fail("misaligned", site, "a bulk copy of %u bytes, not a multiple of 16", bytes);
    if (!inside_shared(*me.block, shared, bytes))
        fail("out of bounds", site, "a bulk copy of %u bytes to shared%+td of %zu", bytes,
             static_cast<char *>(shared) - me.block->shared, machine.shared_bytes);
    mbarrier_at(*me.block, me, b, site);
    BulkCopy copy{static_cast<char *>(shared), static_cast<const char *>(global), bytes, b, &me, site, nullptr};
    check_release(me, copy.before);
    if (eager())
        land(*me.block, copy);
    else
        me.block->bulk.push_back(std::move(copy));
}

bool land_one_bulk_copy() {
    for (Block &block : machine.blocks) {
        if (block.bulk.empty())
            continue;
        const size_t which = machine.seed ? next_random() % block.bulk.size() : 0;
        const BulkCopy copy = std::move(block.bulk[which]);
        block.bulk.erase(block.bulk.begin() + static_cast<ptrdiff_t>(which));
        land(block, copy);
        return true;
    }
    return false;
}

}  // namespace cuda_on_host
