// Stands for the intrinsics of AMX that csrc/cpu/tiles.h uses, so that what is built on them runs on any machine. Semantics
// from the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, of each instruction.
//
// Register numbers are checked by the compiler: the real intrinsics take literals. Use of a thread's registers without a
// configuration ends the process, as it would on a part with AMX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles_stand_in {

constexpr int ROWS = 16, WORDS = 16, REGISTERS = 8;

struct Tile {
  float sums[ROWS][WORDS];
};
struct Thread {
  bool configured = false;
  Tile tiles[REGISTERS];
};
inline thread_local Thread thread;

inline Tile& tile(int index) {
  if (!thread.configured) {
    std::fputs("ILLEGAL: a tile instruction without a configuration\n", stderr);
    std::abort();
  }
  return thread.tiles[index];
}

inline void configure(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  for (int i = 0; i < REGISTERS; ++i)
    if (bytes[0] != 1 || bytes[16 + 2 * i] != 4 * WORDS || bytes[17 + 2 * i] != 0 || bytes[48 + i] != ROWS) {
      std::fputs("GENERAL PROTECTION: tiles of another size than the stand-in has\n", stderr);
      std::abort();
    }
  thread = Thread{true, {}};
}

inline void release() { thread = Thread{}; }

inline void load(Tile& to, const void* base, std::ptrdiff_t stride) {
  for (int r = 0; r < ROWS; ++r) std::memcpy(to.sums[r], static_cast<const char*>(base) + r * stride, sizeof to.sums[r]);
}

inline void store(const Tile& from, void* base, std::ptrdiff_t stride) {
  for (int r = 0; r < ROWS; ++r) std::memcpy(static_cast<char*>(base) + r * stride, from.sums[r], sizeof from.sums[r]);
}

// A subnormal number counts as 0, and so does a subnormal sum.
inline float flushed(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float half_of(float word, bool upper) {
  std::uint32_t bits;
  std::memcpy(&bits, &word, sizeof bits);
  bits = upper ? bits & 0xffff0000u : bits << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

// Sums of even and of odd numbers, which are added to one another and then to what was there.
inline void add_products(Tile& sums, const Tile& a, const Tile& b) {
  float numbers[2][WORDS][WORDS];  // of b: [half, row, column]
  for (int k = 0; k < WORDS; ++k)
    for (int n = 0; n < WORDS; ++n)
      for (int half = 0; half < 2; ++half) numbers[half][k][n] = half_of(b.sums[k][n], half);
  for (int m = 0; m < ROWS; ++m) {
    float totals[2][WORDS] = {};
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < WORDS; ++k) {
        const float factor = half_of(a.sums[m][k], half);
        for (int n = 0; n < WORDS; ++n) totals[half][n] += factor * numbers[half][k][n];
      }
    for (int n = 0; n < WORDS; ++n) sums.sums[m][n] = flushed(sums.sums[m][n] + flushed(totals[0][n] + totals[1][n]));
  }
}

template <int I>
constexpr int literal() {
  static_assert(I >= 0 && I < REGISTERS, "no such tile register");
  return I;
}

}  // namespace tiles_stand_in

#define _tile_loadconfig(from) tiles_stand_in::configure(from)
#define _tile_release() tiles_stand_in::release()
#define _tile_zero(to) (tiles_stand_in::tile(tiles_stand_in::literal<to>()) = tiles_stand_in::Tile{})
#define _tile_loadd(to, base, stride) tiles_stand_in::load(tiles_stand_in::tile(tiles_stand_in::literal<to>()), base, stride)
#define _tile_stored(from, base, stride) \
  tiles_stand_in::store(tiles_stand_in::tile(tiles_stand_in::literal<from>()), base, stride)
#define _tile_dpbf16ps(to, a, b)                                                    \
  tiles_stand_in::add_products(tiles_stand_in::tile(tiles_stand_in::literal<to>()), \
                               tiles_stand_in::tile(tiles_stand_in::literal<a>()),  \
                               tiles_stand_in::tile(tiles_stand_in::literal<b>()))
