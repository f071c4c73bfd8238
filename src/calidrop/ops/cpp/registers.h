// Registers of words (whole numbers of 16 bits) and of sums of their products (32 bits), as words.h needs them: with
// AVX-512 VNNI, and with AVX2.
#pragma once
#include "vectors.h"

#if !defined(CALIDROP_PORTABLE)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define CALIDROP_VNNI 1
#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
#define CALIDROP_AVX2 1
#endif
#endif

#if defined(CALIDROP_VNNI) || defined(CALIDROP_AVX2)
#define CALIDROP_WORDS 1
#include <immintrin.h>

namespace words {
namespace {  // nothing here is called from outside, so all of it may become part of who calls it

struct alignas(REGISTER) Line {
  int16_t of[REGISTER / 2];
};
constexpr int LANES = REGISTER / 4, ROWS_AT_ONCE = REGISTER / 16;  // rows: of which sixteen bytes fill a register

#ifdef CALIDROP_VNNI
using Int = __m512i;
constexpr int SUMS = 16;   // that registers hold beside what they are made of
constexpr int CHAINS = 2;  // sums that products go to in turn, as one waits for the other
constexpr int PIECES = 4;  // sixteen bytes of a row that are loaded at once
constexpr int GROUPS = 2;  // of ROWS_AT_ONCE rows that share a load of what they are multiplied with
constexpr int PAIRS = 1;   // of rows that a loop sums in one go; few sums of narrow registers are soon made

inline Int zero() { return _mm512_setzero_si512(); }
inline Int all16(int16_t x) { return _mm512_set1_epi16(x); }
inline Int all32(int32_t x) { return _mm512_set1_epi32(x); }
inline Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
inline Int plus(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Int right(Int x, int bits) { return _mm512_srli_epi16(x, bits); }
inline Int right(Int x, const Line& bits) { return _mm512_srlv_epi16(x, _mm512_load_si512(&bits)); }
constexpr bool SHIFTS_WORDS = true;  // each by bits of its own, and not in pairs
inline Int low(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
inline Int high(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }

// sum += a * b, in words. Written out because compilers (GCC 12) copy every sum twice around their own instruction, and
// load what should stay in memory.
inline void add(Int& sum, Int a, Int b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
inline void add(Int& sum, Int a, const Line& b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(b)); }
inline void begin(Int& sum, Int a, Int b) { asm("vpmaddwd %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b)); }
inline void begin(Int& sum, Int a, const Line& b) { asm("vpmaddwd %2, %1, %0" : "=v"(sum) : "v"(a), "m"(b)); }

// W bytes, as often as they fill a register
template <int W> inline Int repeated(const char* p) {
  if constexpr (W == 64) return _mm512_loadu_si512(p);
  if constexpr (W == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  if constexpr (W == 16) {  // written out, or compilers load it first and then shuffle
    Int x;
    asm("vbroadcasti32x4 %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m128i_u*>(p)));
    return x;
  }
  return _mm512_set1_epi64(::load<int64_t>(p));
}

// the first N sixteen bytes of four rows, those of all rows side by side
template <int N> inline void beside(const char* p, int64_t step, Int* x) {
  if constexpr (N == 1) {
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
    const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    x[0] = _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
  } else if constexpr (N == 2) {
    const auto at = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * step)); };
    const Int ab = _mm512_inserti64x4(_mm512_castsi256_si512(at(0)), at(1), 1);
    const Int cd = _mm512_inserti64x4(_mm512_castsi256_si512(at(2)), at(3), 1);
    x[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), x[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
  } else {
    const auto at = [&](int i) { return _mm512_loadu_si512(p + i * step); };
    const Int a = at(0), b = at(1), c = at(2), d = at(3);
    const Int ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    x[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), x[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    const Int ab2 = _mm512_shuffle_i32x4(a, b, 0xee), cd2 = _mm512_shuffle_i32x4(c, d, 0xee);
    x[2] = _mm512_shuffle_i32x4(ab2, cd2, 0x88), x[3] = _mm512_shuffle_i32x4(ab2, cd2, 0xdd);
  }
}

// to += sum * by + more
inline void give(float* to, Int sum, float by, float more) {
  const __m512 y = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(more));
  _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(by), y));
}

// sums of four lanes of x[r], those of row j in lane 4 * j + r, times by + more
inline __m512 row_sums(const Int* x, const float* by, const float* more) {
  const Int a = plus(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const Int b = plus(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  const Int each = plus(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(each), _mm512_load_ps(by), _mm512_load_ps(more));
}

// to[r * apart + j] becomes the sum of four lanes of x[j / 4][r], those of row j % 4, times by + more
template <int R> inline void give_rows(const Int (&x)[1][4], const float* by, const float* more, float* to, int apart) {
  const Int turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 all = _mm512_permutexvar_ps(turn, row_sums(x[0], by, more));
  _mm_storeu_ps(to, _mm512_castps512_ps128(all));
  if constexpr (R > 1) _mm_storeu_ps(to + apart, _mm512_extractf32x4_ps(all, 1));
  if constexpr (R > 2) _mm_storeu_ps(to + 2 * apart, _mm512_extractf32x4_ps(all, 2));
  if constexpr (R > 3) _mm_storeu_ps(to + 3 * apart, _mm512_extractf32x4_ps(all, 3));
}
template <int R> inline void give_rows(const Int (&x)[2][4], const float* by, const float* more, float* to, int apart) {
  const __m512 a = row_sums(x[0], by, more), b = row_sums(x[1], by, more);
  const auto two = [&](Int turn, float* at, bool both) {
    const __m512 rows = _mm512_permutex2var_ps(a, turn, b);
    _mm256_storeu_ps(at, _mm512_castps512_ps256(rows));
    if (both) _mm256_storeu_ps(at + apart, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(rows), 1)));
  };
  two(_mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29), to, R > 1);
  if constexpr (R > 2) two(_mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31), to + 2 * apart, R > 3);
}

// numbers without their sign, in bits
inline Int size_of(V x) { return _mm512_and_si512((Int)x, _mm512_set1_epi32(0x7fffffff)); }
inline Int larger(Int a, Int b) { return _mm512_max_epu32(a, b); }
inline uint32_t largest(Int x) { return _mm512_reduce_max_epu32(x); }

// x in whole numbers, and their words written: as they are, or every eight of them once for each of four rows
template <bool REPEATED> inline V put(char*& line, V x) {
  const Int w = _mm512_cvtps_epi32((__m512)x);
  const __m256i words = _mm512_cvtepi32_epi16(w);
  if constexpr (REPEATED) {
    _mm512_store_si512(line, _mm512_broadcast_i32x4(_mm256_castsi256_si128(words)));
    _mm512_store_si512(line + 64, _mm512_broadcast_i32x4(_mm256_extracti128_si256(words, 1)));
  } else
    _mm256_store_si256(reinterpret_cast<__m256i*>(line), words);
  line += REPEATED ? 128 : 32;
  return (V)_mm512_cvtepi32_ps(w);
}
#else
using Int = __m256i;
#ifdef __AVXVNNI__
constexpr int CHAINS = 2;
#else
constexpr int CHAINS = 1;
#endif
constexpr int SUMS = 8, PIECES = 1, GROUPS = 1, PAIRS = 4;

inline Int zero() { return _mm256_setzero_si256(); }
inline Int all16(int16_t x) { return _mm256_set1_epi16(x); }
inline Int all32(int32_t x) { return _mm256_set1_epi32(x); }
inline Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
inline Int plus(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int right(Int x, int bits) { return _mm256_srli_epi16(x, bits); }
inline Int right(Int x, const Line& bits) { return _mm256_srlv_epi32(x, _mm256_load_si256(reinterpret_cast<const Int*>(&bits))); }
constexpr bool SHIFTS_WORDS = false;
inline Int low(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
inline Int high(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }

#ifdef __AVXVNNI__
inline void add(Int& sum, Int a, Int b) { asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
inline void add(Int& sum, Int a, const Line& b) { asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "m"(b)); }
#else
// Written out because compilers (GCC 12) keep all products to add them in another order, and that in memory.
inline void add(Int& sum, Int a, Int b) {
  Int x;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(x) : "x"(a), "x"(b));
}
inline void add(Int& sum, Int a, const Line& b) {
  Int x;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(x) : "x"(a), "m"(b));
}
#endif
inline void begin(Int& sum, Int a, const Line& b) { asm("vpmaddwd %2, %1, %0" : "=x"(sum) : "x"(a), "m"(b)); }

template <int W> inline Int repeated(const char* p) {
  if constexpr (W == 32) return _mm256_loadu_si256(reinterpret_cast<const Int*>(p));
  if constexpr (W == 16) return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_set1_epi64x(::load<int64_t>(p));
}

template <int N> inline void beside(const char* p, int64_t step, Int* x) {
  const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
  x[0] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
}

inline void give(float* to, Int sum, float by, float more) {
  const __m256 y = _mm256_add_ps(_mm256_loadu_ps(to), _mm256_set1_ps(more));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(by), y));
}

template <int R> inline void give_rows(const Int (&x)[1][4], const float* by, const float* more, float* to, int apart) {
  const Int each = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0][0], x[0][1]), _mm256_hadd_epi32(x[0][2], x[0][3]));
  const __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(each), _mm256_load_ps(by), _mm256_load_ps(more));
  const __m128 a = _mm256_castps256_ps128(y), b = _mm256_extractf128_ps(y, 1);
  const auto at = [&](int r) { return reinterpret_cast<__m64*>(to + r * apart); };
  const __m128 first = _mm_unpacklo_ps(a, b), last = _mm_unpackhi_ps(a, b);
  _mm_storel_pi(at(0), first);
  if constexpr (R > 1) _mm_storeh_pi(at(1), first);
  if constexpr (R > 2) _mm_storel_pi(at(2), last);
  if constexpr (R > 3) _mm_storeh_pi(at(3), last);
}

inline Int size_of(Lanes<8>::F x) { return _mm256_and_si256((Int)x, _mm256_set1_epi32(0x7fffffff)); }
inline Int larger(Int a, Int b) { return _mm256_max_epu32(a, b); }
inline Int size_of(V x) { return larger(size_of(x.a), size_of(x.b)); }
inline uint32_t largest(Int x) {
  alignas(32) uint32_t all[8];
  _mm256_store_si256(reinterpret_cast<Int*>(all), x);
  return *std::max_element(all, all + 8);
}

template <bool REPEATED> inline V put(char*& line, V x) {
  const Int a = _mm256_cvtps_epi32((__m256)x.a), b = _mm256_cvtps_epi32((__m256)x.b);
  const Int words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  Int* to = reinterpret_cast<Int*>(line);
  if constexpr (REPEATED) {
    _mm256_store_si256(to, _mm256_permute2x128_si256(words, words, 0x00));
    _mm256_store_si256(to + 1, _mm256_permute2x128_si256(words, words, 0x11));
  } else
    _mm256_store_si256(to, words);
  line += REPEATED ? 64 : 32;
  return {(Lanes<8>::F)_mm256_cvtepi32_ps(a), (Lanes<8>::F)_mm256_cvtepi32_ps(b)};
}
#endif

}  // namespace
}  // namespace words
#endif
