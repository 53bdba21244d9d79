// The instruction sets this build holds kernels for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace headstart {

struct InstructionSet {
  Kernels kernels;
  bool usable;  // on this machine
};

// Best first.
const std::vector<InstructionSet>& instruction_sets();

// Those that this machine has and this build holds no kernels for; best first.
std::vector<std::string> missing_sets();

}  // namespace headstart
