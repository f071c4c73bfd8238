// How tensors come in.
#pragma once
#include <cstdint>

namespace calidrop {

struct Array {
  const char* p;
  int64_t row, head, slot;  // strides in bytes
};
inline const char* at_head(const Array& x, int64_t b, int64_t h) { return x.p + b * x.row + h * x.head; }

enum Dtype { F32, BF16, F16 };

}  // namespace calidrop
using namespace calidrop;
