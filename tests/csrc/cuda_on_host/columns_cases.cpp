// The column pass, equations (5) and (6) of vmf_kernels/README.md.
#include <cmath>
#include <cstdio>

#include "cases.h"
#include "machine.h"
#include "tile.cuh"

namespace on_host {
namespace {

using vmf::cuda::ColumnPass;

constexpr double STUDENT_TEMPERATURE = 0.1, TEACHER_TEMPERATURE = 0.06;
constexpr float UNIT = 4, TOTAL = 3;
constexpr float PADDING_BIAS = -2.9e30f;  // of prototypes that are none

struct ColumnCase {
  const char* name;
  int student_rows, teacher_rows, prototypes, prototype_count, dim;
  bool usage_only;
};

// Of one network: queries, rows, and what is summed over these.
struct Side {
  Matrix prototypes, features, vectors;
  std::vector<float> bias, offset;
  double temperature;
};

struct Inputs {
  Side student, teacher;
};

struct Outputs {
  std::vector<float> vectors, bias_gradient, usage;  // [K, D], [K], [K] without padding
};

Side side_of(Setting& setting, const ColumnCase& c, int rows, double temperature, float mean_offset) {
  const float scale = 0.1f / std::sqrt(static_cast<float>(setting.width));
  Side side{normal_matrix(setting, c.prototypes, 1), normal_matrix(setting, rows, scale), normal_matrix(setting, rows, 1),
            normal_line(setting, c.prototypes, 1),   normal_line(setting, rows, 1),       temperature};
  for (float& offset : side.offset) offset += mean_offset;
  side.offset[5] = side.offset[rows - 1] = INFINITY;  // rows without weight
  for (int k = c.prototype_count; k < c.prototypes; ++k) side.bias[k] = PADDING_BIAS;
  return side;
}

Outputs outputs_of(const Setting& setting, const ColumnCase& c, const Inputs& in, int blocks_in_cluster) {
  const auto& [student, teacher] = in;
  const size_t count = static_cast<size_t>(c.prototype_count);
  Outputs out{std::vector<float>(count * c.dim, NAN), std::vector<float>(count, NAN), std::vector<float>(count, NAN)};
  const ColumnPass pass{setting.element,
                        setting.width,
                        c.prototypes,
                        c.prototype_count,
                        c.dim,
                        c.student_rows,
                        c.teacher_rows,
                        student.prototypes.bits.data(),
                        student.features.bits.data(),
                        teacher.prototypes.bits.data(),
                        teacher.features.bits.data(),
                        teacher.vectors.bits.data(),
                        student.bias.data(),
                        teacher.bias.data(),
                        student.offset.data(),
                        teacher.offset.data(),
                        &student.temperature,
                        &teacher.temperature,
                        &UNIT,
                        &TOTAL,
                        c.usage_only ? nullptr : out.vectors.data(),
                        c.usage_only ? nullptr : out.bias_gradient.data(),
                        out.usage.data(),
                        blocks_in_cluster};
  if (const int error = column_pass(pass, nullptr)) fail("REFUSED %s: error %d", c.name, error);
  return out;
}

// Of one prototype.
struct Sums {
  double mass = 0;
  std::vector<double> vector;  // [D]
  std::vector<Size> size;      // [D], of the vector's sums

  explicit Sums(int width) : vector(width), size(width) {}

  // Adds a side's rows. Returns their mass.
  double add(const Side& side, const Matrix& vectors, int k) {
    double added = 0;
    for (int row = 0; row < static_cast<int>(side.offset.size()); ++row) {
      const double product = dot(side.features.row(row), side.prototypes.row(k), vectors.columns);
      const double p = std::exp2(product * LOG2_E / side.temperature + side.bias[k] - side.offset[row]);
      added += p;
      for (int d = 0; d < vectors.columns; ++d) {
        vector[d] += p * vectors.row(row)[d];
        size[d].add(p, vectors.row(row)[d]);
      }
    }
    return added;
  }
};

void compare_prototype(Comparison& comparison, const Setting& setting, const ColumnCase& c, const Inputs& in,
                       const Outputs& out, int k) {
  Sums sums(setting.width);
  const double p = sums.add(in.student, in.student.features, k), q = sums.add(in.teacher, in.teacher.vectors, k);
  comparison.check("usage", k, out.usage[k], q / UNIT / TOTAL, SINGLE * q / UNIT / TOTAL);
  if (c.usage_only) return;
  comparison.check("bias gradient", k, out.bias_gradient[k], (p - q) / UNIT, SINGLE * (p + q) / UNIT);
  const double factor = 1 / (STUDENT_TEMPERATURE * UNIT);
  for (int d = 0; d < c.dim; ++d)
    comparison.check("vectors", k, out.vectors[static_cast<size_t>(k) * c.dim + d], factor * sums.vector[d],
                     factor * allowed_by_rounding(setting.element, sums.size[d]));
}

void compare_clusters(const Setting& setting, const ColumnCase& c, const Inputs& in, const Outputs& alone) {
  const Outputs out = outputs_of(setting, c, in, 2);
  check_clusters(c.name);
  check_same("vectors", out.vectors, alone.vectors);
  check_same("bias gradient", out.bias_gradient, alone.bias_gradient);
  check_same("usage", out.usage, alone.usage);
}

void run(Setting& setting, const ColumnCase& c) {
  const Inputs in{side_of(setting, c, c.student_rows, STUDENT_TEMPERATURE, 8),
                  side_of(setting, c, c.teacher_rows, TEACHER_TEMPERATURE, 12)};
  const Outputs out = outputs_of(setting, c, in, 1);
  if (!c.usage_only && setting.width >= vmf::cuda::NARROWEST_IN_CLUSTERS) compare_clusters(setting, c, in, out);
  Comparison comparison;
  for (int k = 0; k < c.prototype_count; ++k) compare_prototype(comparison, setting, c, in, out, k);
  printf("%s: %.2f %016lx\n", c.name, comparison.worst(), static_cast<unsigned long>(comparison.digest()));
}

}  // namespace

void run_cases(Setting& setting) {
  const int tile = setting.width <= 128 ? vmf::cuda::Tile<128>::KEYS : vmf::cuda::Tile<256>::KEYS;
  const int students = 8 * tile, teachers = 6 * tile;  // 20 panels in a ring that has 8 slots at most
  const ColumnCase cases[] = {
      {"both networks, padding in K and D", students, teachers, 256, 200, setting.width - 3, false},
      {"few rows, no padding", 128, 128, 256, 256, setting.width, false},
      {"usage alone", 128, 12 * tile, 256, 130, setting.width, true},
  };
  for (const ColumnCase& c : cases) run(setting, c);
}

}  // namespace on_host
