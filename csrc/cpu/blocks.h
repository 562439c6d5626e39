// Blocks of prototypes and panels of rows, as the products read them.
#pragma once

#include "kernels.h"
#include "product.h"

namespace vmf::cpu::VMF_ISA {

// Bytes of a thread's block of prototypes in fp32: beside the block of G and the panels of rows it shares 1 MiB of L2.
constexpr int BLOCK_BYTES = 147456;
constexpr int MOST_TILES = 20;  // in a block: with few dims G would outgrow the cache

inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
inline std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
// Words of a sum over n numbers; those beyond are 0.
template <class Dot>
inline int words(int n) {
  constexpr int numbers = Dot::PER_WORD * Dot::LEAST_WORDS;
  return (n + numbers - 1) / numbers * Dot::LEAST_WORDS;
}

// Prototypes of a block: a whole number of tiles of every height, and even.
inline int block_prototypes(int dim) {
  const int tiles = BLOCK_BYTES / 4 / dim / BLOCK_MULTIPLE;
  return (tiles < 1 ? 1 : tiles > MOST_TILES ? MOST_TILES : tiles) * BLOCK_MULTIPLE;
}

// fp32 rows of prototypes: the stored rows, or a converted copy.
struct Block {
  const float* start;
  std::ptrdiff_t stride;
  const float* row(int k) const { return start + k * stride; }
};

// <a, b> in several sums side by side, whose rounding errors stay small.
inline float dot(const float* a, const float* b, int n) {
  constexpr int SUMS = 4;
  Floats totals[SUMS];
  for (Floats& total : totals) total = zero();
  int i = 0;
  for (; i + SUMS * LANES <= n; i += SUMS * LANES)
    for (int j = 0; j < SUMS; ++j) totals[j] = multiply_add(load(a + i + j * LANES), load(b + i + j * LANES), totals[j]);
  for (; i + LANES <= n; i += LANES) totals[0] = multiply_add(load(a + i), load(b + i), totals[0]);
  float result = sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
  for (; i < n; ++i) result += a[i] * b[i];
  return result;
}

inline void convert_row(const Weight& w, int k, float* out) {
  const std::uint16_t* row = static_cast<const std::uint16_t*>(w.data) + k * w.stride;
  if (w.stored == Stored::bf16)
    for (int d = 0; d < w.dim; ++d) out[d] = from_bf16(row[d]);
  else
    for (int d = 0; d < w.dim; ++d) out[d] = from_fp16(row[d]);
}

inline std::size_t block_bytes(const Weight& w) {
  return w.stored == Stored::fp32 ? 0 : aligned(sizeof(float) * block_prototypes(w.dim) * std::size_t(w.dim));
}

inline Block block_of(const Weight& w, int first, int count, float* room) {
  if (w.stored == Stored::fp32) return {static_cast<const float*>(w.data) + first * w.stride, w.stride};
  for (int k = 0; k < count; ++k) convert_row(w, first + k, room + std::ptrdiff_t(k) * w.dim);
  return {room, w.dim};
}

// The place of a prototype's logits, and the number of prototypes from it to the end of its piece.
inline float* row_of(const Logits& logits, int k) {
  return logits.pieces[k / logits.prototypes] + k % logits.prototypes * logits.stride;
}
inline int left_in_piece(const Logits& logits, int k) { return logits.prototypes - k % logits.prototypes; }

// The number of prototypes of the block that begins at `first`, at most `count`; all are in one piece of the logits.
inline int block_size(const Logits& logits, int count, int first, int last) {
  if (last - first < count) count = last - first;
  if (logits.pieces[0] && left_in_piece(logits, first) < count) count = left_in_piece(logits, first);
  return count;
}

// Rows [first, last) of the prototypes, as they are stored.
inline Ahead ahead_of(const Weight& w, int first, int last) {
  const std::ptrdiff_t size = w.stored == Stored::fp32 ? 4 : 2;
  const char* start = static_cast<const char*>(w.data);
  return {start + size * w.stride * first, start + size * w.stride * last};
}

// Words of one row [D], as A of the logits' product reads them.
template <class Dot>
inline void pack_row(const float* row, int dim, typename Dot::Word* out) {
  if constexpr (Dot::PER_WORD == 1) {
    std::memcpy(out, row, sizeof(float) * dim);
  } else {
#if defined(VMF_HAS_BF16)
    std::uint16_t* numbers = reinterpret_cast<std::uint16_t*>(out);
    const int whole = Dot::PER_WORD * words<Dot>(dim);
    int d = 0;
    for (; d + LANES <= dim; d += LANES) store_bf16(numbers + d, load(row + d));
    for (; d < dim; ++d) {
      const std::uint16_t rounded = to_bf16(row[d]);
      std::memcpy(numbers + d, &rounded, sizeof rounded);  // they are read as words
    }
    std::memset(numbers + d, 0, sizeof(std::uint16_t) * (whole - d));
#endif
  }
}

// [count, D] with `at(i)` the rows -> panels [column tile][words of count][columns], zeros beyond either edge.
template <class Dot, class Row>
inline void pack_panels(int count, int dim, Row&& at, typename Dot::Word* out) {
  const int steps = words<Dot>(count);
  const Cut cut(padded(dim) / LANES);
  for (int step = 0; step < steps; ++step)  // the outer loop: memory is fastest if rows are read from end to end
    for (int i = 0; i < cut.tiles; ++i) {
      const int first = cut.first(i) * LANES, width = (cut.first(i + 1) - cut.first(i)) * LANES;
      typename Dot::Word* panel = out + std::ptrdiff_t(first) * steps;
      for (int j = 0; j < width; j += LANES) {
        float lines[Dot::PER_WORD][LANES] = {};
        for (int half = 0; half < Dot::PER_WORD; ++half)
          if (step * Dot::PER_WORD + half < count) at(step * Dot::PER_WORD + half, first + j, lines[half]);
        typename Dot::Word* to = panel + std::ptrdiff_t(step) * width + j;
        if constexpr (Dot::PER_WORD == 1) store(reinterpret_cast<float*>(to), load(lines[0]));
#if defined(VMF_HAS_BF16)
        else
          store_pairs(to, load(lines[0]), load(lines[1]));
#endif
      }
    }
}

// Columns [first, first + LANES) of a row of D into `out`, 0 beyond D.
inline void line_of(const float* row, int dim, int first, float* out, float gain) {
  if (first + LANES <= dim) {
    store(out, mul(load(row + first), all(gain)));
    return;
  }
  for (int d = first; d < dim; ++d) out[d - first] = row[d] * gain;
}

// Word `step` of a row of D numbers, 0 beyond them.
template <class Dot>
inline typename Dot::Word word_of(const float* row, int dim, int step) {
  if constexpr (Dot::PER_WORD == 1)
    return row[step];
  else
    return (2 * step < dim ? to_bf16(row[2 * step]) : 0u) |
           (2 * step + 1 < dim ? std::uint32_t(to_bf16(row[2 * step + 1])) << 16 : 0u);
}

// Rows [count, D] -> panels [row tile][words of D][rows]: the transpose of a block's rows, in the same packing.
template <class Dot>
inline void pack_transposed(const float* rows, int count, int dim, typename Dot::Word* out) {
  constexpr int STEPS = 16;  // of a row at a time: what they are written to stays in L1
  const int steps = words<Dot>(dim);
  const Cut cut(padded(count) / LANES);
  for (int i = 0; i < cut.tiles; ++i) {
    const int first = cut.first(i) * LANES, width = (cut.first(i + 1) - cut.first(i)) * LANES;
    const int present = count - first < width ? count - first : width;
    for (int from = 0; from < steps; from += STEPS) {
      const int to = from + STEPS < steps ? from + STEPS : steps;
      typename Dot::Word* panel = out + std::ptrdiff_t(first) * steps + std::ptrdiff_t(from) * width;
      for (int r = 0; r < present; ++r)
        for (int step = from; step < to; ++step)
          panel[(step - from) * width + r] = word_of<Dot>(rows + std::ptrdiff_t(first + r) * dim, dim, step);
      for (int step = from; step < to; ++step)
        for (int r = present; r < width; ++r) panel[(step - from) * width + r] = 0;
    }
  }
}

}  // namespace vmf::cpu::VMF_ISA
