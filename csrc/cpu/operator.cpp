// Splits the prototypes among threads and merges the parts, in the same order for any number of threads.
#include "operator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernels.h"
#include "parts.h"

namespace vmf::cpu {

namespace {

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float LOG2_E = 1.4426950408889634f;
float not_below(float least, float x) { return x < least ? least : x; }  // a NaN stays

constexpr double EXPONENTIAL = 16;  // costs as much as so many products

double products_of(int rows, const Weight& weight) { return double(rows) * weight.prototypes * weight.dim; }

// The functions of the matrix unit's instruction set; it has none of its own for fp32.
const Kernels* matrix_kernels([[maybe_unused]] Products products) {
#if defined(VMF_TILES_STAND_IN)
  return products == Products::bf16 ? amx_bf16_kernels(products) : portable_kernels(products);
#elif defined(VMF_HAS_AMX)
  return products == Products::bf16 ? amx_bf16_kernels(products) : avx512_kernels(products);
#else
  return nullptr;
#endif
}

const Kernels& kernels_of(const Execution& run) {
  const Kernels* found = nullptr;
  switch (run.isa) {
    case Isa::portable: found = portable_kernels(run.products); break;
    case Isa::amx_bf16: found = matrix_kernels(run.products); break;
#if defined(VMF_HAS_X86)
    case Isa::avx2: found = avx2_kernels(run.products); break;
    case Isa::avx512: found = avx512_kernels(run.products); break;
    case Isa::avx512bf16:
      found = run.products == Products::bf16 ? avx512bf16_kernels(run.products) : avx512_kernels(run.products);
      break;
#else
    default: break;
#endif
  }
  if (!found)
    throw std::invalid_argument(std::string("no ") + (run.products == Products::bf16 ? "bf16" : "fp32") + " products for " +
                                name_of(run.isa));
  return *found;
}

int padded_to(int n, int lanes) { return (n + lanes - 1) / lanes * lanes; }

// Returns pieces of one allocation, each on its own cache line; with a null start it only counts.
struct Arena {
  char* start;
  std::size_t used = 0;
  template <class T>
  T* take(std::size_t count) {
    T* piece = start ? reinterpret_cast<T*>(start + used) : nullptr;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

struct ScoreRoom {
  char* panels;
  float *statistics, *scaled, *bias, *multiplier, *norm, *gain;
  char* scratch;
  std::size_t scratch_bytes, bytes;
  ScoreRoom(const Score& s, const Execution& run, const Kernels& kernels, void* start)
      : scratch_bytes(kernels.score_scratch(s)) {
    Arena arena{static_cast<char*>(start)};
    panels = arena.take<char>(kernels.features_bytes(s.rows, s.weight.dim));
    statistics =
        arena.take<float>(std::size_t(part_count(s.weight.prototypes)) * statistics_of(s) * padded_to(s.rows, kernels.lanes));
    scaled = arena.take<float>(s.row_factor == 1 ? 0 : std::size_t(s.rows) * s.weight.dim);
    bias = arena.take<float>(s.bias ? s.weight.prototypes : 0);
    multiplier = arena.take<float>(s.weight.prototypes);
    const int found = s.norms == Norms::free || s.norm ? 0 : s.weight.prototypes;
    norm = arena.take<float>(found);
    gain = arena.take<float>(found);
    scratch = arena.take<char>(scratch_bytes * std::min(run.threads, MOST_PARTS));
    bytes = arena.used;
  }
};

// The parts' maxima, masses and first moments (or null), relative to the common maximum. `stride` separates the parts.
void merge(int count, const float* statistics, int parts, int rows, std::size_t stride, float* to_top, float* to_mass,
           float* to_moment) {
  for (int r = 0; r < count; ++r) {
    const auto at = [&](int part, int which) { return statistics[part * stride + std::size_t(which) * rows + r]; };
    float top = std::numeric_limits<float>::lowest();
    for (int part = 0; part < parts; ++part) top = std::max(top, at(part, 0));
    double mass = 0, moment = 0;
    for (int part = 0; part < parts; ++part) {
      const double shift = double(at(part, 0)) - top, weight = std::exp2(shift);
      mass += weight * at(part, 1);
      moment += weight * at(part, 2) + (weight > 0 ? weight * shift * at(part, 1) : 0);
    }
    to_top[r] = top, to_mass[r] = float(mass);
    if (to_moment) to_moment[r] = float(moment);
  }
}

struct GatherRoom {
  char* panels;
  float *student_top, *student_factor, *teacher_top, *teacher_factor, *column_offset, *coefficient, *packed, *feature_gradient;
  char* scratch;
  std::size_t scratch_bytes, bytes;
  GatherRoom(const Gather& g, const Execution& run, const Kernels& kernels, void* start)
      : scratch_bytes(kernels.gather_scratch(g)) {
    const std::size_t students = padded_to(g.student_rows, kernels.lanes);
    const std::size_t teachers = padded_to(g.teacher_rows, kernels.lanes);
    Arena arena{static_cast<char*>(start)};
    panels = arena.take<char>(g.weight_gradient ? kernels.values_bytes(g.student_rows, g.weight.dim) : 0);
    student_top = arena.take<float>(students);
    student_factor = arena.take<float>(students);
    teacher_top = arena.take<float>(teachers);
    teacher_factor = arena.take<float>(teachers);
    column_offset = arena.take<float>(g.column_top ? teachers : 0);
    coefficient = arena.take<float>(students * g.teacher_views);
    packed = arena.take<float>(folds_by_product(g) ? students * g.teacher_views : 0);
    feature_gradient = arena.take<float>(std::size_t(part_count(g)) * students * padded_to(g.weight.dim, kernels.lanes));
    scratch = arena.take<char>(scratch_bytes * std::min(run.threads, MOST_PARTS));
    bytes = arena.used;
  }
};

void pad(const float* from, int count, float* to, int whole, float with) {
  std::copy(from, from + count, to);
  std::fill(to + count, to + whole, with);
}

// Nats of a row of Score.
double entropy(float mass, float moment) { return (std::log2(double(mass)) - double(moment) / mass) * M_LN2; }

// The pairs' weights over the masses of their rows, which turn 2^(l - top) into weighted probabilities:
// scale n_s / mass_s, n_t / mass_t and, of every teacher view, scale a_gv r_b / mass_t.
Sums weigh(const Gather& g, const GatherRoom& room, int students, int teachers) {
  Sums sums;
  const auto image = [&](int b) { return g.image_weights ? g.image_weights[b] : 1.0f; };
  const auto pair = [&](int view, int other) { return g.view_weights[view * g.student_views + other]; };
  for (int s = 0; s < g.student_rows; ++s) {
    float weight = 0;
    for (int view = 0; view < g.teacher_views; ++view) weight += pair(view, s / g.images) * image(s % g.images);
    room.student_factor[s] = weight * g.scale / g.student_mass[s];
    sums.student_entropy += weight * entropy(g.student_mass[s], g.student_moment[s]);
  }
  for (int t = 0; t < g.teacher_rows; ++t) {
    float weight = 0;
    for (int other = 0; other < g.student_views; ++other) weight += pair(t / g.images, other) * image(t % g.images);
    room.teacher_factor[t] = weight / g.teacher_mass[t];
    sums.teacher_entropy += weight * entropy(g.teacher_mass[t], g.teacher_moment[t]);
    sums.weight += weight;
  }
  for (int view = 0; view < g.teacher_views; ++view) {
    float* row = room.coefficient + std::size_t(view) * students;
    for (int s = 0; s < g.student_rows; ++s) {
      const int b = s % g.images;
      row[s] = pair(view, s / g.images) * image(b) * g.scale / g.teacher_mass[view * g.images + b];
    }
    std::fill(row + g.student_rows, row + students, 0.0f);
  }
  std::fill(room.student_factor + g.student_rows, room.student_factor + students, 0.0f);
  std::fill(room.teacher_factor + g.teacher_rows, room.teacher_factor + teachers, 0.0f);
  return sums;
}

// Sums dz over the parts in a fixed order, row by row.
void add_parts(const Gather& g, const float* parts, int count, int rows, int width, int threads) {
  const int dim = g.weight.dim;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int s = 0; s < g.student_rows; ++s) {
    float* total = g.feature_gradient + std::size_t(s) * dim;
    std::fill(total, total + dim, 0.0f);
    for (int part = 0; part < count; ++part) {
      const float* row = parts + (std::size_t(part) * rows + s) * width;
      for (int d = 0; d < dim; ++d) total[d] += row[d];
    }
  }
  (void)threads;  // where there is no OpenMP
}

}  // namespace

std::size_t score_workspace(const Score& s, const Execution& run) { return ScoreRoom(s, run, kernels_of(run), nullptr).bytes; }

void score(const Score& given, const Execution& run, void* workspace) {
  if (given.other_bias && !(given.other_top && given.other_mass))
    throw std::invalid_argument("another bias, but no room for its maximum and mass");
  const Kernels& kernels = kernels_of(run);
  const ScoreRoom room(given, run, kernels, workspace);
  Score s = given;
  if (s.row_factor != 1) {
    const std::size_t count = std::size_t(s.rows) * s.weight.dim;
    for (std::size_t i = 0; i < count; ++i) room.scaled[i] = s.features[i] * s.row_factor;
    s.features = room.scaled;
  }
  if (s.bias) {
    // with another bias, finite in base 2 as well: the difference of both is taken
    const float least = s.other_bias ? LOWEST : -std::numeric_limits<float>::infinity();
    for (int k = 0; k < s.weight.prototypes; ++k) room.bias[k] = not_below(least, not_below(LOWEST, s.bias[k]) * LOG2_E);
    s.bias = room.bias;
  }
  if (!s.norm) s.norm = room.norm, s.gain = room.gain;
  if (s.norms == Norms::free) std::fill(room.multiplier, room.multiplier + s.weight.prototypes, s.uniform);
  const int rows = padded_to(s.rows, kernels.lanes), parts = part_count(s.weight.prototypes);
  const std::size_t stride = std::size_t(statistics_of(s)) * rows;
  kernels.pack_features(s.features, s.rows, s.weight.dim, room.panels);
  for_each_part(parts, s.weight.prototypes, threads_for(products_of(s.rows, s.weight), run),
                [&](int part, int thread, int first, int last) {
                  kernels.score({&s, room.panels, room.multiplier, room.scratch + thread * room.scratch_bytes,
                                 room.statistics + part * stride, first, last});
                });
  merge(s.rows, room.statistics, parts, rows, stride, s.top, s.mass, s.moment);
  if (s.other_bias) merge(s.rows, room.statistics + 3 * rows, parts, rows, stride, s.other_top, s.other_mass, nullptr);
}

std::size_t gather_workspace(const Gather& g, const Execution& run) {
  return GatherRoom(g, run, kernels_of(run), nullptr).bytes;
}

Sums gather(const Gather& g, const Execution& run, void* workspace) {
  const Kernels& kernels = kernels_of(run);
  const GatherRoom room(g, run, kernels, workspace);
  const int students = padded_to(g.student_rows, kernels.lanes), teachers = padded_to(g.teacher_rows, kernels.lanes);
  const int width = padded_to(g.weight.dim, kernels.lanes), parts = part_count(g);
  const float infinity = std::numeric_limits<float>::infinity();
  if (g.weight_gradient) kernels.pack_values(g.features, g.student_rows, g.weight.dim, room.panels);
  pad(g.student_top, g.student_rows, room.student_top, students, infinity);
  pad(g.teacher_top, g.teacher_rows, room.teacher_top, teachers, infinity);
  const Sums sums = weigh(g, room, students, teachers);
  if (g.first) {
    std::fill(g.bias_gradient, g.bias_gradient + g.weight.prototypes, 0.0f);
    std::fill(g.usage, g.usage + g.weight.prototypes, 0.0f);
  }
  if (g.column_top) {
    if (!g.other_top) throw std::invalid_argument("column sums need the teacher's other softmax");
    for (int t = 0; t < g.teacher_rows; ++t) room.column_offset[t] = g.other_top[t] + std::log2(g.other_mass[t]);
    std::fill(room.column_offset + g.teacher_rows, room.column_offset + teachers, infinity);
  }
  const bool product = folds_by_product(g);
  if (product) kernels.pack_coefficients(room.coefficient, g.teacher_views, students, room.packed);
  // teachers have no products here, but an exponential for each logit
  const double exponentials = double(g.teacher_rows) * g.weight.prototypes * EXPONENTIAL;
  const int threads = threads_for(2 * products_of(g.student_rows, g.weight) + exponentials, run);
  for_each_part(parts, g.weight.prototypes, threads, [&](int part, int thread, int first, int last) {
    kernels.gather({&g, room.panels, room.student_top, room.student_factor, room.teacher_top, room.teacher_factor,
                    product ? room.packed : room.coefficient, g.column_top ? room.column_offset : nullptr,
                    room.scratch + thread * room.scratch_bytes, room.feature_gradient + std::size_t(part) * students * width,
                    first, last});
  });
  if (g.student_rows) add_parts(g, room.feature_gradient, parts, students, width, threads);
  return sums;
}

namespace {

constexpr std::size_t aligned_floats(int count) { return (std::size_t(count) * sizeof(float) + 63) / 64 * 64; }

// The same logits from a later column on.
Logits from_column(Logits logits, std::ptrdiff_t column) {
  for (float*& piece : logits.pieces)
    if (piece) piece += column;
  return logits;
}

}  // namespace

std::size_t step_workspace(const Score& student, const Score& teacher, const Gather& g, const Execution& run) {
  if (student.weight.prototypes != teacher.weight.prototypes || student.weight.prototypes != g.weight.prototypes)
    throw std::invalid_argument("networks with different numbers of prototypes, whose logits lie side by side");
  const std::size_t scores = std::max(score_workspace(student, run), score_workspace(teacher, run));
  return 3 * aligned_floats(student.rows) + 5 * aligned_floats(teacher.rows) + 2 * aligned_floats(g.weight.prototypes) +
         std::max(scores, gather_workspace(g, run));
}

Sums step(Score student, Score teacher, Gather g, const Execution& run, void* workspace) {
  char* room = static_cast<char*>(workspace);
  const auto take = [&](int count) {
    float* piece = reinterpret_cast<float*>(room);
    room += aligned_floats(count);
    return piece;
  };
  if (student.norms != Norms::free) student.norm = take(g.weight.prototypes), g.gain = student.gain = take(g.weight.prototypes);
  PullBack pull_back;
  if (g.pull_back) {
    pull_back = *g.pull_back;
    if (student.norm) pull_back.norm = student.norm;
    g.pull_back = &pull_back;
  }
  g.student_top = student.top = take(student.rows), g.student_mass = student.mass = take(student.rows);
  g.student_moment = student.moment = take(student.rows);
  g.teacher_top = teacher.top = take(teacher.rows), g.teacher_mass = teacher.mass = take(teacher.rows);
  g.teacher_moment = teacher.moment = take(teacher.rows);
  if (teacher.other_bias) {
    g.other_top = teacher.other_top = take(teacher.rows);
    g.other_mass = teacher.other_mass = take(teacher.rows);
  }
  student.logits = g.logits, teacher.logits = from_column(g.logits, g.teacher_column);
  score(student, run, room);
  score(teacher, run, room);
  return gather(g, run, room);
}

namespace {

// An exponential for each logit.
int threads_for(const StoredLogits& s, const Execution& run) {
  return threads_for(double(s.rows) * s.prototypes * EXPONENTIAL, run);
}

}  // namespace

std::size_t stored_workspace(const StoredLogits& s, const Execution& run) {
  // statistics of each part, and the maximum and mass of each row; or the rows' offsets
  const int rows = padded_to(s.rows, kernels_of(run).lanes);
  return sizeof(float) * (3 * std::size_t(part_count(s.prototypes)) + 2) * rows;
}

void sum_over_prototypes(const StoredLogits& s, const float* bias, float* result, const Execution& run, void* workspace) {
  const Kernels& kernels = kernels_of(run);
  const int rows = padded_to(s.rows, kernels.lanes), parts = part_count(s.prototypes);
  const std::size_t stride = 3 * std::size_t(rows);
  float *top = static_cast<float*>(workspace), *mass = top + rows, *statistics = mass + rows;
  for_each_part(parts, s.prototypes, threads_for(s, run), [&](int part, int, int first, int last) {
    kernels.over_prototypes({&s, bias, statistics + part * stride, nullptr, nullptr, first, last});
  });
  merge(s.rows, statistics, parts, rows, stride, top, mass, nullptr);
  for (int r = 0; r < s.rows; ++r) result[r] = top[r] + std::log2(mass[r]);
}

void sum_over_rows(const StoredLogits& s, const float* offset, float* result, const Execution& run, void* workspace) {
  const Kernels& kernels = kernels_of(run);
  float* padded = static_cast<float*>(workspace);
  pad(offset, s.rows, padded, padded_to(s.rows, kernels.lanes), std::numeric_limits<float>::infinity());
  for_each_part(part_count(s.prototypes), s.prototypes, threads_for(s, run),
                [&](int, int, int first, int last) { kernels.over_rows({&s, nullptr, nullptr, padded, result, first, last}); });
}

double dot(const float* a, const float* b, std::size_t count) {
  constexpr int LANES = 8;  // sums side by side, which the compiler keeps in vectors
  double sums[LANES] = {};
  std::size_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += double(a[i + lane]) * b[i + lane];
  for (; i < count; ++i) sums[0] += double(a[i]) * b[i];
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace vmf::cpu
