// What wgmma computes, a warp's 16 of the 64 rows at a time, from descriptors and fragments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace on_host {

// One wgmma of one thread, m64nNk16, unscaled: sums [64, N] (+)= left [64, 16] right. Pointers, not copies: registers that
// change before the product is carried out change what it computes.
struct Product {
  vmf::cuda::Element element;
  float* sums;              // N / 2 registers
  int columns;              // N
  uint64_t left;            // descriptor, K-major; unless there are
  const uint32_t* weights;  // 4 registers of the left operand; the right one is then MN-major, else K-major
  uint64_t right;           // descriptor
  bool first;               // whatever is in the sums is not added to
};

void issue(const Product& product);  // into the group that the next commit closes
void commit();
void await(size_t pending);  // until at most so many groups of the warp are unfinished

// For the scheduler.
void clear_products(int threads);
bool finish_a_product(int warp);  // the oldest group, if every lane has committed one
bool products_in_flight();

float to_float(uint16_t bits, vmf::cuda::Element element);
uint16_t rounded(float value, vmf::cuda::Element element);  // to the nearest, ties to even

}  // namespace on_host
