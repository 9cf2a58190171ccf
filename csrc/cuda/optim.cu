// optim_step:  one step of AdamW or Lion of every parameter, in place, with states in float32 or in 8-bit codes
// optim_check: is any gradient NaN or Inf? Counts the step where none is
// Operands:      params.h; params and grads dtype [numel] each, states in arenas of one index space
// Rounding:      nf4lora/reference_optim.py to the bit: each operation in fp32, in its order
// Preconditions: offsets are multiples of 256, so that no two parameters share a block; ops.py checks the rest
// Memory:        reads and writes each operand once: 28 bytes a parameter in float32 with its states, 10 in 16 bits with
//                8-bit states; 12 KiB shared for these
// Budget:        at most 150 instructions a parameter (8-bit states, sm_90a): 0.30 ms for 41.9 M on an H200
//
// The table of tensors travels with the launch, so that all of them, up to kTensors, are one. A warp takes a unit at a
// time, 256 elements that share an absmax, 8 a lane; a thread block has a range of units to itself, so that its warps
// look for a unit's tensor a few times only. What is whole and aligned moves in runs of 4 to 16 bytes a lane.
#include <cstring>

#include "../api.h"
#include "../dropout.cuh"
#include "../optim.h"
#include "../tile.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kResident = 4;  // thread blocks of a multiprocessor, as nf4lora/heuristics.py has them
constexpr unsigned kAllLanes = ~0u;
constexpr int kEach = kStateBlock / kLanes;  // elements of a unit a lane holds
constexpr size_t kMostParameters = 32764;    // bytes of a kernel's parameters

// ---- the tables

constexpr int kTensors = 704;
constexpr int kHypers = 120;

union Hyper {
    OptimConstants known;
    OptimHyper counted;  // where the step is read on the device
};

struct StepTable {
    void *param[kTensors];
    const void *grad[kTensors];
    int64_t numel[kTensors];
    Hyper hyper[kHypers];
    void *state1, *state2;
    float *absmax1, *absmax2;
    const int32_t *steps, *flag;
    int64_t origin;
    Philox philox;
    uint32_t first[kTensors + 1];  // units of the tensors before
    uint32_t block[kTensors];      // of the arenas, where a tensor begins
    int32_t slot[kTensors];
    int32_t count;
    bool aligned;                  // the arenas
    uint8_t hyper_of[kTensors];
};
static_assert(sizeof(StepTable) <= kMostParameters && kHypers <= 256, "a table is a kernel's parameter");

constexpr int kGrads = 1280;

struct CheckTable {
    const void *grad[kGrads];
    int64_t numel[kGrads];
    int32_t *steps, *flag;
    uint32_t *counters;            // thread blocks that have come; of how many a gradient is not finite
    uint32_t first[kGrads + 1];
    int32_t slot[kGrads];
    int32_t count;
    bool last;                     // of the launches of one check
};
static_assert(sizeof(CheckTable) <= kMostParameters, "a table is a kernel's parameter");

// The tensor a unit is of: the last one that begins at it or before.
template <class Table>
NF4LORA_DEVICE int tensor_of(const Table &table, uint32_t unit) {
    int low = 0, high = table.count;
    while (low + 1 < high) {
        const int middle = (low + high) / 2;
        if (table.first[middle] <= unit)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// The first unit of thread block `block`.
template <class Table>
NF4LORA_DEVICE uint32_t first_unit(const Table &table, unsigned block) {
    return static_cast<uint32_t>(uint64_t{table.first[table.count]} * block / gridDim.x);
}

// ---- runs: kRun elements that lie together and kLanes such runs side by side, as often as a lane has elements

template <int kWords>
NF4LORA_DEVICE void load_words(const void *p, uint32_t *word) {
    if constexpr (kWords == 4) {
        const uint4 v = *static_cast<const uint4 *>(p);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else if constexpr (kWords == 2) {
        const uint2 v = *static_cast<const uint2 *>(p);
        word[0] = v.x, word[1] = v.y;
    } else {
        word[0] = *static_cast<const uint32_t *>(p);
    }
}

template <int kWords>
NF4LORA_DEVICE void store_words(void *p, const uint32_t *word) {
    if constexpr (kWords == 4)
        *static_cast<uint4 *>(p) = make_uint4(word[0], word[1], word[2], word[3]);
    else if constexpr (kWords == 2)
        *static_cast<uint2 *>(p) = make_uint2(word[0], word[1]);
    else
        *static_cast<uint32_t *>(p) = word[0];
}

// A lane's share of a unit, `left` elements of which exist, from `at` on. All of a whole unit where `whole`, which also
// means that the pointer suits runs.
template <int kRun>
struct Share {
    unsigned lane;
    int left;
    bool whole;

    NF4LORA_DEVICE int place(int i) const { return (i / kRun * kLanes + static_cast<int>(lane)) * kRun + i % kRun; }
    NF4LORA_DEVICE bool has(int i) const { return place(i) < left; }

    template <class T>
    NF4LORA_DEVICE void load(const T *at, uint32_t (&word)[kEach * sizeof(T) / 4]) const {
        constexpr int kWords = kRun * sizeof(T) / 4;
        if (whole) {
#pragma unroll
            for (int run = 0; run < kEach / kRun; ++run)
                load_words<kWords>(at + place(run * kRun), word + run * kWords);
            return;
        }
        constexpr int kPacked = 4 / sizeof(T);
#pragma unroll
        for (int w = 0; w < kEach / kPacked; ++w) {
            word[w] = 0;
#pragma unroll
            for (int i = 0; i < kPacked; ++i)
                if (has(w * kPacked + i)) {
                    uint32_t bits = 0;
                    memcpy(&bits, at + place(w * kPacked + i), sizeof(T));
                    word[w] |= bits << 8 * sizeof(T) * i;
                }
        }
    }

    template <class T>
    NF4LORA_DEVICE void store(T *at, const uint32_t (&word)[kEach * sizeof(T) / 4]) const {
        constexpr int kWords = kRun * sizeof(T) / 4;
        if (whole) {
#pragma unroll
            for (int run = 0; run < kEach / kRun; ++run)
                store_words<kWords>(at + place(run * kRun), word + run * kWords);
            return;
        }
        constexpr int kPacked = 4 / sizeof(T);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (has(i)) {
                const uint32_t bits = word[i / kPacked] >> 8 * sizeof(T) * (i % kPacked);
                memcpy(static_cast<void *>(at + place(i)), &bits, sizeof(T));
            }
    }
};

NF4LORA_DEVICE void unpack(const uint32_t (&word)[kEach], float (&v)[kEach], const float *) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        v[i] = __uint_as_float(word[i]);
}

template <class T>
NF4LORA_DEVICE void unpack(const uint32_t (&word)[kEach / 2], float (&v)[kEach], const T *) {
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) {
        const float2 pair = unpack_pair<T>(word[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}

NF4LORA_DEVICE void pack(const float (&v)[kEach], uint32_t (&word)[kEach], const float *) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        word[i] = __float_as_uint(v[i]);
}

template <class T>
NF4LORA_DEVICE void pack(const float (&v)[kEach], uint32_t (&word)[kEach / 2], const T *) {
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i)
        word[i] = round_pair<T>(v[2 * i], v[2 * i + 1]);
}

// ---- states

template <bool kCoded>
struct StateOf {
    typedef float Type;
};
template <>
struct StateOf<true> {
    typedef uint8_t Type;
};

NF4LORA_DEVICE void decode(const DynamicCells &, const uint32_t (&word)[kEach], float, float (&v)[kEach]) {
    unpack(word, v, static_cast<const float *>(nullptr));
}

NF4LORA_DEVICE void decode(const DynamicCells &cells, const uint32_t (&word)[kEach / 4], float absmax, float (&v)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        v[i] = __fmul_rn(cells.value[word[i / 4] >> 8 * (i % 4) & 255], absmax);
}

NF4LORA_DEVICE float absmax_of_unit(const float (&v)[kEach]) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        m = max_magnitude(m, v[i]);
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2)
        m = max_magnitude(m, __shfl_xor_sync(kAllLanes, m, apart));
    return m;
}

// Stores a unit's new values, those beyond its end zeros.
template <int kRun>
NF4LORA_DEVICE void store_state(const DynamicCells &, const Share<kRun> &share, const float (&v)[kEach], float *at, float *) {
    uint32_t word[kEach];
    pack(v, word, at);
    share.store(at, word);
}

template <int kRun>
NF4LORA_DEVICE void store_state(const DynamicCells &cells, const Share<kRun> &share, const float (&v)[kEach], uint8_t *at,
                                float *absmax) {
    const float largest = absmax_of_unit(v), inv = reciprocal(largest);
    if (share.lane == 0)
        *absmax = largest;
    uint32_t word[kEach / 4];
#pragma unroll
    for (int w = 0; w < kEach / 4; ++w) {
        word[w] = 0;
#pragma unroll
        for (int i = 3; i >= 0; --i)
            word[w] = word[w] << 8 | encode_in_cell(cells, __fmul_rn(v[4 * w + i], inv));
    }
    share.store(at, word);
}

NF4LORA_DEVICE void fill(DynamicCells *, bool, const float *) {}

static __device__ const DynamicCells kCellsOnDevice[] = {kSignedCells, kUnsignedCells};

NF4LORA_DEVICE void fill(DynamicCells *cells, bool both, const uint8_t *) {
    const unsigned count = sizeof(DynamicCells) / sizeof(uint4) << both;
    for (unsigned i = threadIdx.x; i < count; i += kThreads)
        reinterpret_cast<uint4 *>(cells)[i] = reinterpret_cast<const uint4 *>(kCellsOnDevice)[i];
    __syncthreads();
}

// ---- the step

// Shared memory has the cells, and then for each warp the constants of the tensor it is at: registers are few.
template <bool kCoded, OptimKind kKind>
constexpr size_t kCellsBytes = kCoded ? sizeof(DynamicCells) << (kKind == kAdamW) : 0;

NF4LORA_DEVICE OptimConstants constants_of(const StepTable &table, int tensor) {
    const Hyper &hyper = table.hyper[table.hyper_of[tensor]];
    return table.steps ? constants_of(hyper.counted, table.steps[table.slot[tensor]]) : hyper.known;
}

NF4LORA_DEVICE float stochastically_rounded(float v, uint32_t word) {
    const uint32_t bits = __float_as_uint(v);
    return (bits & 0x7f800000u) == 0x7f800000u ? v : __uint_as_float((bits + (word >> 16)) & 0xffff0000u);
}

template <bool kStochastic, class T, int kRun>
NF4LORA_DEVICE void store_param(const StepTable &table, const Share<kRun> &share, float (&p)[kEach], T *param, int64_t index) {
    if (kStochastic)
#pragma unroll
        for (int i = 0; i < kEach; i += 4) {
            const uint64_t counter = static_cast<uint64_t>(table.origin + index + share.place(i)) / 4;
            const uint4 word = table.philox.words(counter);
            p[i] = stochastically_rounded(p[i], word.x), p[i + 1] = stochastically_rounded(p[i + 1], word.y);
            p[i + 2] = stochastically_rounded(p[i + 2], word.z), p[i + 3] = stochastically_rounded(p[i + 3], word.w);
        }
    uint32_t word[kEach * sizeof(T) / 4];
    pack(p, word, param);
    share.store(param, word);
}

template <class T, bool kCoded, OptimKind kKind, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kResident) step_units(const __grid_constant__ StepTable table) {
    typedef typename StateOf<kCoded>::Type State;
    constexpr int kRun = kCoded && sizeof(T) == 2 ? 8 : 4;
    NF4LORA_SHARED(char, shared);
    DynamicCells *const cells = reinterpret_cast<DynamicCells *>(shared);
    const unsigned warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    OptimConstants *const constants = reinterpret_cast<OptimConstants *>(shared + kCellsBytes<kCoded, kKind>) + warp;
    if (table.flag && *table.flag != 0)
        return;
    fill(cells, kKind == kAdamW, static_cast<const State *>(nullptr));
    const uint32_t end = first_unit(table, blockIdx.x + 1);
    int tensor = 0;
    uint32_t tensor_end = 0;
    for (uint32_t unit = first_unit(table, blockIdx.x) + warp; unit < end; unit += kWarps) {
        if (unit >= tensor_end) {
            tensor = tensor_of(table, unit);
            tensor_end = table.first[tensor + 1];
            __syncwarp();
            if (lane == 0)
                *constants = constants_of(table, tensor);
            __syncwarp();
        }
        const uint32_t unit_of_tensor = unit - table.first[tensor], block = table.block[tensor] + unit_of_tensor;
        const int64_t at = int64_t{unit_of_tensor} * kStateBlock, left = table.numel[tensor] - at;
        const int64_t index = int64_t{block} * kStateBlock;
        T *const param = static_cast<T *>(table.param[tensor]) + at;
        const T *const grad = static_cast<const T *>(table.grad[tensor]) + at;
        State *const state1 = static_cast<State *>(table.state1) + index;
        State *const state2 = static_cast<State *>(table.state2) + index;
        const bool full = left >= kStateBlock;
        const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad);
        const bool whole = full && table.aligned && addresses % (kRun * sizeof(T)) == 0;
        const Share<kRun> share{lane, full ? kStateBlock : static_cast<int>(left), whole};

        uint32_t p_word[kEach * sizeof(T) / 4], g_word[kEach * sizeof(T) / 4];
        uint32_t m_word[kEach * sizeof(State) / 4], v_word[kEach * sizeof(State) / 4];
        share.load(param, p_word);
        share.load(grad, g_word);
        share.load(state1, m_word);
        if (kKind == kAdamW)
            share.load(state2, v_word);
        float g[kEach], m[kEach], v[kEach];
        unpack(g_word, g, grad);
        decode(cells[0], m_word, kCoded ? table.absmax1[block] : 0.0f, m);
        if (kKind == kAdamW)
            decode(cells[1], v_word, kCoded ? table.absmax2[block] : 0.0f, v);

        const OptimConstants &c = *constants;
        float step[kEach];  // to take off a parameter
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float mixed = __fadd_rn(__fmul_rn(m[i], c.beta1), __fmul_rn(g[i], c.rest1));
            if (kKind == kLion) {
                step[i] = mixed > 0.0f ? c.lr : mixed < 0.0f ? -c.lr : __fmul_rn(0.0f, c.lr);  // 0 of NaN
                m[i] = __fadd_rn(__fmul_rn(m[i], c.beta2), __fmul_rn(g[i], c.rest2));
            } else {
                m[i] = mixed;
                v[i] = __fadd_rn(__fmul_rn(v[i], c.beta2), __fmul_rn(__fmul_rn(g[i], c.rest2), g[i]));
            }
        }
        float p[kEach];
        unpack(p_word, p, param);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if (kKind == kAdamW)
                step[i] = __fmul_rn(__fdiv_rn(m[i], __fadd_rn(__fdiv_rn(__fsqrt_rn(v[i]), c.root), c.eps)), c.step_size);
            p[i] = __fsub_rn(__fmul_rn(p[i], c.keep), step[i]);
        }
        // Where more registers are free: before the codes are found, or after the states have gone.
        if (kCoded)
            store_param<kStochastic>(table, share, p, param, index);
        if (!full)
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                m[i] = share.has(i) ? m[i] : 0.0f;
                v[i] = share.has(i) ? v[i] : 0.0f;
            }
        if (kCoded)
            __syncwarp();  // all have read the absmax
        store_state(cells[0], share, m, state1, table.absmax1 + block);
        if (kKind == kAdamW)
            store_state(cells[1], share, v, state2, table.absmax2 + block);
        if (!kCoded)
            store_param<kStochastic>(table, share, p, param, index);
    }
}

// ---- the check

// A word of gradients: kMask its exponents, and kOne what makes one of all ones carry into a bit of kCarry.
template <class T>
struct Exponents {
    static constexpr uint32_t kMask = 0x7f800000u, kOne = 0x00800000u, kCarry = 0x80000000u;
};
template <>
struct Exponents<__nv_bfloat16> {
    static constexpr uint32_t kMask = 0x7f807f80u, kOne = 0x00800080u, kCarry = 0x80008000u;
};
template <>
struct Exponents<__half> {
    static constexpr uint32_t kMask = 0x7c007c00u, kOne = 0x04000400u, kCarry = 0x80008000u;
};

constexpr int kAccesses = 4;  // of 16 bytes a lane makes of a unit
template <class T>
constexpr int kCheckUnit = static_cast<int>(kAccesses * kLanes * sizeof(uint4) / sizeof(T));

template <class T>
NF4LORA_DEVICE uint32_t not_finite(uint32_t word) {
    return (word & Exponents<T>::kMask) + Exponents<T>::kOne;
}

template <class T>
__global__ void __launch_bounds__(kThreads) check_units(const __grid_constant__ CheckTable table) {
    NF4LORA_SHARED(uint32_t, word);
    const unsigned lane = threadIdx.x % kLanes;
    const uint32_t end = first_unit(table, blockIdx.x + 1);
    uint32_t found = 0;
    for (uint32_t unit = first_unit(table, blockIdx.x) + threadIdx.x / kLanes; unit < end; unit += kWarps) {
        const int i = tensor_of(table, unit);
        const int64_t at = int64_t{unit - table.first[i]} * kCheckUnit<T>, left = table.numel[i] - at;
        const T *const grad = static_cast<const T *>(table.grad[i]) + at;
        if (left >= kCheckUnit<T> && reinterpret_cast<uintptr_t>(grad) % sizeof(uint4) == 0) {
            uint4 words[kAccesses];
#pragma unroll
            for (int a = 0; a < kAccesses; ++a)
                words[a] = load_stream(reinterpret_cast<const uint4 *>(grad) + a * kLanes + lane);
#pragma unroll
            for (int a = 0; a < kAccesses; ++a)
                found |= not_finite<T>(words[a].x) | not_finite<T>(words[a].y) | not_finite<T>(words[a].z) |
                         not_finite<T>(words[a].w);
        } else {
            const int count = left < kCheckUnit<T> ? static_cast<int>(left) : kCheckUnit<T>;
            for (int j = static_cast<int>(lane); j < count; j += kLanes) {
                uint32_t bits = 0;
                memcpy(&bits, grad + j, sizeof(T));
                found |= not_finite<T>(bits);
            }
        }
    }
    const bool any = __syncthreads_or((found & Exponents<T>::kCarry) != 0);
    if (any && threadIdx.x == 0)
        add_relaxed(table.counters + 1, 1);
    if (!table.last || !comes_last(table.counters, gridDim.x, word))
        return;
    const uint32_t blocks = load_acquire(table.counters + 1);
    __syncthreads();  // all have read it
    if (threadIdx.x == 0) {
        table.counters[1] = 0;
        *table.flag = blocks != 0;
    }
    for (int i = static_cast<int>(threadIdx.x); i < table.count; i += kThreads)
        table.steps[table.slot[i]] += blocks == 0;
}

// The steps of the tables before the last.
__global__ void __launch_bounds__(kThreads) count_steps(const __grid_constant__ CheckTable table) {
    for (int i = static_cast<int>(threadIdx.x); i < table.count; i += kThreads)
        table.steps[table.slot[i]] += *table.flag == 0;
}

// ---- launches

template <class T, bool kCoded, OptimKind kKind, bool kStochastic>
const char *launch(const OptimParams &p, const StepTable &table, void *stream) {
    const unsigned grid = grid_of(p.workers, ceil_div(table.first[table.count], kWarps));
    constexpr size_t kShared = kCellsBytes<kCoded, kKind> + kWarps * sizeof(OptimConstants);
    return NF4LORA_LAUNCH((step_units<T, kCoded, kKind, kStochastic>), grid, kThreads, kShared, stream, table);
}

template <class T, bool kStochastic>
const char *launch(const OptimParams &p, const StepTable &table, void *stream) {
    if (p.kind == kLion)
        return p.absmax1 ? launch<T, true, kLion, kStochastic>(p, table, stream)
                         : launch<T, false, kLion, kStochastic>(p, table, stream);
    return p.absmax1 ? launch<T, true, kAdamW, kStochastic>(p, table, stream)
                     : launch<T, false, kAdamW, kStochastic>(p, table, stream);
}

const char *launch(const OptimParams &p, const StepTable &table, void *stream) {
    if (p.dtype == kFloat32)
        return launch<float, false>(p, table, stream);
    if (p.dtype == kFloat16)
        return launch<__half, false>(p, table, stream);
    return p.stochastic ? launch<__nv_bfloat16, true>(p, table, stream) : launch<__nv_bfloat16, false>(p, table, stream);
}

// Enters the tensors from `from` on, as many as fit. Returns the first that does not.
int64_t enter(const OptimParams &p, int64_t from, StepTable *table) {
    int32_t of_hyper[kHypers];  // which OptimHyper each of the table's is
    int hypers = 0;
    table->count = 0;
    table->first[0] = 0;
    for (; from < p.count && table->count < kTensors; ++from) {
        const OptimTensor &of = p.tensors[from];
        int hyper = hypers;
        while (hyper > 0 && of_hyper[hyper - 1] != of.hyper)
            --hyper;
        if (hyper == 0) {
            if (hypers == kHypers)
                break;
            of_hyper[hypers++] = of.hyper;
            hyper = hypers;
            const OptimHyper &numbers = p.hypers[of.hyper];
            if (p.steps)
                table->hyper[hyper - 1].counted = numbers;
            else
                table->hyper[hyper - 1].known = constants_of(numbers, numbers.step);
        }
        const int i = table->count++;
        table->param[i] = of.param;
        table->grad[i] = of.grad;
        table->numel[i] = of.numel;
        table->slot[i] = of.slot;
        table->hyper_of[i] = static_cast<uint8_t>(hyper - 1);
        table->block[i] = static_cast<uint32_t>(of.offset / kStateBlock);
        table->first[i + 1] = table->first[i] + static_cast<uint32_t>(ceil_div(of.numel, kStateBlock));
    }
    return from;
}

int64_t enter(const OptimCheckParams &p, int64_t from, int64_t unit, CheckTable *table) {
    table->count = 0;
    table->first[0] = 0;
    for (; from < p.count && table->count < kGrads; ++from) {
        const OptimTensor &of = p.tensors[from];
        const int i = table->count++;
        table->grad[i] = of.grad;
        table->numel[i] = of.numel;
        table->slot[i] = of.slot;
        table->first[i + 1] = table->first[i] + static_cast<uint32_t>(ceil_div(of.numel, unit));
    }
    return from;
}

template <class T>
const char *check(const OptimCheckParams &p, void *stream) {
    CheckTable table;
    table.steps = p.steps;
    table.flag = p.flag;
    table.counters = p.counters;
    const char *error = nullptr;
    int64_t last = 0;  // first tensor of the last table
    for (int64_t from = 0; from < p.count && !error;) {
        last = from;
        from = enter(p, from, kCheckUnit<T>, &table);
        table.last = from == p.count;
        const unsigned grid = grid_of(p.workers, 1 + table.first[table.count] / kWarps);  // also where there is nothing to look at
        error = NF4LORA_LAUNCH((check_units<T>), grid, kThreads, sizeof(uint32_t), stream, table);
    }
    for (int64_t from = 0; from < last && !error;) {
        from = enter(p, from, kCheckUnit<T>, &table);
        error = NF4LORA_LAUNCH(count_steps, 1, kThreads, 0, stream, table);
    }
    return error;
}

}  // namespace
}  // namespace nf4lora

const char *nf4lora_cuda_optim_step(const nf4lora::OptimParams *p, void *stream) {
    using namespace nf4lora;
    StepTable table;
    table.state1 = p->state1, table.state2 = p->state2;
    table.absmax1 = p->absmax1, table.absmax2 = p->absmax2;
    table.steps = p->steps, table.flag = p->flag;
    table.origin = p->origin;
    table.philox = {static_cast<uint32_t>(p->seed), static_cast<uint32_t>(static_cast<uint64_t>(p->seed) >> 32)};
    table.aligned = aligned(p->state1, sizeof(uint4)) && aligned(p->state2, sizeof(uint4));
    const char *error = nullptr;
    for (int64_t from = 0; from < p->count && !error;) {
        from = enter(*p, from, &table);
        if (table.first[table.count] > 0)
            error = launch(*p, table, stream);
    }
    return error;
}

const char *nf4lora_cuda_optim_check(const nf4lora::OptimCheckParams *p, void *stream) {
    using namespace nf4lora;
    if (p->dtype == kFloat32)
        return check<float>(*p, stream);
    return p->dtype == kBFloat16 ? check<__nv_bfloat16>(*p, stream) : check<__half>(*p, stream);
}
