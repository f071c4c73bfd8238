// Vectors of 16 floats and what the kernel computes with them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

template <int L> struct Lanes {
  typedef float F __attribute__((vector_size(4 * L), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(4 * L), aligned(4)));
  typedef uint32_t U __attribute__((vector_size(4 * L), aligned(4)));
  typedef uint16_t H __attribute__((vector_size(2 * L), aligned(2)));
  typedef uint8_t B __attribute__((vector_size(L), aligned(1)));
  typedef int8_t S __attribute__((vector_size(L), aligned(1)));
};
using V = Lanes<16>::F;
constexpr int BLOCK = 64;  // tokens of a prompt whose scores are held at once
constexpr int SCORES = 128;  // tokens that a step of decoding asks at once: scores of a query are so far from those of the next
constexpr float NONE = -INFINITY;

inline V splat(float x) { return V{} + x; }

// by value and not through memcpy, which would have the compiler keep x in memory all along
inline void store(void* p, V x) { *static_cast<V*>(p) = x; }

inline void halves(V x, Lanes<8>::F& a, Lanes<8>::F& b) {
#ifdef __AVX512F__
  a = (Lanes<8>::F)_mm512_castps512_ps256((__m512)x);
  b = (Lanes<8>::F)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1));
#else
  std::memcpy(&a, &x, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + 32, 32);
#endif
}

inline void halves(Lanes<8>::F x, Lanes<4>::F& a, Lanes<4>::F& b) {
#ifdef __AVX512F__
  a = (Lanes<4>::F)_mm256_castps256_ps128((__m256)x);
  b = (Lanes<4>::F)_mm256_extractf128_ps((__m256)x, 1);
#else
  std::memcpy(&a, &x, 16);
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + 16, 16);
#endif
}

inline float sum(Lanes<8>::F x) {
  Lanes<4>::F c, d;
  halves(x, c, d);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

inline float sum(V x) {
  Lanes<8>::F a, b;
  halves(x, a, b);
  return sum(a + b);
}

#ifdef __AVX512F__
// to[r * apart + j] becomes the sum of x[4 * r + j], for r < R and j < 4
template <int R> inline void store_sums(const V* x, float* to, int apart) {
  const auto two = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto halved = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 y[4];  // sums of four lanes of four vectors
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    y[r] = _mm512_setzero_ps();
    if (r >= R) continue;
    const __m512d a = _mm512_castps_pd(two((__m512)x[4 * r], (__m512)x[4 * r + 1]));
    const __m512d b = _mm512_castps_pd(two((__m512)x[4 * r + 2], (__m512)x[4 * r + 3]));
    y[r] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 all = halved(halved(y[0], y[1]), halved(y[2], y[3]));
  _mm_storeu_ps(to, _mm512_castps512_ps128(all));
  if constexpr (R > 1) _mm_storeu_ps(to + apart, _mm512_extractf32x4_ps(all, 1));
  if constexpr (R > 2) _mm_storeu_ps(to + 2 * apart, _mm512_extractf32x4_ps(all, 2));
  if constexpr (R > 3) _mm_storeu_ps(to + 3 * apart, _mm512_extractf32x4_ps(all, 3));
}
#endif

// the largest of numbers none of which is NaN
inline float most(V x) {
  Lanes<8>::F a, b;
  halves(x, a, b);
  Lanes<4>::F c, d;
  halves(a > b ? a : b, c, d);
  c = c > d ? c : d;
  return std::max(std::max(c[0], c[2]), std::max(c[1], c[3]));
}

inline bool any(Lanes<16>::I x) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int64_t w[8];
  std::memcpy(w, &x, 64);
  return ((w[0] | w[1]) | (w[2] | w[3])) | ((w[4] | w[5]) | (w[6] | w[7]));
#endif
}

// e^x for x <= 0, relative error 2e-7; below -87 it is 0
inline V exp(V x) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
#ifndef __AVX512F__
  Lanes<16>::I tiny = x < splat(-87.0f);
  x = tiny ? splat(-87.0f) : x;
#endif
  V n = (x * 1.44269504f + magic) - magic;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
  // not below: what is no number stays none
  return (V)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
  return tiny ? V{} : p * (V)((__builtin_convertvector(n, Lanes<16>::I) + 127) << 23);
#endif
}

// a half in bits, as a float: scaling moves the exponent, of numbers below the normal ones too. In integers and floats,
// since many compilers have no half in C++ (g++ before 12, on ARM before 13; clang on x86 before 15)
inline float half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t bits = (h & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  std::memcpy(&bits, &x, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;  // infinite, or no number
  bits |= (h & 0x8000u) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

template <class T> inline T load(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

inline int whole_vectors(int n) { return (n + 15) / 16 * 16; }

// the first 16 of `left` numbers, zeros behind them
inline V head(const float* p, int left) {
  if (left >= 16) return load<V>(p);
#ifdef __AVX512F__
  return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << left) - 1), p);
#else
  V x = {};
  std::memcpy(&x, p, sizeof(float) * left);
  return x;
#endif
}

inline float inner(const float* a, const float* b, int n) {
  V total = {};
  for (int i = 0; i < n; i += 16) total += head(a + i, n - i) * head(b + i, n - i);
  return sum(total);
}

// every S-th of n * S numbers
template <int S> inline void every(const float* from, int n, float* to) {
  for (int i = 0; i < n; ++i) to[i] = from[i * S];
}
inline void every(const float* from, int step, int n, float* to) {
  switch (step) {  // known steps become shuffles
    case 1: return every<1>(from, n, to);
    case 2: return every<2>(from, n, to);
    case 4: return every<4>(from, n, to);
    case 8: return every<8>(from, n, to);
  }
  for (int i = 0; i < n; ++i) to[i] = from[i * step];
}

// 16 halves as floats (compilers convert vectors of them one by one)
inline V of_halves(Lanes<16>::H halves) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
  const auto* of = reinterpret_cast<const __m128i*>(&halves);
  V x;
  for (int i = 0; i < 2; ++i) {
    const __m256 y = _mm256_cvtph_ps(_mm_loadu_si128(of + i));
    std::memcpy(reinterpret_cast<char*>(&x) + 32 * i, &y, 32);
  }
  return x;
#elif defined(__ARM_NEON)
  V x;
  for (int i = 0; i < 4; ++i) {
    const float32x4_t y = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(&halves) + 4 * i)));
    std::memcpy(reinterpret_cast<char*>(&x) + 16 * i, &y, 16);
  }
  return x;
#else  // as `half`
  using U = Lanes<16>::U;
  const U h = __builtin_convertvector(halves, U);
  const V x = (V)((h & 0x7fffu) << 13) * splat(0x1p112f);
  const U beyond = (U)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (V)((U)x | beyond | (h & 0x8000u) << 16);
#endif
}

inline V of_halves(const void* p) { return of_halves(load<Lanes<16>::H>(p)); }

// n halves, `slot` bytes apart, as floats; to holds a multiple of 16
inline void halves(const char* p, int64_t slot, int n, float* to) {
  int i = 0;
  if (slot == 2)
    for (; i + 16 <= n; i += 16) store(to + i, of_halves(p + 2 * i));
  for (; i < n; ++i) to[i] = half(load<uint16_t>(p + i * slot));
}

}  // namespace
