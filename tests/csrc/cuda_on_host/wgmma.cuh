// Stands in for csrc/cuda/wgmma.cuh: the same functions, of which products.h is what they compute.
#pragma once

#include "products.h"
#include "ptx.cuh"
#include "stream.h"

namespace vmf::cuda {

inline void begin_products() { __syncwarp(); }
inline void commit_products() { on_host::commit(); }

template <int N>
void pin(float (&)[N]) {}

template <int PENDING, int N>
void await_products(float (&)[N]) {
  on_host::await(PENDING);
}

template <Element ELEMENT>
uint32_t rounded_pair(float low, float high) {
  return on_host::rounded(low, ELEMENT) | static_cast<uint32_t>(on_host::rounded(high, ELEMENT)) << 16;
}

template <Element ELEMENT, int SUMS>
void multiply_shared(float (&sums)[SUMS], uint64_t left, uint64_t right, bool first) {
  on_host::issue({ELEMENT, sums, 2 * SUMS, left, nullptr, right, first});
}

template <Element ELEMENT, int SUMS>
void multiply_registers(float (&sums)[SUMS], const uint32_t* left, uint64_t right) {
  on_host::issue({ELEMENT, sums, 2 * SUMS, 0, left, right, false});
}

}  // namespace vmf::cuda
