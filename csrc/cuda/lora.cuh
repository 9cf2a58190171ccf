// What the kernels of the adapters share: where a member's rows and ranks lie in a group, how operands of any alignment
// come to shared memory and go back, and ordered sums of parts.
#pragma once
#include "../dropout.cuh"
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kPiece = 8;  // 16-bit elements of a 16-byte copy

// Bytes of a row of 16-bit elements in shared memory: 16 more than it holds, so that ldmatrix meets no bank twice.
template <int kColumns>
constexpr int kPitch = 2 * kColumns + 16;

// ---- groups

struct RankPlace {
    int member;
    int64_t first;  // of the member's ranks in the group
};

template <class Params>
NF4LORA_DEVICE RankPlace place_of_rank(const Params &p, int64_t rank) {
    RankPlace place{0, 0};
    while (place.member + 1 < p.count && rank >= place.first + p.member[place.member].r) {
        place.first += p.member[place.member].r;
        ++place.member;
    }
    return place;
}

// Where every member is cut along its rows (or ranks) into parts of `size`: whose part this is, and its number there.
struct PartPlace {
    int member;
    int64_t part;
    int64_t row0, rank0;  // the member's first row and rank in the group
};

// At least one: that of a member without ranks passes its dy on.
NF4LORA_HD int64_t parts_of_member(const Member &member, bool along_rows, int size) {
    const int64_t cut = along_rows ? member.w.rows : member.r;
    return cut > 0 ? (cut + size - 1) / size : 1;
}

NF4LORA_DEVICE PartPlace place_of_part(const GroupLoraBwdParams &p, int64_t part, bool along_rows, int size) {
    PartPlace place{0, part, 0, 0};
    for (; place.member + 1 < p.count; ++place.member) {
        const int64_t parts = parts_of_member(p.member[place.member], along_rows, size);
        if (place.part < parts)
            break;
        place.part -= parts;
        place.row0 += p.member[place.member].w.rows;
        place.rank0 += p.member[place.member].r;
    }
    return place;
}

// How many parts there are.
static inline int64_t parts_of(const GroupLoraBwdParams &p, bool along_rows, int size) {
    int64_t parts = 0;
    for (int i = 0; i < p.count; ++i)
        parts += parts_of_member(p.member[i], along_rows, size);
    return parts;
}

static inline int64_t most_rows(const GroupLoraBwdParams &p) {
    int64_t most = 0;
    for (int i = 0; i < p.count; ++i)
        most = p.member[i].w.rows > most ? p.member[i].w.rows : most;
    return most;
}

template <class Params>
int64_t most_ranks(const Params &p) {
    int64_t most = 0;
    for (int i = 0; i < p.count; ++i)
        most = p.member[i].r > most ? p.member[i].r : most;
    return most;
}

// ---- extents and sums of parts

NF4LORA_DEVICE int extent(int64_t left, int most) {
    return left < 0 ? 0 : static_cast<int>(left < most ? left : most);
}

NF4LORA_DEVICE float sum_of_parts(const float *first, int64_t apart, unsigned parts) {
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned part = 0; part < parts; ++part)
        sum = __fadd_rn(sum, first[part * apart]);
    return sum;
}

// Of four neighbours each; 16-byte aligned. kAhead parts are fetched before the first is added.
template <int kAhead>
NF4LORA_DEVICE float4 sum_of_quads(const float *first, int64_t apart, unsigned parts) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll(kAhead)
    for (unsigned part = 0; part < parts; ++part) {
        const float4 v = *reinterpret_cast<const float4 *>(first + part * apart);
        sum = make_float4(__fadd_rn(sum.x, v.x), __fadd_rn(sum.y, v.y), __fadd_rn(sum.z, v.z), __fadd_rn(sum.w, v.w));
    }
    return sum;
}

// ---- four neighbours of lora_A or lora_B, as they lie in memory, and rounded to T

// Elements from `valid` on are zero. wide: all four may be loaded at once.
NF4LORA_DEVICE uint4 load_quad(const void *p, int32_t dtype, int64_t at, int64_t valid, bool wide) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (dtype == kFloat32) {
        const uint32_t *words = static_cast<const uint32_t *>(p) + at;
        if (wide && valid >= 4)
            return *reinterpret_cast<const uint4 *>(words);
        raw.x = valid > 0 ? words[0] : 0;
        raw.y = valid > 1 ? words[1] : 0;
        raw.z = valid > 2 ? words[2] : 0;
        raw.w = valid > 3 ? words[3] : 0;
        return raw;
    }
    const uint16_t *halves = static_cast<const uint16_t *>(p) + at;
    if (wide && valid >= 4) {
        const uint2 pairs = *reinterpret_cast<const uint2 *>(halves);
        return make_uint4(pairs.x, pairs.y, 0, 0);
    }
    raw.x = (valid > 0 ? halves[0] : 0u) | (valid > 1 ? halves[1] : 0u) << 16;
    raw.y = (valid > 2 ? halves[2] : 0u) | (valid > 3 ? halves[3] : 0u) << 16;
    return raw;
}

template <class T>
NF4LORA_DEVICE uint2 round_quad(uint4 raw, int32_t dtype) {
    if (dtype == kFloat32)
        return make_uint2(round_pair<T>(__uint_as_float(raw.x), __uint_as_float(raw.y)),
                          round_pair<T>(__uint_as_float(raw.z), __uint_as_float(raw.w)));
    const bool bf16 = dtype == kBFloat16;
    const float2 low = bf16 ? unpack_pair<__nv_bfloat16>(raw.x) : unpack_pair<__half>(raw.x);
    const float2 high = bf16 ? unpack_pair<__nv_bfloat16>(raw.y) : unpack_pair<__half>(raw.y);
    return make_uint2(round_pair<T>(low.x, low.y), round_pair<T>(high.x, high.y));
}

// Four columns of a rank of the group's A; zeros from `valid` on.
template <class Params>
NF4LORA_DEVICE uint4 load_quad_of_A(const Params &p, int64_t rank, int64_t column, int64_t valid, bool wide) {
    const RankPlace place = place_of_rank(p, rank);
    return load_quad(p.member[place.member].lora_A, p.A_dtype, (rank - place.first) * p.K + column, valid, wide);
}

// ---- pieces: eight neighbours of a row of x, dy or what is made of them

// Puts one into shared memory, zeros from `valid` on. wide: as an asynchronous copy, which the thread waits for.
NF4LORA_DEVICE void load_piece(char *to, const void *from, int64_t at, int64_t valid, bool wide) {
    const uint16_t *source = static_cast<const uint16_t *>(from);
    if (wide)
        return cp_async<16>(to, source + (valid > 0 ? at : 0), valid > 0);
    uint32_t pair[kPiece / 2];
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i)
        pair[i] = (2 * i < valid ? source[at + 2 * i] : 0u) | (2 * i + 1 < valid ? source[at + 2 * i + 1] : 0u) << 16;
    *reinterpret_cast<uint4 *>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// The first `valid` elements of one to memory. wide: all eight may be stored at once.
NF4LORA_DEVICE void store_piece(void *to, int64_t at, uint4 piece, int64_t valid, bool wide) {
    uint16_t *target = static_cast<uint16_t *>(to) + at;
    if (wide && valid >= kPiece) {
        *reinterpret_cast<uint4 *>(target) = piece;
        return;
    }
    const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
        if (i < valid)
            target[i] = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
}

// Which of the eight elements from flat index `first` on the mask keeps, a bit each.
NF4LORA_DEVICE uint32_t kept_of_piece(const DropoutMask &mask, int64_t first) {
    const int64_t counter = first / 4;
    const uint32_t kept = mask.kept(counter) | mask.kept(counter + 1) << 4;
    return first % 4 ? (kept | mask.kept(counter + 2) << 8) >> first % 4 : kept;
}

NF4LORA_DEVICE uint32_t keep_pair(uint32_t pair, uint32_t kept) {
    return pair & ((kept & 1 ? 0xffffu : 0u) | (kept & 2 ? 0xffff0000u : 0u));
}

// With zeros for what is not kept.
NF4LORA_DEVICE uint4 keep_piece(uint4 v, uint32_t kept) {
    return make_uint4(keep_pair(v.x, kept), keep_pair(v.y, kept >> 2), keep_pair(v.z, kept >> 4),
                      keep_pair(v.w, kept >> 6));
}

// ---- which operands can be moved 16 bytes at a time: a bit for each member's, or bit 0 for all

struct Wideness {
    uint32_t source, out;  // x or dy; x_ext, dx or dy_ext
    bool side, factor;     // xa or dyb beside it; four elements of A or B
};

// Four neighbours of every A.
template <class Params>
bool wide_A(const Params &p) {
    bool wide = p.K % 4 == 0;
    for (int i = 0; i < p.count; ++i)
        wide = wide && aligned(p.member[i].lora_A, p.A_dtype == kFloat32 ? 16 : 8);
    return wide;
}

// The same of every B, whose rows are its ranks.
static inline bool wide_B(const GroupLoraBwdParams &p) {
    bool wide = true;
    for (int i = 0; i < p.count; ++i)
        wide = wide && p.member[i].r % 4 == 0 && aligned(p.member[i].lora_B, p.B_dtype == kFloat32 ? 16 : 8);
    return wide;
}

// Pieces of the rows of a whole matrix.
static inline bool wide_rows(const void *matrix, int64_t ld) { return ld % kPiece == 0 && aligned(matrix, 16); }

// Pieces of a member's columns of xa or dyb.
static inline bool wide_ranks(const GroupLoraBwdParams &p, const void *side) {
    bool wide = aligned(side, 16);
    for (int i = 0; i < p.count; ++i)
        wide = wide && p.member[i].r % kPiece == 0;
    return wide;
}

// Pieces of each member's dy, which end with its columns.
static inline uint32_t wide_dy(const GroupLoraBwdParams &p) {
    uint32_t wide = 0;
    for (int i = 0; i < p.count; ++i) {
        const Member &of = p.member[i];
        wide |= uint32_t{of.w.rows % kPiece == 0 && wide_rows(of.dy, of.ld_dy)} << i;
    }
    return wide;
}

// Pieces of each member's columns of dy_ext.
static inline uint32_t wide_dy_ext(const GroupLoraBwdParams &p) {
    uint32_t wide = 0;
    int64_t column = 0;
    for (int i = 0; i < p.count; column += p.member[i++].w.rows)
        wide |= uint32_t{column % kPiece == 0 && wide_rows(p.dy_ext, p.ld)} << i;
    return wide;
}

// ---- dyb, and the columns of dy_ext beyond dy

template <class T>
NF4LORA_DEVICE void store_dyb(const GroupLoraBwdParams &p, int64_t token, int64_t rank, float v) {
    const T rounded = from_float<T>(v);
    static_cast<T *>(p.dyb)[token * p.r + rank] = rounded;
    if (p.dy_ext && p.ld > p.N)
        static_cast<T *>(p.dy_ext)[token * p.ld + p.N + rank] = rounded;
}

// The block writes what follows the last rank.
template <class T>
NF4LORA_DEVICE void store_zeros_beyond_dyb(const GroupLoraBwdParams &p, int64_t token0, int rows) {
    const int zeros = p.dy_ext && p.ld > p.N ? static_cast<int>(p.ld - p.N - p.r) : 0;
    for (int i = static_cast<int>(threadIdx.x); i < rows * zeros; i += kThreads)
        static_cast<T *>(p.dy_ext)[(token0 + i / zeros) * p.ld + p.N + p.r + i % zeros] = from_float<T>(0.0f);
}

}  // namespace nf4lora
