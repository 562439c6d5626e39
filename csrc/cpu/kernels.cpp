// Compiled once per instruction set, with VMF_ISA its name: see kernels.h.
#include "kernels.h"

#include "gather.h"
#include "score.h"
#include "sums.h"

#define VMF_CONCAT(a, b) a##b
#define VMF_NAMED(isa, what) VMF_CONCAT(isa, what)

namespace vmf::cpu {
namespace VMF_ISA {

template <class Dot>
struct Table {
  using Word = typename Dot::Word;
  static std::size_t features_bytes(int count, int dim) {
    return aligned(sizeof(Word) * padded(count) * std::size_t(words<Dot>(dim)));
  }
  static void pack_features(const float* rows, int count, int dim, void* panels) {
    pack_transposed<Dot>(rows, count, dim, static_cast<Word*>(panels));
  }
  static std::size_t values_bytes(int count, int dim) {
    return aligned(sizeof(Word) * words<Dot>(count) * std::size_t(padded(dim)));
  }
  static void pack_values(const float* rows, int count, int dim, void* panels) {
    pack_panels<Dot>(
        count, dim, [&](int r, int d, float* line) { line_of(rows + std::ptrdiff_t(r) * dim, dim, d, line, 1.0f); },
        static_cast<Word*>(panels));
  }
  static void pack_coefficients(const float* rows, int count, int columns, float* panels) {
    pack_panels<Fp32>(
        count, columns, [&](int r, int s, float* line) { line_of(rows + std::ptrdiff_t(r) * columns, columns, s, line, 1.0f); },
        panels);
  }
  static std::size_t score_scratch(const Score& s) { return Scorer<Dot>::scratch(s); }
  static void score(const ScoreTask& task) { Scorer<Dot>{task}.run(); }
  static std::size_t gather_scratch(const Gather& g) { return Gatherer<Dot>::scratch(g); }
  static void gather(const GatherTask& task) { Gatherer<Dot>{task}.run(); }

  static void over_prototypes(const StoredTask& task) { StoredSums{task}.over_prototypes(); }
  static void over_rows(const StoredTask& task) { StoredSums{task}.over_rows(); }

  static constexpr Kernels kernels{
      LANES,         pack_features, features_bytes, pack_values, values_bytes,    pack_coefficients,
      score_scratch, score,         gather_scratch, gather,      over_prototypes, over_rows};
};

}  // namespace VMF_ISA

const Kernels* VMF_NAMED(VMF_ISA, _kernels)(Products products) {
#if defined(VMF_HAS_BF16)
  return products == Products::bf16 ? &VMF_ISA::Table<VMF_ISA::Bf16>::kernels : nullptr;
#else
  return products == Products::fp32 ? &VMF_ISA::Table<VMF_ISA::Fp32>::kernels : nullptr;
#endif
}

}  // namespace vmf::cpu
