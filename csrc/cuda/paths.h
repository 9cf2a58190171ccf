// The kernels behind nf4lora_cuda_linear_fwd, _linear_bwd and _lora_bwd, one file a path; linear.cu chooses by
// config.path. Each returns null on success, else a static message; each *_workspace gives the bytes it wants.
#pragma once
#include "../params.h"

namespace nf4lora {

// lora.cu, which chooses among the functions below it: p.xa, and p.x_ext where it is given
const char *lora_fwd(const GroupFwdParams &p, void *stream);
int64_t lora_fwd_workspace(const GroupFwdParams &p);
// all that is wanted of GroupLoraBwdParams
const char *lora_bwd(const GroupLoraBwdParams &p, void *stream);
int64_t lora_bwd_workspace(const GroupLoraBwdParams &p);
// p.dx = dropout_mask * (dyb A), for the DENSE path
const char *lora_bwd_dx(const GroupBwdParams &p, void *stream);

// lora_projections.cu, 16-bit dtypes: xa and x_ext; dyb and dy_ext
const char *lora_xa(const GroupFwdParams &p, void *stream);
int64_t lora_xa_workspace(const GroupFwdParams &p);
const char *lora_dyb(const GroupLoraBwdParams &p, void *stream);
int64_t lora_dyb_workspace(const GroupLoraBwdParams &p);
// lora_gradients.cu, 16-bit dtypes: dB, with dyb and dy_ext up to 64 ranks a member; dA, with dx up to 64 in all
const char *lora_dB(const GroupLoraBwdParams &p, void *stream);
int64_t lora_dB_workspace(const GroupLoraBwdParams &p);
bool lora_dB_gives_dyb(const GroupLoraBwdParams &p);
const char *lora_dA(const GroupLoraBwdParams &p, void *stream);
int64_t lora_dA_workspace(const GroupLoraBwdParams &p);
bool lora_dA_gives_dx(const GroupLoraBwdParams &p);
// lora_dx.cu, 16-bit dtypes: dx from dyb alone
const char *lora_dx(const GroupBwdParams &p, void *stream);
// lora_plain.cu, float32: the same, each by a launch of its own; but for dx, which lora_bwd adds
const char *plain_xa(const GroupFwdParams &p, void *stream);
const char *plain_lora_bwd(const GroupLoraBwdParams &p, void *stream);
const char *plain_dx(const GroupBwdParams &p, void *stream);

// linear_fwd_small.cu: y and xa in one launch
const char *linear_fwd_small(const GroupFwdParams &p, void *stream);
int64_t linear_fwd_small_workspace(const GroupFwdParams &p);
// linear_fwd_mma.cu, linear_fwd_wgmma.cu: y, from p.xa as lora_fwd left it
const char *linear_fwd_mma(const GroupFwdParams &p, void *stream);
int64_t linear_fwd_mma_workspace(const GroupFwdParams &p);
const char *linear_fwd_wgmma(const GroupFwdParams &p, void *stream);
int64_t linear_fwd_wgmma_workspace(const GroupFwdParams &p);

// linear_bwd_mma.cu (its small tiles are the SMALL path), linear_bwd_wgmma.cu: dx
const char *linear_bwd_mma(const GroupBwdParams &p, void *stream);
int64_t linear_bwd_mma_workspace(const GroupBwdParams &p);
const char *linear_bwd_wgmma(const GroupBwdParams &p, void *stream);
int64_t linear_bwd_wgmma_workspace(const GroupBwdParams &p);

// decode_group.cu: p.decoded for the library's product
const char *decode_group(const GroupFwdParams &p, void *stream);
const char *decode_group(const GroupBwdParams &p, void *stream);

}  // namespace nf4lora
