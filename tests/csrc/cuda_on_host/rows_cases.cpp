// The row pass, equation (2) of vmf_kernels/README.md, by splits.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cases.h"
#include "machine.h"
#include "tile.cuh"

namespace on_host {
namespace {

using vmf::cuda::RowPass;

constexpr double TEMPERATURE = 0.1;
constexpr float PADDING_BIAS = -2.9e30f;  // of prototypes that are none
constexpr int PADDED = 40;

enum class Barycentre { none, of_keys, of_own_values };

struct RowCase {
  const char* name;
  Barycentre barycentre;
  int rows, prototypes, splits, split_size;
  bool has_value_bias;
  float mean_bias;
  int first_probable;  // prototypes before are as improbable as a finite bias makes them
  bool in_clusters;    // besides, at widths that have them
};

struct Inputs {
  Matrix features, keys, values;
  std::vector<float> bias, value_bias;
};

struct Outputs {
  std::vector<float> statistics, barycentre;  // [4, N, R], [N, R, width]
};

Inputs inputs_of(Setting& setting, const RowCase& c) {
  Inputs in{normal_matrix(setting, c.rows, 1 / std::sqrt(static_cast<float>(setting.width))),
            normal_matrix(setting, c.prototypes, 1), normal_matrix(setting, c.prototypes, 1),
            normal_line(setting, c.prototypes, 1), normal_line(setting, c.prototypes, 1)};
  for (float& b : in.bias) b += c.mean_bias;
  for (int k = 0; k < c.first_probable; ++k) in.bias[k] = -1.44e30f;
  for (int k = c.prototypes - PADDED; k < c.prototypes; ++k) in.bias[k] = in.value_bias[k] = PADDING_BIAS;
  if (c.barycentre == Barycentre::of_keys) in.values = in.keys;
  return in;
}

Outputs outputs_of(const Setting& setting, const RowCase& c, const Inputs& in, int blocks_in_cluster) {
  const size_t cells = static_cast<size_t>(c.splits) * c.rows;
  Outputs out{std::vector<float>(4 * cells, NAN), std::vector<float>(cells * setting.width, NAN)};
  const bool has_barycentre = c.barycentre != Barycentre::none;
  const Matrix& values = c.barycentre == Barycentre::of_keys ? in.keys : in.values;
  const RowPass pass{setting.element,
                     setting.width,
                     c.rows,
                     c.prototypes,
                     c.splits,
                     c.split_size,
                     in.features.bits.data(),
                     in.keys.bits.data(),
                     has_barycentre ? values.bits.data() : nullptr,
                     in.bias.data(),
                     c.has_value_bias ? in.value_bias.data() : nullptr,
                     &TEMPERATURE,
                     out.statistics.data(),
                     has_barycentre ? out.barycentre.data() : nullptr,
                     blocks_in_cluster};
  if (const int error = row_pass(pass, nullptr)) fail("REFUSED %s: error %d", c.name, error);
  return out;
}

// Over prototypes [first, last); sums relative to the maximum.
struct Sums {
  double top = -1e38, mass = 0, moment = 0, value_bias = 0;
  std::vector<double> barycentre;  // [D]
  std::vector<Size> size;          // [D], of the barycentre's sums

  Sums(const Inputs& in, int row, int first, int last) : barycentre(in.values.columns), size(in.values.columns) {
    const int width = in.keys.columns;
    std::vector<double> logits;
    for (int k = first; k < last; ++k) {
      logits.push_back(dot(in.features.row(row), in.keys.row(k), width) * LOG2_E / TEMPERATURE + in.bias[k]);
      top = std::max(top, logits.back());
    }
    for (int k = first; k < last; ++k) {
      const double deviation = logits[k - first] - top, p = std::exp2(deviation);
      mass += p;
      moment += p * deviation;
      value_bias += p * in.value_bias[k];
      for (int d = 0; d < width; ++d) {
        barycentre[d] += p * in.values.row(k)[d];
        size[d].add(p, in.values.row(k)[d]);
      }
    }
  }
};

// The i-th of [N, R].
void compare_row(Comparison& comparison, const Setting& setting, const RowCase& c, const Inputs& in, const Outputs& out,
                 int i) {
  const int split = i / c.rows, row = i % c.rows;
  const int first = std::min(split * c.split_size, c.prototypes), last = std::min(first + c.split_size, c.prototypes);
  const Sums sums(in, row, first, last);
  const auto statistic = [&](int j) { return out.statistics[static_cast<size_t>(j) * c.splits * c.rows + i]; };
  // the terms of each sum are of the order of the mass; those of an empty split are all 0
  const double allowed = SINGLE * sums.mass;
  comparison.check("maximum", row, statistic(0), sums.top, SINGLE + 1e-6 * std::abs(sums.top));
  comparison.check("mass", row, statistic(1), sums.mass, allowed);
  comparison.check("moment", row, statistic(2), sums.moment, allowed + SINGLE * std::abs(sums.moment));
  comparison.check("value bias", row, statistic(3), c.has_value_bias ? sums.value_bias : 0, 4 * allowed);
  if (c.barycentre == Barycentre::none) return;
  for (int d = 0; d < setting.width; ++d)
    comparison.check("barycentre", row, out.barycentre[static_cast<size_t>(i) * setting.width + d], sums.barycentre[d],
                     allowed_by_rounding(setting.element, sums.size[d]));
}

void compare_clusters(const Setting& setting, const RowCase& c, const Inputs& in, const Outputs& alone) {
  const Outputs out = outputs_of(setting, c, in, 2);
  check_clusters(c.name);
  check_same("statistics", out.statistics, alone.statistics);
  check_same("barycentre", out.barycentre, alone.barycentre);
}

void run(Setting& setting, const RowCase& c) {
  const Inputs in = inputs_of(setting, c);
  const Outputs out = outputs_of(setting, c, in, 1);
  if (c.in_clusters && setting.width >= vmf::cuda::NARROWEST_IN_CLUSTERS) compare_clusters(setting, c, in, out);
  Comparison comparison;
  for (int i = 0; i < c.splits * c.rows; ++i) compare_row(comparison, setting, c, in, out, i);
  printf("%s: %.2f %016lx\n", c.name, comparison.worst(), static_cast<unsigned long>(comparison.digest()));
}

}  // namespace

void run_cases(Setting& setting) {
  const int tile = vmf::cuda::prototype_tile(setting.width, true);
  const int many = 12 * tile;  // panels in the ring, which has 8 slots at most: each is filled for the third time
  const Barycentre none = Barycentre::none, keys = Barycentre::of_keys, own = Barycentre::of_own_values;
  const RowCase cases[] = {
      {"own values, one split", own, 128, many, 1, many, true, 0, 0, false},
      {"own values, a tile a split", own, 128, 256, 256 / tile, tile, false, 0, 0, false},
      {"own values, steep", own, 128, 512, 1, 512, true, 700, 130, false},
      {"own values, two blocks, the last split empty", own, 256, 512, 2, 512, true, 0, 0, true},
      {"keys as values, two blocks", keys, 256, 512, 1, 512, false, 0, 0, true},
      {"keys as values, the last split empty", keys, 128, 768, 3, 384, false, 0, 0, false},
      {"no values, the last split short", none, 128, 768, 2, 512, false, 0, 0, false},
  };
  for (const RowCase& c : cases) run(setting, c);
}

}  // namespace on_host
