// The functions of csrc/cpu/operator.h over sizes that straddle vectors, tiles and blocks, for tests/csrc/test_sanitizers.py:
//
//   sanitize                prints the instruction sets that this machine has
//   sanitize ISA            prints how many cases ran; every output has been written, and is finite. What a matrix unit has of
//                           products in fp32 are those of vectors, and are not run once more
//   sanitize ISA PLACE      one case whose weight lacks its last row, which has to be noticed; PLACE is heap or page
//
// Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "operator.h"

using namespace vmf::cpu;

namespace {

constexpr int ROWS[] = {1, 63, 65};
constexpr int PROTOTYPES[] = {1, 127, 1000};
constexpr int DIMS[] = {2, 24, 100, 256};
constexpr Stored STORED[] = {Stored::fp32, Stored::bf16, Stored::fp16};
constexpr Norms NORMS[] = {Norms::free, Norms::fixed, Norms::magnitude};
constexpr float NAN_F = std::numeric_limits<float>::quiet_NaN();

// Where arrays lie. On the heap AddressSanitizer watches both ends, but not the loads and stores of intrinsics with masks; an
// array that ends with its page is followed by one that nothing may touch.
enum class Place { heap, page };

void* allocate(std::size_t bytes, Place place) {
  if (place == Place::heap) {
    void* data;
    return posix_memalign(&data, 64, bytes) ? (std::abort(), nullptr) : data;
  }
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + whole, page, PROT_NONE)) std::abort();
  return static_cast<char*>(start) + whole - bytes;
}

void release(void* data, std::size_t bytes, Place place) {
  if (place == Place::heap) return std::free(data);
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  munmap(static_cast<char*>(data) + bytes - whole, whole + page);
}

// `count` elements and not one more.
template <class T>
class Array {
 public:
  Array(std::size_t count, Place place) : count_(count), place_(place), data_(static_cast<T*>(allocate(bytes(), place))) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(data_, bytes(), place_); }
  T* get() const { return data_; }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data_[i]; }

 private:
  std::size_t bytes() const { return count_ * sizeof(T); }
  std::size_t count_;
  Place place_;
  T* data_;
};

struct Floats : Array<float> {
  Floats(std::size_t count, Place place, float value) : Array(count, place) {
    for (std::size_t i = 0; i < count; ++i) (*this)[i] = value;
  }
};

// Values between -1 and 1 that repeat from run to run.
struct Random {
  std::uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / 8388608.0f - 1.0f;
  }
  void fill(const Array<float>& array) {
    for (std::size_t i = 0; i < array.size(); ++i) array[i] = next();
  }
};

void expect_finite(const float* values, std::size_t count, const char* what) {
  for (std::size_t i = 0; i < count; ++i)
    if (!std::isfinite(values[i])) {
      std::printf("%s[%zu] is %f: expected a finite number\n", what, i, double(values[i]));
      std::exit(1);
    }
}
void expect_finite(const Array<float>& values, const char* what) { expect_finite(values.get(), values.size(), what); }

struct Case {
  Isa isa;
  Products products;
  Stored stored;
  Norms norms;
  Place place;
  int threads, rows, prototypes, dim;
  bool lacks_row;  // of the weight
};

// Stored prototypes [K, D] with a gap after each row but the last.
class StoredWeight {
 public:
  StoredWeight(const Case& c, Random& random)
      : c_(c), stride_(c.dim + 3), bytes_(element() * ((c.prototypes - 1 - c.lacks_row) * stride_ + c.dim), c.place) {
    for (std::size_t i = 0; i < bytes_.size(); i += element()) put(random.next(), bytes_.get() + i);
  }
  Weight weight() const { return {bytes_.get(), c_.stored, stride_, c_.prototypes, c_.dim}; }

 private:
  std::size_t element() const { return c_.stored == Stored::fp32 ? 4 : 2; }
  void put(float value, unsigned char* to) const {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (c_.stored == Stored::fp32) return void(std::memcpy(to, &bits, 4));
    // fp16: that sign, 1/2 to 1
    const std::uint32_t fp16 = (bits >> 16 & 0x8000u) | 0x3800u | (bits & 0x3ffu);
    const std::uint16_t half = std::uint16_t(c_.stored == Stored::bf16 ? bits >> 16 : fp16);
    std::memcpy(to, &half, 2);
  }
  const Case& c_;
  std::ptrdiff_t stride_;
  Array<unsigned char> bytes_;
};

Execution execution(const Case& c) { return {c.isa, c.products, c.threads, 0}; }

// One network's rows: scored on construction into columns of the logits.
struct Network {
  Floats features, top, mass, moment, other_top, other_mass;

  Network(const Case& c, int rows, const Weight& weight, const float* bias, float* logits, std::ptrdiff_t stride,
          Random& random)
      : features(std::size_t(rows) * c.dim, c.place, 0),
        top(rows, c.place, NAN_F),
        mass(rows, c.place, NAN_F),
        moment(rows, c.place, NAN_F),
        other_top(rows, c.place, NAN_F),
        other_mass(rows, c.place, NAN_F) {
    random.fill(features);
    const Floats magnitude(c.prototypes, c.place, 0.5f), norm(c.prototypes, c.place, NAN_F), gain(c.prototypes, c.place, NAN_F);
    Score s{
        weight,    bias,       features.get(), 0.5f, c.threads == 1 ? 1.0f : 2.0f, rows, Logits{{logits}, c.prototypes, stride},
        top.get(), mass.get(), moment.get()};
    // not free for one network and free for the other, with and without a magnitude
    if (bias) s.norms = c.norms, s.norm = norm.get(), s.gain = gain.get();
    if (s.norms == Norms::magnitude) s.magnitude = magnitude.get();
    const Floats other_bias(c.prototypes, c.place, -0.5f);
    s.other_bias = other_bias.get(), s.other_top = other_top.get(), s.other_mass = other_mass.get();
    const Execution run = execution(c);
    Array<char> workspace(score_workspace(s, run), c.place);
    score(s, run, workspace.get());
    if (s.norms != Norms::free) expect_finite(norm, "norm"), expect_finite(gain, "gain");
    expect_finite(top, "top"), expect_finite(mass, "mass"), expect_finite(moment, "moment");
    expect_finite(other_top, "other_top"), expect_finite(other_mass, "other_mass");
    for (int k = 0; logits && k < c.prototypes; ++k) expect_finite(logits + k * stride, rows, "logits");
  }
};

// Sums over what a score has stored, with a bias and without.
void sum_stored(const Case& c, const StoredLogits& stored, const float* bias) {
  const Execution run = execution(c);
  const Floats by_row(stored.rows, c.place, NAN_F), by_prototype(stored.prototypes, c.place, NAN_F);
  Array<char> workspace(stored_workspace(stored, run), c.place);
  sum_over_prototypes(stored, bias, by_row.get(), run, workspace.get());
  expect_finite(by_row, "sums over prototypes");
  sum_over_rows(stored, by_row.get(), by_prototype.get(), run, workspace.get());
  expect_finite(by_prototype, "sums over rows");
}

void gather_in_own_room(const Case& c, const Gather& g) {
  const Execution run = execution(c);
  Array<char> workspace(gather_workspace(g, run), c.place);
  const Sums sums = gather(g, run, workspace.get());
  const float all[] = {float(sums.student_entropy), float(sums.teacher_entropy), float(sums.weight)};
  expect_finite(all, 3, "sums");
}

// Everything that `gather` writes.
struct Gradients {
  Floats features, weight, bias, usage, magnitude, column_top, column_mass;
  explicit Gradients(const Case& c)
      : features(std::size_t(c.rows) * c.dim, c.place, NAN_F),
        weight(std::size_t(c.prototypes) * c.dim, c.place, NAN_F),
        bias(c.prototypes, c.place, 0),
        usage(c.prototypes, c.place, 0),
        magnitude(c.prototypes, c.place, NAN_F),
        column_top(c.prototypes, c.place, std::numeric_limits<float>::lowest()),
        column_mass(c.prototypes, c.place, 0) {}
};

// Two chunks of rows, the second one with equation (7); then without the weight's gradient; then the teacher alone.
void gather_all(const Case& c, Gather g, const PullBack& pull_back, const Gradients& gradients) {
  gather_in_own_room(c, g);
  expect_finite(gradients.features, "feature_gradient"), expect_finite(gradients.weight, "weight_gradient");
  g.first = false, g.pull_back = &pull_back;
  gather_in_own_room(c, g);
  expect_finite(gradients.weight, "weight_gradient of two chunks"), expect_finite(gradients.bias, "bias_gradient");
  if (pull_back.magnitude_gradient) expect_finite(gradients.magnitude, "magnitude_gradient");
  g.first = true, g.pull_back = nullptr, g.features = nullptr, g.weight_gradient = nullptr, g.gain = nullptr;
  gather_in_own_room(c, g);
  g.student_rows = 0, g.student_top = g.student_mass = g.student_moment = nullptr, g.feature_gradient = nullptr;
  gather_in_own_room(c, g);
  expect_finite(gradients.usage, "usage");
  expect_finite(gradients.column_top, "column_top"), expect_finite(gradients.column_mass, "column_mass");
}

void run(const Case& c) {
  Random random;
  const bool one_image = c.rows % 3 == 0 && c.prototypes % 2 == 1;  // of many views: pairs are folded as a product
  const int student_views = one_image ? c.rows : c.rows % 5 == 0 ? 5 : c.rows % 3 == 0 ? 3 : 1;
  const int teacher_views = one_image ? 9 : student_views > 1 ? 2 : 1;
  const int images = c.rows / student_views, teacher_rows = images * teacher_views;
  const std::ptrdiff_t teacher_column = padded_rows(c.rows), stride = teacher_column + padded_rows(teacher_rows);
  const StoredWeight stored(c, random), other(c, random);
  Floats norm(c.prototypes, c.place, 2), bias(c.prototypes, c.place, -1), gain(c.prototypes, c.place, 0.5f);

  Floats logits(std::size_t(c.prototypes) * stride, c.place, NAN_F);
  const Network unstored(c, c.rows, stored.weight(), nullptr, nullptr, 0, random);
  const Network student(c, c.rows, stored.weight(), bias.get(), logits.get(), stride, random);
  const Network teacher(c, teacher_rows, other.weight(), nullptr, logits.get() + teacher_column, stride, random);

  sum_stored(c, {Logits{{logits.get()}, c.prototypes, stride}, c.prototypes, c.rows}, bias.get());
  sum_stored(c, {Logits{{logits.get() + teacher_column}, c.prototypes, stride}, c.prototypes, teacher_rows}, nullptr);

  Floats view_weights(std::size_t(teacher_views) * student_views, c.place, 0.5f), image_weights(images, c.place, 2);
  view_weights[0] = 0;  // a pair without weight
  const bool weighs_images = c.threads == 1;
  const Gradients gradients(c);
  const bool has_magnitude = c.norms == Norms::magnitude;
  PullBack pull_back{};
  pull_back.norms = c.norms, pull_back.norm = norm.get();
  if (c.norms != Norms::fixed) pull_back.slope = bias.get();
  if (has_magnitude) pull_back.magnitude = gain.get(), pull_back.magnitude_gradient = gradients.magnitude.get();
  Gather g{};
  g.weight = stored.weight(), g.gain = gain.get();
  g.logits = Logits{{logits.get()}, c.prototypes, stride}, g.teacher_column = teacher_column;
  g.student_rows = c.rows, g.teacher_rows = teacher_rows, g.images = images;
  g.student_views = student_views, g.teacher_views = teacher_views, g.view_weights = view_weights.get();
  if (weighs_images) g.image_weights = image_weights.get();
  g.student_top = student.top.get(), g.student_mass = student.mass.get(), g.student_moment = student.moment.get();
  g.teacher_top = teacher.top.get(), g.teacher_mass = teacher.mass.get(), g.teacher_moment = teacher.moment.get();
  g.features = student.features.get(), g.scale = 10;
  g.feature_gradient = gradients.features.get(), g.weight_gradient = gradients.weight.get();
  g.bias_gradient = gradients.bias.get(), g.usage = gradients.usage.get();
  g.other_top = teacher.other_top.get(), g.other_mass = teacher.other_mass.get();
  g.column_top = gradients.column_top.get(), g.column_mass = gradients.column_mass.get();
  g.first = true;
  gather_all(c, g, pull_back, gradients);
}

bool has(Isa isa, Products products) {
  return isa == Isa::avx512bf16 || (products == Products::bf16) == (isa == Isa::amx_bf16);
}

int run_all(Isa isa) {
  int count = 0;
  for (const Products products : {Products::fp32, Products::bf16}) {
    if (!has(isa, products)) continue;
    for (int r = 0; r < 3; ++r)
      for (int p = 0; p < 3; ++p)
        for (int d = 0; d < 4; ++d) {  // the others take turns: with every number of rows, each meets each of another kind
          const Stored stored = STORED[(r + p + d) % 3];
          const Norms norms = NORMS[(2 * r + p + d / 2) % 3];
          const Place place = (r + d / 2) % 2 ? Place::heap : Place::page;
          const int threads = 1 + (r + p + d) % 2;
          run({isa, products, stored, norms, place, threads, ROWS[r], PROTOTYPES[p], DIMS[d], false});
          ++count;
        }
  }
  return count;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    for (const Isa isa : available()) std::printf("%s\n", name_of(isa));
    return 0;
  }
  const Isa isa = isa_named(arguments[1]);
  if (count > 2) {
    const Place place = std::string(arguments[2]) == "heap" ? Place::heap : Place::page;
    run({isa, Products::fp32, Stored::fp32, Norms::free, place, 1, 63, 127, 100, true});
    std::printf("the missing row went unnoticed\n");
    return 0;
  }
  std::printf("%d cases\n", run_all(isa));
  return 0;
}
