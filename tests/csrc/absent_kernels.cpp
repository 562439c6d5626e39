// In place of the kernels of an instruction set that this machine has not, for tests/csrc/test_sanitizers.py: VMF_ABSENT is the
// name of their function.
#include "kernels.h"

namespace vmf::cpu {

const Kernels* VMF_ABSENT(Products) { return nullptr; }

}  // namespace vmf::cpu
