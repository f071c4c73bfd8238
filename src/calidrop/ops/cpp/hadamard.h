// The rotation of src/calidrop/hadamard.py.
#pragma once
#include "vectors.h"

namespace {

// sums and differences of lanes HALF apart
template <int HALF, class X> ALWAYS X butterflies(X x) {
  constexpr int LANES = sizeof(X) / sizeof(float);
  if constexpr (!HALVED<X>) {
    X y, sign;
#ifdef __clang__
    for (int i = 0; i < LANES; ++i) y[i] = x[i ^ HALF];
#else
    typename Lanes<LANES>::I other;
    for (int i = 0; i < LANES; ++i) other[i] = i ^ HALF;
    y = __builtin_shuffle(x, other);
#endif
    for (int i = 0; i < LANES; ++i) sign[i] = i & HALF ? -1.0f : 1.0f;
    return y + sign * x;
  } else if constexpr (2 * HALF == LANES)
    return {x.a + x.b, x.a - x.b};
  else
    return {butterflies<HALF>(x.a), butterflies<HALF>(x.b)};
}

// orthonormal, of blocks of the largest power of two that divides D
inline void hadamard(float* x, int D) {
  const int block = D & -D;
  const float c = 1.0f / std::sqrt(static_cast<float>(block));
  if (D % 16) {
    for (int half = 1; half < block; half *= 2)
      for (int i = 0; i < D; i += 2 * half)
        for (int j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b, x[j + half] = a - b;
        }
    for (int i = 0; i < D; ++i) x[i] *= c;
    return;
  }
  for (int i = 0; i < D; i += 16)
    store(x + i, butterflies<8>(butterflies<4>(butterflies<2>(butterflies<1>(load<V>(x + i))))) * c);
  for (int half = 16; half < block; half *= 2)
    for (int i = 0; i < D; i += 2 * half)
      for (int j = i; j < i + half; j += 16) {
        const V a = load<V>(x + j), b = load<V>(x + j + half);
        store(x + j, a + b);
        store(x + j + half, a - b);
      }
}

}  // namespace
