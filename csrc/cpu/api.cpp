// The C ABI of the host library: chooses the instruction set once, at the first call.
// Compiled for the baseline processor; the kernels it reaches are compiled once for each instruction set.
#include "../api.h"

#include <cstdlib>
#include <cstring>

#define NF4LORA_ISA portable
#include "ops.h"
#undef NF4LORA_ISA
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NF4LORA_ISA avx2
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA avx512
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA avx512vbmi
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA avx512bf16
#include "ops.h"
#undef NF4LORA_ISA
#define NF4LORA_ISA amx
#include "ops.h"
#undef NF4LORA_ISA
#endif

// Those that were compiled, the best first; setup.py says so where the compiler does not know them all.
#if !defined(NF4LORA_ISAS) && defined(__x86_64__)
#define NF4LORA_ISAS(X) X(amx) X(avx512bf16) X(avx512vbmi) X(avx512) X(avx2) X(portable)
#elif !defined(NF4LORA_ISAS)
#define NF4LORA_ISAS(X) X(portable)
#endif

namespace {

using namespace nf4lora;

#define NF4LORA_NAME(isa) " " #isa
constexpr const char *kNoIsa =
    "nf4lora: NF4LORA_CPU_ISA names an instruction set that this processor lacks, or that this library was built without; "
    "it was built with" NF4LORA_ISAS(NF4LORA_NAME);

struct Ops {
    const char *name;
    bool (*available)();
    decltype(&portable::quantize) quantize;
    decltype(&portable::quantize_absmax) quantize_absmax;
    decltype(&portable::dequantize) dequantize;
    decltype(&portable::linear_fwd) linear_fwd;
    decltype(&portable::linear_bwd) linear_bwd;
    decltype(&portable::lora_bwd) lora_bwd;
    decltype(&portable::swiglu_fwd) swiglu_fwd;
    decltype(&portable::swiglu_bwd) swiglu_bwd;
    decltype(&portable::optim_step) optim_step;
    decltype(&portable::optim_check) optim_check;
};

#if defined(__x86_64__)
// By cpuid, as not every compiler that knows tiles has a name for asking. Linux keeps their state for a process that has
// asked to use them, which then takes larger stacks for signals: not where another set is forced.
[[maybe_unused]] bool has_tiles() {
    constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Read where the set is one of NF4LORA_ISAS only: older compilers do not know every name.
#define NF4LORA_HAS_portable true
#define NF4LORA_HAS_avx2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#define NF4LORA_HAS_avx512                                                                                   \
    (NF4LORA_HAS_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&          \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#define NF4LORA_HAS_avx512vbmi (NF4LORA_HAS_avx512 && __builtin_cpu_supports("avx512vbmi"))
#define NF4LORA_HAS_avx512bf16 (NF4LORA_HAS_avx512vbmi && __builtin_cpu_supports("avx512bf16"))
#define NF4LORA_HAS_amx (NF4LORA_HAS_avx512bf16 && has_tiles())

#define NF4LORA_OPS(isa)                                                                                    \
    {#isa, []() -> bool { return NF4LORA_HAS_##isa; }, isa::quantize, isa::quantize_absmax,                 \
     isa::dequantize, isa::linear_fwd, isa::linear_bwd, isa::lora_bwd, isa::swiglu_fwd, isa::swiglu_bwd,    \
     isa::optim_step, isa::optim_check},

Ops choose() {
    const char *forced = getenv("NF4LORA_CPU_ISA");
    const Ops none{};
    const Ops all[] = {NF4LORA_ISAS(NF4LORA_OPS)};
    for (const Ops &ops : all)
        if ((!forced || !*forced || !strcmp(forced, ops.name)) && ops.available())
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
NF4LORA_FORWARD(swiglu_fwd, SwigluParams)
NF4LORA_FORWARD(swiglu_bwd, SwigluParams)
NF4LORA_FORWARD(optim_step, OptimParams)
NF4LORA_FORWARD(optim_check, OptimCheckParams)
