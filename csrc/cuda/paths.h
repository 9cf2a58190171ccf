// The kernels behind nf4lora_cuda_linear_fwd, _linear_bwd and _lora_bwd, one file a path; linear.cu chooses by
// config.path. Each returns null on success, else a static message; each *_workspace gives the bytes it wants.
#pragma once
#include "../params.h"

namespace nf4lora {

// lora.cu: p.xa, and p.x_ext where it is given. Needs p.r > 0.
const char *lora_fwd(const GroupFwdParams &p, void *stream);
int64_t lora_fwd_workspace(const GroupFwdParams &p);
// lora.cu: dyb and dB from one reading of dy, dA from one of x
const char *lora_bwd(const GroupLoraBwdParams &p, void *stream);
int64_t lora_bwd_workspace(const GroupLoraBwdParams &p);

// lora.cu: p.dx = dropout_mask * (dyb A), for the DENSE path
const char *lora_dx(const GroupBwdParams &p, void *stream);

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
