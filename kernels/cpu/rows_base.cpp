#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "plan.h"

#define VECTOR_BYTES 16

namespace fastood::base {
#include "rows.h"

extern const Kernels kernels;
const Kernels kernels = KERNELS("base");
}  // namespace fastood::base
