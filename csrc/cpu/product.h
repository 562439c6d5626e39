// The register-blocked product that every pass uses: C[m, n] = sum_k A[m, k] B[k, n], m by broadcast, n by vectors.
// A word is the operand of one step of k: an fp32 number, or a pair of bf16 numbers.
#pragma once

#include "tiles.h"

namespace vmf::cpu::VMF_ISA {

struct NoRegisters {};  // configures nothing

struct Fp32 {
  using Registers = NoRegisters;  // an object of it lives while a pass runs
  using Word = float;
  static constexpr int PER_WORD = 1;
  static constexpr int LEAST_WORDS = 1;  // of k: sums are over a multiple of so many
  static constexpr bool ON_TILES = false;
  static Floats broadcast(const Word* p) { return all(*p); }
  static Floats add_product(Floats a, Floats b, Floats sum) { return multiply_add(a, b, sum); }
};

#if defined(VMF_HAS_TILES)
struct Bf16 {
  using Registers = TileRegisters;
  using Word = std::uint32_t;
  static constexpr int PER_WORD = 2;
  static constexpr int LEAST_WORDS = TILE;
  static constexpr bool ON_TILES = true;
};
#elif defined(VMF_HAS_BF16)
struct Bf16 {
  using Registers = NoRegisters;
  using Word = std::uint32_t;
  static constexpr int PER_WORD = 2;
  static constexpr int LEAST_WORDS = 1;
  static constexpr bool ON_TILES = false;
  static Floats broadcast(const Word* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(*p))); }
  static Floats add_product(Floats a, Floats b, Floats sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};
#endif

// Vectors of C side by side in a tile, at most; and rows of C in it: as many accumulators as registers allow beside the
// vectors of B and one of A. Measured on Zen 4 at D = 256 (bench/LOG.md).
#if defined(VMF_HAS_TILES)
constexpr int MOST_VECTORS = 2;  // four tile registers of sums
constexpr int BLOCK_MULTIPLE = 2 * TILE;
#else
constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 2;
constexpr int BLOCK_MULTIPLE = REGISTERS == 32 ? 24 : 30;  // a multiple of every tile_rows(), so that a block has no rest
#endif
constexpr int tile_rows(int vectors) {
  return REGISTERS == 32 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 24) : (vectors == 2 ? 6 : 10);
}
constexpr int LINES_A_STEP = 4;  // cache lines of `Ahead` that are prefetched every four steps of k
constexpr int SHORT_SUM = 64;    // steps of k

// Where A's rows lie: in `Rows`, m steps through memory by a stride and k is contiguous; in `Columns` the other way round.
template <class Word>
struct Rows {
  const Word* start;
  std::ptrdiff_t stride;
  template <int M>
  struct Cursor {
    // a pointer for every third row: an address with a scaled index reaches the two rows between
    const Word* third[(M + 2) / 3];
    std::ptrdiff_t stride;
    explicit Cursor(const Rows& a) : stride(a.stride) {
      for (int i = 0; i < (M + 2) / 3; ++i) third[i] = a.start + 3 * i * a.stride;
    }
    const Word* at(int m, int k) const { return third[m / 3] + (m % 3) * stride + k; }
    void advance(int k) {
      for (int i = 0; i < (M + 2) / 3; ++i) third[i] += k;
    }
  };
};
template <class Word>
struct Columns {
  const Word* start;
  std::ptrdiff_t stride;
  template <int M>
  struct Cursor {
    const Word* now;
    std::ptrdiff_t stride;
    explicit Cursor(const Columns& a) : now(a.start), stride(a.stride) {}
    const Word* at(int m, int k) const { return now + k * stride + m; }
    void advance(int k) { now += k * stride; }
  };
};

// Memory that is needed soon: a product prefetches a few of its cache lines at every step, which hides the latency.
struct Ahead {
  const char *start, *end;
};

// The part of the remaining memory that a product of `steps` can prefetch; it is removed from the remainder.
inline Ahead share_of(Ahead& left, int steps) {
  const char* start = left.start;
  const std::ptrdiff_t most = std::ptrdiff_t(steps / 4) * LINES_A_STEP * 64;
  left.start = left.end - start < most ? left.end : start + most;
  return {start, left.start};
}

// The slices in which sums leave a tile: as many rows as registers hold beside what is done with them.
constexpr int SLICE = 8;

// A tile of A B, of Rows only, by the matrix unit. Rows of A beyond `valid`, up to the next multiple of TILE, must be readable
// and may hold anything. Words beyond the sum, up to `steps`, must be 0 in A and in B: 0 times a NaN is none.
template <int M, int N, class Done>
__attribute__((always_inline)) inline void tile_on_matrix_unit([[maybe_unused]] int steps, const Rows<std::uint32_t>& a,
                                                               const std::uint32_t* b, int valid, Ahead ahead, Done&& done) {
#if defined(VMF_HAS_TILES)
  Floats slices[M / SLICE][SLICE][N];
  multiply_tiles<M / TILE, N>(steps, a.start, a.stride, b, &slices[0][0][0], [&]() __attribute__((always_inline)) {
    for (int i = 0; i < TILE / 4 * LINES_A_STEP && ahead.start < ahead.end; ++i, ahead.start += 64)
      __builtin_prefetch(ahead.start, 0, 2);
  });
  int m = 0;
  for (; m + SLICE <= valid; m += SLICE) done(m, slices[m / SLICE]);
  for (; m < valid; ++m) {
    Floats row[1][N];
    for (int n = 0; n < N; ++n) row[0][n] = slices[m / SLICE][m % SLICE][n];
    done(m, row);
  }
#endif
}

// Adds A B over `steps` of k to a tile of sums; B is a panel [k, N LANES] of words. Both move on to the steps that follow.
template <class Dot, int M, int N, class Cursor>
__attribute__((always_inline)) inline void accumulate(int steps, Cursor& a, const typename Dot::Word*& b, Ahead& ahead,
                                                      Floats (&sums)[M][N]) {
  auto step = [&](int k) __attribute__((always_inline)) {
    Floats bs[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) bs[n] = load(reinterpret_cast<const float*>(b) + (k * N + n) * LANES);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const Floats am = Dot::broadcast(a.at(m, k));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = Dot::add_product(am, bs[n], sums[m][n]);
    }
  };
  int k = 0;
  for (; k + 4 <= steps; k += 4) {
#pragma GCC unroll 2
    for (int i = 0; i < LINES_A_STEP; ++i)
      if (ahead.start < ahead.end) {
        __builtin_prefetch(ahead.start, 0, 2);
        ahead.start += 64;
      }
    step(0), step(1), step(2), step(3);
    a.advance(4);
    b += 4 * N * LANES;
  }
  for (; k < steps; ++k) {
    step(0);
    a.advance(1);
    b += N * LANES;
  }
}

template <int M, int N>
__attribute__((always_inline)) inline void clear(Floats (&sums)[M][N]) {
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = zero();
}

// Calls done(first row, sums) with a tile of A B, or with one slice of its rows after the other; `valid` rows of it count.
template <class Dot, int M, int N, class A, class Done>
__attribute__((always_inline)) inline void tile(int steps, const A& a, const typename Dot::Word* b, int valid, Ahead ahead,
                                                Done&& done) {
  if constexpr (Dot::ON_TILES) {
    tile_on_matrix_unit<M, N>(steps, a, b, valid, ahead, done);
  } else {
    Floats sums[M][N];
    clear(sums);
    typename A::template Cursor<M> cursor(a);
    accumulate<Dot, M, N>(steps, cursor, b, ahead, sums);
    done(0, sums);
  }
}

// The same from several short sums: a logit computed as one long sum has up to twice the rounding error, and so has every
// probability. Costs 2 to 3 % of the product. A matrix unit adds up 32 products at a time as it is.
template <class Dot, int M, int N, class A, class Done>
__attribute__((always_inline)) inline void tile_in_short_sums(int steps, const A& a, const typename Dot::Word* b, int valid,
                                                              Ahead ahead, Done&& done) {
  if constexpr (Dot::ON_TILES) {
    tile_on_matrix_unit<M, N>(steps, a, b, valid, ahead, done);
  } else {
    Floats totals[M][N];  // in memory, while registers hold a short sum
    clear(totals);
    typename A::template Cursor<M> cursor(a);
    for (int k = 0; k < steps; k += SHORT_SUM) {
      Floats sums[M][N];
      clear(sums);
      accumulate<Dot, M, N>(k + SHORT_SUM < steps ? SHORT_SUM : steps - k, cursor, b, ahead, sums);
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) totals[m][n] = add(totals[m][n], sums[m][n]);
    }
    done(0, totals);
  }
}

// Calls body(integral constant M, first row, valid rows) over `rows` rows: whole tiles, then what is left in smaller ones.
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <class Dot, int N, class Body>
__attribute__((always_inline)) inline void for_each_rows(int rows, Body&& body) {
  int m = 0;
  if constexpr (Dot::ON_TILES) {
    for (; m + 2 * TILE <= rows; m += 2 * TILE) body(Constant<2 * TILE>{}, m, 2 * TILE);
    for (; m < rows; m += TILE) body(Constant<TILE>{}, m, m + TILE < rows ? TILE : rows - m);
  } else {
    for (; m + tile_rows(N) <= rows; m += tile_rows(N)) body(Constant<tile_rows(N)>{}, m, tile_rows(N));
    for (; m + 4 <= rows; m += 4) body(Constant<4>{}, m, 4);
    for (; m < rows; ++m) body(Constant<1>{}, m, 1);
  }
}

// How `vectors` columns of C are cut into tiles: as few as possible, of nearly equal width.
struct Cut {
  int vectors, tiles;
  explicit Cut(int vectors) : vectors(vectors), tiles((vectors + MOST_VECTORS - 1) / MOST_VECTORS) {}
  int first(int tile) const { return int(std::ptrdiff_t(tile) * vectors / tiles); }
};

// Calls body(integral constant N, first vector) for every tile of a cut.
template <class Body>
__attribute__((always_inline)) inline void for_each_tile(const Cut& cut, Body&& body) {
  for (int i = 0; i < cut.tiles; ++i) {
    const int first = cut.first(i), width = cut.first(i + 1) - first;
    if (width == 1) body(Constant<1>{}, first);
    if (width == 2) body(Constant<2>{}, first);
    if constexpr (MOST_VECTORS > 2) {
      if (width == 3) body(Constant<3>{}, first);
      if (width == 4) body(Constant<4>{}, first);
    }
  }
}

}  // namespace vmf::cpu::VMF_ISA
