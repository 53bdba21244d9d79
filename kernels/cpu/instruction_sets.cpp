#include "instruction_sets.h"

#include <string_view>

#include "machine.h"

// HEADSTART_SETS, from CMakeLists.txt: X(portable) X(avx2) ..., one for each object of kernels.
namespace headstart {

#define X(isa)                  \
  namespace isa {               \
  extern const Kernels kTable;  \
  }
HEADSTART_SETS
#undef X

namespace {

// Of the kernels compiled for `isa`; null: there are none.
const Kernels* compiled(std::string_view isa) {
#define X(name) \
  if (isa == #name) return &name::kTable;
  HEADSTART_SETS
#undef X
  return nullptr;
}

// `base`, with what `more` has instead.
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

std::vector<InstructionSet> find() {
  const std::vector<MachineSet> machine = machine_sets();
  std::vector<InstructionSet> sets;
  for (auto set = machine.rbegin(); set != machine.rend(); ++set) {  // bases first
    const Kernels* kernels = compiled(set->name);
    if (!kernels) continue;
    if (!set->base) {
      sets.insert(sets.begin(), {*kernels, set->usable});
      continue;
    }
    for (const InstructionSet& base : sets) {
      if (std::string_view(base.kernels.name) != set->base) continue;
      const Kernels all = extended(base.kernels, *kernels);
      sets.insert(sets.begin(), {all, set->usable});
      break;
    }
  }
  return sets;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all = find();
  return all;
}

std::vector<std::string> missing_sets() {
  std::vector<std::string> names;
  for (const MachineSet& set : machine_sets()) {
    if (set.usable && !compiled(set.name)) names.emplace_back(set.name);
  }
  return names;
}

}  // namespace headstart
