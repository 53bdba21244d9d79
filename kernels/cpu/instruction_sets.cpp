#include "instruction_sets.h"

#if defined(HEADSTART_X86)
#include <cpuid.h>
#elif defined(HEADSTART_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(HEADSTART_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace headstart {

#define HEADSTART_DECLARE(isa) \
  namespace isa {              \
  extern const Kernels kTable; \
  }
HEADSTART_DECLARE(portable)
#if defined(HEADSTART_X86)
HEADSTART_DECLARE(avx2)
HEADSTART_DECLARE(avx_vnni)
HEADSTART_DECLARE(avx512)
HEADSTART_DECLARE(avx512_vnni)
HEADSTART_DECLARE(avx512_bf16)
#elif defined(HEADSTART_ARM)
HEADSTART_DECLARE(neon_dotprod)
HEADSTART_DECLARE(neon_i8mm)
#endif

namespace {

#if defined(HEADSTART_X86) || defined(HEADSTART_ARM)
// `more`, with what it has not taken from `base`.
Kernels extended(const Kernels& base, const Kernels& more) {
  Kernels all = base;
  all.name = more.name;
  if (more.norm) all.norm = more.norm;
  if (more.silu) all.silu = more.silu;
  if (more.rope) all.rope = more.rope;
  if (more.attend) all.attend = more.attend;
  if (more.linear) all.linear = more.linear;
  if (more.lora) all.lora = more.lora;
  if (more.argmax) all.argmax = more.argmax;
  if (more.sample) all.sample = more.sample;
  if (more.top) all.top = more.top;
  return all;
}
#endif

#if defined(HEADSTART_X86)
// Neither compiler's __builtin_cpu_supports has known its name for long.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(HEADSTART_ARM)
struct Arm {
  bool dotprod, i8mm;
};
Arm arm() {
#if defined(__linux__)
  // HWCAP_ASIMDDP, and HWCAP2_I8MM, which older headers lack.
  return {(getauxval(AT_HWCAP) >> 20 & 1) != 0, (getauxval(AT_HWCAP2) >> 13 & 1) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#else
  return {false, false};
#endif
}
#endif

std::vector<InstructionSet> find() {
  std::vector<InstructionSet> all;
#if defined(HEADSTART_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  const Kernels with_vnni = extended(avx512::kTable, avx512_vnni::kTable);
  all.push_back({extended(with_vnni, avx512_bf16::kTable), bf16});
  all.push_back({with_vnni, vnni});
  all.push_back({avx512::kTable, avx512});
  all.push_back({extended(avx2::kTable, avx_vnni::kTable), avx2 && has_avx_vnni()});
  all.push_back({avx2::kTable, avx2});
#elif defined(HEADSTART_ARM)
  const Arm machine = arm();
  all.push_back({extended(portable::kTable, neon_i8mm::kTable), machine.dotprod && machine.i8mm});
  all.push_back({extended(portable::kTable, neon_dotprod::kTable), machine.dotprod});
#endif
  all.push_back({portable::kTable, true});
  return all;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all = find();
  return all;
}

}  // namespace headstart
