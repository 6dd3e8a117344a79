// Which kernels this CPU and its operating system can run.
#include <cstring>

#if defined(PUNA_HAS_neon)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.hpp"

namespace puna {

#if defined(PUNA_HAS_avx512bf16)
namespace avx512bf16 { extern const Kernels kernels; }
#endif
#if defined(PUNA_HAS_avx512)
namespace avx512 { extern const Kernels kernels; }
#endif
#if defined(PUNA_HAS_avx2)
namespace avx2 { extern const Kernels kernels; }
#endif
#if defined(PUNA_HAS_neon)
namespace neon { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

namespace {

#if defined(PUNA_HAS_avx512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
#endif

// Of kInstructionSets[i]: the features that CMakeLists.txt compiles it for. The builtins ask the operating system too (XGETBV).
const Kernels* supported(int i) {
  switch (i) {
#if defined(PUNA_HAS_avx512bf16)
    case 0:  // not on Intel's cores, whose bfloat16 products are half as fast as those of float32 and round besides
      return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd") ? &avx512bf16::kernels : nullptr;
#endif
#if defined(PUNA_HAS_avx512)
    case 1: return has_avx512() ? &avx512::kernels : nullptr;
#endif
#if defined(PUNA_HAS_avx2)
    case 2:  // every CPU with AVX2 and FMA has F16C, which the builtin of older compilers doesn't know
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::kernels : nullptr;
#endif
#if defined(PUNA_HAS_neon)
    case 3:  // dot products came with ARMv8.2, and every CPU that has them has the rest of it
      return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &neon::kernels : nullptr;
#endif
    case 4: return &portable::kernels;
    default: return nullptr;
  }
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (int i = 0; i < kInstructionSetCount; i++)
    if (!std::strcmp(name, kInstructionSets[i])) return supported(i);
  return nullptr;
}

}  // namespace puna
