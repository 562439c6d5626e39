// Logits of a range of prototypes and the online softmax over them: equation (1), and the row sums of (2).
#pragma once

#include "blocks.h"

namespace vmf::cpu::VMF_ISA {

// Below this 2^x is 0 and x may be anything but -inf, whose product with that 0 would be NaN: logits of 1e38 are that far
// apart.
constexpr float LEAST_DEVIATION = -200.0f;
inline Floats deviation_from(Floats top, Floats x) { return larger(all(LEAST_DEVIATION), sub(x, top)); }  // a NaN stays

// Mass and first moment over the prototypes of one block, of the rows of one tile. A sum in two steps, first of a block and
// then of the blocks, rounds far less than a long one.
struct BlockSums {
  float mass[MOST_VECTORS * LANES], moment[MOST_VECTORS * LANES];
};

// Running maximum, mass and first moment of LANES rows; until `close`, also the mass and moment of the block.
struct Softmax {
  float *top, *mass, *moment, *block_mass, *block_moment;

  void open() const {
    store(block_mass, zero());
    store(block_moment, zero());
  }
  void close() const {
    store(mass, add(load(mass), load(block_mass)));
    store(moment, add(load(moment), load(block_moment)));
  }

  // Adds M vectors of logits.
  template <int M>
  __attribute__((always_inline)) void absorb(const Floats (&logits)[M]) const {
    const Floats old = load(top);
    Floats now = old;
    for (int m = 0; m < M; ++m) now = larger(logits[m], now);
    if (any_larger(now, old)) rescale(old, now);
    Floats tile_mass = zero(), tile_moment = zero();
    for (int m = 0; m < M; ++m) {
      const Floats deviation = deviation_from(now, logits[m]), p = exp2(deviation);
      tile_mass = add(tile_mass, p);
      tile_moment = multiply_add(p, deviation, tile_moment);
    }
    store(block_mass, add(load(block_mass), tile_mass));
    store(block_moment, add(load(block_moment), tile_moment));
  }

 private:
  // Changes sums from one maximum to a larger one.
  __attribute__((noinline)) void rescale(Floats old, Floats now) const {
    const Floats shift = deviation_from(now, old), decay = exp2(shift);
    rescale(mass, moment, shift, decay);
    rescale(block_mass, block_moment, shift, decay);
    store(top, now);
  }
  static void rescale(float* mass, float* moment, Floats shift, Floats decay) {
    const Floats total = load(mass);
    store(moment, mul(decay, multiply_add(shift, total, load(moment))));
    store(mass, mul(decay, total));
  }
};

// Bytes of logits of all prototypes that stay in the cache for the gathering pass; more of them are stored past it.
constexpr std::size_t CACHED_LOGITS = std::size_t(1) << 18;

constexpr float LOWEST = -3.4028234663852886e38f;  // finite: (-inf) - (-inf) would be NaN

// No prototypes yet: [count, rows] maxima, masses and moments, in threes.
inline void open_statistics(float* statistics, int count, int rows) {
  for (float* sums = statistics; sums < statistics + std::ptrdiff_t(count) * rows; sums += 3 * rows)
    for (int r = 0; r < rows; ++r) {
      sums[r] = LOWEST;
      sums[rows + r] = sums[2 * rows + r] = 0;
    }
}

template <class Dot>
struct Scorer {
  using Word = typename Dot::Word;
  const ScoreTask& task;
  const Score& score = *task.score;
  const int rows = padded(score.rows);
  const int steps = words<Dot>(score.weight.dim);
  const bool past_cache = sizeof(float) * score.weight.prototypes * score.logits.stride > CACHED_LOGITS;

  static std::size_t word_bytes(const Weight& w) {
    return Dot::PER_WORD == 1 ? 0 : aligned(sizeof(Word) * block_prototypes(w.dim) * std::size_t(words<Dot>(w.dim)));
  }
  static std::size_t scratch(const Score& s) { return block_bytes(s.weight) + word_bytes(s.weight); }

  void run() const {
    [[maybe_unused]] const typename Dot::Registers registers;
    open_statistics(task.statistics, statistics_of(score), rows);
    for (int k = task.first, count; k < task.last; k += count) {
      count = block_size(score.logits, block_prototypes(score.weight.dim), k, task.last);
      float* room = static_cast<float*>(task.scratch);
      const Block fp32 = block_of(score.weight, k, count, room);
      if (score.norms != Norms::free) find_gains(fp32, k, count);
      one_block(k, count, words_of(fp32, count, room + block_bytes(score.weight) / sizeof(float)));
    }
    after_stores_past_cache();
  }

  void find_gains(const Block& block, int first, int count) const {
    for (int i = 0; i < count; ++i) {
      const int k = first + i;
      const float* row = block.row(i);
      const float norm = ::sqrtf(dot(row, row, score.weight.dim));
      const float gain = norm > 0 ? (score.magnitude ? score.magnitude[k] : 1.0f) / norm : 0.0f;
      score.norm[k] = norm, score.gain[k] = gain;
      // NaN for an infinite gain: such an effective prototype has infinities of both signs, and its products are NaN
      task.multiplier[k] = (gain + 0 * gain) * score.uniform;
    }
  }

  Rows<Word> words_of(const Block& block, int count, void* room) const {
    if constexpr (Dot::PER_WORD == 1) {
      return {block.start, block.stride};
    } else {
      Word* out = static_cast<Word*>(room);
      for (int k = 0; k < count; ++k) pack_row<Dot>(block.row(k), score.weight.dim, out + std::ptrdiff_t(k) * steps);
      return {out, steps};
    }
  }

  void one_block(int first, int count, const Rows<Word>& weight) const {
    const Cut cut(rows / LANES);
    const int next = first + count, ahead = task.last - next < count ? task.last - next : count;
    float* logits = score.logits.pieces[0] ? row_of(score.logits, first) : nullptr;
    int index = 0;
    for_each_tile(cut, [&](auto n, int vector) __attribute__((always_inline)) {
      // of the next block, each tile of rows asks for its share
      const int begin = next + ahead * index / cut.tiles, end = next + ahead * (index + 1) / cut.tiles;
      const int share = end - begin;
      ++index;
      constexpr int N = decltype(n)::value;
      const Word* panel = static_cast<const Word*>(task.panels) + std::ptrdiff_t(vector) * LANES * steps;
      BlockSums block, others;
      for (int i = 0; i < N; ++i) softmax(block, vector, i).open();
      if (score.other_bias)
        for (int i = 0; i < N; ++i) softmax(others, vector, i, 3 * rows).open();
      for_each_rows<Dot, N>(count, [&](auto m, int k, int valid) __attribute__((always_inline)) {
        constexpr int M = decltype(m)::value;
        const Ahead soon = ahead_of(score.weight, begin + share * k / count, begin + share * (k + valid) / count);
        const Rows<Word> rows_of_m{weight.start + k * weight.stride, weight.stride};
        tile_in_short_sums<Dot, M, N>(
            steps, rows_of_m, panel, valid, soon, [&](int row, auto& sums) __attribute__((always_inline)) {
              float* out = logits ? logits + (k + row) * score.logits.stride + vector * LANES : nullptr;
              finish(first + k + row, vector, block, sums, out);
              if (score.other_bias) absorb_others(first + k + row, vector, others, sums);
            });
      });
      for (int i = 0; i < N; ++i) softmax(block, vector, i).close();
      if (score.other_bias)
        for (int i = 0; i < N; ++i) softmax(others, vector, i, 3 * rows).close();
    });
  }

  // The same logits with the other bias. Not inlined: they are rarely asked for, and few rows have them.
  template <int M, int N>
  __attribute__((noinline)) void absorb_others(int k, int vector, BlockSums& others, const Floats (&sums)[M][N]) const {
    for (int n = 0; n < N; ++n) {
      Floats logits[M];
      for (int m = 0; m < M; ++m)
        logits[m] = multiply_add(sums[m][n], all(task.multiplier[k + m]), all(score.other_bias[k + m]));
      softmax(others, vector, n, 3 * rows).template absorb<M>(logits);
    }
  }

  // Of the n-th vector of a tile that begins with `vector`; its sums begin so far into the statistics.
  Softmax softmax(BlockSums& block, int vector, int n, int from = 0) const {
    float* top = task.statistics + from + (vector + n) * LANES;
    return {top, top + rows, top + 2 * rows, block.mass + n * LANES, block.moment + n * LANES};
  }

  template <int M, int N>
  __attribute__((always_inline)) void finish(int k, int vector, BlockSums& block, const Floats (&sums)[M][N],
                                             float* out) const {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Floats logits[M];
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
        logits[m] = multiply_add(sums[m][n], all(task.multiplier[k + m]), all(score.bias ? score.bias[k + m] : 0.0f));
      if (out)
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) {
          float* to = out + m * score.logits.stride + n * LANES;
          past_cache ? store_past_cache(to, logits[m]) : store(to, logits[m]);
        }
      softmax(block, vector, n).template absorb<M>(logits);
    }
  }
};

}  // namespace vmf::cpu::VMF_ISA
