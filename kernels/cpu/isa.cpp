// Compiled once per instruction set, with HEADSTART_ISA naming it and the compiler flags choosing
// the vectors (CMakeLists.txt). Exports one table of functions; those that an instruction set
// leaves as they are in the one before it (instruction_sets.cpp) are null in its table.
#include "kernels.h"

#if !defined(HEADSTART_ONLY_LINEAR)
#include "attention.h"
#include "lora.h"
#include "rows.h"
#include "sample.h"
#endif
#if !defined(HEADSTART_ALL_BUT_LINEAR)
#include "linear.h"
#endif

#define HEADSTART_STRING_(x) #x
#define HEADSTART_STRING(x) HEADSTART_STRING_(x)

namespace headstart::HEADSTART_ISA {

extern const Kernels kTable;
const Kernels kTable = {
    .name = HEADSTART_STRING(HEADSTART_ISA),
#if !defined(HEADSTART_ONLY_LINEAR)
    .norm = norm,
    .silu = silu,
    .rope = rope,
    .attend = attend,
#endif
#if !defined(HEADSTART_ALL_BUT_LINEAR)
    .linear = linear,
#endif
#if !defined(HEADSTART_ONLY_LINEAR)
    .lora = lora,
    .argmax = argmax,
    .sample = sample,
    .top = top,
#endif
};

}  // namespace headstart::HEADSTART_ISA
