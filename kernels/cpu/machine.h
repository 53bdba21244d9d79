// The instruction sets there are kernels for, and which of them this machine has.
#pragma once

#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace headstart {

struct MachineSet {
  const char* name;
  const char* base;  // the set whose kernels it has too, but for those it replaces; null: none
  bool usable;       // on this machine
};

// Best first; a base comes after what is built on it.
inline std::vector<MachineSet> machine_sets() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(HEADSTART_EMULATED)  // tests/kernels/cpu/emulated.h
  const bool avx512 = avx2, vnni = avx2, bf16 = avx2, avx_vnni = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  // Neither compiler's __builtin_cpu_supports has known AVX-VNNI's name for long.
  unsigned a, b, c, d;
  const bool avx_vnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  return {{"avx512_bf16", "avx512_vnni", bf16}, {"avx512_vnni", "avx512", vnni}, {"avx512", nullptr, avx512},
          {"avx_vnni", "avx2", avx_vnni},       {"avx2", nullptr, avx2},         {"portable", nullptr, true}};
#elif defined(__aarch64__)
  bool dotprod = false, i8mm = false;
#if defined(__linux__)
  // HWCAP_ASIMDDP, and HWCAP2_I8MM, which older headers lack.
  dotprod = getauxval(AT_HWCAP) >> 20 & 1;
  i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  dotprod = has("hw.optional.arm.FEAT_DotProd");
  i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  return {{"neon_i8mm", "portable", dotprod && i8mm}, {"neon_dotprod", "portable", dotprod}, {"portable", nullptr, true}};
#else
  return {{"portable", nullptr, true}};
#endif
}

}  // namespace headstart
