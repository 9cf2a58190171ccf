// out[i] = codebook[code i] * absmax[i / blocksize]; a nested absmax is decoded in the same launch
// Operands:      packed uint8 [ceil(rows*cols/2)], absmax as Weight says -> out dtype [rows*cols]
// Rounding:      the product in fp32, then to dtype (nearest even); the nested absmax rounds its product and its sum
// Preconditions: blocksize and nested_blocksize powers of two, a nested block at least a tile; ops.py checks the rest
// Memory:        reads numel / 2 bytes and the absmax once, writes numel * sizeof(dtype); 4 KiB shared, nested 12 KiB
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

// Tiles [0, tiles) in a grid stride. shift: log2 of the blocksize; nested_shift: of the elements of a nested block.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) decode_tiles(
    const uint8_t *__restrict__ packed, const void *__restrict__ absmax, const float *__restrict__ nested_absmax,
    const float *__restrict__ offset, T *__restrict__ out, int64_t tiles, int shift, int nested_shift, int quant_type) {
    typedef typename Wide<T>::Codes Codes;
    constexpr int kCount = Wide<T>::kCount, kStep = kLanes * kCount, kSteps = kWarpTile / kStep;
    NF4LORA_SHARED(char, table);
    float *map = reinterpret_cast<float *>(table + kCodeTableBytes);
    fill_codes(table, quant_type);
    if (kNested)
        fill_map_copies(map);
    __syncthreads();

    const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const unsigned last_block = (kWarpTile - 1) >> shift;
    const unsigned my_block = (warp * kWarpTile >> shift) + (lane < last_block ? lane : last_block);
    const float mean = kNested ? *offset : 0.0f;
    const float *map_copy = map + lane % kMapCopies;
    const Codes *codes_in = reinterpret_cast<const Codes *>(packed) + warp * (kWarpTile / kCount) + lane;
    uint4 *stores = reinterpret_cast<uint4 *>(out) + warp * (kWarpTile / kCount) + lane;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first = tile * kTile;
        Codes codes[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            codes[s] = Wide<T>::load_codes(codes_in + first / kCount + s * kLanes);
        const int64_t block = (first >> shift) + my_block;
        float scale;  // of the warp's block number `lane`
        if (kNested)
            scale = __fadd_rn(__fmul_rn(map_copy[static_cast<const uint8_t *>(absmax)[block] * kMapCopies],
                                        nested_absmax[first >> nested_shift]), mean);
        else
            scale = static_cast<const float *>(absmax)[block];
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            stores[first / kCount + s * kLanes] =
                decode_wide<T>(table, codes[s], __shfl_sync(~0u, scale, (s * kStep + lane * kCount) >> shift));
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
    const bool whole_words = aligned(w.packed, sizeof(typename Wide<T>::Codes)) && aligned(p.out, sizeof(uint4));
    const int64_t tiles = whole_words ? numel / kTile : 0, first = tiles * kTile;
    const char *error = nullptr;
    if (tiles > 0) {
        const unsigned grid = grid_of(p.workers, tiles);
        const size_t shared = kCodeTableBytes + (nested ? kMapCopiesBytes : 0);
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
