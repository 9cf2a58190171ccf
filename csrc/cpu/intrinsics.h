// The processor's own instructions, where the file is compiled for any beyond the baseline.
#pragma once
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
