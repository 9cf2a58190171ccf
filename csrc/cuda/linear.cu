// The entry points of the linear: which kernels a config's path means.
#include "../api.h"
#include "paths.h"

namespace nf4lora {
namespace {

constexpr const char *kNoSuchPath = "config.path is none of CudaPath";

const char *wrong_group(int64_t count) {
    return count < 1 || count > kMaxGroup ? "a group has 1 to 3 members" : nullptr;
}

}  // namespace
}  // namespace nf4lora

const char *nf4lora_cuda_linear_fwd(const nf4lora::GroupFwdParams *p, void *stream) {
    using namespace nf4lora;
    if (const char *error = wrong_group(p->count))
        return error;
    if (p->config.path == kSmall)
        return linear_fwd_small(*p, stream);
    if (p->r > 0 || p->x_ext)
        if (const char *error = lora_fwd(*p, stream))
            return error;
    switch (p->config.path) {
    case kMma:
        return linear_fwd_mma(*p, stream);
    case kWgmma:
        return linear_fwd_wgmma(*p, stream);
    case kDense:
        return decode_group(*p, stream);
    }
    return kNoSuchPath;
}

// The launches run one after another, so that they can share what the larger wants.
int64_t nf4lora_cuda_linear_fwd_workspace(const nf4lora::GroupFwdParams *p) {
    using namespace nf4lora;
    if (p->config.path == kSmall)
        return linear_fwd_small_workspace(*p);
    const int64_t lora = p->r > 0 || p->x_ext ? lora_fwd_workspace(*p) : 0;
    const int64_t product = p->config.path == kMma     ? linear_fwd_mma_workspace(*p)
                            : p->config.path == kWgmma ? linear_fwd_wgmma_workspace(*p)
                                                       : 0;
    return lora > product ? lora : product;
}

const char *nf4lora_cuda_linear_bwd(const nf4lora::GroupBwdParams *p, void *stream) {
    using namespace nf4lora;
    if (const char *error = wrong_group(p->count))
        return error;
    switch (p->config.path) {
    case kSmall:
    case kMma:
        return linear_bwd_mma(*p, stream);
    case kWgmma:
        return linear_bwd_wgmma(*p, stream);
    case kDense:
        if (p->r > 0 && p->ld == p->N)
            if (const char *error = lora_bwd_dx(*p, stream))
                return error;
        return decode_group(*p, stream);
    }
    return kNoSuchPath;
}

int64_t nf4lora_cuda_linear_bwd_workspace(const nf4lora::GroupBwdParams *p) {
    using namespace nf4lora;
    if (p->config.path == kDense)
        return 0;
    return p->config.path == kWgmma ? linear_bwd_wgmma_workspace(*p) : linear_bwd_mma_workspace(*p);
}

const char *nf4lora_cuda_lora_bwd(const nf4lora::GroupLoraBwdParams *p, void *stream) {
    using namespace nf4lora;
    if (const char *error = wrong_group(p->count))
        return error;
    return lora_bwd(*p, stream);
}

int64_t nf4lora_cuda_lora_bwd_workspace(const nf4lora::GroupLoraBwdParams *p) { return nf4lora::lora_bwd_workspace(*p); }
