// products.h.
#include "products.h"

#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime_api.h"
#include "machine.h"

namespace on_host {
namespace {

using vmf::cuda::Element;

constexpr int ROWS = 16, DEPTH = 16, MOST_COLUMNS = 256;  // of a warp's part of a product

struct Queue {
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};
std::vector<Queue> queues;  // by thread of the cluster

// PTX ISA, "Matrix Descriptor Format" of wgmma; offsets in bytes.
struct Descriptor {
  uint32_t start, leading, stride;
};

Descriptor decode(uint64_t bits) {
  if (bits >> 62 != 1) fail("DESCRIPTOR of another layout than the 128-byte swizzle: %016lx", static_cast<unsigned long>(bits));
  if (bits >> 49 & 7) fail("DESCRIPTOR with a base offset: %016lx", static_cast<unsigned long>(bits));
  const auto field = [bits](int at) { return static_cast<uint32_t>(bits >> at & 0x3FFF) << 4; };
  return {field(0), field(16), field(32)};
}

std::vector<float> table_of(Element element) {
  std::vector<float> values(1 << 16);
  for (uint32_t bits = 0; bits < values.size(); ++bits) {
    if (element == Element::bf16) {
      const uint32_t wide = bits << 16;
      memcpy(&values[bits], &wide, sizeof wide);
    } else {
      const uint16_t narrow = static_cast<uint16_t>(bits);
      _Float16 value;
      memcpy(&value, &narrow, sizeof narrow);
      values[bits] = static_cast<float>(value);
    }
  }
  return values;
}

// What each of the 2^16 patterns is worth.
const float* values_of(Element element) {
  static const std::vector<float> bf16 = table_of(Element::bf16), fp16 = table_of(Element::fp16);
  return (element == Element::bf16 ? bf16 : fp16).data();
}

float load(uint32_t address, const float* values) {
  uint16_t bits;
  memcpy(&bits, shared_at(swizzled(address), sizeof bits), sizeof bits);
  return values[bits];
}

// k along the rows of a box of 128 bytes each.
uint32_t k_major(const Descriptor& d, int row, int k) { return d.start + row / 8 * d.stride + row % 8 * 128 + k * 2; }
// k from row to row, and a box for each 64 columns.
uint32_t mn_major(const Descriptor& d, int k, int column) {
  return d.start + column / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + column % 64 * 2;
}

// One product of each lane of a warp.
using Lanes = const Product* [LANES];

void load_left(float (&left)[ROWS][DEPTH], const Lanes& lanes, int warp, const float* values) {
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k) {
      const Product& p = *lanes[row % 8 * 4 + k % 8 / 2];  // the lane that has the element in its fragment
      if (p.weights) {
        const uint32_t pair = p.weights[k / 8 * 2 + row / 8];
        left[row][k] = values[static_cast<uint16_t>(k % 2 ? pair >> 16 : pair)];
      } else {
        left[row][k] = load(k_major(decode(p.left), warp % 4 * ROWS + row, k), values);
      }
    }
}

void load_right(float (&right)[DEPTH][MOST_COLUMNS], const Product& p, const float* values) {
  const Descriptor d = decode(p.right);
  for (int k = 0; k < DEPTH; ++k)
    for (int n = 0; n < p.columns; ++n) right[k][n] = load(p.weights ? mn_major(d, k, n) : k_major(d, n, k), values);
}

float& sum_of(const Lanes& lanes, int row, int column) {
  return lanes[row % 8 * 4 + column % 8 / 2]->sums[column / 8 * 4 + row / 8 * 2 + column % 2];
}

// The oldest group's i-th.
void carry_out(int warp, size_t i) {
  static float left[ROWS][DEPTH], right[DEPTH][MOST_COLUMNS];
  Lanes lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = &queues[warp * LANES + lane].committed.front()[i];
  const Product& p = *lanes[0];
  const float* const values = values_of(p.element);
  load_left(left, lanes, warp, values);
  load_right(right, p, values);
  for (int row = 0; row < ROWS; ++row) {
    float sums[MOST_COLUMNS];  // fp32, in the order of k
    for (int n = 0; n < p.columns; ++n) sums[n] = p.first ? 0 : sum_of(lanes, row, n);
    for (int k = 0; k < DEPTH; ++k)
      for (int n = 0; n < p.columns; ++n) sums[n] += left[row][k] * right[k][n];
    for (int n = 0; n < p.columns; ++n) sum_of(lanes, row, n) = sums[n];
  }
}

}  // namespace

void issue(const Product& product) { queues[thread_in_cluster()].open.push_back(product); }

void commit() {
  Queue& mine = queues[thread_in_cluster()];
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
  if (timing() == Timing::early) await(0);
}

void await(size_t pending) {
  __syncwarp();  // all lanes have committed what the first of them to go on carries out for all
  while (queues[thread_in_cluster()].committed.size() > pending) finish_a_product(thread_in_cluster() / LANES);
}

void clear_products(int threads) { queues.assign(threads, {}); }

bool finish_a_product(int warp) {
  for (int lane = 0; lane < LANES; ++lane)
    if (queues[warp * LANES + lane].committed.empty()) return false;
  const size_t products = queues[warp * LANES].committed.front().size();
  for (size_t i = 0; i < products; ++i) carry_out(warp, i);
  for (int lane = 0; lane < LANES; ++lane) queues[warp * LANES + lane].committed.pop_front();
  return true;
}

bool products_in_flight() {
  for (const Queue& queue : queues)
    if (!queue.committed.empty() || !queue.open.empty()) return true;
  return false;
}

float to_float(uint16_t bits, Element element) { return values_of(element)[bits]; }

uint16_t rounded(float value, Element element) {
  if (element == Element::bf16) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  const _Float16 narrow = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

}  // namespace on_host
