// The C ABI that nf4lora/native.py loads with ctypes. Arguments are checked before they get here (nf4lora/ops.py).
// Every function returns null on success, else a static message; none exits, none throws across the boundary.
#pragma once
#include "managed.h"
#include "params.h"

#define NF4LORA_API extern "C" __attribute__((visibility("default")))

NF4LORA_API const char *nf4lora_cpu_quantize(const nf4lora::QuantizeParams *);
NF4LORA_API const char *nf4lora_cpu_quantize_absmax(const nf4lora::QuantizeAbsmaxParams *);
NF4LORA_API const char *nf4lora_cpu_dequantize(const nf4lora::DequantizeParams *);
NF4LORA_API const char *nf4lora_cpu_linear_fwd(const nf4lora::LinearFwdParams *);
NF4LORA_API const char *nf4lora_cpu_linear_bwd(const nf4lora::LinearBwdParams *);
NF4LORA_API const char *nf4lora_cpu_lora_bwd(const nf4lora::LoraBwdParams *);
NF4LORA_API const char *nf4lora_cpu_swiglu_fwd(const nf4lora::SwigluParams *);
NF4LORA_API const char *nf4lora_cpu_swiglu_bwd(const nf4lora::SwigluParams *);
NF4LORA_API const char *nf4lora_cpu_optim_step(const nf4lora::OptimParams *);
NF4LORA_API const char *nf4lora_cpu_optim_check(const nf4lora::OptimCheckParams *);
// Name of the instruction set in use: "amx", "avx512bf16", "avx512vbmi", "avx512", "avx2" or "portable". NF4LORA_CPU_ISA
// forces one the processor has.
NF4LORA_API const char *nf4lora_cpu_isa();

// libnf4lora_cuda.so: the same arguments in device memory, and the stream to run on. Nothing synchronizes.
NF4LORA_API const char *nf4lora_cuda_quantize(const nf4lora::QuantizeParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_quantize_absmax(const nf4lora::QuantizeAbsmaxParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_dequantize(const nf4lora::DequantizeParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_linear_fwd(const nf4lora::GroupFwdParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_linear_bwd(const nf4lora::GroupBwdParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_lora_bwd(const nf4lora::GroupLoraBwdParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_swiglu_fwd(const nf4lora::SwigluParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_swiglu_bwd(const nf4lora::SwigluParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_optim_step(const nf4lora::OptimParams *, void *stream);
NF4LORA_API const char *nf4lora_cuda_optim_check(const nf4lora::OptimCheckParams *, void *stream);
// Bytes of scratch memory that the launch wants in `workspace`.
NF4LORA_API int64_t nf4lora_cuda_linear_fwd_workspace(const nf4lora::GroupFwdParams *);
NF4LORA_API int64_t nf4lora_cuda_linear_bwd_workspace(const nf4lora::GroupBwdParams *);
NF4LORA_API int64_t nf4lora_cuda_lora_bwd_workspace(const nf4lora::GroupLoraBwdParams *);
// Why no kernel of the library can run on the current device: the driver is too old, or it has no code for the GPU. Null where they can.
NF4LORA_API const char *nf4lora_cuda_why_not();
// kCounters zeros in memory of the device, for the launches on a stream of it, which leave them zeros; null where none can
// be had. Launches on one stream follow one another, so they share them. A capture into a CUDA graph has some of its own
// for each of its streams, cleared at the start of a replay, as the graph may run on any stream. Kept for good.
NF4LORA_API uint32_t *nf4lora_cuda_counters(int32_t device, void *stream);

// Managed memory, csrc/cuda/managed_memory.cu. A message of an error of CUDA is its name; it is not found again by the next
// call. What a function writes is null or unspecified where it fails.
// found: whether kernels and the host may use managed memory at once, bytes of the device free and in all, bytes of arenas
// of this process on it, and those of them that were last sent there: told to be there, which says nothing of having come.
NF4LORA_API const char *nf4lora_cuda_managed_room(const nf4lora::ManagedRoom *);
// An arena, as a tensor that gives itself back; release gives it back where no tensor was made, and may be called twice.
NF4LORA_API const char *nf4lora_cuda_managed_allocate(const nf4lora::ManagedArena *, void *stream);
NF4LORA_API const char *nf4lora_cuda_managed_release(const nf4lora::ManagedArena *);
// Sets the place that is preferred; moves to a place; says which place was last moved to and which is preferred.
NF4LORA_API const char *nf4lora_cuda_managed_advise(const nf4lora::ManagedRange *);
NF4LORA_API const char *nf4lora_cuda_managed_prefetch(const nf4lora::ManagedRange *, void *stream);
NF4LORA_API const char *nf4lora_cuda_managed_places(const nf4lora::ManagedRange *);
// Refuses where the stream is captured into a CUDA graph.
NF4LORA_API const char *nf4lora_cuda_managed_capture(void *stream);
NF4LORA_API const char *nf4lora_cuda_managed_stream_create(const nf4lora::ManagedHandle *);
NF4LORA_API const char *nf4lora_cuda_managed_stream_destroy(const nf4lora::ManagedHandle *);
NF4LORA_API const char *nf4lora_cuda_managed_event_create(const nf4lora::ManagedHandle *);
NF4LORA_API const char *nf4lora_cuda_managed_event_record(const nf4lora::ManagedHandle *, void *stream);
NF4LORA_API const char *nf4lora_cuda_managed_event_wait(const nf4lora::ManagedHandle *, void *stream);
NF4LORA_API const char *nf4lora_cuda_managed_event_synchronize(const nf4lora::ManagedHandle *);
NF4LORA_API const char *nf4lora_cuda_managed_event_destroy(const nf4lora::ManagedHandle *);
