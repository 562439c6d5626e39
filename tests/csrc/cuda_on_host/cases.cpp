// cases.h: numbers and their comparison.
#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"
#include "products.h"

namespace on_host {

Matrix normal_matrix(Setting& setting, int rows, float scale) {
  std::normal_distribution<float> normal;
  Matrix matrix{setting.width, {}, {}};
  for (size_t i = 0; i < static_cast<size_t>(rows) * setting.width; ++i) {
    matrix.bits.push_back(rounded(normal(setting.inputs) * scale, setting.element));
    matrix.values.push_back(to_float(matrix.bits.back(), setting.element));
  }
  return matrix;
}

std::vector<float> normal_line(Setting& setting, int count, float scale) {
  std::normal_distribution<float> normal;
  std::vector<float> line(count);
  for (float& x : line) x = normal(setting.inputs) * scale;
  return line;
}

double dot(const float* x, const float* y, int n) {
  constexpr int CHAINS = 8;  // additions that need not wait for each other; n is a multiple
  double sums[CHAINS] = {}, sum = 0;
  for (int i = 0; i < n; i += CHAINS)
    for (int j = 0; j < CHAINS; ++j) sums[j] += static_cast<double>(x[i + j]) * y[i + j];
  for (const double part : sums) sum += part;
  return sum;
}

double allowed_by_rounding(vmf::cuda::Element element, const Size& size) {
  // bf16 has fp32's range; fp16's weights below 2^-14 are multiples of 2^-24
  const double relative = std::exp2(element == vmf::cuda::Element::bf16 ? -8 : -11);
  const double absolute = element == vmf::cuda::Element::bf16 ? 0 : std::exp2(-25);
  return (relative + SINGLE) * size.terms + absolute * size.values;
}

void Comparison::check(const char* what, int row, double got, double expected, double allowed) {
  const double error = std::abs(got - expected);
  if (!(error <= allowed)) fail("WRONG %s of row %d: %g, expected %g within %.2g", what, row, got, expected, allowed);
  if (allowed > 0) worst_ = std::max(worst_, error / allowed);
  const float stored = static_cast<float>(got);
  uint32_t bits;
  memcpy(&bits, &stored, sizeof bits);
  digest_ = (digest_ ^ bits) * 0x100000001B3;
}

void check_clusters(const char* name) {
  if (blocks_together() != 2) fail("WRONG clusters of %s: of %d, expected 2", name, blocks_together());
}

void check_same(const char* name, const std::vector<float>& in_clusters, const std::vector<float>& alone) {
  for (size_t i = 0; i < alone.size(); ++i)
    if (memcmp(&in_clusters[i], &alone[i], sizeof(float)) != 0)
      fail("WRONG in clusters: number %zu of %s is %g, without %g", i, name, in_clusters[i], alone[i]);
}

}  // namespace on_host
