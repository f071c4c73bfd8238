// Vectors of 16 floats and what the kernel computes with them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "lanes.h"

namespace {

using V = Lanes<16>::F;
constexpr int BLOCK = 64;  // tokens of a prompt whose scores are held at once
constexpr int SCORES = 128;  // tokens that a step of decoding asks at once: scores of a query are so far from those of the next
constexpr float NONE = -INFINITY;

// or compilers load it again for every product, which takes longer than the products do
ALWAYS void in_register([[maybe_unused]] V& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(x.a), "+x"(x.b));
#elif defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}

inline V splat(float x) { return V{} + x; }

inline float sum(Lanes<4>::F x) { return (x[0] + x[2]) + (x[1] + x[3]); }

inline float sum(Lanes<8>::F x) {
  Lanes<4>::F a, b;
  halves(x, a, b);
  return sum(a + b);
}

inline float sum(V x) {
  Lanes<8>::F a, b;
  halves(x, a, b);
  return sum(a + b);
}

using Register = Lanes<REGISTER / 4>::F;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TOKENS = 2;  // whose sums for four queries registers hold
#else
constexpr int TOKENS = 4;
#endif

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define CALIDROP_PAIRS 1
ALWAYS void in_register(Lanes<32>::H& x) { asm("" : "+v"(x)); }
// of bf16; written out because compilers know such vectors under names of their own
ALWAYS void add_products(Register& sum, Lanes<32>::H x, Lanes<32>::H y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}
#endif

template <class X> ALWAYS void add_products(Register& sum, X x, X y) {
  if constexpr (HALVED<X>)
    add_products(sum, x.a, y.a), add_products(sum, x.b, y.b);
  else
    sum += x * y;
}

// to[r * apart + j] becomes the sum of x[TOKENS * r + j], for r < R and j < TOKENS
#if defined(__AVX512F__)
template <int R> ALWAYS void store_sums(const Register* x, float* to, int apart) {
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
#elif defined(__AVX2__)
template <int R> ALWAYS void store_sums(const Register* x, float* to, int apart) {
#pragma GCC unroll 2
  for (int r = 0; r < R; r += 2) {
    const auto at = [&](int i) { return (__m256)x[i]; };
    const __m256 mine = _mm256_hadd_ps(at(2 * r), at(2 * r + 1));
    const __m256 next = r + 1 < R ? _mm256_hadd_ps(at(2 * r + 2), at(2 * r + 3)) : mine;
    const __m256 all = _mm256_hadd_ps(mine, next);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(to + r * apart), sums);
    if (r + 1 < R) _mm_storeh_pi(reinterpret_cast<__m64*>(to + (r + 1) * apart), sums);
  }
}
#else
template <int R> ALWAYS void store_sums(const Register* x, float* to, int apart) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#ifdef __aarch64__
    const auto at = [&](int j) { return (float32x4_t)x[4 * r + j]; };
    vst1q_f32(to + r * apart, vpaddq_f32(vpaddq_f32(at(0), at(1)), vpaddq_f32(at(2), at(3))));
#else
    for (int j = 0; j < 4; ++j) to[r * apart + j] = sum(x[4 * r + j]);
#endif
  }
}
#endif

// the largest of numbers none of which is NaN
inline float most(V x) {
  Lanes<8>::F a, b;
  halves(x, a, b);
  Lanes<4>::F c, d;
  halves(pick(a > b, a, b), c, d);
  c = pick(c > d, c, d);
  return std::max(std::max(c[0], c[2]), std::max(c[1], c[3]));
}

inline bool any(Lanes<16>::I x) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  Lanes<8>::I a, b;
  halves(x, a, b);
  int64_t w[4];
  store(w, bits_of<Lanes<8>::F>(a | b));
  return (w[0] | w[1]) | (w[2] | w[3]);
#endif
}

// e^x for x <= 0, relative error 2e-7; below -87 it is 0
inline V exp(V x) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
#ifndef __AVX512F__
  Lanes<16>::I tiny = x < splat(-87.0f);
  x = pick(tiny, splat(-87.0f), x);
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
  return pick(tiny, V{}, p * bits_of<V>((converted<Lanes<16>::I>(n) + 127) << 23));
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

inline int whole_vectors(int n) { return (n + 15) / 16 * 16; }

// the first 16 of `left` numbers, zeros behind them
inline V head(const float* p, int left) {
  if (left >= 16) return load<V>(p);
#ifdef __AVX512F__
  return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << left) - 1), p);
#else
  alignas(64) float x[16] = {};
  std::memcpy(x, p, sizeof(float) * left);
  return load<V>(x);
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
#elif defined(__AVX2__) && defined(__F16C__)
  const auto all = (__m256i)halves;
  return {(Lanes<8>::F)_mm256_cvtph_ps(_mm256_castsi256_si128(all)), (Lanes<8>::F)_mm256_cvtph_ps(_mm256_extracti128_si256(all, 1))};
#elif defined(__ARM_NEON)
  const auto four = [](uint16x4_t x) { return (Lanes<4>::F)vcvt_f32_f16(vreinterpret_f16_u16(x)); };
  const auto a = (uint16x8_t)halves.a, b = (uint16x8_t)halves.b;
  return {{four(vget_low_u16(a)), four(vget_high_u16(a))}, {four(vget_low_u16(b)), four(vget_high_u16(b))}};
#else  // as `half`
  using U = Lanes<16>::U;
  const U h = widened(halves);
  const V x = bits_of<V>((h & 0x7fffu) << 13) * splat(0x1p112f);
  const U beyond = bits_of<U>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits_of<V>(bits_of<U>(x) | beyond | (h & 0x8000u) << 16);
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
