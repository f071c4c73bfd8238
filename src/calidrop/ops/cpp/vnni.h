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

// the step in which n numbers become whole ones of 16 bits: 0 where all are next to nothing, NaN where any is not finite
inline float step_of(const float* x, int n) {
  V most = {}, total = {};
  for (int i = 0; i < n; i += 16) {
    const V y = head(x + i, n - i), size = y < V{} ? -y : y;
    most = size > most ? size : most;
    total += y * 0.0f;  // NaN where any is not finite
  }
  const float largest = _mm512_reduce_max_ps((__m512)most);
  if (_mm512_cmp_ps_mask((__m512)total, (__m512)total, _CMP_UNORD_Q)) return NAN;
  // below 1e-30 the inverse would overflow; such weights are next to ones of about 1
  return largest > 1e-30f ? largest / MOST : 0.0f;
}

// rows of numbers as whole numbers of 16 bits, the step between them, and what rounding took from the sum of a row
struct Words {
  std::vector<Line> lines;
  std::vector<float> step, lost;
  int width = 0;  // lines of a row
  void size(int rows, int n) {
    width = (n + 31) / 32;
    lines.resize(static_cast<size_t>(rows) * width);
    step.resize(rows), lost.resize(rows);
  }
  // row r becomes x[0..n), rows of x a number of floats apart; the rest of it 0
  void set(const float* x, int64_t apart, int n) {
    const int rows = static_cast<int>(step.size());
    // rows are independent: what one waits for, another computes
    for (int r = 0; r < rows; ++r) step[r] = step_of(x + r * apart, n);
    for (int r = 0; r < rows; ++r) {
      const bool none = !(step[r] > 0.0f);  // all 0 where any is not finite
      const float inverse = none ? 0.0f : 1.0f / step[r];
      int16_t* to = lines[static_cast<size_t>(r) * width].of;
      V rest = {};
      for (int i = 0; i < 32 * width; i += 16) {
        const V y = i < n && !none ? head(x + r * apart + i, n - i) * inverse : V{};
        const __m512i w = _mm512_cvtps_epi32((__m512)y);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(w));
        rest += y - (V)_mm512_cvtepi32_ps(w);
      }
      lost[r] = sum(rest) * step[r];
    }
  }
  const Line* of(int r) const { return lines.data() + static_cast<size_t>(r) * width; }
  const int32_t* pairs(int r) const { return reinterpret_cast<const int32_t*>(of(r)); }
};

// Rows that are read next: asked for along with work on others, as the codes of a block are too few for a processor to
// see what is coming. Where they are shorter or longer than those, nothing but time is lost.
struct Ahead {
  const char* p;
  int64_t step;
};

// Rows of codes are cut into chunks of W bytes, as many as a power of two allows up to a vector. A chunk is repeated to
// fill a vector of words; each copy gives other codes of its words, so that every vector has 32 codes.
template <int BITS, int W> struct Chunk {
  static constexpr int PER = 16 / BITS, COPIES = 64 / W, VECTORS = PER / COPIES, CODES = 8 * W / BITS;
  static inline __m512i load(const char* p) {
    if constexpr (W == 64) return _mm512_loadu_si512(p);
    if constexpr (W == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (W == 16) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_set1_epi64(::load<int64_t>(p));
  }
  // the code of word g in vector v
  static constexpr int code(int v, int g) { return g % (W / 2) * PER + v * COPIES + g / (W / 2); }
  // the word in lane i of `pair` u
  static constexpr int word(int u, int i) { return i / 4 * 8 + 4 * u + i % 4; }
  static inline __m512i codes(__m512i x, int v) {
    return _mm512_and_si512(_mm512_srlv_epi16(x, _mm512_load_si512(&SHIFTS[v])), _mm512_set1_epi16((1 << BITS) - 1));
  }
  // words of two rows side by side: the lower (u = 0) or upper halves of every eight
  static inline __m512i pair(__m512i a, __m512i b, int u) { return u ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b); }
  static inline __m512i codes(__m512i x, int v, int u) {
    return _mm512_and_si512(_mm512_srlv_epi16(x, _mm512_load_si512(&PAIRED[v][u])), _mm512_set1_epi16((1 << BITS) - 1));
  }

 private:
  struct Tables {
    Line shifts[VECTORS], paired[VECTORS][2];
  };
  static constexpr Tables made() {
    Tables t = {};
    for (int v = 0; v < VECTORS; ++v)
      for (int g = 0; g < 32; ++g) {
        t.shifts[v].of[g] = BITS * (v * COPIES + g / (W / 2));
        for (int u = 0; u < 2; ++u) t.paired[v][u].of[g] = BITS * (v * COPIES + word(u, g / 2) / (W / 2));
      }
    return t;
  }
  static constexpr Tables TABLES = made();
  static constexpr const Line (&SHIFTS)[VECTORS] = TABLES.shifts;
  static constexpr const Line (&PAIRED)[VECTORS][2] = TABLES.paired;
};

// sum += a * b, in words. Written out because compilers (GCC 12) copy every sum twice around their own instruction.
inline void add(__m512i& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

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
inline bool fits(int n) { return n % 32 == 0 && n <= ROWS; }

// which code of a row of n `dots` multiplies with number i of a query
template <int BITS> inline void code_order(int n, int* order) {
  of_chunk<BITS>(n, [&](auto c) {
    for (int i = 0; i < n; ++i) {
      const int in = i % c.CODES;
      order[i] = i - in + c.code(in / 32, in % 32);
    }
  });
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
inline void rows_of(const char* p, int64_t step, int n, const Words& w, int r0, float* to, int width, Ahead next) {
  constexpr int VT = C::VECTORS;
  __m512i sum[RT][UT * VT];  // all loops over it are unrolled, so that it lies in registers
  const int32_t* weights[RT];
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r) {
    weights[r] = w.pairs(r0 + r);
#pragma GCC unroll 16
    for (int i = 0; i < UT * VT; ++i) sum[r][i] = _mm512_setzero_si512();
  }
  const char* at = p;
  for (int t = 0; t < n; t += 2, at += 2 * step) {  // behind the last row the weight is 0
    const __m512i a = C::load(at), b = C::load(t + 1 < n ? at + step : at);
    if constexpr (U == 0) _mm_prefetch(next.p + t * next.step, _MM_HINT_T0), _mm_prefetch(next.p + (t + 1) * next.step, _MM_HINT_T0);
    __m512i x[RT];
#pragma GCC unroll 16
    for (int r = 0; r < RT; ++r) x[r] = _mm512_set1_epi32(weights[r][t / 2]);
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
  }
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
inline void chunk_of(const char* p, int64_t step, int n, const Words& w, int r, float* to, int width, Ahead next) {
  if constexpr (2 * C::VECTORS * RT <= 16)
    rows_of<C, BITS, RT, 0, 2>(p, step, n, w, r, to, width, next);
  else {
    rows_of<C, BITS, RT, 0, 1>(p, step, n, w, r, to, width, next);
    rows_of<C, BITS, RT, 1, 1>(p, step, n, w, r, to, width, next);
  }
}

// n >= 1 rows of `codes` codes, `step` bytes apart; w holds R rows of n weights; sums in the order of `sum_order`
template <int BITS>
inline void rows(const char* p, int64_t step, int n, int codes, const Words& w, int R, float* to, int width,
                 Ahead next) {
  of_chunk<BITS>(codes, [&](auto c) {
    using C = decltype(c);
    constexpr int RT = C::VECTORS <= 4 ? 4 : 2;
    for (int j = 0; j < codes / C::CODES; ++j, next.p += C::CODES * BITS / 8) {
      const char* at = p + j * (C::CODES * BITS / 8);
      float* sums = to + j * C::CODES;
      int r = 0;
      for (; r + RT <= R; r += RT) chunk_of<C, BITS, RT>(at, step, n, w, r, sums, width, next);
      if constexpr (RT == 4) {
        if (R - r == 3) chunk_of<C, BITS, 3>(at, step, n, w, r, sums, width, next);
        if (R - r == 2) chunk_of<C, BITS, 2>(at, step, n, w, r, sums, width, next);
      }
      if (R - r == 1) chunk_of<C, BITS, 1>(at, step, n, w, r, sums, width, next);
    }
  });
}

// 32 numbers, the i-th from place[i], without 32 single writes
inline void take32(const float* from, const int* place, float* to) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place), b));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a, _mm512_loadu_si512(place + 16), b));
}

// sums of neighbouring lanes: those of a, then those of b
inline __m512i lanes(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// products of n tokens' codes, NV vectors of 32, with RT queries in the order of `code_order`: s[r * BLOCK + t]
template <int BITS, int NV, int RT>
inline void dots_of(const char* k, int64_t step, int n, const Words& q, int r0, float* s, Ahead next) {
  constexpr int W = chunk(32 * NV, BITS), ROW = 4 * NV * BITS;
  using C = Chunk<BITS, W>;
  __m512i mine[RT][NV];
  __m512 by = _mm512_setzero_ps(), more = by;  // of query r in lanes 4 * r to 4 * r + 3
#pragma GCC unroll 16
  for (int r = 0; r < RT; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) mine[r][i] = _mm512_load_si512(q.of(r0 + r) + i);
    const __mmask16 own = static_cast<__mmask16>(15 << 4 * r);
    by = _mm512_mask_mov_ps(by, own, _mm512_set1_ps(q.step[r0 + r]));
    more = _mm512_mask_mov_ps(more, own, _mm512_set1_ps(MIDDLE<BITS> * q.lost[r0 + r]));
  }
  float* to = s + r0 * BLOCK;
  int t = 0;
  for (; t + 4 <= n; t += 4, k += 4 * step, next.p += 4 * next.step) {
#pragma GCC unroll 16
    for (int i = 0; i < ROW; i += 64)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm_prefetch(next.p + j * next.step + i, _MM_HINT_T0);
    __m512i pair[2][RT];  // of two tokens: sums of two words each, those of one token beside those of the other
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512i x[RT], y[RT];
#pragma GCC unroll 16
      for (int j = 0; j < NV / C::VECTORS; ++j) {
        const __m512i first = C::load(k + 2 * p * step + j * W), second = C::load(k + (2 * p + 1) * step + j * W);
#pragma GCC unroll 16
        for (int v = 0; v < C::VECTORS; ++v) {
          const __m512i c = C::codes(first, v), d = C::codes(second, v);
#pragma GCC unroll 16
          for (int r = 0; r < RT; ++r) {
            const __m512i w = mine[r][j * C::VECTORS + v];
            if (j + v == 0)
              x[r] = _mm512_madd_epi16(c, w), y[r] = _mm512_madd_epi16(d, w);
            else
              add(x[r], c, w), add(y[r], d, w);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < RT; ++r)
        pair[p][r] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[r], y[r]), _mm512_unpackhi_epi32(x[r], y[r]));
    }
    __m512i z[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i a = pair[0][r % RT], b = pair[1][r % RT];
      z[r] = r < RT ? _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)) : _mm512_setzero_si512();
    }
    const __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes(lanes(z[0], z[1]), lanes(z[2], z[3]))), by, more);
    _mm_storeu_ps(to + t, _mm512_castps512_ps128(all));
    if constexpr (RT > 1) _mm_storeu_ps(to + BLOCK + t, _mm512_extractf32x4_ps(all, 1));
    if constexpr (RT > 2) _mm_storeu_ps(to + 2 * BLOCK + t, _mm512_extractf32x4_ps(all, 2));
    if constexpr (RT > 3) _mm_storeu_ps(to + 3 * BLOCK + t, _mm512_extractf32x4_ps(all, 3));
  }
  if (t == n) return;
  alignas(64) char left[4][ROW] = {};  // BLOCK is a multiple of 4, so there is room for their products
  for (int i = 0; i < n - t; ++i) std::memcpy(left[i], k + i * step, ROW);
  dots_of<BITS, NV, RT>(left[0], ROW, 4, q, r0, s + t, next);
}

template <int BITS, int NV> inline void all_dots(const char* k, int64_t step, int n, const Words& q, int R, float* s, Ahead next) {
  int r = 0;
  for (; r + 4 <= R; r += 4) dots_of<BITS, NV, 4>(k, step, n, q, r, s, next);
  switch (R - r) {
    case 3: dots_of<BITS, NV, 3>(k, step, n, q, r, s, next); break;
    case 2: dots_of<BITS, NV, 2>(k, step, n, q, r, s, next); break;
    case 1: dots_of<BITS, NV, 1>(k, step, n, q, r, s, next); break;
  }
}

// for the widths of rows.h
template <int BITS> inline void dots(const char* k, int64_t step, int n, int codes, const Words& q, int R, float* s, Ahead next) {
  switch (codes / 32) {
    case 1: return all_dots<BITS, 1>(k, step, n, q, R, s, next);
    case 2: return all_dots<BITS, 2>(k, step, n, q, R, s, next);
    case 3: return all_dots<BITS, 3>(k, step, n, q, R, s, next);
    case 4: return all_dots<BITS, 4>(k, step, n, q, R, s, next);
    case 6: return all_dots<BITS, 6>(k, step, n, q, R, s, next);
    case 8: return all_dots<BITS, 8>(k, step, n, q, R, s, next);
  }
}

}  // namespace
}  // namespace vnni
#endif
