// Vectors of numbers that know what a register holds: on AVX-512, AVX2 or NEON, and in whatever GCC or Clang makes of
// vectors of sixteen bytes.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#define ALWAYS inline __attribute__((always_inline))

// What a register holds. Compilers keep wider vectors in memory, so here those are two halves.
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
template <class T, int L> struct Two;
template <class T, int L, bool WHOLE = sizeof(T) * L <= REGISTER> struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * L), aligned(sizeof(T))));
};
template <int L> struct Vector<float, L, true> {
  typedef float type __attribute__((vector_size(4 * L), aligned(4), may_alias));
};
template <class T, int L> struct Vector<T, L, false> {
  using type = Two<T, L>;
};
template <int L> struct Lanes {
  using F = typename Vector<float, L>::type;
  using I = typename Vector<int32_t, L>::type;
  using U = typename Vector<uint32_t, L>::type;
  using H = typename Vector<uint16_t, L>::type;
  using B = typename Vector<uint8_t, L>::type;
  using S = typename Vector<int8_t, L>::type;
};

template <class T, int L> struct Two {
  using Half = typename Vector<T, L / 2>::type;
  using Mask = typename Lanes<L>::I;
  Half a, b;
  ALWAYS T operator[](int i) const { return i < L / 2 ? a[i] : b[i - L / 2]; }
  friend ALWAYS Two operator-(Two x) { return {-x.a, -x.b}; }
#define CALIDROP_BOTH(op)                                                            \
  friend ALWAYS Two operator op(Two x, Two y) { return {x.a op y.a, x.b op y.b}; }   \
  friend ALWAYS Two operator op(Two x, T y) { return {x.a op y, x.b op y}; }         \
  friend ALWAYS Two operator op(T x, Two y) { return {x op y.a, x op y.b}; }         \
  friend ALWAYS Two& operator op##=(Two& x, Two y) { return x = x op y; }
  CALIDROP_BOTH(+)
  CALIDROP_BOTH(-)
  CALIDROP_BOTH(*)
  CALIDROP_BOTH(/)
  CALIDROP_BOTH(&)
  CALIDROP_BOTH(|)
  CALIDROP_BOTH(<<)
  CALIDROP_BOTH(>>)
#undef CALIDROP_BOTH
#define CALIDROP_BOTH(op)                                                            \
  friend ALWAYS Mask operator op(Two x, Two y) { return {x.a op y.a, x.b op y.b}; }  \
  friend ALWAYS Mask operator op(Two x, T y) { return {x.a op y, x.b op y}; }
  CALIDROP_BOTH(<)
  CALIDROP_BOTH(>)
  CALIDROP_BOTH(<=)
  CALIDROP_BOTH(==)
  CALIDROP_BOTH(!=)
#undef CALIDROP_BOTH
};
template <class X> constexpr bool HALVED = false;
template <class T, int L> constexpr bool HALVED<Two<T, L>> = true;

// by value and not through memcpy, which would have the compiler keep x in memory all along
#ifdef __AVX512F__
inline void store(void* p, Lanes<16>::F x) { *static_cast<Lanes<16>::F*>(p) = x; }
#endif
#ifdef __AVX2__
inline void store(void* p, Lanes<8>::F x) { *static_cast<Lanes<8>::F*>(p) = x; }
#endif
inline void store(void* p, Lanes<4>::F x) { *static_cast<Lanes<4>::F*>(p) = x; }
template <class T, int L> ALWAYS void store(void* p, Two<T, L> x) {
  store(p, x.a), store(static_cast<char*>(p) + sizeof x.a, x.b);
}

template <class X> inline X load(const void* p) {
  if constexpr (HALVED<X>)
    return {load<decltype(X::a)>(p), load<decltype(X::b)>(static_cast<const char*>(p) + sizeof(X::a))};
  else {
    X x;
    std::memcpy(&x, p, sizeof(X));
    return x;
  }
}

template <class T, int L> ALWAYS void halves(Two<T, L> x, typename Two<T, L>::Half& a, typename Two<T, L>::Half& b) {
  a = x.a, b = x.b;
}
#ifdef __AVX512F__
inline void halves(Lanes<16>::F x, Lanes<8>::F& a, Lanes<8>::F& b) {
  a = (Lanes<8>::F)_mm512_castps512_ps256((__m512)x);
  b = (Lanes<8>::F)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1));
}
#endif
#ifdef __AVX2__
inline void halves(Lanes<8>::F x, Lanes<4>::F& a, Lanes<4>::F& b) {
  a = (Lanes<4>::F)_mm256_castps256_ps128((__m256)x);
  b = (Lanes<4>::F)_mm256_extractf128_ps((__m256)x, 1);
}
#endif

// x where a mask has all bits, y where it has none
template <class M, class X> ALWAYS X pick(M m, X x, X y) {
  if constexpr (HALVED<X>)
    return {pick(m.a, x.a, y.a), pick(m.b, x.b, y.b)};
  else
    return m ? x : y;
}

// the same bits
template <class To, class X> ALWAYS To bits_of(X x) {
  if constexpr (HALVED<X>)
    return {bits_of<decltype(To::a)>(x.a), bits_of<decltype(To::b)>(x.b)};
  else
    return (To)x;
}

// whole numbers as floats, or floats as whole numbers
template <class To, class X> ALWAYS To converted(X x) {
  if constexpr (HALVED<X>)
    return {converted<decltype(To::a)>(x.a), converted<decltype(To::b)>(x.b)};
  else
    return __builtin_convertvector(x, To);
}

// ---- the same numbers in more bits: for each machine, as compilers move them one by one where they fill two registers

template <class To, class X> ALWAYS To one_by_one(X x) {
  std::remove_reference_t<decltype(std::declval<To>()[0])> y[sizeof(X) / sizeof(x[0])];
  for (size_t i = 0; i < sizeof(y) / sizeof(y[0]); ++i) y[i] = x[i];
  return load<To>(y);
}

ALWAYS Lanes<16>::I widened(Lanes<16>::B x) {
#if defined(__AVX512F__)
  return (Lanes<16>::I)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  const __m128i y = (__m128i)x;
  return {(Lanes<8>::I)_mm256_cvtepu8_epi32(y), (Lanes<8>::I)_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(y, y))};
#elif defined(__aarch64__)
  const auto eight = [](uint16x8_t y) -> Lanes<8>::I {
    return {(Lanes<4>::I)vmovl_u16(vget_low_u16(y)), (Lanes<4>::I)vmovl_u16(vget_high_u16(y))};
  };
  return {eight(vmovl_u8(vget_low_u8((uint8x16_t)x))), eight(vmovl_u8(vget_high_u8((uint8x16_t)x)))};
#else
  return one_by_one<Lanes<16>::I>(x);
#endif
}

ALWAYS Lanes<8>::I widened(Lanes<8>::B x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, Lanes<8>::I);
#elif defined(__AVX2__)
  return (Lanes<8>::I)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(&x)));
#else
  return one_by_one<Lanes<8>::I>(x);
#endif
}

ALWAYS Lanes<16>::U widened(Lanes<16>::H x) {
#if defined(__AVX512F__)
  return (Lanes<16>::U)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  const __m256i y = (__m256i)x;
  return {(Lanes<8>::U)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(y)),
          (Lanes<8>::U)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(y, 1))};
#elif defined(__aarch64__)
  const auto eight = [](uint16x8_t y) -> Lanes<8>::U {
    return {(Lanes<4>::U)vmovl_u16(vget_low_u16(y)), (Lanes<4>::U)vmovl_u16(vget_high_u16(y))};
  };
  return {eight((uint16x8_t)x.a), eight((uint16x8_t)x.b)};
#else
  return one_by_one<Lanes<16>::U>(x);
#endif
}

// with their sign
ALWAYS Lanes<16>::H widened(Lanes<16>::S x) {
#if defined(__AVX2__)
  return __builtin_convertvector(x, Lanes<16>::H);
#elif defined(__aarch64__)
  const auto y = (int8x16_t)x;
  return {(Lanes<8>::H)vmovl_s8(vget_low_s8(y)), (Lanes<8>::H)vmovl_s8(vget_high_s8(y))};
#else
  return one_by_one<Lanes<16>::H>(x);
#endif
}

}  // namespace
