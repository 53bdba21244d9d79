"""The CPU backend: C++ kernels for five instruction sets, chosen at run time."""
