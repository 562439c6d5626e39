// Logits of a range of prototypes and the online softmax over them: equation (1), and the row sums of (2).
#pragma once

#include "blocks.h"

namespace vmf::cpu::VMF_ISA {

// Running maximum, mass and first moment of LANES rows.
struct Softmax {
  float *top, *mass, *moment;

  // Takes in M vectors of logits.
  template <int M>
  __attribute__((always_inline)) void absorb(const Floats (&logits)[M]) const {
    const Floats old = load(top);
    Floats now = old;
    for (int m = 0; m < M; ++m) now = larger(logits[m], now);
    Floats total = load(mass), first = load(moment);
    if (any_larger(now, old)) {
      const Floats shift = sub(old, now), decay = exp2(shift);
      first = mul(decay, multiply_add(shift, total, first));
      total = mul(decay, total);
      store(top, now);
    }
    Floats tile_total = zero(), tile_first = zero();  // a sum of few like numbers before the long one: rounding
    for (int m = 0; m < M; ++m) {
      const Floats deviation = sub(logits[m], now), p = exp2(deviation);
      tile_total = add(tile_total, p);
      tile_first = multiply_add(p, deviation, tile_first);
    }
    store(mass, add(total, tile_total));
    store(moment, add(first, tile_first));
  }
};

template <class Dot>
struct Scorer {
  using Word = typename Dot::Word;
  const ScoreTask& task;
  const Score& score = *task.score;
  const int rows = padded(score.rows);
  const int steps = words<Dot>(score.weight.dim);

  static std::size_t word_bytes(const Weight& w) {
    return Dot::PER_WORD == 1 ? 0 : aligned(sizeof(Word) * block_prototypes(w.dim) * std::size_t(words<Dot>(w.dim)));
  }
  static std::size_t scratch(const Score& s) { return block_bytes(s.weight) + word_bytes(s.weight); }

  void run() const {
    for (int r = 0; r < rows; ++r) {
      task.statistics[r] = -3.4028234663852886e38f;  // finite: (-inf) - (-inf) would be NaN
      task.statistics[rows + r] = task.statistics[2 * rows + r] = 0;
    }
    for (int k = task.first, count; k < task.last; k += count) {
      count = block_size(score.logits, score.weight.dim, k, task.last);
      float* room = static_cast<float*>(task.scratch);
      const Block fp32 = block_of(score.weight, k, count, room);
      one_block(k, count, words_of(fp32, count, room + block_bytes(score.weight) / sizeof(float)));
    }
    after_stores_past_cache();
  }

  Rows<Word> words_of(const Block& block, int count, void* room) const {
    if constexpr (Dot::PER_WORD == 1) {
      return {block.start, block.stride};
    } else {
      Word* out = static_cast<Word*>(room);
      for (int k = 0; k < count; ++k) pack_row(block.row(k), score.weight.dim, out + std::ptrdiff_t(k) * steps);
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
      const int begin = next + ahead * index / cut.tiles, share = ahead * (index + 1) / cut.tiles - ahead * index / cut.tiles;
      ++index;
      constexpr int N = decltype(n)::value;
      const Word* panel = static_cast<const Word*>(task.panels) + std::ptrdiff_t(vector) * LANES * steps;
      for_each_rows<N>(count, [&](auto m, int k) __attribute__((always_inline)) {
        constexpr int M = decltype(m)::value;
        const Ahead soon = ahead_of(score.weight, begin + share * k / count, begin + share * (k + M) / count);
        tile<Dot, M, N>(steps, Rows<Word>{weight.start + k * weight.stride, weight.stride}, panel, soon,
                        [&](Floats(&sums)[M][N]) __attribute__((always_inline)) {
                          finish<M, N>(first + k, vector * LANES, sums,
                                       logits ? logits + k * score.logits.stride + vector * LANES : nullptr);
                        });
      });
    });
  }

  template <int M, int N>
  __attribute__((always_inline)) void finish(int k, int r, const Floats (&sums)[M][N], float* out) const {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Floats logits[M];
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
        logits[m] = multiply_add(sums[m][n], all(score.multiplier[k + m]), all(score.bias ? score.bias[k + m] : 0.0f));
      const int at = r + n * LANES;
      if (out)
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) store_past_cache(out + m * score.logits.stride + n * LANES, logits[m]);
      Softmax{task.statistics + at, task.statistics + rows + at, task.statistics + 2 * rows + at}.template absorb<M>(logits);
    }
  }
};

}  // namespace vmf::cpu::VMF_ISA
