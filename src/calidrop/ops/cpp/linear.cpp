// A linear layer for a few rows: its weights are read once, at the pace of memory. The oracle is torch's linear.
#include "array.h"
#include "rows.h"
#include "threads.h"

namespace {

constexpr int64_t AWAY = 8192;  // bytes from what is worked on to what memory is asked for

// products of n rows of weights, one behind the other, with RT rows of D numbers: the loop of `dots` for any D
template <class F, int RT, bool ASKS>
inline void long_dots(const char* w, int64_t step, const typename F::Query* q, int D, float* s, int n) {
  const int vectors = D / F::WIDE, size = F::WIDE / 8 * F::BITS;
  for (int t = 0; t < n; t += TOKENS) {
    const char* row[TOKENS];
    for (int j = 0; j < TOKENS; ++j) row[j] = w + std::min(t + j, n - 1) * step;
    Register a[TOKENS * RT] = {};
    for (int i = 0; i < vectors; ++i) {
      decltype(F::at(w, i, vectors)) x[TOKENS];
#pragma GCC unroll 4
      for (int j = 0; j < TOKENS; ++j) {
        x[j] = F::at(row[j], i, vectors);
        if constexpr (REGISTER == 64) in_register(x[j]);  // of narrow ones there are too few
        if constexpr (ASKS) __builtin_prefetch(row[0] + AWAY + (TOKENS * i + j) * size);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        auto y = F::query(q + r * D, i);
        in_register(y);
#pragma GCC unroll 4
        for (int j = 0; j < TOKENS; ++j) add_products(a[TOKENS * r + j], x[j], y);
      }
    }
    store_sums<RT>(a, s + t, SCORES);
  }
}

struct Linear {
  const char *w, *bias;
  int dtype;  // of all but sums
  int R, O, I;
  char* out;  // [R,O]
};

template <class F> void multiply(const Linear& c, const typename F::Query* x, int threads) {
  const int64_t step = int64_t{c.I} * F::BITS / 8, most = int64_t{threads} * SCORES;
  const int64_t parts = threads * ((c.O + most - 1) / most);
  const int64_t some = ((c.O + parts - 1) / parts + TOGETHER - 1) / TOGETHER * TOGETHER;  // rows of weights of a task
  const auto start = [&] { return std::vector<float>(c.R * SCORES); };
  each((c.O + some - 1) / some, threads, start, [&](int64_t task, std::vector<float>& s) {
    const int64_t from = task * some;
    const int n = static_cast<int>(std::min<int64_t>(some, c.O - from));
    for (int t = 0; t < n; t += TOGETHER)
      all_rows(c.R, [&](int r, auto rows, auto first) __attribute__((always_inline)) {
        long_dots<F, rows, first>(c.w + (from + t) * step, step, x + r * c.I, c.I, s.data() + r * SCORES + t,
                                  std::min(TOGETHER, n - t));
      });
    for (int r = 0; r < c.R; ++r)
      for (int t = 0; t < n; ++t) {
        const float y = s[r * SCORES + t] + (c.bias ? number(c.bias, from + t, c.dtype) : 0.0f);
        put(c.out, r * c.O + from + t, c.dtype, y);
      }
  });
}

}  // namespace

// x [R,I], w [O,I], bias [O] or none, out [R,O], each without gaps and of one dtype, fp32 or bf16; I fills vectors
extern "C" void calidrop_linear(
    const char* w, const char* bias, int32_t dtype, const char* x, int32_t R, int32_t O, int32_t I, char* out, int32_t threads) {
  const Linear c{w, bias, dtype, R, O, I, out};
  if (dtype == F32) return multiply<Float32>(c, reinterpret_cast<const float*>(x), threads);
#ifdef CALIDROP_PAIRS
  if (I % Pairs::WIDE == 0) return multiply<Pairs>(c, reinterpret_cast<const uint16_t*>(x), threads);
#endif
  std::vector<float> floats(static_cast<size_t>(R) * I);
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = number(x, i, dtype);
  multiply<BFloat16>(c, floats.data(), threads);
}
