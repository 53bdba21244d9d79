#include "instruction_sets.h"

namespace headstart {

#define HEADSTART_DECLARE(isa) \
  namespace isa {              \
  extern const Kernels kTable; \
  }
HEADSTART_DECLARE(portable)
#if defined(HEADSTART_X86)
HEADSTART_DECLARE(avx2)
HEADSTART_DECLARE(avx512)
HEADSTART_DECLARE(avx512_vnni)
HEADSTART_DECLARE(avx512_bf16)
#endif

namespace {

#if defined(HEADSTART_X86)
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
  return all;
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
  all.push_back({avx2::kTable, avx2});
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
