// Inputs of the passes and what is expected of their outputs.
//
// Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim; base-2 logits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "stream.h"

namespace on_host {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double SINGLE = 1e-4;  // relative, of fp32: exponentials of logits of order 100, and sums of hundreds of terms

// Of one element type and width; the inputs are the same whatever the schedule.
struct Setting {
  vmf::cuda::Element element;
  int width;
  std::mt19937 inputs{7};
};

// Rounded to 16 bits, and what these bits are worth.
struct Matrix {
  int columns;
  std::vector<uint16_t> bits;
  std::vector<float> values;

  const float* row(int i) const { return values.data() + static_cast<size_t>(i) * columns; }
};

Matrix normal_matrix(Setting& setting, int rows, float scale);  // [rows, width], independent normal
std::vector<float> normal_line(Setting& setting, int count, float scale);

double dot(const float* x, const float* y, int n);

// Of a sum of weights times values: of the absolute values of the terms, and of those of the values.
struct Size {
  double terms = 0, values = 0;

  void add(double weight, double value) {
    terms += weight * std::abs(value);
    values += std::abs(value);
  }
};

// A bound on what rounding each weight to `element` changes in such a sum, and fp32 in the rest.
double allowed_by_rounding(vmf::cuda::Element element, const Size& size);

// One output after the other against double precision.
class Comparison {
 public:
  // Fails as WRONG unless |got - expected| <= allowed; so does NaN.
  void check(const char* what, int row, double got, double expected, double allowed);
  double worst() const { return worst_; }      // error / allowed
  uint64_t digest() const { return digest_; }  // of the bits of all that was checked

 private:
  double worst_ = 0;
  uint64_t digest_ = 0xCBF29CE484222325;  // FNV-1a
};

// After a pass that has to run in clusters: fails as WRONG unless its blocks ran in twos.
void check_clusters(const char* name);

// An output of blocks in clusters against that of blocks alone: fails as WRONG unless all bits are the same.
void check_same(const char* name, const std::vector<float>& in_clusters, const std::vector<float>& alone);

// Of the pass that the program is for. Prints a line a case: its name, the worst error as a share of what is allowed, and the
// digest.
void run_cases(Setting& setting);

}  // namespace on_host
