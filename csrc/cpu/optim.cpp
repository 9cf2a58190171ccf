// optim_step:  one step of AdamW or Lion of every parameter, in place, with states in float32 or in 8-bit codes
// optim_check: is any gradient NaN or Inf? Counts the step where none is
// Operands:      params.h; params and grads dtype [numel] each, states in arenas of one index space
// Rounding:      nf4lora/reference_optim.py to the bit: each operation in float32, in its order
// Preconditions: offsets are multiples of 256, so that no two parameters share a block; ops.py checks the rest
// Memory:        reads and writes each operand once; no allocation
#include "codes.h"
#include "ops.h"
#include "philox.h"
#include "threads.h"

namespace nf4lora {
namespace NF4LORA_ISA {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

// Of the bits of values, NaN above infinity.
float absmax_of(const float *values, int64_t count) {
    int32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(values[i]) & 0x7fffffff);
        bits = magnitude > bits ? magnitude : bits;
    }
    return float_of(static_cast<uint32_t>(bits));
}

NF4LORA_INLINE void decode_block(const DynamicMap &map, float scale, const uint8_t *codes, int64_t count, float *values) {
    uint8_t padded[kStateBlock] = {};
    if (count < kStateBlock)
        codes = static_cast<const uint8_t *>(memcpy(padded, codes, count));
    for (int first = 0; first < kStateBlock; first += kGroup) {
        Vec v[kGroupVecs];
        decode_group(map, codes + first, v);
        for (int i = 0; i < kGroupVecs; ++i)
            store(values + first + i * kWidth, v[i] * broadcast(scale));
    }
}

NF4LORA_INLINE void encode_values(const DynamicMap &map, const float *values, float inv, uint8_t *codes) {
    Vec v[kGroupVecs];
    NF4LORA_UNROLL
    for (int i = 0; i < kGroupVecs; ++i)
        v[i] = load(values + i * kWidth) * broadcast(inv);
    encode_group(map, v, codes);
}

// A state of 8 bits while its block is stepped.
struct Coded {
    const DynamicMap &map;
    uint8_t *codes;
    float &absmax;
    float values[kStateBlock], inv;

    Coded(const DynamicMap &map, void *arena, float *absmax, int64_t first)
        : map(map), codes(static_cast<uint8_t *>(arena) + first), absmax(absmax[first / kStateBlock]) {}

    void decode(int64_t count) { decode_block(map, absmax, codes, count, values); }

    void scale(float largest) {
        absmax = largest;
        inv = reciprocal(largest);
    }

    bool is_whole(int64_t count) const { return count == kStateBlock && absmax <= kLargest; }

    void encode_group(int first) { encode_values(map, values + first, inv, codes + first); }

    // What is not whole: the rest of a tensor, or infinities and what is not a number.
    void encode_each(int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            codes[i] = static_cast<uint8_t>(encode_in_cell(*map.all, values[i] * inv));
    }
};

template <class T>  // float, or Vec
NF4LORA_INLINE void adamw_moments(const OptimConstants &c, T g, T &m, T &v) {
    m = m * c.beta1 + g * c.rest1;
    v = v * c.beta2 + (g * c.rest2) * g;
}

NF4LORA_INLINE float adamw_param(const OptimConstants &c, float p, float m, float v) {
    return p * c.keep - (m / (__builtin_sqrtf(v) / c.root + c.eps)) * c.step_size;
}

void adamw(const OptimConstants &c, int64_t count, float *__restrict p, const float *__restrict g, float *__restrict m,
           float *__restrict v) {
    for (int64_t i = 0; i < count; ++i) {
        adamw_moments(c, g[i], m[i], v[i]);
        p[i] = adamw_param(c, p[i], m[i], v[i]);
    }
}

// Of a block's elements, all of them: decoded, stepped, and held until their absmax is known.
NF4LORA_INLINE void adamw_moments(const OptimConstants &c, const float *g, Coded &m, Coded &v) {
    IVec m_most{}, v_most{};  // of the bits of magnitudes, as in absmax_of
    for (int first = 0; first < kStateBlock; first += kGroup) {
        Vec m_of[kGroupVecs], v_of[kGroupVecs];
        decode_group(m.map, m.codes + first, m_of);
        decode_group(v.map, v.codes + first, v_of);
        NF4LORA_UNROLL
        for (int i = 0; i < kGroupVecs; ++i) {
            const int at = first + i * kWidth;
            Vec m_new = m_of[i] * m.absmax, v_new = v_of[i] * v.absmax;
            adamw_moments(c, load(g + at), m_new, v_new);
            store(m.values + at, m_new);
            store(v.values + at, v_new);
            const IVec m_bits = (IVec)m_new & 0x7fffffff, v_bits = (IVec)v_new & 0x7fffffff;
            m_most = m_most < m_bits ? m_bits : m_most;
            v_most = v_most < v_bits ? v_bits : v_most;
        }
    }
    float most[2][kWidth];
    memcpy(most[0], &m_most, sizeof m_most);
    memcpy(most[1], &v_most, sizeof v_most);
    m.scale(absmax_of(most[0], kWidth));
    v.scale(absmax_of(most[1], kWidth));
}

void adamw(const OptimConstants &c, int64_t count, float *__restrict p, const float *__restrict g, Coded &m, Coded &v) {
    if (count == kStateBlock) {
        adamw_moments(c, g, m, v);
    } else {
        m.decode(count);
        v.decode(count);
        for (int64_t i = 0; i < count; ++i)
            adamw_moments(c, g[i], m.values[i], v.values[i]);
        m.scale(absmax_of(m.values, count));
        v.scale(absmax_of(v.values, count));
    }
    if (m.is_whole(count) && v.is_whole(count)) {
        for (int first = 0; first < kStateBlock; first += kGroup) {  // divisions take long, lookups run beside them
            for (int i = first; i < first + kGroup; ++i)
                p[i] = adamw_param(c, p[i], m.values[i], v.values[i]);
            m.encode_group(first);
            v.encode_group(first);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i)
        p[i] = adamw_param(c, p[i], m.values[i], v.values[i]);
    m.encode_each(count);
    v.encode_each(count);
}

void lion(const OptimConstants &c, int64_t count, float *__restrict p, const float *__restrict g, float *__restrict m) {
    for (int64_t i = 0; i < count; ++i) {
        const float direction = m[i] * c.beta1 + g[i] * c.rest1;
        const float sign = static_cast<float>((0.0f < direction) - (direction < 0.0f));  // 0 of NaN
        p[i] = p[i] * c.keep - sign * c.lr;
        m[i] = m[i] * c.beta2 + g[i] * c.rest2;
    }
}

void lion(const OptimConstants &c, int64_t count, float *__restrict p, const float *__restrict g, Coded &m) {
    m.decode(count);
    lion(c, count, p, g, m.values);
    m.scale(absmax_of(m.values, count));
    if (!m.is_whole(count))
        return m.encode_each(count);
    for (int first = 0; first < kStateBlock; first += kGroup)
        m.encode_group(first);
}

// Of a block that begins at index `first`; the results are values of bfloat16.
void round_stochastically(int64_t seed, int64_t first, int64_t count, float *values) {
    constexpr int64_t kSpan = 4 * kPhiloxLanes;
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
    for (int64_t base = 0; base < count; base += kSpan) {
        uint32_t words[4][kPhiloxLanes];
        philox(key, static_cast<uint64_t>(first + base) / 4, words);
        for (int64_t i = base; i < min_of(base + kSpan, count); ++i) {
            const uint32_t bits = bits_of(values[i]), word = words[i % 4][(i - base) / 4];
            const bool finite = (bits & 0x7f800000) != 0x7f800000;
            values[i] = float_of(select(finite, (bits + (word >> 16)) & 0xffff0000u, bits));
        }
    }
}

void step_states(const OptimParams &p, const OptimConstants &c, int64_t first, int64_t count, float *param, const float *grad) {
    if (p.absmax1) {
        Coded m{kSignedMap, p.state1, p.absmax1, first};
        if (p.kind == kLion)
            return lion(c, count, param, grad, m);
        Coded v{kUnsignedMap, p.state2, p.absmax2, first};
        return adamw(c, count, param, grad, m, v);
    }
    float *m = static_cast<float *>(p.state1) + first;
    if (p.kind == kLion)
        return lion(c, count, param, grad, m);
    adamw(c, count, param, grad, m, static_cast<float *>(p.state2) + first);
}

// Brings what the block kAhead after this one reads nearer. Work on codes leaves the memory idle, and what the processor
// fetches by itself ends with each page of 4 KiB.
NF4LORA_INLINE void fetch_ahead(const OptimParams &p, const OptimTensor &of, int64_t at) {
    constexpr int64_t kAhead = 8 * kStateBlock, kLine = 64;
    constexpr int kSecondLevel = 2;  // as the first is small, and full
    at += kAhead;
    if (!p.absmax1 || at + kStateBlock > of.numel)
        return;
    const auto fetch = [](const void *base, int64_t first, int64_t size) {
        const char *const begin = static_cast<const char *>(base) + first * size;
        for (int64_t i = 0; i < kStateBlock * size; i += kLine)
            __builtin_prefetch(begin + i, 0, kSecondLevel);
    };
    const int64_t size = p.dtype == kFloat32 ? 4 : 2;
    fetch(of.param, at, size);
    fetch(of.grad, at, size);
    fetch(p.state1, of.offset + at, 1);
    if (p.state2)
        fetch(p.state2, of.offset + at, 1);
}

void step_block(const OptimParams &p, const OptimTensor &of, const OptimConstants &c, int64_t block) {
    const int64_t at = block * kStateBlock, first = of.offset + at, count = min_of(kStateBlock, of.numel - at);
    fetch_ahead(p, of, at);
    if (p.dtype == kFloat32)
        return step_states(p, c, first, count, static_cast<float *>(of.param) + at, static_cast<const float *>(of.grad) + at);
    float values[kStateBlock], grads[kStateBlock] = {};
    load_elements(of.param, p.dtype, at, count, values);
    load_elements(of.grad, p.dtype, at, count, grads);
    step_states(p, c, first, count, values, grads);
    if (p.stochastic)
        round_stochastically(p.seed, p.origin + first, count, values);
    store_elements(of.param, p.dtype, at, count, values);
}

int64_t blocks_of(const OptimTensor &of) { return ceil_div(of.numel, kStateBlock); }

int64_t blocks_of_all(const OptimTensor *tensors, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i)
        blocks += blocks_of(tensors[i]);
    return blocks;
}

// Part `part` of `parts` of the blocks of all tensors: work(tensor, its first block, the one after its last).
template <class Work>
NF4LORA_INLINE void for_part(const OptimTensor *tensors, int64_t count, int64_t blocks, int part, int parts, Work work) {
    int64_t before = 0;
    const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    for (int64_t i = 0; i < count && before < end; ++i) {
        const int64_t mine = blocks_of(tensors[i]);
        const int64_t from = max_of(begin - before, 0), to = min_of(end - before, mine);
        before += mine;
        if (from < to)
            work(tensors[i], from, to);
    }
}

bool any_not_finite(const OptimTensor &of, int32_t dtype, int64_t begin, int64_t end) {
    uint32_t found = 0;
    if (dtype == kFloat32) {
        const float *g = static_cast<const float *>(of.grad);
        for (int64_t i = begin; i < end; ++i)
            found |= (bits_of(g[i]) & 0x7f800000u) + 0x00800000u;
        return found >> 31;
    }
    const uint16_t *g = static_cast<const uint16_t *>(of.grad);
    const uint32_t exponent = dtype == kBFloat16 ? 0x7f80 : 0x7c00, one = dtype == kBFloat16 ? 0x80 : 0x400;
    for (int64_t i = begin; i < end; ++i)
        found |= (g[i] & exponent) + one;
    return found >> 15 & 1;
}

}  // namespace

const char *optim_step(const OptimParams &p) {
    if (p.flag && *p.flag)
        return nullptr;
    const int64_t blocks = blocks_of_all(p.tensors, p.count);
    const int parts = static_cast<int>(max_of(1, min_of(p.workers, blocks)));
    for_parts(parts, parts, [&](int64_t part, int) {
        for_part(p.tensors, p.count, blocks, part, parts, [&p](const OptimTensor &of, int64_t from, int64_t to) {
            const OptimHyper &hyper = p.hypers[of.hyper];
            const OptimConstants c = constants_of(hyper, p.steps ? p.steps[of.slot] : hyper.step);
            for (int64_t block = from; block < to; ++block)
                step_block(p, of, c, block);
        });
    });
    return nullptr;
}

const char *optim_check(const OptimCheckParams &p) {
    const int64_t blocks = blocks_of_all(p.tensors, p.count);
    const int parts = static_cast<int>(max_of(1, min_of(p.workers, blocks)));
    int32_t found = 0;
    for_parts(parts, parts, [&](int64_t part, int) {
        for_part(p.tensors, p.count, blocks, part, parts, [&](const OptimTensor &of, int64_t from, int64_t to) {
            if (any_not_finite(of, p.dtype, from * kStateBlock, min_of(to * kStateBlock, of.numel)))
                __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
        });
    });
    *p.flag = found;
    for (int64_t i = 0; i < p.count; ++i)
        p.steps[p.tensors[i].slot] += !found;
    return nullptr;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
