// Products of codes with AVX-512 VNNI: 64 of them an instruction, where fp32 takes four and the codes must be converted
// first. The other side (queries, or weights of tokens) is rounded to 16 bits of its largest number, as two signed
// bytes: w = step * (256 * high + low). Sums are whole numbers, exact in 32 bits. What rounding took from the sum of the
// numbers is given back as if it met the middle code, so that only the spread of the codes meets rounding errors.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && !defined(CALIDROP_PORTABLE)
#define CALIDROP_VNNI 1
#include <immintrin.h>

namespace vnni {
namespace {  // nothing here is called from outside, so all of it may become part of who calls it

struct alignas(64) Line {
  int8_t of[64];
};

// numbers as two signed bytes each, four numbers a word and an even number of words; the step between them
struct Fixed {
  std::vector<Line> lines;  // rows of high ones, then rows of low ones
  std::vector<float> step, lost;  // lost: what rounding took from the sum of a row
  int words = 0, half = 0;  // half: the row of the first low ones
  // tiles: as two halves of 8 rows of whole tiles, for at most 8 rows (amx.h)
  void size(int rows, int n, bool tiles = false) {
    words = tiles ? (n + 63) / 64 * 16 : (n + 7) / 8 * 2;
    half = tiles ? 8 : rows;
    lines.assign((static_cast<size_t>(2 * half) * words * 4 + 63) / 64, Line{});
    step.resize(rows), lost.resize(rows);
  }
  // row r becomes x[0..n), n at most 4 * words; the rest of it 0
  void set(int r, const float* x, int n) {
    V most = {}, total = {};
    for (int i = 0; i < n; i += 16) {
      const V y = head(x + i, n - i), size = y < V{} ? -y : y;
      most = size > most ? size : most;
      total += y * 0.0f;  // NaN where any is not finite
    }
    const float largest = _mm512_reduce_max_ps((__m512)most), bad = sum(total);
    // below 1e-30 the inverse would overflow; such weights are next to ones of about 1
    const float inverse = largest > 1e-30f && bad == 0.0f ? 32512.0f / largest : 0.0f;
    step[r] = inverse == 0.0f ? bad : largest / 32512.0f;
    int8_t *h = lines.data()->of + static_cast<size_t>(r) * words * 4, *l = h + static_cast<size_t>(half) * words * 4;
    V rest = {};
    for (int i = 0; i < 4 * words; i += 16) {
      const V y = i < n && inverse != 0.0f ? head(x + i, n - i) * inverse : V{};  // all 0 where any is not finite
      const __m512i w = _mm512_cvtps_epi32((__m512)y);
      const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(128)), 8);
      const __m128i a = _mm512_cvtepi32_epi8(top), b = _mm512_cvtepi32_epi8(_mm512_sub_epi32(w, _mm512_slli_epi32(top, 8)));
      rest += y - (V)_mm512_cvtepi32_ps(w);
      if (i + 16 <= 4 * words) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i), a);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(l + i), b);
      } else {  // words are even
        _mm_storel_epi64(reinterpret_cast<__m128i*>(h + i), a);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(l + i), b);
      }
    }
    lost[r] = sum(rest) * step[r];
  }
  const int32_t* highs(int r) const { return reinterpret_cast<const int32_t*>(lines.data()) + static_cast<size_t>(r) * words; }
  const int32_t* lows(int r) const { return highs(half + r); }
};

template <int BITS> constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;

// W codes of a row, one a byte. Of rows of 32 two are taken at once, one in each half, and sums are added at the end.
template <int W, int BITS> struct Chunk;
template <int BITS> struct Chunk<64, BITS> {
  static constexpr int BYTES = 8 * BITS, QUADS = 1;
  static inline __m512i load(const char* p) {
    if constexpr (BITS == 8) return _mm512_loadu_si512(p);
    if constexpr (BITS == 4) {
      const __m512i x = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      const __m512i by = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
      return _mm512_and_si512(_mm512_srlv_epi16(x, by), _mm512_set1_epi8(15));
    }
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i by = _mm512_set_epi64(SHIFT * 6, SHIFT * 6, SHIFT * 4, SHIFT * 4, SHIFT * 2, SHIFT * 2, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi16(x, by), _mm512_set1_epi8(3));
  }
  static inline __m512i load(const char* p, const char*) { return load(p); }
  static inline __m512i weights(const int32_t* w) { return _mm512_set1_epi32(*w); }
  static inline void add(float* to, __m512i high, __m512i low, float step, float more) {
    const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
    const __m512 y = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(more));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(step), y));
  }
  static constexpr int64_t SHIFT = 0x0001000100010001;
};
template <int BITS> struct Chunk<32, BITS> {
  static constexpr int BYTES = 4 * BITS, QUADS = 2;
  static inline __m512i load(const char* p, const char* q) {
    if constexpr (BITS == 8)
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), 1);
    if constexpr (BITS == 4) {
      const __m512i x = _mm512_mask_broadcast_i32x4(
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 0xff00,
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
      const __m512i by = _mm512_set_epi64(SHIFT * 4, SHIFT * 4, 0, 0, SHIFT * 4, SHIFT * 4, 0, 0);
      return _mm512_and_si512(_mm512_srlv_epi16(x, by), _mm512_set1_epi8(15));
    }
    const __m512i x = _mm512_mask_set1_epi64(_mm512_set1_epi64(::load<int64_t>(p)), 0xf0, ::load<int64_t>(q));
    const __m512i by = _mm512_set_epi64(SHIFT * 6, SHIFT * 4, SHIFT * 2, 0, SHIFT * 6, SHIFT * 4, SHIFT * 2, 0);
    return _mm512_and_si512(_mm512_srlv_epi16(x, by), _mm512_set1_epi8(3));
  }
  static inline __m512i weights(const int32_t* w) { return _mm512_mask_set1_epi32(_mm512_set1_epi32(w[0]), 0xff00, w[1]); }
  static inline void add(float* to, __m512i high, __m512i low, float step, float more) {
    const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1));
    const __m256i l = _mm256_add_epi32(_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1));
    const __m256 x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(h), _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(l));
    const __m256 y = _mm256_add_ps(_mm256_loadu_ps(to), _mm256_set1_ps(more));
    _mm256_storeu_ps(to, _mm256_fmadd_ps(x, _mm256_set1_ps(step), y));
  }
  static constexpr int64_t SHIFT = 0x0001000100010001;
};

// four rows -> four vectors whose words hold one code of each row
inline void weave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab, cd), out[1] = _mm512_unpackhi_epi16(ab, cd);
  out[2] = _mm512_unpacklo_epi16(AB, CD), out[3] = _mm512_unpackhi_epi16(AB, CD);
}

// how a row of n codes is cut: chunks of 64, of 32, or not at all
inline int width(int n) { return n % 64 == 0 ? 64 : n % 32 == 0 ? 32 : 0; }

// which code of a row lies in byte b of its chunks
inline int code_at(int b, int w, int bits) {
  const int bytes = w * bits / 8, in = b % w;
  return (b / w * bytes + in % bytes) * (8 / bits) + in / bytes;
}

// which code of a row the a-th sum of `rows` belongs to
inline int sum_at(int a, int w, int bits) {
  const int in = a % w, u = in / (w / 4), word = in % (w / 4);
  return code_at(a - in + word / 4 * 16 + 4 * u + word % 4, w, bits);
}

// sums over rows of weight times code: `to` + r * width gets those of weights r, in the order of `sum_at`
template <int W, int BITS, int RT>
inline void rows_of(const char* p, int64_t step, int n, int codes, const Fixed& w, int r0, float* to, int width) {
  using C = Chunk<W, BITS>;
  for (int j = 0; j < codes / W; ++j, p += C::BYTES) {
    __m512i high[RT][4], low[RT][4];
    for (int r = 0; r < RT; ++r)
      for (int u = 0; u < 4; ++u) high[r][u] = low[r][u] = _mm512_setzero_si512();
    const auto quads = [&](int g, const auto& row) {
      __m512i four[4];
      weave(C::load(row(0), row(4)), C::load(row(1), row(5)), C::load(row(2), row(6)), C::load(row(3), row(7)), four);
      for (int r = 0; r < RT; ++r) {
        const __m512i h = C::weights(w.highs(r0 + r) + g), l = C::weights(w.lows(r0 + r) + g);
        for (int u = 0; u < 4; ++u) {
          high[r][u] = _mm512_dpbusd_epi32(high[r][u], four[u], h);
          low[r][u] = _mm512_dpbusd_epi32(low[r][u], four[u], l);
        }
      }
    };
    int g = 0;
    const char* at = p;
    for (; 4 * (g + C::QUADS) <= n; g += C::QUADS, at += 4 * C::QUADS * step)
      quads(g, [&](int i) { return at + i * step; });
    // behind the last row weights are 0, whatever they meet
    for (; 4 * g < n; g += C::QUADS) quads(g, [&](int i) { return p + std::min(4 * g + i, n - 1) * step; });
    for (int r = 0; r < RT; ++r)
      for (int u = 0; u < 4; ++u)
        C::add(to + static_cast<size_t>(r0 + r) * width + j * W + u * (W / 4), high[r][u], low[r][u], w.step[r0 + r],
               MIDDLE<BITS> * w.lost[r0 + r]);
  }
}

template <int W, int BITS>
inline void all_rows(const char* p, int64_t step, int n, int codes, const Fixed& w, int R, float* to, int width) {
  int r = 0;
  for (; r + 3 <= R && R - r != 4; r += 3) rows_of<W, BITS, 3>(p, step, n, codes, w, r, to, width);
  for (; r + 2 <= R; r += 2) rows_of<W, BITS, 2>(p, step, n, codes, w, r, to, width);
  if (r < R) rows_of<W, BITS, 1>(p, step, n, codes, w, r, to, width);
}

// n >= 1 rows of `codes` codes, `step` bytes apart; w holds R rows of n weights
template <int BITS>
inline void rows(const char* p, int64_t step, int n, int codes, const Fixed& w, int R, float* to, int width_of_to) {
  if (width(codes) == 64)
    all_rows<64, BITS>(p, step, n, codes, w, R, to, width_of_to);
  else
    all_rows<32, BITS>(p, step, n, codes, w, R, to, width_of_to);
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

// products of n tokens' codes with RT queries in the order of `code_at`: s[r * BLOCK + t]. CHUNKS: 0 for any other number
template <int BITS, int RT, int CHUNKS>
inline void dots_of(const char* k, int64_t step, int n, int chunks, const Fixed& q, int r0, float* s) {
  using C = Chunk<64, BITS>;
  const int count = CHUNKS ? CHUNKS : chunks;
  const int32_t *high[RT], *low[RT];
  float by[RT], more[RT];
  for (int r = 0; r < RT; ++r) {
    high[r] = q.highs(r0 + r), low[r] = q.lows(r0 + r);
    by[r] = q.step[r0 + r], more[r] = MIDDLE<BITS> * q.lost[r0 + r];
  }
  // two tokens: sums of two words each, those of one token beside those of the other
  const auto two = [&](const char* a, const char* b, __m512i* to) {
    __m512i x[RT], y[RT];
    for (int r = 0; r < RT; ++r) x[r] = y[r] = _mm512_setzero_si512();
    const auto add = [&](const int32_t* const* of) {
      for (int j = 0; j < count; ++j) {
        const __m512i c = C::load(a + j * C::BYTES), d = C::load(b + j * C::BYTES);
        for (int r = 0; r < RT; ++r) {
          const __m512i w = _mm512_loadu_si512(of[r] + 16 * j);
          x[r] = _mm512_dpbusd_epi32(x[r], c, w), y[r] = _mm512_dpbusd_epi32(y[r], d, w);
        }
      }
    };
    add(high);
    for (int r = 0; r < RT; ++r) x[r] = _mm512_slli_epi32(x[r], 8), y[r] = _mm512_slli_epi32(y[r], 8);
    add(low);
    for (int r = 0; r < RT; ++r) to[r] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[r], y[r]), _mm512_unpackhi_epi32(x[r], y[r]));
  };
  const auto four = [&](int t, const char* a, const char* b, const char* c, const char* d) {
    __m512i x[RT], y[RT], z[4];
    two(a, b, x), two(c, d, y);
    for (int r = 0; r < 4; ++r)
      z[r] = r < RT ? _mm512_add_epi32(_mm512_unpacklo_epi64(x[r % RT], y[r % RT]), _mm512_unpackhi_epi64(x[r % RT], y[r % RT]))
                    : _mm512_setzero_si512();
    const __m512 all = _mm512_cvtepi32_ps(lanes(lanes(z[0], z[1]), lanes(z[2], z[3])));
    const auto put = [&](int r, __m128 y) {  // BLOCK is a multiple of 4, so there is room behind the last token
      if (r < RT) _mm_storeu_ps(s + (r0 + r) * BLOCK + t, _mm_fmadd_ps(y, _mm_set1_ps(by[r % RT]), _mm_set1_ps(more[r % RT])));
    };
    put(0, _mm512_castps512_ps128(all)), put(1, _mm512_extractf32x4_ps(all, 1));
    put(2, _mm512_extractf32x4_ps(all, 2)), put(3, _mm512_extractf32x4_ps(all, 3));
  };
  int t = 0;
  for (; t + 4 <= n; t += 4, k += 4 * step) four(t, k, k + step, k + 2 * step, k + 3 * step);
  if (t < n) {
    const auto row = [&](int i) { return k + std::min(i, n - 1 - t) * step; };
    four(t, row(0), row(1), row(2), row(3));
  }
}

template <int BITS, int CHUNKS>
inline void all_dots(const char* k, int64_t step, int n, int chunks, const Fixed& q, int R, float* s) {
  int r = 0;
  for (; r + 4 <= R; r += 4) dots_of<BITS, 4, CHUNKS>(k, step, n, chunks, q, r, s);
  switch (R - r) {
    case 3: dots_of<BITS, 3, CHUNKS>(k, step, n, chunks, q, r, s); break;
    case 2: dots_of<BITS, 2, CHUNKS>(k, step, n, chunks, q, r, s); break;
    case 1: dots_of<BITS, 1, CHUNKS>(k, step, n, chunks, q, r, s); break;
  }
}

template <int BITS> inline void dots(const char* k, int64_t step, int n, int codes, const Fixed& q, int R, float* s) {
  switch (codes / 64) {  // a known number is unrolled
    case 1: return all_dots<BITS, 1>(k, step, n, 1, q, R, s);
    case 2: return all_dots<BITS, 2>(k, step, n, 2, q, R, s);
    default: return all_dots<BITS, 0>(k, step, n, codes / 64, q, R, s);
  }
}

}  // namespace
}  // namespace vnni
#endif
