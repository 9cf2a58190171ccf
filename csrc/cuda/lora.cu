// The adapters' launches in their order; no kernel is here.
//   xa, x_ext               lora_projections.cu
//   dyb, dy_ext without dB  lora_projections.cu, also where a member has more than 64 ranks
//   dB, dyb, dy_ext         lora_gradients.cu
//   dA, dx                  lora_gradients.cu
//   dx alone                lora_dx.cu, also where the group has more than 64 ranks
//   all of it in fp32       lora_plain.cu
// Each launch leaves what the next reads; they share the workspace and the counters.
#include "paths.h"

namespace nf4lora {
namespace {

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The same dx as a launch of its own.
GroupBwdParams alone(const GroupLoraBwdParams &p) {
    GroupBwdParams dx{};
    for (int i = 0; i < kMaxGroup; ++i)
        dx.member[i] = p.member[i];
    dx.dyb = p.dyb;
    dx.dx = p.dx;
    dx.count = p.count;
    dx.M = p.M;
    dx.K = p.K;
    dx.r = p.r;
    dx.dy_dtype = p.dtype;
    dx.A_dtype = p.A_dtype;
    dx.dropout = p.dropout;
    return dx;
}

// Whether dyb has a launch of its own.
bool dyb_first(const GroupLoraBwdParams &p) { return !p.member[0].dB || !lora_dB_gives_dyb(p); }

const char *gradients(const GroupLoraBwdParams &p, void *stream) {
    if (p.dtype == kFloat32)
        return plain_lora_bwd(p, stream);
    const bool dB = p.member[0].dB, dA = p.member[0].dA;
    const char *error = dyb_first(p) ? lora_dyb(p, stream) : nullptr;
    if (!error && dB)
        error = lora_dB(p, stream);
    if (!error && dA)
        error = lora_dA(p, stream);
    return error;
}

}  // namespace

const char *lora_fwd(const GroupFwdParams &p, void *stream) {
    return p.x_dtype == kFloat32 ? plain_xa(p, stream) : lora_xa(p, stream);
}

int64_t lora_fwd_workspace(const GroupFwdParams &p) { return p.x_dtype == kFloat32 ? 0 : lora_xa_workspace(p); }

const char *lora_bwd(const GroupLoraBwdParams &p, void *stream) {
    const char *error = gradients(p, stream);
    const bool made = p.dtype != kFloat32 && p.member[0].dA && lora_dA_gives_dx(p);
    return error || !p.dx || made ? error : lora_bwd_dx(alone(p), stream);
}

int64_t lora_bwd_workspace(const GroupLoraBwdParams &p) {
    if (p.dtype == kFloat32)
        return 0;
    const int64_t dyb = dyb_first(p) ? lora_dyb_workspace(p) : 0, dB = p.member[0].dB ? lora_dB_workspace(p) : 0;
    return larger(dyb, larger(dB, p.member[0].dA ? lora_dA_workspace(p) : 0));
}

const char *lora_bwd_dx(const GroupBwdParams &p, void *stream) {
    return p.dy_dtype == kFloat32 ? plain_dx(p, stream) : lora_dx(p, stream);
}

}  // namespace nf4lora
