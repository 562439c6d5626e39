// Log-sums over a gathering pass's teacher rows, of another softmax than the target's: sum_t 2^(l_tk - offset_t).
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
  // a NaN does not enter the maximum, but the mass
  for (int t = 0; t < rows; t += LANES) most = larger(sub(load(logits + t), load(offset + t)), most);
  const float now = largest(most);
  Floats total = zero();
  for (int t = 0; t < rows; t += LANES)
    total = add(total, exp2(sub(sub(load(logits + t), load(offset + t)), all(now))));
  if (mass != 0) {
    float decay[LANES];
    store(decay, exp2(all(top - now)));
    mass *= decay[0];
  }
  mass += sum(total);
  top = now;
}

}  // namespace vmf::cpu::VMF_ISA
