// out[i] = codebook[code i] * absmax[i / blocksize]; a nested absmax is decoded in the same pass
// Operands:      packed uint8 [ceil(rows*cols/2)], absmax as Weight says -> out dtype [rows*cols]
// Rounding:      the product in fp32, then to dtype (nearest even); the nested absmax rounds its product and its sum
// Preconditions: blocksize and nested_blocksize at least 1; ops.py checks the operands
// Memory:        reads numel / 2 bytes and the absmax, writes numel * sizeof(dtype); no allocation
#include "convert.h"
#include "decode.h"
#include "ops.h"

namespace nf4lora {
namespace NF4LORA_ISA {

const char *dequantize(const DequantizeParams &p) {
    constexpr int64_t kPiece = 2048;  // elements held as fp32 before they are rounded
    const int64_t numel = p.w.rows * p.w.cols;
    const int64_t pieces = ceil_div(numel, kPiece);
    const int threads = static_cast<int>(max_of(1, min_of(p.workers, pieces)));
    (void)threads;  // unread where OpenMP is off
    NF4LORA_OMP(omp parallel for num_threads(threads) schedule(static))
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * kPiece, count = min_of(kPiece, numel - first);
        if (p.dtype == kFloat32) {
            decode_elements(p.w, first, count, static_cast<float *>(p.out) + first);
            continue;
        }
        float values[kPiece];
        decode_elements(p.w, first, count, values);
        store_elements(p.out, p.dtype, first, count, values);
    }
    return nullptr;
}

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
