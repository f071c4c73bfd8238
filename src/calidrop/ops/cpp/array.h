// How tensors come in.
#pragma once
#include <cstdint>

namespace {

struct Array {
  const char* p;
  int64_t row, head, slot;  // strides in bytes
};
enum Dtype { F32, BF16, F16 };

}  // namespace
