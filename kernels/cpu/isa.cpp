#include "isa.h"

namespace fastood {

namespace base { extern const Kernels kernels; }
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

const Kernels* kernels = nullptr;

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {&base::kernels};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // asks the operating system too
  // F16C, which older Clangs cannot be asked about, is older than AVX2 and was never left out beside it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      found.push_back(&avx512::kernels);
  }
#endif
  return found;
}

}  // namespace fastood
