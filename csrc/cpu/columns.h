// What a gathering pass takes from the teacher's rows of one prototype: their probabilities, and log-sums over the rows of
// another softmax than the target's, sum_t 2^(l_tk - offset_t).
#pragma once

#include "blocks.h"

namespace vmf::cpu::VMF_ISA {

inline float largest(Floats x) {
  float lanes[LANES];
  store(lanes, x);
  float most = lanes[0];
  for (int i = 1; i < LANES; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// Adds rows to the maximum and mass of a prototype, whose logits these are. One that is far from every row keeps a finite
// logarithm, because its sum is relative to its own maximum.
inline void add_column(const float* logits, const float* offset, int rows, float& top, float& mass) {
  Floats most = all(top);
  // a NaN is left out of the maximum and makes the mass NaN
  for (int t = 0; t < rows; t += LANES) most = larger(sub(load(logits + t), load(offset + t)), most);
  const float now = largest(most);
  Floats total = zero();
  for (int t = 0; t < rows; t += LANES) total = add(total, exp2(sub(sub(load(logits + t), load(offset + t)), all(now))));
  if (mass != 0) {
    float decay[LANES];
    store(decay, exp2(all(top - now)));
    mass *= decay[0];
  }
  mass += sum(total);
  top = now;
}

// [rows] mass_t q_t of prototype k for the teacher rows with these logits, and the prototype's share of the sums over them.
inline void form_probabilities(const GatherTask& task, int k, const float* logits, int rows, float* q) {
  Floats used = zero();
  for (int t = 0; t < rows; t += LANES) {
    const Floats p = exp2(sub(load(logits + t), load(task.teacher_top + t)));
    store(q + t, p);
    used = multiply_add(load(task.teacher_factor + t), p, used);
  }
  task.gather->usage[k] += sum(used);
  const Gather& gather = *task.gather;
  if (task.column_offset) add_column(logits, task.column_offset, rows, gather.column_top[k], gather.column_mass[k]);
}

}  // namespace vmf::cpu::VMF_ISA
