// Work shared among threads: those of the pool that torch computes with, so that two pools never compete for the processor.
#pragma once
#include <cstdint>

namespace nf4lora {

// Calls body(data, part, thread) once for each part in [0, parts), on at most `threads` threads at a time, thread in
// [0, threads). A thread has neighbouring parts, the same ones whenever the numbers are, and helps others when it is done.
void run_parts(int threads, int64_t parts, void (*body)(const void *data, int64_t part, int thread), const void *data);

// The same for body(part, thread); internal linkage, as each instruction set has its own.
template <class Body>
static inline void for_parts(int threads, int64_t parts, const Body &body) {
    const auto call = [](const void *data, int64_t part, int thread) { (*static_cast<const Body *>(data))(part, thread); };
    run_parts(threads, parts, call, &body);
}

}  // namespace nf4lora
