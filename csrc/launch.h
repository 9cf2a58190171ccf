// What the host side of every CUDA launch works out: whether a pointer suits wide accesses, and how many blocks there are.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nf4lora {

static inline bool aligned(const void *p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Thread blocks: no more than the caller wants, nor than there is work for.
static inline unsigned grid_of(int32_t wanted, int64_t work) {
    return static_cast<unsigned>(wanted < 1 ? 1 : wanted < work ? wanted : work);
}

static inline bool power_of_two(int64_t v) { return v > 0 && (v & (v - 1)) == 0; }

static inline int log2_of(int64_t power) {
    int log = 0;
    while (int64_t{1} << log < power)
        ++log;
    return log;
}

}  // namespace nf4lora
