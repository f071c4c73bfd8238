// How tensors come in.
#pragma once
#include <cstdint>
#include <cstring>

namespace calidrop {

struct Array {
  const char* p;
  int64_t row, head, slot;  // strides in bytes
};
inline const char* at_head(const Array& x, int64_t b, int64_t h) { return x.p + b * x.row + h * x.head; }

enum Dtype { F32, BF16, F16 };

// a number in the upper half of an fp32, and back to the nearest such
inline float of_bfloat(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline uint16_t bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;  // adding would make another number of it
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// the i-th of numbers that are fp32 or bf16
inline float number(const char* first, int64_t i, int32_t dtype) {
  float x;
  uint16_t y;
  if (dtype == F32) return std::memcpy(&x, first + 4 * i, 4), x;
  return std::memcpy(&y, first + 2 * i, 2), of_bfloat(y);
}
inline void put(char* first, int64_t i, int32_t dtype, float x) {
  const uint16_t y = bfloat(x);
  if (dtype == F32)
    std::memcpy(first + 4 * i, &x, 4);
  else
    std::memcpy(first + 2 * i, &y, 2);
}
// n numbers from the i-th on
inline void put(char* first, int64_t i, int32_t dtype, const float* x, int n) {
  if (dtype == F32)
    std::memcpy(first + 4 * i, x, sizeof(float) * n);
  else
    for (int d = 0; d < n; ++d) put(first, i + d, BF16, x[d]);
}

}  // namespace calidrop
using namespace calidrop;
