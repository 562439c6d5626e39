// Which instruction sets the machine has, and this build has functions for.
#include <stdexcept>

#include "operator.h"

#if defined(VMF_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vmf::cpu {

namespace {

#if defined(VMF_TILES_STAND_IN)
bool has_matrix_unit() { return true; }
#elif defined(VMF_HAS_AMX) && defined(__linux__)
// Whether there is AMX with bf16 products and this process may use it. The registers are large, so Linux saves them only for
// processes that have asked; what is granted holds for all threads, and is asked for once.
bool ask_for_matrix_unit() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
bool has_matrix_unit() {
  static const bool granted = ask_for_matrix_unit();
  return granted;
}
#else
bool has_matrix_unit() { return false; }
#endif

constexpr Isa ALL[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx_bf16};

}  // namespace

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
#if !defined(VMF_TILES_STAND_IN)
  if (found.back() != Isa::avx512bf16) return found;  // whose instructions go with the tiles
#endif
  if (has_matrix_unit()) found.push_back(Isa::amx_bf16);
  return found;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::amx_bf16: return "amx_bf16";
  }
  return "";
}

Isa isa_named(const std::string& name) {
  std::string known;
  for (const Isa isa : ALL) {
    if (name == name_of(isa)) return isa;
    known += (known.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; expected one of " + known);
}

}  // namespace vmf::cpu
