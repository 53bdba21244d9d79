// The instruction sets this build holds kernels for.
#pragma once

#include <vector>

#include "kernels.h"

namespace headstart {

struct InstructionSet {
  Kernels kernels;
  bool usable;  // on this machine
};

// Best first.
const std::vector<InstructionSet>& instruction_sets();

}  // namespace headstart
