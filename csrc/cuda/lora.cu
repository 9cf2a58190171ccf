// what reads x or dy once for the adapter
#include "../tile.cuh"
#include "paths.h"

namespace nf4lora {

const char *lora_fwd(const GroupFwdParams &, void *) { return "this path is not there yet"; }

int64_t lora_fwd_workspace(const GroupFwdParams &) { return 0; }

const char *lora_bwd(const GroupLoraBwdParams &, void *) { return "this path is not there yet"; }

int64_t lora_bwd_workspace(const GroupLoraBwdParams &) { return 0; }

const char *lora_dx(const GroupBwdParams &, void *) { return "this path is not there yet"; }

}  // namespace nf4lora
