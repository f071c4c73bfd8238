// Products of codes in whole numbers, 32 of them an instruction with AVX-512 VNNI and 16 with AVX2, where fp32 takes two and
// the codes must be converted first. The other side (queries, or weights of tokens) is rounded to 16 bits of its largest
// number. Sums are whole numbers, exact in 32 bits. What rounding took from the sum of the numbers is given back as if it
// met the middle code, so that only the spread of the codes meets rounding errors.
#pragma once
#include "registers.h"

#ifdef CALIDROP_WORDS
namespace words {
namespace {

template <int BITS> constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;
constexpr float MOST = 32512.0f;
constexpr int ROWS = 256;  // of so many, sums of products with a byte stay below 2^31

// the step in which numbers, the largest of them in bits and without its sign in a lane of `most`, become whole ones of 16
// bits: 0 where all are next to nothing, NaN where any is not finite
inline float step_of(Int most) {
  const auto bits = static_cast<int32_t>(largest(most));
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (!(largest < INFINITY)) return NAN;
  // below 1e-30 the inverse would overflow; such weights are next to ones of about 1
  return largest > 1e-30f ? largest / MOST : 0.0f;
}

// Rows of numbers as whole numbers of 16 bits, the step between them, and what rounding took from the sum of a row.
// REPEATED: every eight of them once for each of ROWS_AT_ONCE tokens.
template <bool REPEATED> struct Words {
  static constexpr int PER = REPEATED ? 8 : 2 * LANES;  // numbers of a line
  std::vector<Line> lines;
  std::vector<float> step, lost;
  int width = 0;  // lines of a row
  void size(int rows, int n) {
    width = (n + PER - 1) / PER;
    lines.resize(static_cast<size_t>(rows) * width);
    step.resize(rows), lost.resize(rows);
  }
  // row r becomes x[0..n), rows of x a number of floats apart; the rest of it 0
  void set(const float* x, int64_t apart, int n) {
    become(n, [=](int r, int i, int left) { return head(x + r * apart + i, left); });
  }
  // or x times scale
  void set(const float* x, int64_t apart, int n, const float* scale) {
    become(n, [=](int r, int i, int left) { return head(x + r * apart + i, left) * head(scale + i, left); });
  }
  const Line* of(int r) const { return lines.data() + static_cast<size_t>(r) * width; }
  const int32_t* pairs(int r) const { return reinterpret_cast<const int32_t*>(of(r)); }

 private:
  // at(r, i, left): numbers i to i + 15 of row r, 0 where they are not left
  template <class At> void become(int n, const At& at) {
    const int rows = static_cast<int>(step.size()), whole = n / 16 * 16, end = PER * width;
    for (int r = 0; r < rows; ++r) {  // rows are independent: what one waits for, another computes
      Int most = zero();
      for (int i = 0; i < whole; i += 16) most = larger(most, size_of(at(r, i, 16)));
      if (whole < n) most = larger(most, size_of(at(r, whole, n - whole)));
      step[r] = step_of(most);
    }
    for (int r = 0; r < rows; ++r) {
      char* line = reinterpret_cast<char*>(lines.data() + static_cast<size_t>(r) * width);
      const bool none = !(step[r] > 0.0f);  // all 0 where any is not finite
      const float inverse = none ? 0.0f : 1.0f / step[r];
      V rest = {};
      const auto next = [&](V y) __attribute__((always_inline)) { rest += y - put<REPEATED>(line, y); };
      int i = 0;
      if (!none) {
        for (; i < whole; i += 16) next(at(r, i, 16) * inverse);
        if (whole < n) next(at(r, whole, n - whole) * inverse), i += 16;
      }
      for (; i < end; i += 16) next(V{});
      lost[r] = sum(rest) * step[r];
    }
  }
};

// asks for memory that the rows behind this one will need
ALWAYS void ask_behind(const char* row, [[maybe_unused]] int64_t step) {
#ifdef CALIDROP_VNNI
  // what is near for the first cache, to which only so much can be on its way, and what is far for the second: with the near
  // alone int8 reads a quarter slower
  __builtin_prefetch(row + 8192, 0, 3), __builtin_prefetch(row + 32768, 0, 2);
#else
  __builtin_prefetch(row + 64 * step);
#endif
}

// the v-th code of every word
template <int BITS> inline Int planes(Int x, int v) {
  if (v) x = right(x, BITS * v);
  return v == 16 / BITS - 1 ? x : both(x, all16((1 << BITS) - 1));
}

// Rows of codes are cut into chunks of W bytes, as many as a power of two allows up to a register. A chunk is repeated to
// fill a register of words; each copy gives other codes of its words, so that every register has as many codes as words.
template <int BITS, int W> struct Chunk {
  static constexpr int PER = 16 / BITS, COPIES = REGISTER / W, VECTORS = PER / COPIES, CODES = 8 * W / BITS;
  static inline Int load(const char* p) { return repeated<W>(p); }
  // the code of word g in vector v
  static constexpr int code(int v, int g) { return g % (W / 2) * PER + v * COPIES + g / (W / 2); }
  // the word in lane i of `pair` u
  static constexpr int word(int u, int i) { return i / 4 * 8 + 4 * u + i % 4; }
  // words of two rows side by side: the lower (u = 0) or upper halves of every eight
  static inline Int pair(Int a, Int b, int u) { return u ? high(a, b) : low(a, b); }
  static inline Int codes(Int x, int v, int u) {
    if constexpr (COPIES == 1) return planes<BITS>(x, v);
    return both(right(x, PAIRED[v][u]), all16((1 << BITS) - 1));
  }

 private:
  struct Tables {
    Line paired[VECTORS][2];
  };
  static constexpr Tables made() {
    Tables t = {};
    for (int v = 0; v < VECTORS; ++v)
      for (int g = 0; g < 2 * LANES; ++g)
        for (int u = 0; u < 2; ++u)
          if (SHIFTS_WORDS || g % 2 == 0) t.paired[v][u].of[g] = BITS * (v * COPIES + word(u, g / 2) / (W / 2));
    return t;
  }
  static constexpr Tables TABLES = made();
  static constexpr const Line (&PAIRED)[VECTORS][2] = TABLES.paired;
};

// bytes of a chunk of rows of n codes; n is a multiple of 32
constexpr int chunk(int n, int bits) {
  const int bytes = n * bits / 8, least = bytes & -bytes;
  return least < REGISTER ? least : REGISTER;
}

template <int BITS, class F> inline auto of_chunk(int n, F f) {
  switch (chunk(n, BITS)) {
    case 64: if constexpr (REGISTER == 64) return f(Chunk<BITS, 64>{});
    case 32: return f(Chunk<BITS, 32>{});
    case 16: if constexpr (BITS <= 4) return f(Chunk<BITS, 16>{});
    default: if constexpr (BITS <= 2) return f(Chunk<BITS, 8>{});
  }
  return f(Chunk<BITS, REGISTER>{});
}

// whether sums over rows of n codes can be made
constexpr bool fits(int n) { return n % 32 == 0; }

// which code of a row of n `dots` multiplies with number i of a query
template <int BITS> inline void code_order(int n, int* order) {
  constexpr int PER = 16 / BITS;
  for (int i = 0; i < n; ++i) order[i] = (i / 8 / PER * 8 + i % 8) * PER + i / 8 % PER;
}

// which code of a row of n the i-th sum of `rows` belongs to
template <int BITS> inline void sum_order(int n, int* order) {
  of_chunk<BITS>(n, [&](auto c) {
    for (int i = 0; i < n; ++i) {
      const int in = i % c.CODES, vector = in / LANES;
      order[i] = i - in + c.code(vector % c.VECTORS, c.word(vector / c.VECTORS, in % LANES));
    }
  });
}

// sums over rows of weight times code: `to` + r * width gets those of RT weights, for `pair` U to U + UT - 1 and vectors
// from V0 on, VT of them
template <class C, int BITS, int RT, int U, int UT, int V0, int VT>
__attribute__((noinline)) void rows_of(const char* p, int64_t step, int n, const Words<false>& w, int r0, float* to,
                                       int width) {  // by itself, so that nothing else wants its registers
  Int sum[RT][UT * VT];  // all loops over it are unrolled, so that it lies in registers
  const int32_t* weights[RT];
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r) {
    weights[r] = w.pairs(r0 + r);
#pragma GCC unroll 16
    for (int i = 0; i < UT * VT; ++i) sum[r][i] = zero();
  }
  const auto two = [&](Int a, Int b, int64_t i) __attribute__((always_inline)) {
    Int x[RT];
#pragma GCC unroll 16
    for (int r = 0; r < RT; ++r) x[r] = all32(weights[r][i]);
#pragma GCC unroll 16
    for (int u = 0; u < UT; ++u) {
      const Int both = C::pair(a, b, U + u);
#pragma GCC unroll 16
      for (int v = 0; v < VT; ++v) {
        const Int codes = C::codes(both, V0 + v, U + u);
#pragma GCC unroll 16
        for (int r = 0; r < RT; ++r) add(sum[r][u * VT + v], codes, x[r]);
      }
    }
  };
  const int64_t pairs = n / 2;
#pragma GCC unroll PAIRS
  for (int64_t i = 0; i < pairs; ++i, p += 2 * step) {
    if constexpr (U == 0 && V0 == 0)
      for (int j = 0; j < 2; ++j) ask_behind(p + j * step, step);
    two(C::load(p), C::load(p + step), i);
  }
  if (n % 2) two(C::load(p), zero(), pairs);
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < UT * VT; ++i)
      give(to + static_cast<size_t>(r0 + r) * width + LANES * ((U + i / VT) * C::VECTORS + V0 + i % VT), sum[r][i],
           w.step[r0 + r], MIDDLE<BITS> * w.lost[r0 + r]);
}

// in parts whose sums fit the registers
template <class C, int BITS, int RT, int V0 = 0>
inline void chunk_of(const char* p, int64_t step, int n, const Words<false>& w, int r, float* to, int width) {
  constexpr int VT = RT * C::VECTORS <= SUMS ? C::VECTORS : RT <= 2 ? SUMS / RT : SUMS / 4;
  if constexpr (2 * VT * RT <= SUMS)
    rows_of<C, BITS, RT, 0, 2, V0, VT>(p, step, n, w, r, to, width);
  else {
    rows_of<C, BITS, RT, 0, 1, V0, VT>(p, step, n, w, r, to, width);
    rows_of<C, BITS, RT, 1, 1, V0, VT>(p, step, n, w, r, to, width);
  }
  if constexpr (V0 + VT < C::VECTORS) chunk_of<C, BITS, RT, V0 + VT>(p, step, n, w, r, to, width);
}

// n >= 1 rows of `codes` codes, `step` bytes apart; w holds R rows of n weights; sums in the order of `sum_order`
template <int BITS>
inline void rows(const char* p, int64_t step, int n, int codes, const Words<false>& w, int R, float* to, int width) {
  of_chunk<BITS>(codes, [&](auto c) {
    using C = decltype(c);
    constexpr int RT = SUMS == 8 || C::VECTORS <= 4 ? 4 : 2;  // where sums are few, vectors are asked in parts instead
    for (int j = 0; j < codes / C::CODES; ++j) {
      const char* at = p + j * (C::CODES * BITS / 8);
      float* sums = to + j * C::CODES;
      int r = 0;
      for (; r + RT <= R; r += RT) chunk_of<C, BITS, RT>(at, step, n, w, r, sums, width);
      if constexpr (RT == 4) {
        if (R - r == 3) chunk_of<C, BITS, 3>(at, step, n, w, r, sums, width);
        if (R - r == 2) chunk_of<C, BITS, 2>(at, step, n, w, r, sums, width);
      }
      if (R - r == 1) chunk_of<C, BITS, 1>(at, step, n, w, r, sums, width);
    }
  });
}

#ifdef CALIDROP_VNNI
// 32 numbers, the i-th from place[i], without 32 single writes
inline void take32(const float* from, const int* place, float* to) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place), b));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place + 16), b));
}
#endif

// what products with one register take from memory, and those with several from a register
template <int G> struct Operand {
  const Line& of;
  explicit Operand(const Line& x) : of(x) {}
};
template <> struct Operand<2> {
  Int of;
  explicit Operand(const Line& x) : of(reinterpret_cast<const Int&>(x)) {}
};

// products of ROWS_AT_ONCE tokens and of as many behind them, G times, from the I-th sixteen bytes of their rows on, added to
// sums of RT queries
template <int BITS, int J, int RT, int G, int I = 0>
inline __attribute__((always_inline)) void multiply(const char* k, int64_t step, const Line* const* q, Int (*sum)[RT][CHAINS]) {
  if constexpr (I < J) {
    constexpr int LEFT = J - I < PIECES ? J - I : PIECES, N = LEFT >= 4 ? 4 : LEFT >= 2 ? 2 : 1, PER = 16 / BITS;
    Int x[G][N];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) beside<N>(k + g * ROWS_AT_ONCE * step + 16 * I, step, x[g]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < PER; ++v) {
        Int codes[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) codes[g] = planes<BITS>(x[g][j], v);
#pragma GCC unroll 4
        for (int r = 0; r < RT; ++r) {
          const Operand<G> mine(q[r][(I + j) * PER + v]);
#pragma GCC unroll 2
          for (int g = 0; g < G; ++g)
            if (I + j == 0 && v < CHAINS)
              begin(sum[g][r][v % CHAINS], codes[g], mine.of);
            else
              add(sum[g][r][v % CHAINS], codes[g], mine.of);
        }
      }
    multiply<BITS, J, RT, G, I + N>(k, step, q, sum);
  }
}

// products of n tokens' codes, rows of J times sixteen bytes, with RT queries in the order of `code_order`: s[r * SCORES + t]
template <int BITS, int J, int RT>
__attribute__((noinline)) void dots_of(const char* k, int64_t step, int n, const Words<true>& q, int r0, float* s) {
  const Line* mine[RT];
  alignas(REGISTER) float by[LANES] = {}, more[LANES] = {};  // of query r in lanes r, 4 + r, ..., one lane a token
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
    mine[r] = q.of(r0 + r);
    for (int t = 0; t < ROWS_AT_ONCE; ++t) by[4 * t + r] = q.step[r0 + r], more[4 * t + r] = MIDDLE<BITS> * q.lost[r0 + r];
  }
  float* to = s + r0 * SCORES;
  int t = 0;
  const auto next = [&](auto groups) __attribute__((always_inline)) {
    constexpr int G = groups, MANY = G * ROWS_AT_ONCE;
    for (; t + MANY <= n; t += MANY, k += MANY * step) {
#pragma GCC unroll 16
      for (int i = 0; i < 16 * J; i += 64)
#pragma GCC unroll 8
        for (int j = 0; j < MANY; ++j) ask_behind(k + j * step + i, step);
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) asm("" : "+r"(mine[r]));  // or compilers find all addresses before the loop, and store them
      Int sum[G][RT][CHAINS], x[G][4];
      multiply<BITS, J, RT, G>(k, step, mine, sum);
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
          x[g][r] = r >= RT ? zero() : CHAINS == 2 ? plus(sum[g][r % RT][0], sum[g][r % RT][CHAINS - 1]) : sum[g][r % RT][0];
      give_rows<RT>(x, by, more, to + t, SCORES);
    }
  };
  if constexpr (GROUPS > 1) next(std::integral_constant<int, GROUPS>{});
  next(std::integral_constant<int, 1>{});
  if (t == n) return;
  alignas(64) char left[ROWS_AT_ONCE][16 * J] = {};  // which divides SCORES, so there is room for their products
  for (int i = 0; i < n - t; ++i) std::memcpy(left[i], k + i * step, 16 * J);
  dots_of<BITS, J, RT>(left[0], 16 * J, ROWS_AT_ONCE, q, r0, s + t);
}

template <int BITS, int J> inline void all_dots(const char* k, int64_t step, int n, const Words<true>& q, int R, float* s) {
  int r = 0;
  for (; r + 4 <= R; r += 4) dots_of<BITS, J, 4>(k, step, n, q, r, s);
  switch (R - r) {
    case 3: dots_of<BITS, J, 3>(k, step, n, q, r, s); break;
    case 2: dots_of<BITS, J, 2>(k, step, n, q, r, s); break;
    case 1: dots_of<BITS, J, 1>(k, step, n, q, r, s); break;
  }
}

// whether rows of n codes are among those that `dots` reads; of many bytes the sums could be too large
template <int BITS> constexpr bool multiplies(int n) {
  const bool long_one = BITS < 8 && (n == 512 || n == 576);
  return n * BITS % 128 == 0 && (n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256 || long_one);
}

// of the equal parts in which it reads them; 0 where it cannot
template <int BITS> constexpr int part(int n) {
  if (multiplies<BITS>(n)) return n;
  return BITS == 8 && n == 512 ? 256 : BITS == 8 && n == 576 ? 192 : 0;
}

// for the widths of rows.h, which fill whole sixteen bytes
template <int BITS> inline void dots(const char* k, int64_t step, int n, int codes, const Words<true>& q, int R, float* s) {
  const auto of = [&](auto width) {
    if constexpr (multiplies<BITS>(width)) all_dots<BITS, width * BITS / 128>(k, step, n, q, R, s);
  };
  switch (codes) {
    case 32: return of(std::integral_constant<int, 32>{});
    case 64: return of(std::integral_constant<int, 64>{});
    case 96: return of(std::integral_constant<int, 96>{});
    case 128: return of(std::integral_constant<int, 128>{});
    case 192: return of(std::integral_constant<int, 192>{});
    case 256: return of(std::integral_constant<int, 256>{});
    case 512: return of(std::integral_constant<int, 512>{});
    case 576: return of(std::integral_constant<int, 576>{});
  }
}

}  // namespace
}  // namespace words
#endif
