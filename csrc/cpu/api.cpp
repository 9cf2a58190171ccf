// The C ABI of the host library: chooses the instruction set once, at the first call.
// Compiled for the baseline processor; the kernels it reaches are compiled once for each instruction set.
#include "../api.h"

#include <cstdlib>
#include <cstring>

#define NF4LORA_ISA portable
#include "ops.h"
#undef NF4LORA_ISA
#if defined(__x86_64__)
#define NF4LORA_ISA avx2
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA avx512
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA avx512vbmi
#include "ops.h"
#undef NF4LORA_ISA
#endif

namespace {

using namespace nf4lora;

constexpr const char *kNoIsa =
    "nf4lora: NF4LORA_CPU_ISA names an instruction set that this processor lacks; it may be avx512vbmi, avx512, avx2 or portable";

struct Ops {
    const char *name;
    bool available;
    decltype(&portable::quantize) quantize;
    decltype(&portable::quantize_absmax) quantize_absmax;
    decltype(&portable::dequantize) dequantize;
    decltype(&portable::linear_fwd) linear_fwd;
    decltype(&portable::linear_bwd) linear_bwd;
    decltype(&portable::lora_bwd) lora_bwd;
    decltype(&portable::optim_step) optim_step;
    decltype(&portable::optim_check) optim_check;
};

#define NF4LORA_OPS(isa, available)                                                                                \
    Ops {                                                                                                          \
        #isa, available, isa::quantize, isa::quantize_absmax, isa::dequantize, isa::linear_fwd, isa::linear_bwd,   \
            isa::lora_bwd, isa::optim_step, isa::optim_check                                                       \
    }

Ops choose() {
    const char *forced = getenv("NF4LORA_CPU_ISA");
    const Ops none{};
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512vbmi = avx512 && __builtin_cpu_supports("avx512vbmi");
    const Ops all[] = {NF4LORA_OPS(avx512vbmi, avx512vbmi), NF4LORA_OPS(avx512, avx512), NF4LORA_OPS(avx2, avx2),
                       NF4LORA_OPS(portable, true)};
#else
    const Ops all[] = {NF4LORA_OPS(portable, true)};
#endif
    for (const Ops &ops : all)
        if (ops.available && (!forced || !*forced || !strcmp(forced, ops.name)))
            return ops;
    return none;
}

const Ops &ops() {
    static const Ops chosen = choose();
    return chosen;
}

}  // namespace

const char *nf4lora_cpu_isa() { return ops().name; }

#define NF4LORA_FORWARD(op, Params) \
    const char *nf4lora_cpu_##op(const Params *params) { return ops().op ? ops().op(*params) : kNoIsa; }

NF4LORA_FORWARD(quantize, QuantizeParams)
NF4LORA_FORWARD(quantize_absmax, QuantizeAbsmaxParams)
NF4LORA_FORWARD(dequantize, DequantizeParams)
NF4LORA_FORWARD(linear_fwd, LinearFwdParams)
NF4LORA_FORWARD(linear_bwd, LinearBwdParams)
NF4LORA_FORWARD(lora_bwd, LoraBwdParams)
NF4LORA_FORWARD(optim_step, OptimParams)
NF4LORA_FORWARD(optim_check, OptimCheckParams)
