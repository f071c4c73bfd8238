// Rows of floats or of codes against fp32 queries and weights: portable, converting codes to floats. And rows of bf16
// against queries of bf16, where processors multiply them.
#pragma once
#include "vectors.h"

namespace {

// ---- rows of one token as NV vectors of 16 floats; codes come plane by plane (the first code of every byte, ...)

struct Every {
  using Query = float;
  static constexpr int WIDE = 16;  // numbers of a vector
  static constexpr bool reads(int) { return true; }  // rows of so many
  static inline V query(const float* q, int i) { return load<V>(q + 16 * i); }
};
struct Float32 : Every {
  static constexpr int BITS = 32;
  static inline V at(const char* row, int i, int) { return load<V>(row + 64 * i); }
};
struct BFloat16 : Every {
  static constexpr int BITS = 16;
  static inline V at(const char* row, int i, int) {
    return bits_of<V>(widened(load<Lanes<16>::H>(row + 32 * i)) << 16);
  }
};
struct Float16 : Every {
  static constexpr int BITS = 16;
  static inline V at(const char* row, int i, int) { return of_halves(row + 32 * i); }
};
// 8-bit floats of 4 and 3 bits, divided by 256: as halves with the same bits, the exponents of which begin elsewhere; 0x7f,
// which is no number, becomes one (it is never stored but under a scale that is none)
struct E4M3 : Every {
  static constexpr int BITS = 8;
  static inline V at(const char* row, int i, int) {
    using H = Lanes<16>::H;
    const H x = widened(load<Lanes<16>::S>(row + 16 * i)) << 7;  // the sign twice
    return of_halves(x & uint16_t{0xbfff});
  }
};
#ifdef CALIDROP_PAIRS
// queries are bf16 too: products of two numbers each, exact but for those below 1e-38, which count as 0
struct Pairs : Every {
  using Query = uint16_t;
  static constexpr int BITS = 16, WIDE = 32;
  static constexpr bool reads(int n) { return n % WIDE == 0; }
  static inline Lanes<32>::H at(const char* row, int i, int) { return load<Lanes<32>::H>(row + 64 * i); }
  static inline Lanes<32>::H query(const uint16_t* q, int i) { return load<Lanes<32>::H>(q + 32 * i); }
};
#endif
template <int N> struct Codes : Every {
  static constexpr int BITS = N;
  static inline V at(const char* row, int i, int vectors) {
    const int per_plane = vectors * N / 8, plane = i / per_plane;
    auto x = load<Lanes<16>::B>(row + 16 * (i % per_plane));
    auto c = (x >> static_cast<uint8_t>(N * plane)) & static_cast<uint8_t>((1 << N) - 1);
    return converted<V>(widened(c));
  }
};

// vectors of a row whose products are written out: where registers are few, compilers would then keep sums in memory
constexpr int UNROLLED = REGISTER == 64 ? 8 : 1;
// tokens that are weighed before the next part of their rows is: few, so that memory is read in order
constexpr int TOGETHER = 16;
// Memory is asked for before it is worked on, and in the order in which it lies, which is not that of the work: that reads
// a third faster (AVX2, AVX-512). Codes that narrow registers convert are bound by that, and ask for each token where its row
// is worked on.
template <class F> constexpr bool IN_ORDER = REGISTER == 64 || F::BITS >= 16;
template <class F> constexpr int AHEAD = IN_ORDER<F> ? 32 : 16;  // tokens, from those that are worked on

// asks for the line in which vector i of a row begins, once for all vectors of the line
template <class F> inline void ask_ahead(const char* row, int i) {
  const int at = F::WIDE / 8 * F::BITS * i;
  if (at % 64 == 0) __builtin_prefetch(row + at);
}

// RT rows of scores, of as many tokens at once as registers hold sums of; behind the last it stands in
template <class F, int NV, int RT, bool ASKS>
inline void dots(const char* k, int64_t step, const typename F::Query* q, int D, float* s, int n) {
  for (int t = 0; t < n; t += TOKENS) {
    const char* row[TOKENS];
    for (int j = 0; j < TOKENS; ++j) row[j] = k + std::min(t + j, n - 1) * step;
    Register a[TOKENS * RT] = {};
#pragma GCC unroll UNROLLED
    for (int i = 0; i < NV; ++i) {
      decltype(F::at(k, i, NV)) x[TOKENS];
#pragma GCC unroll 4
      for (int j = 0; j < TOKENS; ++j) {
        x[j] = F::at(row[j], i, NV);
        if constexpr (REGISTER == 64) in_register(x[j]);  // of narrow ones there are too few
        const int next = TOKENS * i + j;
        if constexpr (ASKS && IN_ORDER<F>)
          ask_ahead<F>(row[0] + (AHEAD<F> + next / NV) * step, next % NV);
        else if constexpr (ASKS)
          ask_ahead<F>(row[j] + AHEAD<F> * step, i);
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

// o: rows `wide` apart, of which VT vectors from `from` on
template <class F, int NV, int RT, int VT, bool ASKS>
inline void weigh(const char* v, int64_t step, const float* p, float* o, int wide, int n, int from) {
  V acc[RT][VT];
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < VT; ++i) acc[r][i] = load<V>(o + r * wide + 16 * (from + i));
  for (int t = 0; t < n; ++t) {
    const char* row = v + t * step;
#pragma GCC unroll 8
    for (int i = 0; i < VT; ++i) {
      V x = F::at(row, from + i, NV);
      in_register(x);
      const int next = from * n + VT * t + i;
      if constexpr (ASKS && IN_ORDER<F>)
        ask_ahead<F>(v + (AHEAD<F> + next / NV) * step, next % NV);
      else if constexpr (ASKS)
        ask_ahead<F>(row + AHEAD<F> * step, from + i);
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) acc[r][i] += x * p[r * SCORES + t];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < VT; ++i) store(o + r * wide + 16 * (from + i), acc[r][i]);
}

// in parts of a row whose sums fit the registers
template <class F, int NV, int RT, bool ASKS>
inline void weigh(const char* v, int64_t step, const float* p, float* o, int wide, int n) {
  constexpr int VT = REGISTER == 64 ? NV <= 6 ? NV : 4 : RT > 2 || NV % 2 ? 1 : 2;
  for (int t = 0; t < n; t += TOGETHER)
    for (int from = 0; from < NV; from += VT)
      weigh<F, NV, RT, VT, ASKS>(v + t * step, step, p + t, o, wide, std::min(TOGETHER, n - t), from);
}

// R rows, as many at once as fit the registers: run(r, rows from there on, whether they are the first, who ask for memory)
template <class Run> ALWAYS void all_rows(int R, const Run& run) {
  using std::integral_constant;
  constexpr std::true_type first;
  constexpr std::false_type later;
  switch (R) {
    case 1: return run(0, integral_constant<int, 1>{}, first);
    case 2: return run(0, integral_constant<int, 2>{}, first);
    case 3: return run(0, integral_constant<int, 3>{}, first);
  }
  run(0, integral_constant<int, 4>{}, first);
  int r = 4;
  for (; r + 4 <= R; r += 4) run(r, integral_constant<int, 4>{}, later);
  switch (R - r) {
    case 3: run(r, integral_constant<int, 3>{}, later); break;
    case 2: run(r, integral_constant<int, 2>{}, later); break;
    case 1: run(r, integral_constant<int, 1>{}, later); break;
  }
}

// tokens that all rows are done with before the next are read, which is from the first cache then
inline int strip(int R, int n) { return R > 4 ? TOGETHER : n; }

template <class F, int NV>
void all_dots(const char* k, int64_t step, const typename F::Query* q, int D, float* s, int n, int R) {
  const int some = strip(R, n);
  for (int t = 0; t < n; t += some)
    all_rows(R, [&](int r, auto rows, auto first) __attribute__((always_inline)) {
      dots<F, NV, rows, first>(k + t * step, step, q + r * D, D, s + r * SCORES + t, std::min(some, n - t));
    });
}

template <class F, int NV>
void all_weigh(const char* v, int64_t step, const float* p, float* o, int wide, int n, int R) {
  const int some = strip(R, n);
  for (int t = 0; t < n; t += some)
    all_rows(R, [&](int r, auto rows, auto first) __attribute__((always_inline)) {
      weigh<F, NV, rows, first>(v + t * step, step, p + r * SCORES + t, o + r * wide, wide, std::min(some, n - t));
    });
}

// the widths of rows that there are loops for; a plane of codes fills whole vectors
constexpr int WIDTHS[] = {32, 64, 80, 96, 128, 192, 256, 512, 576};
template <class F> constexpr bool known(int D) { return D * F::BITS % 128 == 0 && F::reads(D); }

// the narrowest that holds D numbers; 0 where none does
template <class F> inline int width_of(int D) {
  for (int wide : WIDTHS)
    if (known<F>(wide) && wide >= D) return wide;
  return 0;
}

// f with the vectors of a row, D / 16, as a constant
template <class F, int I = 0, class Do> inline void of_width(int D, Do f) {
  if constexpr (I < sizeof(WIDTHS) / sizeof(int)) {
    if constexpr (known<F>(WIDTHS[I]))
      if (D == WIDTHS[I]) return f(std::integral_constant<int, WIDTHS[I] / 16>{});
    of_width<F, I + 1>(D, f);
  }
}

template <class F>
void dots_of(int D, const char* k, int64_t step, const typename F::Query* q, float* s, int n, int R) {
  of_width<F>(D, [&](auto vectors) { all_dots<F, vectors * 16 / F::WIDE>(k, step, q, D, s, n, R); });
}

// o: rows `wide` apart
template <class F>
void weigh_of(int D, const char* v, int64_t step, const float* p, float* o, int wide, int n, int R) {
  of_width<F>(D, [&](auto vectors) { all_weigh<F, vectors>(v, step, p, o, wide, n, R); });
}

// which code lies at place i of a row of n whose planes lie one behind the other (the first codes of all bytes, ...)
template <int BITS> inline void plane_order(int n, int* order) {
  constexpr int PER = 8 / BITS;
  for (int plane = 0, bytes = n / PER; plane < PER; ++plane)
    for (int i = 0; i < bytes; ++i) order[plane * bytes + i] = i * PER + plane;
}

}  // namespace
