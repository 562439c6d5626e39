// Log-sums over stored logits, over the prototypes or over the rows: equation (9), whose rounds read the same logits.
#pragma once

#include "columns.h"
#include "score.h"

namespace vmf::cpu::VMF_ISA {

constexpr int STORED_BLOCK = 120;  // prototypes whose logits are read once for each vector of rows: they stay in L2
constexpr int STORED_TILE = 8;     // of them at a time

struct StoredSums {
  const StoredTask& task;
  const StoredLogits& stored = *task.stored;
  const int rows = padded(stored.rows);

  // Online softmax over the task's prototypes, with a bias.
  void over_prototypes() const {
    open_statistics(task.statistics, 3, rows);
    for (int k = task.first, count; k < task.last; k += count) {
      count = block_size(stored.logits, STORED_BLOCK, k, task.last);
      for (int r = 0; r < rows; r += LANES) {
        BlockSums block;
        float* top = task.statistics + r;
        const Softmax softmax{top, top + rows, top + 2 * rows, block.mass, block.moment};
        softmax.open();
        int i = 0;
        for (; i + STORED_TILE <= count; i += STORED_TILE) absorb<STORED_TILE>(softmax, k + i, r);
        for (; i < count; ++i) absorb<1>(softmax, k + i, r);
        softmax.close();
      }
    }
  }

  // [K] base 2, of the task's prototypes: log-sum-exp over the rows of logits less the rows' offsets.
  void over_rows() const {
    for (int k = task.first; k < task.last; ++k) {
      float top = LOWEST, mass = 0;
      add_column(row_of(stored.logits, k), task.offset, rows, top, mass);
      task.result[k] = top + ::log2f(mass);
    }
  }

 private:
  template <int M>
  void absorb(const Softmax& softmax, int k, int r) const {
    const float* start = row_of(stored.logits, k) + r;
    Floats logits[M];
    for (int m = 0; m < M; ++m) {
      const Floats logit = load(start + m * stored.logits.stride);
      logits[m] = task.bias ? add(logit, all(task.bias[k + m])) : logit;
    }
    softmax.absorb<M>(logits);
  }
};

}  // namespace vmf::cpu::VMF_ISA
