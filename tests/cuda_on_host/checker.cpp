// The back end of -fsanitize=thread in checker builds: every load and store of the kernels' translation units comes
// here. It knows CUDA's memory: out of bounds, misaligned, never written, races; and counts sectors and bank
// wavefronts.
//
// Order. Every thread has a clock, drawn from one count; a byte remembers its last write and two reads as (thread,
// clock). A block barrier sets the block's `base`: accesses of the block with an older clock are before everything
// after it. What a thread learns otherwise (__syncwarp, named barriers, mbarriers, atomics) is a row of clocks, one for
// each thread of its block, and of other blocks it learns how many releases of an address it has seen, each with the
// row it published. An atomic is an acquire and a release of its address: a missing __threadfence is not found, and
// neither is a race that an unrelated atomic happens to order.
//
// Not seen: a store of the struct that a call returns, where the function is not inlined (build.py inlines what it
// can); a misaligned vector that GCC takes apart into aligned scalars (UBSan in the address build sees it), the first
// of three or more concurrent readers but one, what is loaded once and kept in a register, and the stack.
#include "machine.h"

#if !CUDA_ON_HOST_CHECKED

extern "C" {
void cuda_on_host_register(const void *, uint64_t, int32_t, const char *) {}
void cuda_on_host_forget_all() {}
const char *cuda_on_host_profile() { return ""; }
}

#else

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <map>

#include <dlfcn.h>

extern "C" {
extern const char image_first[] __asm__("__ehdr_start") __attribute__((visibility("hidden")));
extern const char image_last[] __asm__("_end") __attribute__((visibility("hidden")));
}

namespace cuda_on_host {

// What is known of one block: accesses older than `base`, and those of thread t not younger than of[t].
struct Known {
    uint32_t base = 0;
    std::vector<uint32_t> of;  // by thread, the copy engine last; empty: base says all
};

// What a thread knows of other blocks: of each address that blocks synchronize on, the first so many releases.
typedef std::map<const Published *, uint32_t> Foreign;

// The releases of one address or barrier, in their order.
struct Published {
    struct Release {
        uint32_t number;
        Known known;  // by all releases of the block up to this one
    };
    uint32_t releases = 0;
    uint32_t taken = 0;                                  // how many were there when another block last acquired
    std::map<unsigned, std::vector<Release> > of_block;  // by linear index
    std::shared_ptr<const Foreign> foreign;              // what the releasing threads knew
};

namespace {

enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite, kAtomicUpdate, kAtomicAny };

constexpr bool writes(Kind kind) { return kind != Kind::kRead && kind != Kind::kAtomicRead; }
constexpr bool atomic(Kind kind) { return kind != Kind::kRead && kind != Kind::kWrite; }

constexpr uint32_t kAtomicBit = 1u << 31;      // in Stamp::thread
constexpr uint32_t kTextSite = 1u << 31;       // in a site: an index of g_site_texts, else an offset in the library
constexpr size_t kMaxExactReleases = 1 << 16;  // between blocks, in a launch
constexpr size_t kSharedSlack = 1024;          // an address so close behind shared memory was meant to be in it
constexpr uint32_t kMaxTick = 3u << 30;        // past it, stamps start again

struct Stamp {
    uint32_t thread = 0;  // 1 + its number in the launch; 0: nobody
    uint32_t clock = 0;
    uint32_t site = 0;
};

// One byte of memory.
struct Cell {
    Stamp write;
    Stamp read, other_read;  // the first reader since it was ordered, and the latest other one
};

struct Region {
    const char *first, *last;
    std::string name;
    bool written;
    std::unique_ptr<Cell[], decltype(&free)> cells;
};

// ---- sectors and bank wavefronts
constexpr size_t kMaxGroups = 1 << 16;  // of a site in a barrier interval of a warp

struct Group {
    uint32_t lanes = 0;
    uint64_t address[kWarpLanes];
};

struct SiteOfWarp {
    uint32_t times[kWarpLanes] = {};
    std::vector<Group> groups;  // the lanes' n-th execution of the site
};

struct SiteCount {
    uint32_t site;
    unsigned bytes;
    bool store, shared;
    uint64_t accesses = 0, ideal = 0, moved = 0;
};

// ---- what the checker keeps of a resident block
struct Ledger {
    uint32_t first = 0;  // clock of its start
    uint32_t base = 0;
    std::vector<uint32_t> clock;                // by thread, the copy engine last
    std::vector<std::vector<uint32_t> > known;  // by thread: the row of clocks, empty or one for each thread
    std::vector<uint32_t> wide;                 // by thread: when it last learnt of other warps
    std::vector<std::shared_ptr<const Foreign> > foreign;
    bool any_foreign = false;
    std::unordered_map<const void *, Published> syncs;  // in shared memory
    std::vector<Cell> cells;                            // of shared memory
    std::unordered_map<uint64_t, SiteOfWarp> sites;     // by site and warp
};

// On whose behalf an access is checked.
struct Actor {
    const Block *block;
    uint32_t number, base, clock;
    const uint32_t *row;
    const Foreign *foreign;
};

uint32_t g_tick = 1;
uint32_t g_launch_first = 1;
size_t g_launch_releases = 0;
std::vector<Ledger> g_ledgers;             // by resident block
std::map<const char *, Region> g_regions;  // by their last byte's successor
std::unordered_map<const void *, Published> g_syncs;
const char *g_arguments = nullptr;
size_t g_argument_bytes = 0;
std::vector<const char *> g_site_texts;
std::unordered_map<const char *, uint32_t> g_site_of_text;
std::map<std::pair<uint32_t, bool>, SiteCount> g_counts;  // by site and space
std::string g_profile;

uint32_t participants() { return machine.threads + 1; }  // the threads of a block and its copy engine
Ledger &ledger_of(const Block &block) { return g_ledgers[static_cast<size_t>(&block - machine.blocks.data())]; }

// ---- sites
uint32_t site_of(const char *text) {
    const auto [found, is_new] = g_site_of_text.emplace(text, kTextSite | static_cast<uint32_t>(g_site_texts.size()));
    if (is_new)
        g_site_texts.push_back(text);
    return found->second;
}

inline uint32_t site_of(void *return_address) {
    return static_cast<uint32_t>(static_cast<const char *>(return_address) - image_first);
}

std::string text_of(uint32_t site) {
    if (site & kTextSite)
        return g_site_texts[site & ~kTextSite];
    Dl_info library = {};
    dladdr(image_first, &library);
    char text[512];
    snprintf(text, sizeof text, "%s+0x%x", library.dli_fname, site);
    return text;
}

// ---- order
uint32_t clock_of(const Ledger &ledger, uint32_t thread) { return std::max(ledger.clock[thread], ledger.base); }

std::vector<uint32_t> &row_of(Ledger &ledger, uint32_t thread) {
    std::vector<uint32_t> &row = ledger.known[thread];
    if (row.empty())
        row.resize(participants());
    return row;
}

void raise(uint32_t *row, const uint32_t *by, size_t n) {
    for (size_t i = 0; i < n; ++i)
        row[i] = row[i] > by[i] ? row[i] : by[i];
}

void join(Known &to, const Known &by) {
    to.base = std::max(to.base, by.base);
    if (to.of.empty())
        to.of = by.of;
    else if (!by.of.empty())
        raise(to.of.data(), by.of.data(), by.of.size());
}

std::shared_ptr<const Foreign> joined(const std::shared_ptr<const Foreign> &a,
                                      const std::shared_ptr<const Foreign> &b) {
    if (!a || !b || a == b)
        return a ? a : b;
    auto both = std::make_shared<Foreign>(*a);
    for (const auto &[sync, releases] : *b) {
        uint32_t &known = (*both)[sync];
        known = std::max(known, releases);
    }
    return both;
}

void publish(Published &to, unsigned block, Known known, const std::shared_ptr<const Foreign> &foreign) {
    std::vector<Published::Release> &before = to.of_block[block];
    ++to.releases;
    if (!before.empty()) {
        join(known, before.back().known);
        if (before.back().number > to.taken)  // nobody else can tell them apart
            before.pop_back();
    }
    before.push_back({to.releases, std::move(known)});
    to.foreign = joined(to.foreign, foreign);
}

Known known_to(Ledger &ledger, uint32_t thread) {
    Known known{ledger.base, row_of(ledger, thread)};
    known.of[thread] = clock_of(ledger, thread);
    return known;
}

void release(Thread &t, Published &to) {
    Ledger &ledger = ledger_of(*t.block);
    // So many releases are more than memory may hold exactly: from here on, "everything until now", which hides races.
    const bool exact = g_launch_releases < kMaxExactReleases;
    g_launch_releases += to.taken > 0;
    publish(to, t.block->linear, exact ? known_to(ledger, t.id) : Known{g_tick + 1, {}}, ledger.foreign[t.id]);
    ledger.clock[t.id] = ++g_tick;
}

void acquire(Thread &t, Published &from) {
    Ledger &ledger = ledger_of(*t.block);
    const auto mine = from.of_block.find(t.block->linear);
    if (mine != from.of_block.end()) {
        const Known &known = mine->second.back().known;
        std::vector<uint32_t> &row = row_of(ledger, t.id);
        if (known.of.empty())
            std::fill(row.begin(), row.end(), known.base - 1);
        else
            raise(row.data(), known.of.data(), row.size());
        ledger.wide[t.id] = ++g_tick;
    }
    std::shared_ptr<const Foreign> &foreign = ledger.foreign[t.id];
    foreign = joined(foreign, from.foreign);
    if (from.of_block.size() > (mine != from.of_block.end())) {
        foreign = joined(foreign, std::make_shared<Foreign>(Foreign{{&from, from.releases}}));
        from.taken = from.releases;
    }
    ledger.any_foreign |= foreign != nullptr;
}

Published &sync_at(const Block &block, const void *p) {
    return inside_shared(block, p, 1) ? ledger_of(block).syncs[p] : g_syncs[p];
}

Actor actor_of(const Thread &t) {
    const Ledger &ledger = ledger_of(*t.block);
    return {t.block,
            t.block->linear * participants() + t.id + 1,
            ledger.base,
            clock_of(ledger, t.id),
            ledger.known[t.id].empty() ? nullptr : ledger.known[t.id].data(),
            ledger.foreign[t.id].get()};
}

bool ordered(const Actor &me, uint32_t thread, uint32_t clock) {
    const uint32_t number = thread - 1, block = number / participants(), in_block = number % participants();
    if (block == me.block->linear && (clock < me.base || (me.row && me.row[in_block] >= clock)))
        return true;
    if (!me.foreign)
        return false;
    for (const auto &[sync, releases] : *me.foreign) {
        const auto found = sync->of_block.find(block);
        if (found == sync->of_block.end())
            continue;
        const auto after = std::partition_point(found->second.begin(), found->second.end(),
                                                [&](const Published::Release &r) { return r.number <= releases; });
        if (after == found->second.begin())
            continue;
        const Known &known = std::prev(after)->known;
        if (clock < known.base || (!known.of.empty() && known.of[in_block] >= clock))
            return true;
    }
    return false;
}

// ---- one access
struct Place {
    Cell *cells;
    uint32_t first;  // older stamps are of another launch, or of another block of the same shared memory
    bool unwritten_matters;
    bool shared;
};

const char *verb_of(Kind kind) {
    if (atomic(kind))
        return kind == Kind::kAtomicRead    ? "atomic read"
               : kind == Kind::kAtomicWrite ? "atomic write"
                                            : "atomic access";
    return writes(kind) ? "write" : "read";
}

// The memory that the access goes to, or the nearest that a kernel may touch.
std::string describe(const Block &block, const char *p, size_t bytes) {
    const Region *nearest = nullptr;
    uint64_t distance = 1 << 20;
    for (const auto &[last, region] : g_regions) {
        const uint64_t away = p < region.first ? static_cast<uint64_t>(region.first - p)
                              : p < last       ? 0
                                               : static_cast<uint64_t>(p - last + 1);
        if (away < distance)
            nearest = &region, distance = away;
    }
    const bool shared = p >= block.shared && p < block.shared + machine.shared_bytes + kSharedSlack;
    char text[256];
    if (!shared && !nearest) {
        snprintf(text, sizeof text, "address %p, which is no memory of the device", static_cast<const void *>(p));
        return text;
    }
    const char *first = shared ? block.shared : nearest->first;
    const size_t size = shared ? machine.shared_bytes : static_cast<size_t>(nearest->last - first);
    snprintf(text, sizeof text, "%s%+td", shared ? "shared" : nearest->name.c_str(), p - first);
    if (p < first || p + bytes > first + size)
        snprintf(text + strlen(text), sizeof text - strlen(text), " of %zu bytes", size);
    return text;
}

[[noreturn]] void report(const Thread &who, const char *kind, const char *p, size_t bytes, Kind how, uint32_t site,
                         const char *more = "") {
    const std::string where = text_of(site), place = describe(*who.block, p, bytes);
    fail_as(who, kind, where.c_str(), "%s of %zu bytes %s %s%s", verb_of(how), bytes, writes(how) ? "to" : "from",
            place.c_str(), more);
}

[[noreturn]] void report_race(const Actor &me, const Thread &who, const char *p, size_t bytes, Kind how, uint32_t site,
                              const Stamp &other, const char *did) {
    const uint32_t number = (other.thread & ~kAtomicBit) - 1, block = number / participants(),
                   thread = number % participants();
    const bool copies = (me.number - 1) % participants() == machine.threads;
    char more[768], name[64];
    if (thread == machine.threads)
        snprintf(name, sizeof name, "a bulk copy");
    else if (block == me.block->linear)
        snprintf(name, sizeof name, "thread %u", thread);
    else
        snprintf(name, sizeof name, "block (%u,%u,%u) thread %u", block % machine.grid.x,
                 block / machine.grid.x % machine.grid.y, block / machine.grid.x / machine.grid.y, thread);
    snprintf(more, sizeof more, "%s, against the %s of %s at %s", copies ? " by a bulk copy" : "", did, name,
             text_of(other.site).c_str());
    report(who, "race", p, bytes, how, site, more);
}

void examine(const Actor &me, const Thread &who, const Place &place, const char *p, size_t bytes, Kind how,
             uint32_t site) {
    const auto concurrent = [&](const Stamp &s) {
        const uint32_t thread = s.thread & ~kAtomicBit;
        return s.clock >= place.first && thread != me.number && !ordered(me, thread, s.clock);
    };
    const Stamp mine{me.number | (atomic(how) ? kAtomicBit : 0), me.clock, site};
    for (size_t i = 0; i < bytes; ++i) {
        Cell &cell = place.cells[i];
        if (place.unwritten_matters && how != Kind::kWrite && how != Kind::kAtomicWrite && how != Kind::kAtomicAny &&
            cell.write.clock < (place.shared ? place.first : 1))
            report(who, "uninitialised", p, bytes, how, site, ", which nobody has written");
        if (!(atomic(how) && cell.write.thread & kAtomicBit) && concurrent(cell.write))
            report_race(me, who, p, bytes, how, site, cell.write,
                        cell.write.thread & kAtomicBit ? "atomic access" : "write");
        if (writes(how)) {
            if (concurrent(cell.read))
                report_race(me, who, p, bytes, how, site, cell.read, "read");
            if (concurrent(cell.other_read))
                report_race(me, who, p, bytes, how, site, cell.other_read, "read");
            cell.write = mine;
        } else if (how == Kind::kRead) {
            (cell.read.thread == me.number || !concurrent(cell.read) ? cell.read : cell.other_read) = mine;
        }
    }
}

void count(const Block &block, const Thread &t, const char *p, size_t bytes, Kind how, uint32_t site, bool shared) {
    SiteOfWarp &at =
        ledger_of(block).sites[uint64_t{site} << 6 | static_cast<uint64_t>(shared) << 5 | t.id / kWarpLanes];
    const unsigned lane = t.id % kWarpLanes;
    const size_t n = at.times[lane]++;
    if (n >= kMaxGroups)
        return;
    if (n >= at.groups.size()) {
        if (at.groups.empty())
            g_counts.emplace(std::make_pair(site, shared),
                             SiteCount{site, static_cast<unsigned>(bytes), writes(how), shared});
        at.groups.resize(n + 1);
    }
    at.groups[n].lanes |= 1u << lane;
    at.groups[n].address[lane] = static_cast<uint64_t>(p - (shared ? block.shared : nullptr));
}

// Where the access goes, or an error. False: memory that needs no check (the stack, arguments, constants).
bool find(const Thread &t, const char *p, size_t bytes, Kind how, uint32_t site, Place &place) {
    const Block &block = *t.block;
    if (p >= t.context->stack && p + bytes <= t.context->stack + t.context->bytes)
        return false;
    if (inside_shared(block, p, bytes)) {
        Ledger &ledger = ledger_of(block);
        place = {ledger.cells.data() + (p - block.shared), ledger.first, true, true};
        return true;
    }
    const auto found = g_regions.upper_bound(p);
    if (found != g_regions.end() && p >= found->second.first && p + bytes <= found->first) {
        place = {found->second.cells.get() + (p - found->second.first), g_launch_first, !found->second.written, false};
        return true;
    }
    const bool constant = p >= image_first && p + bytes <= image_last;
    if (constant || (p >= g_arguments && p + bytes <= g_arguments + g_argument_bytes)) {
        if (writes(how))
            report(t, "out of bounds", p, bytes, how, site,
                   constant ? " (constant memory)" : " (the kernel's arguments)");
        return false;
    }
    report(t, "out of bounds", p, bytes, how, site);
}

void check(const void *address, size_t bytes, Kind how, uint32_t site, bool aligned) {
    Thread &t = *machine.current;
    const char *p = static_cast<const char *>(address);
    Place place;
    if (!bytes || !find(t, p, bytes, how, site, place))
        return;
    if (aligned && bytes <= 16 && !(bytes & (bytes - 1)) && reinterpret_cast<uintptr_t>(p) % bytes)
        report(t, "misaligned", p, bytes, how, site);
    if (!atomic(how)) {
        examine(actor_of(t), t, place, p, bytes, how, site);
        if (bytes <= 16)
            count(*t.block, t, p, bytes, how, site, place.shared);
        return;
    }
    Published &sync = sync_at(*t.block, address);
    if (how != Kind::kAtomicWrite)
        acquire(t, sync);
    examine(actor_of(t), t, place, p, bytes, how, site);
    if (how != Kind::kAtomicRead)
        release(t, sync);
}

inline bool kernel_runs() { return machine.current && !machine.quiet; }

// ---- counts
uint64_t sectors(const Group &group, unsigned bytes, uint64_t &ideal) {
    std::vector<std::pair<uint64_t, uint64_t> > spans;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane)
        if (group.lanes >> lane & 1)
            spans.emplace_back(group.address[lane], group.address[lane] + bytes);
    std::sort(spans.begin(), spans.end());
    uint64_t moved = 0, touched = 0, next_sector = 0, next_byte = 0;
    for (const auto &[first, last] : spans) {
        const uint64_t from = std::max(first / 32, next_sector), to = (last - 1) / 32 + 1;
        moved += to > from ? to - from : 0;
        next_sector = std::max(next_sector, to);
        touched += last > std::max(first, next_byte) ? last - std::max(first, next_byte) : 0;
        next_byte = std::max(next_byte, last);
    }
    ideal += (touched + 31) / 32;
    return moved;
}

// 32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarter warps.
uint64_t wavefronts(const Group &group, unsigned bytes, uint64_t &ideal) {
    const unsigned together = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
    uint64_t moved = 0;
    for (unsigned first = 0; first < kWarpLanes; first += together) {
        std::vector<uint64_t> words;
        for (unsigned lane = first; lane < first + together; ++lane)
            if (group.lanes >> lane & 1)
                for (uint64_t word = group.address[lane] / 4; word <= (group.address[lane] + bytes - 1) / 4; ++word)
                    words.push_back(word);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        unsigned in_bank[32] = {}, most = 0;
        for (const uint64_t word : words)
            most = std::max(most, ++in_bank[word % 32]);
        moved += most;
        ideal += most > 0;
    }
    return moved;
}

void add_counts(Ledger &ledger) {
    for (auto &[key, at] : ledger.sites) {
        SiteCount &total = g_counts.at({static_cast<uint32_t>(key >> 6), key >> 5 & 1});
        for (const Group &group : at.groups) {
            ++total.accesses;
            total.moved +=
                total.shared ? wavefronts(group, total.bytes, total.ideal) : sectors(group, total.bytes, total.ideal);
        }
        at.groups.clear();
        std::fill(std::begin(at.times), std::end(at.times), 0);
    }
}

}  // namespace

// ---- what runtime.cpp and async.cpp tell

void check_launch(const void *arguments, size_t bytes) {
    g_arguments = static_cast<const char *>(arguments);
    g_argument_bytes = bytes;
    if (g_tick > kMaxTick) {
        for (auto &[last, region] : g_regions)
            for (const char *p = region.first; p < last; ++p) {
                Cell &cell = region.cells[static_cast<size_t>(p - region.first)];
                const bool written = cell.write.clock > 0;
                cell = Cell{};
                cell.write.clock = written;
            }
        g_ledgers.clear();
        g_tick = 1;
    }
    g_launch_first = ++g_tick;
    g_launch_releases = 0;
    g_syncs.clear();
    g_counts.clear();
}

void check_block(Block &block) {
    const size_t index = static_cast<size_t>(&block - machine.blocks.data());
    if (g_ledgers.size() <= index)
        g_ledgers.resize(index + 1);
    Ledger &ledger = g_ledgers[index];
    ledger.first = ledger.base = ++g_tick;
    ledger.clock.assign(participants(), 0);
    if (ledger.known.size() != machine.threads)
        ledger.known.assign(machine.threads, {});
    ledger.wide.assign(machine.threads, 0);
    ledger.foreign.assign(machine.threads, nullptr);
    ledger.any_foreign = false;
    ledger.syncs.clear();
    ledger.sites.clear();
    if (ledger.cells.size() < machine.shared_bytes)
        ledger.cells.assign(machine.shared_bytes, Cell{});
}

void check_block_ends(Block &block) { add_counts(ledger_of(block)); }

void check_barrier(Block &block) {
    Ledger &ledger = ledger_of(block);
    ledger.base = ++g_tick;
    add_counts(ledger);
    if (!ledger.any_foreign)
        return;
    std::shared_ptr<const Foreign> all;
    for (const auto &foreign : ledger.foreign)
        all = joined(all, foreign);
    std::fill(ledger.foreign.begin(), ledger.foreign.end(), all);
}

void check_meeting(Block &block, unsigned warp, unsigned mask) {
    Ledger &ledger = ledger_of(block);
    const uint32_t first = warp * kWarpLanes, now = ++g_tick;
    // Rows of lanes that know of no other warp since the last barrier differ within their own warp only.
    bool wide = false;
    std::shared_ptr<const Foreign> foreign;
    for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
        const uint32_t t = first + static_cast<uint32_t>(__builtin_ctz(lanes));
        wide |= ledger.wide[t] >= ledger.base;
        foreign = joined(foreign, ledger.foreign[t]);
    }
    const uint32_t from = wide ? 0 : first, n = wide ? participants() : std::min(kWarpLanes, machine.threads - first);
    std::vector<uint32_t> all(n);
    for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
        const uint32_t t = first + static_cast<uint32_t>(__builtin_ctz(lanes));
        raise(all.data(), row_of(ledger, t).data() + from, n);
    }
    for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
        const uint32_t t = first + static_cast<uint32_t>(__builtin_ctz(lanes));
        all[t - from] = clock_of(ledger, t);
    }
    for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
        const uint32_t t = first + static_cast<uint32_t>(__builtin_ctz(lanes));
        std::copy(all.begin(), all.end(), row_of(ledger, t).begin() + from);
        ledger.clock[t] = now;
        ledger.foreign[t] = foreign;
        if (wide)
            ledger.wide[t] = now;
    }
}

void check_release(Thread &thread, Sync &sync) {
    if (!sync)
        sync = std::make_shared<Published>();
    release(thread, *sync);
}

void check_acquire(Thread &thread, const Sync &sync) {
    if (sync)
        acquire(thread, *sync);
}

void check_release_at(Thread &thread, const void *p) { release(thread, sync_at(*thread.block, p)); }
void check_acquire_at(Thread &thread, const void *p) { acquire(thread, sync_at(*thread.block, p)); }

// The copy engine is a thread of its own, which knows what the issuer knew at the issue.
void check_bulk_copy(const BulkCopy &copy) {
    const Block &block = *copy.issuer->block;
    Known known = copy.before->of_block.at(block.linear).back().known;
    const uint32_t engine = machine.threads, clock = ++g_tick, site = site_of(copy.site);
    const Actor me{&block,          block.linear * participants() + engine + 1,
                   known.base,      clock,
                   known.of.data(), copy.before->foreign.get()};
    Place place;
    if (find(*copy.issuer, copy.from, copy.bytes, Kind::kRead, site, place))
        examine(me, *copy.issuer, place, copy.from, copy.bytes, Kind::kRead, site);
    if (find(*copy.issuer, copy.to, copy.bytes, Kind::kWrite, site, place))
        examine(me, *copy.issuer, place, copy.to, copy.bytes, Kind::kWrite, site);
    if (!known.of.empty())
        known.of[engine] = clock;
    publish(sync_at(block, copy.barrier), block.linear, std::move(known), copy.before->foreign);
}

void check_access(const void *p, size_t bytes, Access how, const char *site) {
    const Kind kind = how == Access::kRead ? Kind::kRead : how == Access::kWrite ? Kind::kWrite : Kind::kAtomicAny;
    check(p, bytes, kind, site_of(site), true);
}

}  // namespace cuda_on_host

using namespace cuda_on_host;

extern "C" {

void cuda_on_host_register(const void *p, uint64_t bytes, int32_t written, const char *name) {
    if (!bytes)
        return;
    const char *first = static_cast<const char *>(p), *last = first + bytes;
    // Views of one tensor may overlap: they become one region.
    bool known = written != 0;
    for (auto it = g_regions.upper_bound(first); it != g_regions.end() && it->second.first < last;
         it = g_regions.erase(it)) {
        known |= it->second.written;
        first = std::min(first, it->second.first);
        last = std::max(last, it->first);
    }
    Cell *cells =
        static_cast<Cell *>(calloc(static_cast<size_t>(last - first), sizeof(Cell)));  // zero pages until touched
    if (cells)
        g_regions.emplace(last, Region{first, last, name, known, {cells, free}});
}

void cuda_on_host_forget_all() { g_regions.clear(); }

const char *cuda_on_host_profile() {
    g_profile.clear();
    for (const auto &[key, total] : g_counts) {
        char line[640];
        snprintf(line, sizeof line, "%s %s %s %" PRIu64 " %.3f\n", text_of(total.site).c_str(),
                 total.shared ? "shared" : "global", total.store ? "store" : "load", total.accesses,
                 static_cast<double>(total.moved) / static_cast<double>(std::max<uint64_t>(total.ideal, 1)));
        g_profile += line;
    }
    return g_profile.c_str();
}

// ---- the calls GCC makes. The return address is the site.
#define CUDA_ON_HOST_HOOK __attribute__((visibility("hidden")))
#define CUDA_ON_HOST_CHECK(p, bytes, how, aligned) \
    if (kernel_runs())                             \
    check((p), (bytes), (how), site_of(__builtin_return_address(0)), (aligned))

CUDA_ON_HOST_HOOK void __tsan_init() {}
CUDA_ON_HOST_HOOK void __tsan_func_entry(void *) {}
CUDA_ON_HOST_HOOK void __tsan_func_exit() {}
CUDA_ON_HOST_HOOK void __tsan_vptr_update(void **, void *) {}
CUDA_ON_HOST_HOOK void __tsan_vptr_read(void **) {}
CUDA_ON_HOST_HOOK void __tsan_read_range(void *p, size_t n) { CUDA_ON_HOST_CHECK(p, n, Kind::kRead, false); }
CUDA_ON_HOST_HOOK void __tsan_write_range(void *p, size_t n) { CUDA_ON_HOST_CHECK(p, n, Kind::kWrite, false); }
CUDA_ON_HOST_HOOK void __tsan_atomic_thread_fence(int) {}
CUDA_ON_HOST_HOOK void __tsan_atomic_signal_fence(int) {}

// A volatile access is how flags are read and written without an atomic: it orders as one, and lets others run.
#define CUDA_ON_HOST_VOLATILE(p, bytes, how, aligned)                                \
    if (kernel_runs()) {                                                             \
        check((p), (bytes), (how), site_of(__builtin_return_address(0)), (aligned)); \
        poll("a volatile access");                                                   \
    }

#define CUDA_ON_HOST_SIZE(n)                                                                                     \
    CUDA_ON_HOST_HOOK void __tsan_read##n(void *p) { CUDA_ON_HOST_CHECK(p, n, Kind::kRead, true); }              \
    CUDA_ON_HOST_HOOK void __tsan_write##n(void *p) { CUDA_ON_HOST_CHECK(p, n, Kind::kWrite, true); }            \
    CUDA_ON_HOST_HOOK void __tsan_unaligned_read##n(void *p) { CUDA_ON_HOST_CHECK(p, n, Kind::kRead, false); }   \
    CUDA_ON_HOST_HOOK void __tsan_unaligned_write##n(void *p) { CUDA_ON_HOST_CHECK(p, n, Kind::kWrite, false); } \
    CUDA_ON_HOST_HOOK void __tsan_volatile_read##n(void *p){CUDA_ON_HOST_VOLATILE(                               \
        p, n, Kind::kAtomicRead, true)} CUDA_ON_HOST_HOOK void __tsan_volatile_write##n(void *p){                \
        CUDA_ON_HOST_VOLATILE(p, n, Kind::kAtomicWrite,                                                          \
                              true)} CUDA_ON_HOST_HOOK void __tsan_unaligned_volatile_read##n(void *p){          \
        CUDA_ON_HOST_VOLATILE(p, n, Kind::kAtomicRead,                                                           \
                              false)} CUDA_ON_HOST_HOOK void __tsan_unaligned_volatile_write##n(void *p) {       \
        CUDA_ON_HOST_VOLATILE(p, n, Kind::kAtomicWrite, false)                                                   \
    }
CUDA_ON_HOST_SIZE(1)
CUDA_ON_HOST_SIZE(2)
CUDA_ON_HOST_SIZE(4)
CUDA_ON_HOST_SIZE(8)
CUDA_ON_HOST_SIZE(16)

#define CUDA_ON_HOST_FETCH(bits, T, name)                                             \
    CUDA_ON_HOST_HOOK T __tsan_atomic##bits##_fetch_##name(volatile T *p, T v, int) { \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicUpdate, true); \
        return __atomic_fetch_##name(p, v, __ATOMIC_SEQ_CST);                         \
    }
#define CUDA_ON_HOST_ATOMIC(bits, T)                                                                                 \
    CUDA_ON_HOST_HOOK T __tsan_atomic##bits##_load(const volatile T *p, int) {                                       \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicRead, true);                                  \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                 \
    }                                                                                                                \
    CUDA_ON_HOST_HOOK void __tsan_atomic##bits##_store(volatile T *p, T v, int) {                                    \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicWrite, true);                                 \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                    \
    }                                                                                                                \
    CUDA_ON_HOST_HOOK T __tsan_atomic##bits##_exchange(volatile T *p, T v, int) {                                    \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicUpdate, true);                                \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                          \
    }                                                                                                                \
    CUDA_ON_HOST_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *expected, T v, int, int) { \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicUpdate, true);                                \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
    }                                                                                                                \
    CUDA_ON_HOST_HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *expected, T v, int, int) {   \
        CUDA_ON_HOST_CHECK(const_cast<T *>(p), sizeof(T), Kind::kAtomicUpdate, true);                                \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
    }                                                                                                                \
    CUDA_ON_HOST_FETCH(bits, T, add)                                                                                 \
    CUDA_ON_HOST_FETCH(bits, T, sub)                                                                                 \
    CUDA_ON_HOST_FETCH(bits, T, and)                                                                                 \
    CUDA_ON_HOST_FETCH(bits, T, or)                                                                                  \
    CUDA_ON_HOST_FETCH(bits, T, xor)
CUDA_ON_HOST_ATOMIC(8, uint8_t)
CUDA_ON_HOST_ATOMIC(16, uint16_t)
CUDA_ON_HOST_ATOMIC(32, uint32_t)
CUDA_ON_HOST_ATOMIC(64, uint64_t)

// What cuda_on_host.h makes of memcpy, memmove and memset in kernel text.
CUDA_ON_HOST_HOOK void *cuda_on_host_copy(void *to, const void *from, size_t n) {
    CUDA_ON_HOST_CHECK(from, n, Kind::kRead, false);
    CUDA_ON_HOST_CHECK(to, n, Kind::kWrite, false);
    return memmove(to, from, n);
}
CUDA_ON_HOST_HOOK void *cuda_on_host_fill(void *to, int byte, size_t n) {
    CUDA_ON_HOST_CHECK(to, n, Kind::kWrite, false);
    return memset(to, byte, n);
}

}  // extern "C"

#endif
