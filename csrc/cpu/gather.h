// From stored logits to the gradients of a range of prototypes: G = n p - A^T q (equations 4 to 6 in one matrix), then
// dz = G W, dW = G^T z, and equation (7) for rows of dW that are complete.
#pragma once

#include "pairs.h"

namespace vmf::cpu::VMF_ISA {

// Prototypes of a block of the gathering pass, at most: the product of dz reads G down its columns, a cache line for each, and
// with few dims a block of scores has more of them than L1 holds beside a panel (bench/LOG.md).
constexpr int MOST_GATHERED = 144;
inline int gather_prototypes(int dim) {
  const int most = block_prototypes(dim), fitting = MOST_GATHERED / BLOCK_MULTIPLE * BLOCK_MULTIPLE;
  return most < fitting ? most : fitting;
}

// a = (a + b times) scale
inline void add_scaled(float* a, const float* b, float times, float scale, int n) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(a + i, mul(multiply_add(load(b + i), all(times), load(a + i)), all(scale)));
  for (; i < n; ++i) a[i] = (a[i] + b[i] * times) * scale;
}

template <class Dot>
struct Gatherer {
  using Word = typename Dot::Word;
  const GatherTask& task;
  const Gather& gather = *task.gather;
  const int dim = gather.weight.dim, width = padded(dim);
  const int students = padded(gather.student_rows), teachers = padded(gather.teacher_rows);
  const int most = gather_prototypes(dim);  // prototypes of a block
  const int cycle = gather.images + LANES;  // length of a teacher view's probabilities with their repetition

  // A thread's memory, in this order.
  struct Room {
    std::size_t block, values, by_row, by_prototype, by_student, gradient, teacher, cycles, line, pairs, folded, bytes;
    explicit Room(const Gather& g) {
      const std::size_t n = gather_prototypes(g.weight.dim), w = padded(g.weight.dim), s = padded(g.student_rows);
      block = 0;
      values = block + block_bytes(g.weight);
      by_row = values + aligned(sizeof(Word) * words<Dot>(n) * w);
      by_prototype = by_row + aligned(sizeof(Word) * words<Dot>(s) * n);
      const std::size_t transposed = Dot::PER_WORD == 1 ? 0 : aligned(sizeof(Word) * words<Dot>(n) * s);
      by_student = by_prototype + transposed;
      gradient = by_student + (Dot::LEAST_WORDS == 1 ? 0 : transposed);
      teacher = gradient + (std::size_t(g.weight.dim) == w ? 0 : aligned(sizeof(float) * n * w));
      cycles = teacher + aligned(sizeof(float) * (padded(g.teacher_rows) + LANES));
      line = cycles + aligned(sizeof(float) * std::size_t(g.teacher_views) * (g.images + LANES));
      pairs = line + aligned(sizeof(float) * 2 * (s + LANES));
      folded = pairs + aligned(sizeof(float) * pair_floats(g));
      bytes = folded + (Dot::PER_WORD == 1 || !folds_by_product(g) ? 0 : aligned(sizeof(float) * PAIR_PROTOTYPES * s));
    }
  };
  const Room room{gather};
  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(task.scratch) + offset);
  }
  static std::size_t scratch(const Gather& g) { return Room(g).bytes; }

  void run() const {
    [[maybe_unused]] const typename Dot::Registers registers;
    for (int k = task.first, count; k < task.last; k += count) {
      count = block_size(gather.logits, most, k, task.last);
      const Block weight = block_of(gather.weight, k, count, at<float>(room.block));
      if (students) {
        pack_values(weight, k, count);
        fold(k, count);
        // each product prefetches what follows it: the block of dW to be written, then the next block's logits and prototypes
        const int next = k + count, more = next < task.last ? block_size(gather.logits, most, next, task.last) : 0;
        add_feature_gradient(count, k == task.first, gradient_block(k, count));
        if (gather.weight_gradient) add_weight_gradient(weight, k, count, next, more);
      } else {
        fold(k, count);
      }
    }
  }

  void pack_values(const Block& weight, int first, int count) const {
    pack_panels<Dot>(
        count, dim,
        [&](int k, int d, float* line) { line_of(weight.row(k), dim, d, line, gather.gain ? gather.gain[first + k] : 1.0f); },
        at<Word>(room.values));
  }

  // G of a block, by rows for dW and by prototypes for dz; with fp32 one matrix serves both.
  void fold(int first, int count) const {
    if (folds_by_product(gather))
      fold_by_product(first, count);
    else
      fold_one_by_one(first, count);
#if defined(VMF_HAS_TILES)
    Word* by_prototype = at<Word>(room.by_prototype);
    const int pairs = (count + 1) / 2, whole = words<Dot>(count);
    std::memset(by_prototype + std::ptrdiff_t(pairs) * students, 0, sizeof(Word) * (whole - pairs) * std::size_t(students));
    transpose_words(by_prototype, whole, students, at<Word>(room.by_student));
#endif
  }

  void fold_one_by_one(int first, int count) const {
    for (int k = 0; k < count; k += Dot::PER_WORD) {
      if constexpr (Dot::PER_WORD == 1) {
        fold_one(first + k, at<float>(room.by_row) + std::ptrdiff_t(k) * students);
      } else {
        float* low = at<float>(room.line);
        float* high = low + students + LANES;
        fold_one(first + k, low);
        if (k + 1 < count)
          fold_one(first + k + 1, high);
        else
          std::memset(high, 0, sizeof(float) * students);
        store_pair(k, low, high);
      }
    }
  }

  void fold_by_product(int first, int count) const {
    const PairProduct pairs{task, gather, at<float>(room.pairs)};
    for (int k = 0, more; k < count; k += more) {
      more = count - k < PAIR_PROTOTYPES ? count - k : PAIR_PROTOTYPES;
      if constexpr (Dot::PER_WORD == 1) {
        pairs.fold(first + k, more, at<float>(room.by_row) + std::ptrdiff_t(k) * students);
      } else {
        float* rows = at<float>(room.folded);
        pairs.fold(first + k, more, rows);
        if (more % 2) std::memset(rows + std::ptrdiff_t(more) * students, 0, sizeof(float) * students);
        for (int i = 0; i < more; i += 2, rows += 2 * students) store_pair(k + i, rows, rows + students);
      }
    }
  }

  void store_pair(int k, const float* low, const float* high) const {
#if defined(VMF_HAS_BF16)
    const int stride = 2 * words<Dot>(students);
    Word* by_prototype = at<Word>(room.by_prototype) + std::ptrdiff_t(k / 2) * students;
    std::uint16_t *by_row = at<std::uint16_t>(room.by_row) + std::ptrdiff_t(k) * stride, *next = by_row + stride;
    for (int s = 0; s < students; s += LANES) {
      const Floats l = load(low + s), h = load(high + s);
      store_pairs(by_prototype + s, l, h);
      store_bf16(by_row + s, l);
      store_bf16(next + s, h);
    }
    std::memset(by_row + students, 0, sizeof(std::uint16_t) * (stride - students));
    std::memset(next + students, 0, sizeof(std::uint16_t) * (stride - students));
#else
    (void)k, (void)low, (void)high;
#endif
  }

  // G of a block of `count` prototypes from student s on, as A of the product of dz.
  auto students_of(int count, int s) const {
#if defined(VMF_HAS_TILES)
    const int steps = words<Dot>(count);
    return Rows<Word>{at<Word>(room.by_student) + std::ptrdiff_t(s) * steps, steps};
#else
    (void)count;
    return Columns<Word>{at<Word>(Dot::PER_WORD == 1 ? room.by_row : room.by_prototype) + s, students};
#endif
  }

  // One prototype: [S] G, and its share of beta and usage.
  void fold_one(int k, float* out) const {
    const float* logits = row_of(gather.logits, k);
    teacher_probabilities(k, logits + gather.teacher_column);
    const float* q = at<float>(room.teacher);
    const float* cycles = at<float>(room.cycles);
    Floats total = zero();
    const int turn = students ? LANES % gather.images : 0;
    int phase = 0;
    for (int s = 0; s < students; s += LANES) {
      Floats g = mul(load(task.student_factor + s), exp2(sub(load(logits + s), load(task.student_top + s))));
      for (int view = 0; view < gather.teacher_views; ++view)
        g = subtract_product(load(task.coefficient + std::ptrdiff_t(view) * students + s),
                             gather.images == 1 ? all(q[view]) : load(cycles + std::ptrdiff_t(view) * cycle + phase), g);
      store(out + s, g);
      total = add(total, g);
      phase += turn;
      if (phase >= gather.images) phase -= gather.images;
    }
    if (students) gather.bias_gradient[k] += sum(total) / gather.scale;
  }

  // [T] mass_t q_t of one prototype; those of each view are repeated so that LANES of them can be loaded from any image on.
  void teacher_probabilities(int k, const float* logits) const {
    float* q = at<float>(room.teacher);
    form_probabilities(task, k, logits, teachers, q);
    if (!students || gather.images == 1) return;
    float* cycles = at<float>(room.cycles);
    for (int view = 0; view < gather.teacher_views; ++view, q += gather.images, cycles += cycle) {
      int filled = gather.images;
      std::memcpy(cycles, q, sizeof(float) * filled);
      for (; filled < cycle; ++filled) cycles[filled] = cycles[filled - gather.images];
    }
  }

  Ahead gradient_block(int first, int count) const {
    if (!gather.weight_gradient) return {};
    const float* start = gather.weight_gradient + std::ptrdiff_t(first) * dim;
    return {reinterpret_cast<const char*>(start), reinterpret_cast<const char*>(start + std::ptrdiff_t(count) * dim)};
  }

  // Rows of dz that are formed: some of padding cost less than a rest of single rows.
  int formed_rows(int vectors) const {
    int rows = gather.student_rows;
    while (rows < students && (Dot::ON_TILES || rows % tile_rows(vectors) % 4)) ++rows;
    return rows;
  }

  void add_feature_gradient(int count, bool first, Ahead soon) const {
    const int steps = words<Dot>(count);
    for_each_tile(Cut(width / LANES), [&](auto n, int vector) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      const Word* panel = at<Word>(room.values) + std::ptrdiff_t(vector) * LANES * steps;
      for_each_rows<Dot, N>(formed_rows(N), [&](auto m, int s, int valid) __attribute__((always_inline)) {
        constexpr int M = decltype(m)::value;
        float* out = task.feature_gradient + std::ptrdiff_t(s) * width + vector * LANES;
        tile<Dot, M, N>(steps, students_of(count, s), panel, valid, share_of(soon, steps),
                        [&](int row, auto& sums)
                            __attribute__((always_inline)) { put(out + std::ptrdiff_t(row) * width, width, first, sums); });
      });
    });
  }

  void add_weight_gradient(const Block& weight, int first, int count, int next, int more) const {
    Ahead weights = ahead_of(gather.weight, next, next + more);
    const float* logits = more ? row_of(gather.logits, next) : nullptr;
    Ahead scores{reinterpret_cast<const char*>(logits), reinterpret_cast<const char*>(logits + more * gather.logits.stride)};
    const int steps = words<Dot>(gather.student_rows), stride = words<Dot>(students);
    const bool direct = width == dim;  // else through a block of whole vectors
    float* start = direct ? gather.weight_gradient + std::ptrdiff_t(first) * dim : at<float>(room.gradient);
    for_each_tile(Cut(width / LANES), [&](auto n, int vector) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      const Word* panel = static_cast<const Word*>(task.panels) + std::ptrdiff_t(vector) * LANES * steps;
      for_each_rows<Dot, N>(count, [&](auto m, int k, int valid) __attribute__((always_inline)) {
        constexpr int M = decltype(m)::value;
        float* out = start + std::ptrdiff_t(k) * width + vector * LANES;
        tile<Dot, M, N>(steps, Rows<Word>{at<Word>(room.by_row) + std::ptrdiff_t(k) * stride, stride}, panel, valid,
                        share_of(weights.start < weights.end ? weights : scores, steps),
                        [&](int row, auto& sums) __attribute__((always_inline)) {
                          put(out + std::ptrdiff_t(row) * width, width, !direct || gather.first, sums);
                        });
      });
    });
    for (int k = 0; k < count; ++k) {
      float* row = gather.weight_gradient + std::ptrdiff_t(first + k) * dim;
      if (!direct)
        for (int d = 0; d < dim; ++d) row[d] = (gather.first ? 0.0f : row[d]) + start[std::ptrdiff_t(k) * width + d];
      if (gather.pull_back) pull_back(*gather.pull_back, first + k, weight.row(k), row);
    }
  }

  // Writes a tile, or adds it to what is there.
  template <int M, int N>
  __attribute__((always_inline)) static void put(float* out, std::ptrdiff_t stride, bool overwrite,
                                                 const Floats (&sums)[M][N]) {
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* to = out + m * stride + n * LANES;
        store(to, overwrite ? sums[m][n] : add(load(to), sums[m][n]));
      }
  }

  // Equation (7): from the gradient at w_k to that at the stored row; a row of zeros has no direction and gets no gradient.
  void pull_back(const PullBack& p, int k, const float* stored, float* gradient) const {
    const float inverse = p.norm[k] > 0 ? 1 / p.norm[k] : 0;
    const float radial = p.slope ? gather.bias_gradient[k] * p.slope[k] : 0;
    if (p.norms == Norms::free) {
      if (p.slope) add_scaled(gradient, stored, radial * inverse, 1, dim);
      return;
    }
    const float along = dot(gradient, stored, dim) * inverse;
    float gain = inverse;
    if (p.norms == Norms::magnitude) {
      const float g = p.magnitude[k];
      gain = g * inverse;
      p.magnitude_gradient[k] = along + radial * float((g > 0) - (g < 0));
    }
    add_scaled(gradient, stored, -along * inverse, gain, dim);
  }
};

}  // namespace vmf::cpu::VMF_ISA
