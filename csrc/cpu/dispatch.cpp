// Which instruction sets the machine has.
#include <stdexcept>

#include "operator.h"

namespace vmf::cpu {

std::vector<Isa> available() {
  std::vector<Isa> found{Isa::portable};
#if defined(VMF_HAS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(Isa::avx512);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512bf16);
  }
#endif
  return found;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "";
}

Isa isa_named(const std::string& name) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16})
    if (name == name_of(isa)) return isa;
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; expected portable, avx2, avx512 or avx512bf16");
}

}  // namespace vmf::cpu
