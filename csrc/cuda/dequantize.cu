// out[i] = codebook[code i] * absmax[i / blocksize]; a nested absmax is decoded in the same launch
// Operands:      packed uint8 [ceil(rows*cols/2)], absmax as Weight says -> out dtype [rows*cols]
// Rounding:      the product in fp32, then to dtype (nearest even); the nested absmax rounds its product and its sum
// Preconditions: blocksize and nested_blocksize powers of two, a nested block at least a tile; ops.py checks the rest
// Memory:        reads numel / 2 bytes and the absmax once, writes numel * sizeof(dtype); 2 KiB shared, nested 10 KiB
// Budget:        at most 8 instructions a weight (16-bit out, nested, sm_90a); bench/codegen.py counts them
//
// A step: each lane loads the codes of one 16-byte store, so that loads and stores of a warp are both contiguous. Whole
// tiles of a tensor whose pointers are aligned take decode_tiles; what is left, or all of it, decode_rest, byte by byte.
#include "../api.h"
#include "../tile.cuh"

namespace nf4lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpTile = 1024;  // elements a warp decodes at a time: at most one block a lane
constexpr int kTile = kWarpTile * (kThreads / kLanes);
constexpr int kMapCopies = 8;  // of the dynamic map, so that few of a warp's lanes meet in a bank

// The codes of one 16-byte store of T, and how the store is made of their values.
template <class T>
struct Step;

template <>
struct Step<float> {
    typedef uint16_t Codes;
    static NF4LORA_DEVICE Codes load(const Codes *p) { return *p; }
    static NF4LORA_DEVICE uint4 pack(const float (&v)[4]) {
        return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
    }
};

template <>
struct Step<__nv_bfloat16> {
    typedef uint32_t Codes;
    static NF4LORA_DEVICE Codes load(const Codes *p) { return load_stream(p); }
    static NF4LORA_DEVICE uint4 pack(const float (&v)[8]) {
        return make_uint4(round_pair<__nv_bfloat16>(v[0], v[1]), round_pair<__nv_bfloat16>(v[2], v[3]),
                          round_pair<__nv_bfloat16>(v[4], v[5]), round_pair<__nv_bfloat16>(v[6], v[7]));
    }
};

template <>
struct Step<__half> {
    typedef uint32_t Codes;
    static NF4LORA_DEVICE Codes load(const Codes *p) { return load_stream(p); }
    static NF4LORA_DEVICE uint4 pack(const float (&v)[8]) {
        return make_uint4(round_pair<__half>(v[0], v[1]), round_pair<__half>(v[2], v[3]),
                          round_pair<__half>(v[4], v[5]), round_pair<__half>(v[6], v[7]));
    }
};

template <class T>
constexpr int kStepWeights = static_cast<int>(sizeof(uint4) / sizeof(T));

template <class T>
NF4LORA_DEVICE uint4 decode_step(const float *table, uint32_t codes, float absmax) {
    constexpr int kRow = 7;  // log2 of the bytes of a code's row: one float a lane, so that no two lanes share a bank
    static_assert(1 << kRow == kLanes * sizeof(float), "table[code][lane]");
    const uint32_t lane = threadIdx.x % kLanes * sizeof(float);
    float v[kStepWeights<T>];
#pragma unroll
    for (int i = 0; i < kStepWeights<T>; ++i) {
        const int nibble = 4 * (i ^ 1);
        const uint32_t row = (nibble < kRow ? codes << (kRow - nibble) : codes >> (nibble - kRow)) & (15u << kRow);
        v[i] = __fmul_rn(*reinterpret_cast<const float *>(reinterpret_cast<const char *>(table) + (row | lane)), absmax);
    }
    return Step<T>::pack(v);
}

// Tiles [0, tiles) in a grid stride. shift: log2 of the blocksize; nested_shift: of the elements of a nested block.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) decode_tiles(
    const uint8_t *__restrict__ packed, const void *__restrict__ absmax, const float *__restrict__ nested_absmax,
    const float *__restrict__ offset, T *__restrict__ out, int64_t tiles, int shift, int nested_shift, int quant_type) {
    typedef typename Step<T>::Codes Codes;
    constexpr int kStep = kLanes * kStepWeights<T>, kSteps = kWarpTile / kStep;
    NF4LORA_SHARED(float, table);
    float *map = table + kCodes * kLanes;
    for (unsigned i = threadIdx.x; i < kCodes * kLanes; i += kThreads)
        table[i] = kBooks[quant_type].value[i / kLanes];
    if (kNested)
        for (unsigned i = threadIdx.x; i < kDynamicCodes * kMapCopies; i += kThreads)
            map[i] = kDynamicMap.value[i / kMapCopies];
    __syncthreads();

    const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const unsigned last_block = (kWarpTile - 1) >> shift;
    const unsigned my_block = (warp * kWarpTile >> shift) + (lane < last_block ? lane : last_block);
    const float mean = kNested ? *offset : 0.0f;
    const float *map_copy = map + lane % kMapCopies;
    const Codes *codes_in = reinterpret_cast<const Codes *>(packed) + warp * (kWarpTile / kStepWeights<T>) + lane;
    uint4 *stores = reinterpret_cast<uint4 *>(out) + warp * (kWarpTile / kStepWeights<T>) + lane;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first = tile * kTile;
        Codes codes[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            codes[s] = Step<T>::load(codes_in + first / kStepWeights<T> + s * kLanes);
        const int64_t block = (first >> shift) + my_block;
        float scale;  // of the warp's block number `lane`
        if (kNested)
            scale = __fadd_rn(__fmul_rn(map_copy[static_cast<const uint8_t *>(absmax)[block] * kMapCopies],
                                        nested_absmax[first >> nested_shift]), mean);
        else
            scale = static_cast<const float *>(absmax)[block];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            stores[first / kStepWeights<T> + s * kLanes] =
                decode_step<T>(table, codes[s], __shfl_sync(~0u, scale, (s * kStep + lane * kStepWeights<T>) >> shift));
    }
}

// Elements from `first`, even, to numel; a thread a byte. Any alignment.
__global__ void __launch_bounds__(kThreads) decode_rest(
    Weight w, void *__restrict__ out, int dtype, int64_t first, int64_t numel, int shift, int nested_shift) {
    const Codebook &book = kBooks[w.quant_type];
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, bytes = (numel + 1) / 2;
    for (int64_t byte = first / 2 + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; byte < bytes; byte += stride) {
        const int64_t i = 2 * byte, block = i >> shift;
        float scale;
        if (w.nested_absmax)
            scale = __fadd_rn(__fmul_rn(kDynamicMap.value[static_cast<const uint8_t *>(w.absmax)[block]],
                                        w.nested_absmax[i >> nested_shift]), *w.offset);
        else
            scale = static_cast<const float *>(w.absmax)[block];
        const int codes = w.packed[byte];
        store_element(out, dtype, i, __fmul_rn(book.value[codes >> 4], scale));
        if (i + 1 < numel)
            store_element(out, dtype, i + 1, __fmul_rn(book.value[codes & 15], scale));
    }
}

template <class T>
const char *dequantize(const DequantizeParams &p, void *stream) {
    const Weight &w = p.w;
    const int64_t numel = w.rows * w.cols;
    const bool nested = w.nested_absmax != nullptr;
    const int shift = log2_of(w.blocksize), nested_shift = shift + log2_of(w.nested_blocksize);
    const bool whole_words = aligned(w.packed, sizeof(typename Step<T>::Codes)) && aligned(p.out, sizeof(uint4));
    const int64_t tiles = whole_words ? numel / kTile : 0, first = tiles * kTile;
    const char *error = nullptr;
    if (tiles > 0) {
        const unsigned grid = grid_of(p.workers, tiles);
        const size_t shared = sizeof(float) * (kCodes * kLanes + (nested ? kDynamicCodes * kMapCopies : 0));
        T *out = static_cast<T *>(p.out);
        if (nested)
            error = NF4LORA_LAUNCH((decode_tiles<T, true>), grid, kThreads, shared, stream, w.packed, w.absmax,
                                   w.nested_absmax, w.offset, out, tiles, shift, nested_shift, w.quant_type);
        else
            error = NF4LORA_LAUNCH((decode_tiles<T, false>), grid, kThreads, shared, stream, w.packed, w.absmax,
                                   w.nested_absmax, w.offset, out, tiles, shift, nested_shift, w.quant_type);
    }
    if (error || first == numel)
        return error;
    const int64_t bytes = (numel - first + 1) / 2;
    const unsigned grid = grid_of(p.workers, ceil_div(bytes, kThreads));
    return NF4LORA_LAUNCH(decode_rest, grid, kThreads, 0, stream, w, p.out, p.dtype, first, numel, shift, nested_shift);
}

}  // namespace
}  // namespace nf4lora

const char *nf4lora_cuda_dequantize(const nf4lora::DequantizeParams *p, void *stream) {
    using namespace nf4lora;
    const Weight &w = p->w;
    if (!power_of_two(w.blocksize) || w.blocksize < 32 || w.blocksize > 4096 ||
        (w.nested_absmax && (!power_of_two(w.nested_blocksize) || w.nested_blocksize * w.blocksize < kTile)))
        return "blocksize must be a power of two from 32 to 4096, a nested block at least 8192 elements";
    if (p->dtype == kFloat32)
        return dequantize<float>(*p, stream);
    return p->dtype == kBFloat16 ? dequantize<__nv_bfloat16>(*p, stream) : dequantize<__half>(*p, stream);
}
