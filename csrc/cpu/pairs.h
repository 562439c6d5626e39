// The pairs of one image folded as a product: G = n p - Q A with Q the teacher's probabilities of a few prototypes.
#pragma once

#include "columns.h"

namespace vmf::cpu::VMF_ISA {

// Prototypes whose teacher probabilities are formed before their product: some 100 KiB of them with 400 rows, which stay in L2.
constexpr int PAIR_PROTOTYPES = 2 * BLOCK_MULTIPLE;

// Memory of the fold, in floats: probabilities [PAIR_PROTOTYPES, padded T] and sums of G [PAIR_PROTOTYPES, LANES].
inline std::size_t pair_floats(const Gather& g) {
  return folds_by_product(g) ? std::size_t(PAIR_PROTOTYPES) * (padded(g.teacher_rows) + LANES) : 0;
}

struct PairProduct {
  const GatherTask& task;
  const Gather& gather = *task.gather;
  float* probabilities;  // [PAIR_PROTOTYPES, padded T]
  const int students = padded(gather.student_rows), teachers = padded(gather.teacher_rows);
  float* totals = probabilities + std::ptrdiff_t(PAIR_PROTOTYPES) * teachers;  // [PAIR_PROTOTYPES, LANES]

  // [count, padded S] G of the prototypes from `first` on, and their shares of beta and usage. At most PAIR_PROTOTYPES, all in
  // one piece of the logits.
  void fold(int first, int count, float* out) const {
    const float* logits = row_of(gather.logits, first);
    for (int k = 0; k < count; ++k) {
      form_probabilities(task, first + k, logits + k * gather.logits.stride + gather.teacher_column, teachers,
                         probabilities + std::ptrdiff_t(k) * teachers);
      store(totals + std::ptrdiff_t(k) * LANES, zero());
    }
    const Rows<float> q{probabilities, teachers};
    for_each_tile(Cut(students / LANES), [&](auto n, int vector) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      const float* panel = task.coefficient + std::ptrdiff_t(vector) * LANES * gather.teacher_views;
      for_each_rows<Fp32, N>(count, [&](auto m, int k, int valid) __attribute__((always_inline)) {
        constexpr int M = decltype(m)::value;
        const Rows<float> rows{q.start + std::ptrdiff_t(k) * teachers, teachers};
        tile_in_short_sums<Fp32, M, N>(gather.teacher_views, rows, panel, valid, {},
                                       [&](int row, auto& sums)
                                           __attribute__((always_inline)) { finish(logits, k + row, vector, sums, out); });
      });
    });
    for (int k = 0; k < count; ++k)
      gather.bias_gradient[first + k] += sum(load(totals + std::ptrdiff_t(k) * LANES)) / gather.scale;
  }

 private:
  template <int M, int N>
  __attribute__((always_inline)) void finish(const float* first, int k, int vector, const Floats (&sums)[M][N],
                                             float* out) const {
    for (int m = 0; m < M; ++m) {
      const float* logits = first + (k + m) * gather.logits.stride;
      float* total = totals + std::ptrdiff_t(k + m) * LANES;
      for (int n = 0; n < N; ++n) {
        const int s = (vector + n) * LANES;
        const Floats p = exp2(sub(load(logits + s), load(task.student_top + s)));
        const Floats g = sub(mul(load(task.student_factor + s), p), sums[m][n]);
        store(out + std::ptrdiff_t(k + m) * students + s, g);
        store(total, add(load(total), g));
      }
    }
  }
};

}  // namespace vmf::cpu::VMF_ISA
