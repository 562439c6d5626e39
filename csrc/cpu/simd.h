// One vector type per instruction set: this file is compiled once for each, in a namespace of its own (VMF_ISA).
// Files that include this must not use templates of the standard library: the linker keeps one copy of each, and that one could
// use instructions that the machine lacks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(VMF_TILES_STAND_IN) && defined(__AVX2__)
#error the stand-in of tiles is for portable code
#endif

namespace vmf::cpu::VMF_ISA {

// 2^f on [-1/2, 1/2], minimax in the relative error: 2e-9 before rounding.
constexpr float EXP2[] = {1.0f,
                          0.6931471824645996f,
                          0.24022646248340607f,
                          0.05550328642129898f,
                          0.009618489071726799f,
                          0.0013399930903688073f,
                          0.0001534581242594868f};
constexpr float LEAST_EXPONENT = -126.0f;  // below it 2^x is subnormal, and 0 here

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
using Floats = __m512;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store_past_cache(float* p, Floats x) { _mm512_stream_ps(p, x); }  // p aligned
inline void after_stores_past_cache() { _mm_sfence(); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline bool any_larger(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }

inline Floats exp2(Floats x) {
  // Below, vscalefps would give a subnormal number, for which Intel's parts call microcode: 100 clocks a vector.
  const __mmask16 kept = _mm512_cmp_ps_mask(x, all(LEAST_EXPONENT), _CMP_NLT_UQ);  // a NaN is kept
  x = larger(all(LEAST_EXPONENT), x);                                              // x - round(x) of -inf would be NaN
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = sub(x, whole);
  Floats y = all(EXP2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, f, all(EXP2[i]));
  return _mm512_maskz_scalef_ps(kept, y, whole);
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
using Floats = __m256;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void store_past_cache(float* p, Floats x) { _mm256_stream_ps(p, x); }  // p aligned
inline void after_stores_past_cache() { _mm_sfence(); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline bool any_larger(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline float sum(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}

inline Floats exp2(Floats x) {
  const Floats least = all(LEAST_EXPONENT);
  const Floats kept = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);  // a NaN is kept
  x = larger(least, x);
  const Floats whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = sub(x, whole);
  Floats y = all(EXP2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, f, all(EXP2[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  return _mm256_and_ps(kept, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent)));
}

#else

#if defined(VMF_TILES_STAND_IN)
constexpr int LANES = 16;  // those of a tile register; the compiler makes them of what the machine has
constexpr int REGISTERS = 32;
#else
constexpr int LANES = 4;  // the vectors of SSE2 and NEON
constexpr int REGISTERS = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Floats zero() { return Floats{}; }
inline Floats all(float x) { return x - Floats{}; }  // x, and -0 too; x + 0 would have to be added
inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void store_past_cache(float* p, Floats x) { store(p, x); }
inline void after_stores_past_cache() {}
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats subtract_product(Floats a, Floats b, Floats c) { return c - a * b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN
inline bool any_larger(Floats a, Floats b) {
  const Integers m = a > b;
  std::int32_t any = 0;
  for (int i = 0; i < LANES; ++i) any |= m[i];
  return any != 0;
}
inline float sum(Floats x) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline Floats exp2(Floats x) {
  const Floats least = all(LEAST_EXPONENT);
  const Integers kept = ~(x < least);  // a NaN is kept
  x = larger(least, x);
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats whole = (x + magic) - magic;
  const Floats f = x - whole;
  Floats y = all(EXP2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, f, all(EXP2[i]));
  const Integers exponent = __builtin_convertvector(whole, Integers) << 23;
  return (Floats)(kept & ((Integers)y + exponent));
}

#endif

inline float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float from_bf16(std::uint16_t x) { return from_bits(std::uint32_t(x) << 16); }
inline std::uint16_t to_bf16(float x) {  // to nearest, ties to even; a NaN stays one
  const std::uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((bits >> 16) | 0x40u);
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_fp16(std::uint16_t x) {
  const std::uint32_t sign = std::uint32_t(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // exact for subnormals too: the multiplication normalises them
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));  // 2^112
}

// Where bf16 products have instructions, or a stand-in: LANES numbers rounded, and words of one number from each of two
// vectors.
#if defined(__AVX512BF16__)
#define VMF_HAS_BF16 1

typedef std::uint32_t Words __attribute__((vector_size(64)));
inline void store_bf16(std::uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_pairs(std::uint32_t* p, Floats low, Floats high) {
  const __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  _mm512_storeu_si512(p, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
}

#elif defined(VMF_TILES_STAND_IN)
#define VMF_HAS_BF16 1

typedef std::uint32_t Words __attribute__((vector_size(64)));
inline void store_bf16(std::uint16_t* p, Floats x) {
  for (int i = 0; i < LANES; ++i) p[i] = to_bf16(x[i]);
}
inline void store_pairs(std::uint32_t* p, Floats low, Floats high) {
  for (int i = 0; i < LANES; ++i) p[i] = to_bf16(low[i]) | std::uint32_t(to_bf16(high[i])) << 16;
}

#endif

// Whether bf16 products are those of a matrix unit.
#if defined(__AMX_BF16__) || defined(VMF_TILES_STAND_IN)
#define VMF_HAS_TILES 1
#endif

}  // namespace vmf::cpu::VMF_ISA
