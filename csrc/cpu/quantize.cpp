// quantize:        packed[i] = code(a[i] * (1 / max(absmax, 1e-38))), absmax = max |a| over the block
// quantize_absmax: codes[i] = nearest of the dynamic map to (absmax[i] - offset) * (1 / max(nested_absmax, 1e-38))
// Operands:      a dtype [numel] -> packed uint8 [ceil(numel/2)], absmax fp32 [ceil(numel/blocksize)];
//                absmax fp32 [nblocks] -> codes uint8 [nblocks], nested_absmax fp32 [ceil(nblocks/nested_blocksize)]
// Rounding:      fp32 throughout: the reciprocal, the product, the subtraction of the offset; NaN reaches absmax
// Preconditions: blocksize even, so that blocks start on a byte; ops.py checks the rest
// Memory:        reads numel * sizeof(dtype), writes numel / 2 + 4 * nblocks bytes; no allocation
#include "../nf4.h"
#include "convert.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // elements held as fp32 and as codes at a time
static_assert(kPiece % (2 * kWidth) == 0, "a piece is whole vectors and whole bytes");

// Magnitudes order like their bit patterns, with NaN above infinity.
uint32_t max_magnitude(const float *values, int64_t count) {
    int32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(values[i]) & 0x7fffffff);
        bits = magnitude > bits ? magnitude : bits;
    }
    return static_cast<uint32_t>(bits);
}

// Rank of v * inv among the boundaries, as code; `values` has room for whole vectors.
void encode_piece(const Codebook &book, const float *values, int64_t count, float inv, uint8_t *codes) {
    typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));
    for (int64_t i = 0; i < count; i += kWidth) {
        const Vec v = load(values + i) * broadcast(inv);
        IVec rank = IVec{} + (kCodes - 1);
        NF4LORA_UNROLL
        for (int b = 0; b < kCodes - 1; ++b)
            rank += v <= broadcast(book.boundary[b]);
        const ByteVec bytes = __builtin_convertvector(rank, ByteVec);
        memcpy(codes + i, &bytes, sizeof bytes);
    }
    if (book.code_of_rank[0] != 0)
        for (int64_t i = 0; i < count; ++i)
            codes[i] = book.code_of_rank[codes[i]];
}

void quantize_block(const QuantizeParams &p, const Codebook &book, int64_t block) {
    const int64_t first = block * p.blocksize, end = min_of(first + p.blocksize, p.numel);
    float values[kPiece];
    uint8_t codes[kPiece];
    uint32_t bits = 0;
    for (int64_t i = first; i < end; i += kPiece) {
        const int64_t count = min_of(kPiece, end - i);
        load_elements(p.a, p.dtype, i, count, values);
        const uint32_t magnitude = max_magnitude(values, count);
        bits = magnitude > bits ? magnitude : bits;
    }
    const float absmax = float_of(bits), inv = reciprocal(absmax);
    p.absmax[block] = absmax;
    for (int64_t i = first; i < end; i += kPiece) {
        const int64_t count = min_of(kPiece, end - i);
        if (end - first > kPiece)
            load_elements(p.a, p.dtype, i, count, values);
        memset(values + count, 0, (round_up(count, kWidth) - count) * sizeof(float));
        encode_piece(book, values, count, inv, codes);
        if (count & 1)
            codes[count] = book.zero;
        uint8_t *packed = p.packed + i / 2;
        for (int64_t j = 0; j < (count + 1) / 2; ++j)
            packed[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
    }
}

}  // namespace

const char *quantize(const QuantizeParams &p) {
    const Codebook &book = codebook(p.quant_type);
    const int64_t nblocks = ceil_div(p.numel, p.blocksize);
    const int threads = static_cast<int>(max_of(1, min_of(p.workers, nblocks)));
    (void)threads;  // unread where OpenMP is off
    NF4LORA_OMP(omp parallel for num_threads(threads) schedule(static))
    for (int64_t block = 0; block < nblocks; ++block)
        quantize_block(p, book, block);
    return nullptr;
}

const char *quantize_absmax(const QuantizeAbsmaxParams &p) {
    const float offset = *p.offset;
    for (int64_t first = 0; first < p.nblocks; first += p.nested_blocksize) {
        const int64_t end = min_of(first + p.nested_blocksize, p.nblocks);
        uint32_t bits = 0;
        for (int64_t i = first; i < end; ++i) {
            const uint32_t magnitude = bits_of(p.absmax[i] - offset) & 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
        const float nested_absmax = float_of(bits), inv = reciprocal(nested_absmax);
        p.nested_absmax[first / p.nested_blocksize] = nested_absmax;
        for (int64_t i = first; i < end; ++i)
            p.codes[i] = encode_dynamic(kDynamicBoundaries.at, (p.absmax[i] - offset) * inv);
    }
    return nullptr;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
