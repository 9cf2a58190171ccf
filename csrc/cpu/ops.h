// The kernels of one instruction set. No include guard: api.cpp includes it once for each.
#include "../params.h"

namespace nf4lora {
namespace NF4LORA_ISA {

// Null, or a static message.
const char *quantize(const QuantizeParams &);
const char *quantize_absmax(const QuantizeAbsmaxParams &);
const char *dequantize(const DequantizeParams &);
const char *linear_fwd(const LinearFwdParams &);
const char *linear_bwd(const LinearBwdParams &);
const char *lora_bwd(const LoraBwdParams &);
const char *swiglu_fwd(const SwigluParams &);
const char *swiglu_bwd(const SwigluParams &);
const char *optim_step(const OptimParams &);
const char *optim_check(const OptimCheckParams &);

}  // namespace NF4LORA_ISA
}  // namespace nf4lora
