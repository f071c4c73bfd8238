// Products of codes with AVX-512 VNNI: 32 of them an instruction, where fp32 takes two and the codes must be converted
// first. The other side (queries, or weights of tokens) is rounded to 16 bits of its largest number. Sums are whole
// numbers, exact in 32 bits. What rounding took from the sum of the numbers is given back as if it met the middle code,
// so that only the spread of the codes meets rounding errors.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && !defined(CALIDROP_PORTABLE)
#define CALIDROP_VNNI 1
#include <immintrin.h>

namespace vnni {
namespace {  // nothing here is called from outside, so all of it may become part of who calls it

template <int BITS> constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;
constexpr float MOST = 32512.0f;
constexpr int ROWS = 256;  // of so many, sums of products with a byte stay below 2^31

struct alignas(64) Line {
  int16_t of[32];
};

// the step in which numbers, the largest of them in bits and without its sign in a lane of `most`, become whole ones of 16
// bits: 0 where all are next to nothing, NaN where any is not finite
inline float step_of(__m512i most) {
  const auto bits = static_cast<int32_t>(_mm512_reduce_max_epu32(most));
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (!(largest < INFINITY)) return NAN;
  // below 1e-30 the inverse would overflow; such weights are next to ones of about 1
  return largest > 1e-30f ? largest / MOST : 0.0f;
}

inline __m512i size_of(V x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)); }

// Rows of numbers as whole numbers of 16 bits, the step between them, and what rounding took from the sum of a row. FOUR
// times: every eight of them once for each of four tokens.
template <bool FOUR> struct Words {
  static constexpr int PER = FOUR ? 8 : 32;  // numbers of a line
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
      __m512i most = _mm512_setzero_si512();
      for (int i = 0; i < whole; i += 16) most = _mm512_max_epu32(most, size_of(at(r, i, 16)));
      if (whole < n) most = _mm512_max_epu32(most, size_of(at(r, whole, n - whole)));
      step[r] = step_of(most);
    }
    for (int r = 0; r < rows; ++r) {
      char* line = reinterpret_cast<char*>(lines.data() + static_cast<size_t>(r) * width);
      const bool none = !(step[r] > 0.0f);  // all 0 where any is not finite
      const float inverse = none ? 0.0f : 1.0f / step[r];
      V rest = {};
      const auto put = [&](V y) __attribute__((always_inline)) {
        const __m512i w = _mm512_cvtps_epi32((__m512)y);
        const __m256i words = _mm512_cvtepi32_epi16(w);
        if constexpr (FOUR) {
          _mm512_store_si512(line, _mm512_broadcast_i32x4(_mm256_castsi256_si128(words)));
          _mm512_store_si512(line + 64, _mm512_broadcast_i32x4(_mm256_extracti128_si256(words, 1)));
        } else
          _mm256_store_si256(reinterpret_cast<__m256i*>(line), words);
        line += FOUR ? 128 : 32;
        rest += y - (V)_mm512_cvtepi32_ps(w);
      };
      int i = 0;
      if (!none) {
        for (; i < whole; i += 16) put(at(r, i, 16) * inverse);
        if (whole < n) put(at(r, whole, n - whole) * inverse), i += 16;
      }
      for (; i < end; i += 16) put(V{});
      lost[r] = sum(rest) * step[r];
    }
  }
};

constexpr int AHEAD = 64;  // rows between those that are worked on and those that memory is asked for

// the v-th code of every word
template <int BITS> inline __m512i planes(__m512i x, int v) {
  if (v) x = _mm512_srli_epi16(x, BITS * v);
  return v == 16 / BITS - 1 ? x : _mm512_and_si512(x, _mm512_set1_epi16((1 << BITS) - 1));
}

// Rows of codes are cut into chunks of W bytes, as many as a power of two allows up to a vector. A chunk is repeated to
// fill a vector of words; each copy gives other codes of its words, so that every vector has 32 codes.
template <int BITS, int W> struct Chunk {
  static constexpr int PER = 16 / BITS, COPIES = 64 / W, VECTORS = PER / COPIES, CODES = 8 * W / BITS;
  static inline __m512i load(const char* p) {
    if constexpr (W == 64) return _mm512_loadu_si512(p);
    if constexpr (W == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (W == 16) {  // written out, or compilers load it first and then shuffle
      __m512i x;
      asm("vbroadcasti32x4 %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m128i_u*>(p)));
      return x;
    }
    return _mm512_set1_epi64(::load<int64_t>(p));
  }
  // the code of word g in vector v
  static constexpr int code(int v, int g) { return g % (W / 2) * PER + v * COPIES + g / (W / 2); }
  // the word in lane i of `pair` u
  static constexpr int word(int u, int i) { return i / 4 * 8 + 4 * u + i % 4; }
  // words of two rows side by side: the lower (u = 0) or upper halves of every eight
  static inline __m512i pair(__m512i a, __m512i b, int u) { return u ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b); }
  static inline __m512i codes(__m512i x, int v, int u) {
    if constexpr (COPIES == 1) return planes<BITS>(x, v);
    return _mm512_and_si512(_mm512_srlv_epi16(x, _mm512_load_si512(&PAIRED[v][u])), _mm512_set1_epi16((1 << BITS) - 1));
  }

 private:
  struct Tables {
    Line paired[VECTORS][2];
  };
  static constexpr Tables made() {
    Tables t = {};
    for (int v = 0; v < VECTORS; ++v)
      for (int g = 0; g < 32; ++g)
        for (int u = 0; u < 2; ++u) t.paired[v][u].of[g] = BITS * (v * COPIES + word(u, g / 2) / (W / 2));
    return t;
  }
  static constexpr Tables TABLES = made();
  static constexpr const Line (&PAIRED)[VECTORS][2] = TABLES.paired;
};

// sum += a * b, in words. Written out because compilers (GCC 12) copy every sum twice around their own instruction, and
// load what should stay in memory.
inline void add(__m512i& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
inline void add(__m512i& sum, __m512i a, const Line& b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(b)); }
inline void begin(__m512i& sum, __m512i a, const Line& b) { asm("vpmaddwd %2, %1, %0" : "=v"(sum) : "v"(a), "m"(b)); }

// bytes of a chunk of rows of n codes; n is a multiple of 32
constexpr int chunk(int n, int bits) {
  const int bytes = n * bits / 8, least = bytes & -bytes;
  return least < 64 ? least : 64;
}

template <int BITS, class F> inline auto of_chunk(int n, F f) {
  switch (chunk(n, BITS)) {
    case 64: return f(Chunk<BITS, 64>{});
    case 32: return f(Chunk<BITS, 32>{});
    case 16: if constexpr (BITS <= 4) return f(Chunk<BITS, 16>{});
    default: if constexpr (BITS <= 2) return f(Chunk<BITS, 8>{});
  }
  return f(Chunk<BITS, 64>{});
}

// whether rows of n codes can be read
constexpr bool fits(int n) { return n % 32 == 0 && n <= ROWS; }

// which code of a row of n `dots` multiplies with number i of a query
template <int BITS> inline void code_order(int n, int* order) {
  constexpr int PER = 16 / BITS;
  for (int i = 0; i < n; ++i) order[i] = (i / 8 / PER * 8 + i % 8) * PER + i / 8 % PER;
}

// which code of a row of n the i-th sum of `rows` belongs to
template <int BITS> inline void sum_order(int n, int* order) {
  of_chunk<BITS>(n, [&](auto c) {
    for (int i = 0; i < n; ++i) {
      const int in = i % c.CODES, vector = in / 16;
      order[i] = i - in + c.code(vector % c.VECTORS, c.word(vector / c.VECTORS, in % 16));
    }
  });
}

// sums over rows of weight times code: `to` + r * width gets those of RT weights, for `pair` U to U + UT - 1
template <class C, int BITS, int RT, int U, int UT>
__attribute__((noinline)) void rows_of(const char* p, int64_t step, int n, const Words<false>& w, int r0, float* to,
                                       int width) {  // by itself, so that nothing else wants its registers
  constexpr int VT = C::VECTORS;
  __m512i sum[RT][UT * VT];  // all loops over it are unrolled, so that it lies in registers
  const int32_t* weights[RT];
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r) {
    weights[r] = w.pairs(r0 + r);
#pragma GCC unroll 16
    for (int i = 0; i < UT * VT; ++i) sum[r][i] = _mm512_setzero_si512();
  }
  const auto two = [&](__m512i a, __m512i b, int64_t i) __attribute__((always_inline)) {
    __m512i x[RT];
#pragma GCC unroll 16
    for (int r = 0; r < RT; ++r) x[r] = _mm512_set1_epi32(weights[r][i]);
#pragma GCC unroll 16
    for (int u = 0; u < UT; ++u) {
      const __m512i both = C::pair(a, b, U + u);
#pragma GCC unroll 16
      for (int v = 0; v < VT; ++v) {
        const __m512i codes = C::codes(both, v, U + u);
#pragma GCC unroll 16
        for (int r = 0; r < RT; ++r) add(sum[r][u * VT + v], codes, x[r]);
      }
    }
  };
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i, p += 2 * step) {
    if constexpr (U == 0)
      for (int j = 0; j < 2; ++j) _mm_prefetch(p + (AHEAD + j) * step, _MM_HINT_T0);
    two(C::load(p), C::load(p + step), i);
  }
  if (n % 2) two(C::load(p), _mm512_setzero_si512(), pairs);
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < UT * VT; ++i) {
      float* o = to + static_cast<size_t>(r0 + r) * width + 16 * (U * VT + i);
      const __m512 y = _mm512_add_ps(_mm512_loadu_ps(o), _mm512_set1_ps(MIDDLE<BITS> * w.lost[r0 + r]));
      _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][i]), _mm512_set1_ps(w.step[r0 + r]), y));
    }
}

template <class C, int BITS, int RT>
inline void chunk_of(const char* p, int64_t step, int n, const Words<false>& w, int r, float* to, int width) {
  if constexpr (2 * C::VECTORS * RT <= 16)
    rows_of<C, BITS, RT, 0, 2>(p, step, n, w, r, to, width);
  else {
    rows_of<C, BITS, RT, 0, 1>(p, step, n, w, r, to, width);
    rows_of<C, BITS, RT, 1, 1>(p, step, n, w, r, to, width);
  }
}

// n >= 1 rows of `codes` codes, `step` bytes apart; w holds R rows of n weights; sums in the order of `sum_order`
template <int BITS>
inline void rows(const char* p, int64_t step, int n, int codes, const Words<false>& w, int R, float* to, int width) {
  of_chunk<BITS>(codes, [&](auto c) {
    using C = decltype(c);
    constexpr int RT = C::VECTORS <= 4 ? 4 : 2;
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

// 32 numbers, the i-th from place[i], without 32 single writes
inline void take32(const float* from, const int* place, float* to) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place), b));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place + 16), b));
}

// the first N sixteen bytes of four rows, those of all rows side by side
template <int N> inline void beside(const char* p, int64_t step, __m512i* x) {
  if constexpr (N == 1) {
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
    const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    x[0] = _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
  } else if constexpr (N == 2) {
    const auto at = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * step)); };
    const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(at(0)), at(1), 1);
    const __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(at(2)), at(3), 1);
    x[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), x[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
  } else {
    const auto at = [&](int i) { return _mm512_loadu_si512(p + i * step); };
    const __m512i a = at(0), b = at(1), c = at(2), d = at(3);
    const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    x[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), x[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    const __m512i ab2 = _mm512_shuffle_i32x4(a, b, 0xee), cd2 = _mm512_shuffle_i32x4(c, d, 0xee);
    x[2] = _mm512_shuffle_i32x4(ab2, cd2, 0x88), x[3] = _mm512_shuffle_i32x4(ab2, cd2, 0xdd);
  }
}

// products of four tokens, from the I-th sixteen bytes of their rows on, added to sums of RT queries: even planes of
// codes to the one, odd ones to the other, as an instruction waits for the one before that adds to the same
template <int BITS, int J, int RT, int I = 0>
inline __attribute__((always_inline)) void multiply(const char* k, int64_t step, const Line* const* q, __m512i (*sum)[2]) {
  if constexpr (I < J) {
    constexpr int N = J - I >= 4 ? 4 : J - I >= 2 ? 2 : 1, PER = 16 / BITS;
    __m512i x[N];
    beside<N>(k + 16 * I, step, x);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < PER; ++v) {
        const __m512i codes = planes<BITS>(x[j], v);
#pragma GCC unroll 4
        for (int r = 0; r < RT; ++r) {
          const Line& mine = q[r][(I + j) * PER + v];
          if (I + j == 0 && v < 2)
            begin(sum[r][v % 2], codes, mine);
          else
            add(sum[r][v % 2], codes, mine);
        }
      }
    multiply<BITS, J, RT, I + N>(k, step, q, sum);
  }
}

// products of n tokens' codes, rows of J times sixteen bytes, with RT queries in the order of `code_order`: s[r * SCORES + t]
template <int BITS, int J, int RT>
__attribute__((noinline)) void dots_of(const char* k, int64_t step, int n, const Words<true>& q, int r0, float* s) {
  const Line* mine[RT];
  alignas(64) float by[16] = {}, more[16] = {};  // of query r in lanes r, 4 + r, 8 + r and 12 + r, one lane a token
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
    mine[r] = q.of(r0 + r);
    for (int t = 0; t < 4; ++t) by[4 * t + r] = q.step[r0 + r], more[4 * t + r] = MIDDLE<BITS> * q.lost[r0 + r];
  }
  const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  float* to = s + r0 * SCORES;
  int t = 0;
  for (; t + 4 <= n; t += 4, k += 4 * step) {
#pragma GCC unroll 16
    for (int i = 0; i < 16 * J; i += 64)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm_prefetch(k + (AHEAD + j) * step + i, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) asm("" : "+r"(mine[r]));  // or compilers find all addresses before the loop, and store them
    __m512i sum[RT][2], x[4];
    multiply<BITS, J, RT>(k, step, mine, sum);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) x[r] = r < RT ? _mm512_add_epi32(sum[r % RT][0], sum[r % RT][1]) : _mm512_setzero_si512();
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    const __m512i each = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(each), _mm512_load_ps(by), _mm512_load_ps(more));
    const __m512 all = _mm512_permutexvar_ps(turn, y);
    _mm_storeu_ps(to + t, _mm512_castps512_ps128(all));
    if constexpr (RT > 1) _mm_storeu_ps(to + SCORES + t, _mm512_extractf32x4_ps(all, 1));
    if constexpr (RT > 2) _mm_storeu_ps(to + 2 * SCORES + t, _mm512_extractf32x4_ps(all, 2));
    if constexpr (RT > 3) _mm_storeu_ps(to + 3 * SCORES + t, _mm512_extractf32x4_ps(all, 3));
  }
  if (t == n) return;
  alignas(64) char left[4][16 * J] = {};  // SCORES is a multiple of 4, so there is room for their products
  for (int i = 0; i < n - t; ++i) std::memcpy(left[i], k + i * step, 16 * J);
  dots_of<BITS, J, RT>(left[0], 16 * J, 4, q, r0, s + t);
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

// for the widths of rows.h, which fill whole sixteen bytes
template <int BITS> inline void dots(const char* k, int64_t step, int n, int codes, const Words<true>& q, int R, float* s) {
  const auto of = [&](auto width) {
    if constexpr (width * BITS % 128 == 0) all_dots<BITS, width * BITS / 128>(k, step, n, q, R, s);
  };
  switch (codes) {
    case 32: return of(std::integral_constant<int, 32>{});
    case 64: return of(std::integral_constant<int, 64>{});
    case 96: return of(std::integral_constant<int, 96>{});
    case 128: return of(std::integral_constant<int, 128>{});
    case 192: return of(std::integral_constant<int, 192>{});
    case 256: return of(std::integral_constant<int, 256>{});
  }
}

}  // namespace
}  // namespace vnni
#endif
