// out[i] = codebook[code i] * absmax[i / blocksize]; a nested absmax is decoded in the same pass
// Operands:      packed uint8 [ceil(rows*cols/2)], absmax as Weight says -> out dtype [rows*cols]
// Rounding:      the product in fp32, then to dtype (nearest even); the nested absmax rounds its product and its sum
// Preconditions: blocksize even, so that blocks begin on a byte; ops.py checks the rest
// Memory:        reads numel / 2 bytes and the absmax, writes numel * sizeof(dtype); no allocation
#include "decode.h"
#include "ops.h"
#include "threads.h"

namespace nf4lora {
namespace NF4LORA_ISA {
namespace {

constexpr int64_t kLeastPart = 1 << 14, kPartsPerThread = 8;
constexpr int64_t kStreamed = 1 << 25;  // bytes, of which most have left the caches before anyone reads them

template <int32_t dtype>
void dequantize_as(const DequantizeParams &p) {
    Element<dtype> *const out = static_cast<Element<dtype> *>(p.out);
    const int64_t numel = p.w.rows * p.w.cols;
    const bool whole_runs = p.w.blocksize % kRun == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    const bool stream = whole_runs && numel * static_cast<int64_t>(sizeof *out) >= kStreamed;
    const int64_t part = round_up(numel / (kPartsPerThread * max_of(p.workers, 1)) + 1, kLeastPart);
    for_parts(p.workers, ceil_div(numel, part), [&](int64_t i, int) {
        const int64_t first = i * part, count = min_of(part, numel - first);
        if (!stream)
            return decode_as<dtype>(p.w, first, count, out + first);
        decode_as<dtype, true>(p.w, first, count, out + first);
        end_stream();
    });
}

}  // namespace

const char *dequantize(const DequantizeParams &p) {
    if (p.dtype == kFloat32)
        dequantize_as<kFloat32>(p);
    else if (p.dtype == kBFloat16)
        dequantize_as<kBFloat16>(p);
    else
        dequantize_as<kFloat16>(p);
    return nullptr;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
