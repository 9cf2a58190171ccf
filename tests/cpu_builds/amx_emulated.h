// AMX without a processor that has it: included before a source (-include), these stand for the intrinsics of immintrin.h.
// What the processor refuses ends the process: tiles that were not configured, shapes that do not match, a palette other
// than 1. Loads and stores touch the configured rows and bytes only, as AddressSanitizer sees.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

// How many products there were: the kernels that were to use tiles did.
extern "C" {
inline __attribute__((visibility("default"))) std::atomic<int64_t> nf4lora_amx_products{0};
}

namespace amx_emulated {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
    int rows, bytes;
    alignas(64) uint8_t at[kRows][kRowBytes];
};

struct Tiles {
    bool configured;
    Tile tile[kTiles];
};

inline thread_local Tiles tiles{};

[[noreturn]] inline void refuse(const char *why) {
    fprintf(stderr, "AMX: %s\n", why);
    abort();
}

inline Tile &configured(int number) {
    Tile &tile = tiles.tile[number];
    if (!tiles.configured || !tile.rows)
        refuse("a tile that is not configured");
    return tile;
}

inline void load_config(const void *memory) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    static_assert(sizeof config == 64);
    memcpy(&config, memory, sizeof config);
    tiles = {};
    if (config.palette == 0)
        return;
    if (config.palette != 1)
        refuse("an unknown palette");
    if (config.start)
        refuse("a row to start at");
    for (const uint8_t byte : config.reserved)
        if (byte)
            refuse("a reserved byte that is not 0");
    for (int i = 0; i < 16; ++i) {
        if (config.bytes[i] > kRowBytes || config.rows[i] > kRows || !config.bytes[i] != !config.rows[i])
            refuse("a shape that no tile can have");
        if (i >= kTiles && config.rows[i])
            refuse("more tiles than there are");
        if (i < kTiles)
            tiles.tile[i].rows = config.rows[i], tiles.tile[i].bytes = config.bytes[i];
    }
    tiles.configured = true;
}

template <int number>
void load(std::integral_constant<int, number>, const void *base, int64_t stride) {
    static_assert(number >= 0 && number < kTiles);
    Tile &tile = configured(number);
    memset(tile.at, 0, sizeof tile.at);
    for (int r = 0; r < tile.rows; ++r)
        memcpy(tile.at[r], static_cast<const uint8_t *>(base) + r * stride, tile.bytes);
}

template <int number>
void store(std::integral_constant<int, number>, void *base, int64_t stride) {
    static_assert(number >= 0 && number < kTiles);
    const Tile &tile = configured(number);
    for (int r = 0; r < tile.rows; ++r)
        memcpy(static_cast<uint8_t *>(base) + r * stride, tile.at[r], tile.bytes);
}

template <int number>
void zero(std::integral_constant<int, number>) {
    static_assert(number >= 0 && number < kTiles);
    memset(configured(number).at, 0, sizeof(Tile::at));
}

inline float flushed(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0, f) : f; }

inline float upper(uint32_t pair) {
    float f;
    memcpy(&f, &(pair &= 0xffff0000u), sizeof f);
    return flushed(f);
}

// For each row, a sum of the products of the pairs' lower halves and one of the upper, which join before they join C.
// Denormals count as 0, before and after each operation.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) inline void product(Tile &c, const Tile &a, const Tile &b) {
    const int n = c.bytes / 4;
    for (int row = 0; row < c.rows; ++row) {
        float low[kRowBytes / 4] = {}, high[kRowBytes / 4] = {};
        for (int k = 0; k < a.bytes / 4; ++k) {
            uint32_t x, p[kRowBytes / 4];
            memcpy(&x, a.at[row] + 4 * k, 4);
            memcpy(p, b.at[k], sizeof p);
            for (int col = 0; col < kRowBytes / 4; ++col) {
                low[col] = flushed(fmaf(upper(x << 16), upper(p[col] << 16), low[col]));
                high[col] = flushed(fmaf(upper(x), upper(p[col]), high[col]));
            }
        }
        float sum[kRowBytes / 4];
        memcpy(sum, c.at[row], sizeof sum);
        for (int col = 0; col < n; ++col)
            sum[col] = flushed(flushed(sum[col]) + flushed(low[col] + high[col]));
        memcpy(c.at[row], sum, sizeof sum);
    }
}

template <int c, int a, int b>
void multiply(std::integral_constant<int, c>, std::integral_constant<int, a>, std::integral_constant<int, b>) {
    static_assert(c != a && c != b && a != b, "three tiles");
    Tile &sum = configured(c);
    const Tile &left = configured(a), &right = configured(b);
    if (sum.bytes % 4 || left.bytes % 4 || left.rows != sum.rows || right.rows != left.bytes / 4 || right.bytes != sum.bytes)
        refuse("shapes that do not match");
    product(sum, left, right);
    nf4lora_amx_products.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace amx_emulated

// Tile numbers are part of an instruction: constants.
#define NF4LORA_TILE(t) std::integral_constant<int, (t)>{}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) amx_emulated::load_config(memory)
#define _tile_release() (amx_emulated::tiles = {})
#define _tile_loadd(t, base, stride) amx_emulated::load(NF4LORA_TILE(t), base, stride)
#define _tile_stored(t, base, stride) amx_emulated::store(NF4LORA_TILE(t), base, stride)
#define _tile_zero(t) amx_emulated::zero(NF4LORA_TILE(t))
#define _tile_dpbf16ps(c, a, b) amx_emulated::multiply(NF4LORA_TILE(c), NF4LORA_TILE(a), NF4LORA_TILE(b))

// For api.cpp: a processor with tiles, and a system that lets them be used.
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = 0, *(d) = ~0u, 1)
#define syscall(...) 0L
