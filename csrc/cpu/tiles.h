// Products of bf16 numbers on a CPU's matrix unit (AMX): tile registers of 16 rows of 64 bytes. TDPBF16PS adds to 16 x 16 sums
// the products of 16 rows of 32 numbers with 16 rows of 16 pairs.
//
// Tests compile this against a stand-in of the six intrinsics, which runs anywhere: VMF_TILES_STAND_IN names its header.
#pragma once

#include "simd.h"

#if defined(VMF_TILES_STAND_IN)
#include VMF_TILES_STAND_IN
#endif

namespace vmf::cpu::VMF_ISA {

constexpr int TILE = 16;  // rows of a tile register, and the words of each

#if defined(VMF_HAS_TILES)

// What LDTILECFG reads: eight registers of full size.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};
static_assert(sizeof(TileShapes) == 64, "the instruction reads as much");
// In memory as a constant: GCC before 12.4 says that the intrinsic reads eight bytes, and drops stores to the others.
constexpr TileShapes FULL_TILES{};

// Configures this thread's tile registers for as long as it lives; without it, a tile instruction is illegal.
struct TileRegisters {
  TileRegisters() { _tile_loadconfig(&FULL_TILES); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }
};

// [TILE R, N] sums = A B, one tile register for each TILE rows of A and for each vector of B. Registers 4 and 5 hold A, 6 and 7
// B. The intrinsics take register numbers as they are written, so every combination is written out.
//
// a: rows of `a_stride` words; all TILE R rows must be readable. b: a panel [steps, N LANES] of words. steps: a multiple of
// TILE.
template <int R, int N, class Next>
inline void multiply_tiles(int steps, const std::uint32_t* a, std::ptrdiff_t a_stride, const std::uint32_t* b, Floats* sums,
                           Next&& next) {
  static_assert(R <= 2 && N <= 2, "four registers of sums");
  constexpr std::ptrdiff_t b_row = N * TILE * sizeof(std::uint32_t);
  const std::ptrdiff_t a_row = a_stride * std::ptrdiff_t(sizeof(std::uint32_t));
  // some compilers do not know that a tile load reads memory: what was packed must be there
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && N == 2) _tile_zero(3);
  for (int k = 0; k < steps; k += TILE, a += TILE, b += TILE * N * TILE) {
    next();
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, b_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + TILE, b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + TILE * a_stride, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr std::ptrdiff_t sums_row = N * sizeof(Floats);
  _tile_stored(0, sums, sums_row);
  if constexpr (N == 2) _tile_stored(1, sums + 1, sums_row);
  if constexpr (R == 2) _tile_stored(2, sums + TILE * N, sums_row);
  if constexpr (R == 2 && N == 2) _tile_stored(3, sums + TILE * N + 1, sums_row);
  __asm__ volatile("" ::: "memory");
}

// Swaps words of two rows: the word at i | H of a and the word at i of b, for every i without the bit H. With H = 1, a[1] and
// b[0] change places, a[3] and b[2], and so on.
template <int H>
inline void swap_words(Words& a, Words& b) {
#define VMF_LOW(j) ((j) & H) ? 16 + (j) - H : (j)
#define VMF_HIGH(j) ((j) & H) ? 16 + (j) : (j) + H
#define VMF_16(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
  const Words low = __builtin_shufflevector(a, b, VMF_16(VMF_LOW));
  b = __builtin_shufflevector(a, b, VMF_16(VMF_HIGH));
  a = low;
#undef VMF_LOW
#undef VMF_HIGH
#undef VMF_16
}

template <int H>
inline void swap_in_all(Words (&rows)[TILE]) {
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i)
    if (!(i & H)) swap_words<H>(rows[i], rows[i | H]);
}

// The transpose of [rows, columns] words, both multiples of TILE.
inline void transpose_words(const std::uint32_t* in, int rows, int columns, std::uint32_t* out) {
  for (int r = 0; r < rows; r += TILE)
    for (int c = 0; c < columns; c += TILE) {
      Words square[TILE];
#pragma GCC unroll 16
      for (int i = 0; i < TILE; ++i) std::memcpy(&square[i], in + std::ptrdiff_t(r + i) * columns + c, sizeof(Words));
      swap_in_all<8>(square), swap_in_all<4>(square), swap_in_all<2>(square), swap_in_all<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < TILE; ++i) std::memcpy(out + std::ptrdiff_t(c + i) * rows + r, &square[i], sizeof(Words));
    }
}

#endif
}  // namespace vmf::cpu::VMF_ISA
