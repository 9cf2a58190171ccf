// What the verbs of csrc/ptx.cuh mean on the CPU, after the PTX manual; included at the end of cuda_on_host.h.
// Plain loads and stores are left to the compiler's instrumentation. What a thread does through other hands (fragments,
// asynchronous copies, products from shared memory) is checked here and told to the checker through access(); these
// bodies themselves are CUDA_ON_HOST_UNSEEN, as the memory they touch beyond that is the machine's own.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

#define CUDA_ON_HOST_UNSEEN inline __attribute__((no_sanitize("address", "thread", "undefined")))

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(void const volatile *p, size_t bytes);
extern "C" void __asan_storeN(void const volatile *p, size_t bytes);
#endif

namespace cuda_on_host {
namespace verbs {

// The line of the kernel that calls a verb, as the default of the verb's last parameter. Turns into "file:line", made
// once for each, as the machine keeps the pointer.
struct Caller {
    const char *file;
    int line;

    CUDA_ON_HOST_UNSEEN operator const char *() const {
        struct Known {
            const char *file;
            int line;
            char *text;
        };
        static Known known[1024];
        unsigned slot = static_cast<unsigned>(line) % 1024u;
        while (known[slot].text != nullptr && (known[slot].line != line || strcmp(known[slot].file, file) != 0))
            slot = (slot + 1) % 1024u;
        if (known[slot].text == nullptr) {
            const size_t room = strlen(file) + 16;
            known[slot] = {file, line, new char[room]};
            snprintf(known[slot].text, room, "%s:%d", file, line);
        }
        return known[slot].text;
    }
};

constexpr Caller here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

CUDA_ON_HOST_UNSEEN void sanitize(const void *p, size_t bytes, Access how) {
#if defined(__SANITIZE_ADDRESS__)
    how == Access::kRead ? __asan_loadN(p, bytes) : __asan_storeN(p, bytes);
#else
    (void)p, (void)bytes, (void)how;
#endif
}

CUDA_ON_HOST_UNSEEN void touch(const void *p, size_t bytes, Access how, const char *where) {
    sanitize(p, bytes, how);
    access(p, bytes, how, where);
}

CUDA_ON_HOST_UNSEEN void must_be_aligned(const void *p, unsigned bytes, const char *verb, const char *where) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
        fail("misaligned", where, "%s needs %u-byte alignment", verb, bytes);
}

CUDA_ON_HOST_UNSEEN void must_be_shared(const void *p, size_t bytes, const char *verb, const char *where) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(shared_memory()), at = reinterpret_cast<uintptr_t>(p);
    if (at < start || at + bytes > start + shared_bytes())
        fail("out of bounds", where, "%s: %zu bytes at %+lld of %zu bytes of shared memory", verb, bytes,
             static_cast<long long>(at - start), shared_bytes());
}

CUDA_ON_HOST_UNSEEN void must_be_whole_warp(const char *verb, const char *where) {
    const dim3 block = block_dim();
    if ((warp() + 1) * 32 > block.x * block.y * block.z)
        fail("partial warp", where, "%s needs all 32 lanes", verb);
}

// ---- 16-bit floats

CUDA_ON_HOST_UNSEEN float from_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

template <class T>
CUDA_ON_HOST_UNSEEN float widen(uint16_t bits) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "bf16 or fp16 operands");
    if (std::is_same_v<T, __nv_bfloat16>)
        return from_bits(static_cast<uint32_t>(bits) << 16);
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float shifted = from_bits(magnitude << 13) * from_bits(0x77800000u);  // * 2^112 moves the exponent's bias
    return sign != 0 ? -shifted : shifted;
}

// ---- products

// Rows 0..15 and columns 0..n-1 of d += a b, in the fragment order that mma.sync and wgmma share. b is [16][n].
template <int kColumns>
CUDA_ON_HOST_UNSEEN void multiply(float *const (&d)[32], const float (&a)[16][16], const float (&b)[16][kColumns],
                                  bool accumulate) {
    float sum[16][kColumns];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < kColumns / 2; ++i)
            sum[l / 4 + (i % 4 >= 2 ? 8 : 0)][i / 4 * 8 + l % 4 * 2 + i % 2] = accumulate ? d[l][i] : 0.0f;
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < kColumns; ++column)
                sum[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < kColumns / 2; ++i)
            d[l][i] = sum[l / 4 + (i % 4 >= 2 ? 8 : 0)][i / 4 * 8 + l % 4 * 2 + i % 2];
}

// Element i of the eight that a lane's four registers hold, low half first.
template <class T>
CUDA_ON_HOST_UNSEEN void gather_a(float (&a)[16][16], int lane, const uint32_t *registers) {
    for (int i = 0; i < 8; ++i)
        a[lane / 4 + (i / 2 % 2) * 8][lane % 4 * 2 + i % 2 + (i / 4) * 8] =
            widen<T>(static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)));
}

struct Mma {
    float *d;
    const uint32_t *a, *b;
};

template <class T>
CUDA_ON_HOST_UNSEEN void mma_of_warp(void **lanes, unsigned) {
    float a[16][16], b[16][8];
    float *d[32];
    for (int l = 0; l < 32; ++l) {
        const Mma *mine = static_cast<const Mma *>(lanes[l]);
        d[l] = mine->d;
        gather_a<T>(a, l, mine->a);
        for (int i = 0; i < 4; ++i)
            b[l % 4 * 2 + i % 2 + (i / 2) * 8][l / 4] = widen<T>(static_cast<uint16_t>(mine->b[i / 2] >> (i % 2 * 16)));
    }
    multiply(d, a, b, true);
}

// ---- fragments

struct Fragment {
    uint32_t *r;
    const char *row;
};

template <int kMatrices, bool kTransposed>
CUDA_ON_HOST_UNSEEN void fragments_of_warp(void **lanes, unsigned) {
    for (int m = 0; m < kMatrices; ++m) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row)
            memcpy(element[row], static_cast<const Fragment *>(lanes[m * 8 + row])->row, 16);
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, column = l % 4 * 2;
            const uint16_t low = kTransposed ? element[column][row] : element[row][column];
            const uint16_t high = kTransposed ? element[column + 1][row] : element[row][column + 1];
            static_cast<const Fragment *>(lanes[l])->r[m] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

template <int kMatrices, bool kTransposed>
CUDA_ON_HOST_UNSEEN void ldmatrix(uint32_t *r, const void *row, const char *where) {
    must_be_whole_warp("ldmatrix", where);
    if (lane() < 8 * kMatrices) {
        must_be_aligned(row, 16, "ldmatrix", where);
        must_be_shared(row, 16, "ldmatrix", where);
        touch(row, 16, Access::kRead, where);
    }
    Fragment mine{r, static_cast<const char *>(row)};
    warp_meet(~0u, &mine, fragments_of_warp<kMatrices, kTransposed>, where, false);
}

// ---- cp.async

struct Copy {
    char *shared;
    const char *global;  // null: zeros
    unsigned bytes;
    const char *where;
};

struct Land {
    const Copy *copy;

    CUDA_ON_HOST_UNSEEN void operator()() const {
        touch(copy->shared, copy->bytes, Access::kWrite, copy->where);
        if (copy->global != nullptr)
            memcpy(copy->shared, copy->global, copy->bytes);
        else
            memset(copy->shared, 0, copy->bytes);
        delete copy;
    }
};

CUDA_ON_HOST_UNSEEN void copy_async(void *shared, const void *global, unsigned bytes, bool pred,
                                    const char *where) {
    must_be_aligned(shared, bytes, "cp.async to shared memory", where);
    must_be_shared(shared, bytes, "cp.async", where);
    if (pred) {
        must_be_aligned(global, bytes, "cp.async from global memory", where);
        touch(global, bytes, Access::kRead, where);
    }
    const char *source = pred ? static_cast<const char *>(global) : nullptr;
    async_issue(Queue::kCopy, Land{new Copy{static_cast<char *>(shared), source, bytes, where}}, where);
}

// ---- wgmma

constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;

struct Descriptor {
    uint32_t start, stride;  // bytes of shared memory
};

// Eight rows of 128 bytes repeat every `stride` bytes; the swizzle acts on the address, so it survives a step along K.
CUDA_ON_HOST_UNSEEN uint32_t address_of(Descriptor matrix, uint32_t row, uint32_t k) {
    const uint32_t address = matrix.start + row / 8 * matrix.stride + row % 8 * 128 + k * 2;
    return address ^ (address / 128 % 8) * 16;
}

CUDA_ON_HOST_UNSEEN Descriptor decoded(uint64_t descriptor, uint32_t rows, const char *where) {
    if (descriptor >> 62 != kSwizzle128 >> 62)
        fail("bad descriptor", where, "wgmma knows the 128-byte swizzle only, not mode %u", unsigned(descriptor >> 62));
    const Descriptor matrix{uint32_t(descriptor & 0x3fff) << 4, uint32_t(descriptor >> 32 & 0x3fff) << 4};
    if (matrix.start % 1024 >= 128)
        fail("misaligned", where, "wgmma's matrix at %u of shared memory is not on 1024 bytes", matrix.start);
    const size_t end = matrix.start / 1024 * 1024 + size_t(rows / 8 - 1) * matrix.stride + 1024;
    if (end > shared_bytes() || matrix.start % 128 > 96)
        fail("out of bounds", where, "wgmma's matrix ends at %zu of %zu bytes of shared memory", end, shared_bytes());
    return matrix;
}

struct Product {
    float *d[32];
    uint32_t a[32][4];
    uint64_t a_descriptor, b_descriptor;
    unsigned warp;
    bool accumulate;
    const char *where;
};

struct Wgmma {
    float *d;
    const uint32_t *a;  // null: a_descriptor
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;
    const char *where;
};

// 16 steps of one row: 32 bytes that the swizzle may part in two.
template <class T>
CUDA_ON_HOST_UNSEEN void read_row(float *out, int stride, Descriptor matrix, uint32_t row, const char *where) {
    for (uint32_t k = 0; k < 16; k += 8) {
        const char *p = shared_memory() + address_of(matrix, row, k);
        touch(p, 16, Access::kRead, where);
        uint16_t bits[8];
        memcpy(bits, p, sizeof bits);
        for (uint32_t i = 0; i < 8; ++i)
            out[(k + i) * stride] = widen<T>(bits[i]);
    }
}

template <class T, int kColumns, bool kFromRegisters>
struct Multiply {
    const Product *product;

    CUDA_ON_HOST_UNSEEN void operator()() const {
        const char *where = product->where;
        float a[16][16], b[16][kColumns];
        if (kFromRegisters)
            for (int l = 0; l < 32; ++l)
                gather_a<T>(a, l, product->a[l]);
        else
            for (int row = 0; row < 16; ++row)
                read_row<T>(a[row], 1, decoded(product->a_descriptor, 64, where), product->warp % 4 * 16 + row, where);
        const Descriptor matrix = decoded(product->b_descriptor, kColumns, where);
        for (int column = 0; column < kColumns; ++column)
            read_row<T>(&b[0][column], kColumns, matrix, column, where);
        multiply(product->d, a, b, product->accumulate);
        delete product;
    }
};

// The four warps' shares of a product are independent, so that each is queued as its own warp issues it.
template <class T, int kColumns, bool kFromRegisters>
CUDA_ON_HOST_UNSEEN void issue_warp(void **lanes, unsigned) {
    const Wgmma *first = static_cast<const Wgmma *>(lanes[0]);
    Product *product =
        new Product{{}, {}, first->a_descriptor, first->b_descriptor, warp(), first->accumulate, first->where};
    for (int l = 0; l < 32; ++l) {
        const Wgmma *mine = static_cast<const Wgmma *>(lanes[l]);
        if (mine->a_descriptor != first->a_descriptor || mine->b_descriptor != first->b_descriptor ||
            mine->accumulate != first->accumulate)
            fail("bad descriptor", first->where, "wgmma: lanes of one warp disagree");
        product->d[l] = mine->d;
        if (kFromRegisters)
            memcpy(product->a[l], mine->a, sizeof product->a[l]);
    }
    if (!kFromRegisters)
        decoded(product->a_descriptor, 64, first->where);
    decoded(product->b_descriptor, kColumns, first->where);
    async_issue(Queue::kMatrix, Multiply<T, kColumns, kFromRegisters>{product}, first->where);
}

CUDA_ON_HOST_UNSEEN void must_be_warpgroup(const char *where) {
    const dim3 block = block_dim();
    if ((warp() / 4 + 1) * 128 > block.x * block.y * block.z)
        fail("partial warpgroup", where, "wgmma needs four whole warps");
}

template <class T, int kColumns, bool kFromRegisters>
CUDA_ON_HOST_UNSEEN void wgmma(float *d, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor,
                               bool accumulate, const char *where) {
    must_be_warpgroup(where);
    Wgmma mine{d, a, a_descriptor, b_descriptor, accumulate, where};
    warp_meet(~0u, &mine, issue_warp<T, kColumns, kFromRegisters>, where, false);
}

struct Site {
    const char *where;
};

CUDA_ON_HOST_UNSEEN void commit_of_warp(void **lanes, unsigned) {
    async_commit(Queue::kMatrix, static_cast<const Site *>(lanes[0])->where);
}

template <int kGroups>
CUDA_ON_HOST_UNSEEN void wait_of_warp(void **lanes, unsigned) {
    async_wait(Queue::kMatrix, kGroups, static_cast<const Site *>(lanes[0])->where);
}

CUDA_ON_HOST_UNSEEN void at_matrix_queue(void (*last)(void **, unsigned), const char *where, bool memory) {
    Site mine{where};
    warp_meet(~0u, &mine, last, where, memory);
}

struct Flag {
    const uint32_t *p;
    uint32_t v;
};

CUDA_ON_HOST_UNSEEN bool raised(void *flag) {
    return *static_cast<const volatile uint32_t *>(static_cast<Flag *>(flag)->p) == static_cast<Flag *>(flag)->v;
}


// ---- the verbs themselves: signatures and meaning as in csrc/ptx.cuh

inline uint32_t load_stream(const uint32_t *p) { return *p; }
inline uint2 load_stream(const uint2 *p) { return *p; }
inline uint4 load_stream(const uint4 *p) { return *p; }
inline void prefetch_l2(const void *) {}
inline void store_stream(uint32_t *p, uint32_t v) { *p = v; }
inline void store_stream(uint4 *p, uint4 v) { *p = v; }

// access() may let others run, so that a loop around these ends: values are taken and given before it.
CUDA_ON_HOST_UNSEEN uint32_t load_acquire(const uint32_t *p, Caller at = here()) {
    sanitize(p, sizeof *p, Access::kRead);
    const uint32_t v = *static_cast<const volatile uint32_t *>(p);
    access(p, sizeof *p, Access::kAtomic, at);
    return v;
}

CUDA_ON_HOST_UNSEEN void store_release(uint32_t *p, uint32_t v, Caller at = here()) {
    sanitize(p, sizeof *p, Access::kWrite);
    *static_cast<volatile uint32_t *>(p) = v;
    access(p, sizeof *p, Access::kAtomic, at);
}

CUDA_ON_HOST_UNSEEN uint32_t atomic_add_acq_rel(uint32_t *p, uint32_t v, Caller at = here()) {
    sanitize(p, sizeof *p, Access::kWrite);
    const uint32_t before = *static_cast<volatile uint32_t *>(p);
    *static_cast<volatile uint32_t *>(p) = before + v;
    access(p, sizeof *p, Access::kAtomic, at);
    return before;
}

CUDA_ON_HOST_UNSEEN void add_relaxed(uint32_t *p, uint32_t v, Caller at = here()) { atomic_add_acq_rel(p, v, at); }

CUDA_ON_HOST_UNSEEN uint32_t atomic_inc_acq_rel(uint32_t *p, uint32_t last, Caller at = here()) {
    sanitize(p, sizeof *p, Access::kWrite);
    const uint32_t before = *static_cast<volatile uint32_t *>(p);
    *static_cast<volatile uint32_t *>(p) = before >= last ? 0 : before + 1;
    access(p, sizeof *p, Access::kAtomic, at);
    return before;
}

CUDA_ON_HOST_UNSEEN void wait_acquire(const uint32_t *p, uint32_t v, Caller at = here()) {
    sanitize(p, sizeof *p, Access::kRead);
    Flag flag{p, v};
    wait_until(raised, &flag, at);
    access(p, sizeof *p, Access::kAtomic, at);
}

CUDA_ON_HOST_UNSEEN int pinned(int v) { return v; }

// The neighbour of 1 / v on the other side, so that whoever leaves out the Newton step is found out. (It cannot mend the
// largest mantissa, where the card's approximation is the right one, as its division relies on the same two steps.)
CUDA_ON_HOST_UNSEEN float reciprocal_approx(float v) {
    const float r = 1.0f / v, error = __builtin_fmaf(v, r, -1.0f);
    uint32_t bits, of_v;
    memcpy(&bits, &r, sizeof bits);
    memcpy(&of_v, &v, sizeof of_v);
    if (!(error != 0.0f) || (of_v & 0x7fffffu) == 0x7fffffu || error != error)
        return r;
    return from_bits(bits + (error > 0.0f ? -1u : 1u));
}

CUDA_ON_HOST_UNSEEN float max_magnitude(float m, float v) {
    const float magnitude = __builtin_fabsf(v);
    if (m != m || magnitude != magnitude)
        return from_bits(0x7fffffffu);
    return magnitude > m ? magnitude : m;
}

template <int kBytes>
CUDA_ON_HOST_UNSEEN void cp_async(void *shared, const void *global, bool pred = true, Caller at = here()) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
    copy_async(shared, global, kBytes, pred, at);
}

CUDA_ON_HOST_UNSEEN void cp_async_commit(Caller at = here()) { async_commit(Queue::kCopy, at); }

template <int kGroups>
CUDA_ON_HOST_UNSEEN void cp_async_wait(Caller at = here()) {
    async_wait(Queue::kCopy, kGroups, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x1(uint32_t (&r)[1], const void *row, Caller at = here()) {
    ldmatrix<1, false>(r, row, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x1_trans(uint32_t (&r)[1], const void *row, Caller at = here()) {
    ldmatrix<1, true>(r, row, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x2(uint32_t (&r)[2], const void *row, Caller at = here()) {
    ldmatrix<2, false>(r, row, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row, Caller at = here()) {
    ldmatrix<2, true>(r, row, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x4(uint32_t (&r)[4], const void *row, Caller at = here()) {
    ldmatrix<4, false>(r, row, at);
}

CUDA_ON_HOST_UNSEEN void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, Caller at = here()) {
    ldmatrix<4, true>(r, row, at);
}

template <class T>
CUDA_ON_HOST_UNSEEN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      Caller at = here()) {
    must_be_whole_warp("mma.sync", at);
    Mma mine{d, a, b};
    warp_meet(~0u, &mine, mma_of_warp<T>, at, false);
}

CUDA_ON_HOST_UNSEEN void bar_sync(uint32_t id, uint32_t threads, Caller at = here()) {
    barrier_sync(id, threads, at);
}

CUDA_ON_HOST_UNSEEN void bar_arrive(uint32_t id, uint32_t threads, Caller at = here()) {
    barrier_arrive(id, threads, at);
}

CUDA_ON_HOST_UNSEEN void mbarrier_init(uint64_t *b, uint32_t count, Caller at = here()) {
    cuda_on_host::mbarrier_init(b, count, at);
}

CUDA_ON_HOST_UNSEEN void mbarrier_inval(uint64_t *b, Caller at = here()) {
    cuda_on_host::mbarrier_inval(b, at);
}

// One memory: nothing to order between its two views. Only a card finds these fences missing.
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() {}

CUDA_ON_HOST_UNSEEN void mbarrier_arrive(uint64_t *b, Caller at = here()) {
    cuda_on_host::mbarrier_arrive(b, 0, at);
}

CUDA_ON_HOST_UNSEEN void mbarrier_arrive_expect_tx(uint64_t *b, uint32_t bytes, Caller at = here()) {
    cuda_on_host::mbarrier_arrive(b, bytes, at);
}

CUDA_ON_HOST_UNSEEN bool mbarrier_test(const uint64_t *b, uint32_t parity, Caller at = here()) {
    if (cuda_on_host::mbarrier_test(const_cast<uint64_t *>(b), parity, at))
        return true;
    yield(at);
    return false;
}

CUDA_ON_HOST_UNSEEN bool mbarrier_try_wait(const uint64_t *b, uint32_t parity, Caller at = here()) {
    return verbs::mbarrier_test(b, parity, at) || cuda_on_host::mbarrier_test(const_cast<uint64_t *>(b), parity, at);
}

CUDA_ON_HOST_UNSEEN void mbarrier_wait(const uint64_t *b, uint32_t parity, Caller at = here()) {
    cuda_on_host::mbarrier_wait(const_cast<uint64_t *>(b), parity, at);
}

CUDA_ON_HOST_UNSEEN void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *b,
                                          Caller at = here()) {
    must_be_shared(shared, bytes, "bulk copy", at);
    cuda_on_host::bulk_copy(shared, global, bytes, b, at);
}

template <int kRegisters>
CUDA_ON_HOST_UNSEEN void give_registers(Caller at = here()) {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg takes multiples of 8");
    must_be_warpgroup(at);
    warp_meet(~0u, nullptr, nullptr, at, false);
}

template <int kRegisters>
CUDA_ON_HOST_UNSEEN void take_registers(Caller at = here()) {
    verbs::give_registers<kRegisters>(at);
}

// Registers need no fence here: a product reads a when it is issued and d when it lands.
template <int kCount>
CUDA_ON_HOST_UNSEEN void wgmma_fence(float (&)[kCount], Caller at = here()) {
    must_be_warpgroup(at);
    warp_meet(~0u, nullptr, nullptr, at, false);
}

CUDA_ON_HOST_UNSEEN void wgmma_commit(Caller at = here()) {
    must_be_warpgroup(at);
    at_matrix_queue(commit_of_warp, at, false);
}

template <int kGroups, int kCount>
CUDA_ON_HOST_UNSEEN void wgmma_wait(float (&)[kCount], Caller at = here()) {
    must_be_warpgroup(at);
    at_matrix_queue(wait_of_warp<kGroups>, at, true);
}

CUDA_ON_HOST_UNSEEN uint64_t wgmma_descriptor(const void *tile, Caller at = here()) {
    must_be_shared(tile, 16, "wgmma_descriptor", at);
    const uint64_t start = static_cast<uint64_t>(static_cast<const char *>(tile) - shared_memory());
    return (start & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | kSwizzle128;
}

template <class T>
CUDA_ON_HOST_UNSEEN void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate = true,
                                         Caller at = here()) {
    wgmma<T, 64, false>(d, nullptr, a, b, accumulate, at);
}

template <class T>
CUDA_ON_HOST_UNSEEN void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                                         Caller at = here()) {
    wgmma<T, 64, true>(d, a, 0, b, accumulate, at);
}

template <class T>
CUDA_ON_HOST_UNSEEN void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate = true,
                                         Caller at = here()) {
    wgmma<T, 128, false>(d, nullptr, a, b, accumulate, at);
}

template <class T>
CUDA_ON_HOST_UNSEEN void wgmma_m64n128k16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                                         Caller at = here()) {
    wgmma<T, 128, true>(d, a, 0, b, accumulate, at);
}

template <class T>
CUDA_ON_HOST_UNSEEN void wgmma_m64n256k16(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                                         Caller at = here()) {
    wgmma<T, 256, true>(d, a, 0, b, accumulate, at);
}

}  // namespace verbs
}  // namespace cuda_on_host

namespace nf4lora {

using cuda_on_host::verbs::load_stream;
using cuda_on_host::verbs::prefetch_l2;
using cuda_on_host::verbs::store_stream;
using cuda_on_host::verbs::load_acquire;
using cuda_on_host::verbs::store_release;
using cuda_on_host::verbs::atomic_add_acq_rel;
using cuda_on_host::verbs::add_relaxed;
using cuda_on_host::verbs::atomic_inc_acq_rel;
using cuda_on_host::verbs::wait_acquire;
using cuda_on_host::verbs::pinned;
using cuda_on_host::verbs::reciprocal_approx;
using cuda_on_host::verbs::max_magnitude;
using cuda_on_host::verbs::cp_async;
using cuda_on_host::verbs::cp_async_commit;
using cuda_on_host::verbs::cp_async_wait;
using cuda_on_host::verbs::ldmatrix_x1;
using cuda_on_host::verbs::ldmatrix_x1_trans;
using cuda_on_host::verbs::ldmatrix_x2;
using cuda_on_host::verbs::ldmatrix_x2_trans;
using cuda_on_host::verbs::ldmatrix_x4;
using cuda_on_host::verbs::ldmatrix_x4_trans;
using cuda_on_host::verbs::mma_m16n8k16;
using cuda_on_host::verbs::bar_sync;
using cuda_on_host::verbs::bar_arrive;
using cuda_on_host::verbs::mbarrier_init;
using cuda_on_host::verbs::mbarrier_inval;
using cuda_on_host::verbs::fence_mbarrier_init;
using cuda_on_host::verbs::fence_proxy_async;
using cuda_on_host::verbs::mbarrier_arrive;
using cuda_on_host::verbs::mbarrier_arrive_expect_tx;
using cuda_on_host::verbs::mbarrier_test;
using cuda_on_host::verbs::mbarrier_try_wait;
using cuda_on_host::verbs::mbarrier_wait;
using cuda_on_host::verbs::bulk_copy;
using cuda_on_host::verbs::give_registers;
using cuda_on_host::verbs::take_registers;
using cuda_on_host::verbs::wgmma_fence;
using cuda_on_host::verbs::wgmma_commit;
using cuda_on_host::verbs::wgmma_wait;
using cuda_on_host::verbs::wgmma_descriptor;
using cuda_on_host::verbs::wgmma_m64n64k16;
using cuda_on_host::verbs::wgmma_m64n128k16;
using cuda_on_host::verbs::wgmma_m64n256k16;

}  // namespace nf4lora
