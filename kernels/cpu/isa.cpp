// Compiled once per instruction set, with HEADSTART_ISA naming it and the compiler flags choosing
// the vectors (CMakeLists.txt). Exports one table of functions.
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "lora.h"
#include "rows.h"

#define HEADSTART_STRING_(x) #x
#define HEADSTART_STRING(x) HEADSTART_STRING_(x)

namespace headstart::HEADSTART_ISA {

extern const Kernels kTable;
const Kernels kTable = {HEADSTART_STRING(HEADSTART_ISA), norm, silu, rope, attend, linear, lora, argmax};

}  // namespace headstart::HEADSTART_ISA
