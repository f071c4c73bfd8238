// Many queries against a block of keys: tiles of scores, with the keys laid out by channels.
#pragma once
#include "array.h"
#include "rows.h"

namespace {

#ifdef __AVX512F__
constexpr int ROWS = 6, WIDE = 4;  // of scores in flight: 24 vectors of 16 of 32 registers
#else
constexpr int ROWS = 6, WIDE = 1;
#endif
constexpr int32_t NEVER = INT32_MAX;

// the keys of one block and their positions, NEVER behind its end and for empty slots
struct Block {
  const char* k;
  int n;
  int32_t first = NEVER, last = 0;
  alignas(64) int32_t pos[BLOCK];
  // k, positions: of the head's first token
  Block(const char* k, int64_t k_slot, const char* positions, int64_t slot, int64_t from, int64_t N)
      : k(k + from * k_slot), n(static_cast<int>(std::min<int64_t>(BLOCK, N - from))) {
    for (int t = 0; t < BLOCK; ++t) {
      const int32_t x = t < n ? load<int32_t>(positions + (from + t) * slot) : -1;
      pos[t] = x < 0 ? NEVER : x;
      first = std::min(first, pos[t]), last = std::max(last, pos[t]);
    }
  }
};

// x of any sign and size
inline V tanh(V x) {
  const V e = exp(pick(x < V{}, 2.0f * x, -2.0f * x)), t = (1.0f - e) / (1.0f + e);
  return pick(x < V{}, -t, t);
}

// a tile of scores, rows `step` apart: rows of D numbers, `apart` from each other, against 16 * WIDE keys, every 16 of
// which are laid out by channels
template <int R> inline void products(const float* q, int64_t apart, int D, const float* k, float* s, int64_t step) {
  V sum[R][WIDE] = {};
  for (int d = 0; d < D; ++d) {
    V x[WIDE];
    for (int i = 0; i < WIDE; ++i) x[i] = load<V>(k + (i * D + d) * 16);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < WIDE; ++i) sum[r][i] += x[i] * q[r * apart + d];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < WIDE; ++i) store(s + r * step + 16 * i, sum[r][i]);
}

// against a block of keys
inline void products(int rows, const float* q, int64_t apart, int D, const float* k, float* s, int64_t step) {
  for (int i = 0; i < BLOCK / 16 / WIDE; ++i, k += 16 * WIDE * D, s += 16 * WIDE) switch (rows) {
      case 1: products<1>(q, apart, D, k, s, step); break;
      case 2: products<2>(q, apart, D, k, s, step); break;
      case 3: products<3>(q, apart, D, k, s, step); break;
      case 4: products<4>(q, apart, D, k, s, step); break;
      case 5: products<5>(q, apart, D, k, s, step); break;
      case 6: products<6>(q, apart, D, k, s, step); break;
    }
}

// n keys of a block, `step` bytes apart, by channels
template <class F> void lay(const char* k, int n, int64_t step, int D, float* to) {
  for (int t = 0; t < n; ++t)
    for (int i = 0; i < D / 16; ++i) {
      const V row = F::at(k + t * step, i, D / 16);
      float* at = to + (t / 16 * D + 16 * i) * 16 + t % 16;
      for (int d = 0; d < 16; ++d) at[d * 16] = row[d];
    }
}

}  // namespace
