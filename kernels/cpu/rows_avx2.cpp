#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define VECTOR_BYTES 32

namespace fastood::avx2 {
#include "rows.h"

extern const Kernels kernels;
const Kernels kernels = KERNELS("avx2");
}  // namespace fastood::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
