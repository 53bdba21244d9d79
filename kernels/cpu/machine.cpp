// Prints the instruction sets of this machine, for CMake: those are compiled (HEADSTART_THIS_MACHINE).
#include "machine.h"

#include <cstdio>

int main() {
  for (const auto& set : headstart::machine_sets()) {
    if (set.usable) std::printf("%s;", set.name);
  }
}
