// Products of codes with AMX: 16 x 16 sums of 64 products an instruction. Weights and queries are rounded to 16 bits as in
// words.h, but as two signed bytes: high ones in rows 0 to 7 of a tile and low ones in rows 8 to 15.
#pragma once
#include "words.h"

#if defined(CALIDROP_VNNI) && defined(__AMX_INT8__) && defined(__linux__) && !defined(CALIDROP_NO_AMX)
#define CALIDROP_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace amx {
using words::MIDDLE;

constexpr int ROWS = 8;  // weights or queries at once

// whether the kernel lets this process use tiles: it must be asked, once
inline bool allowed() {
  static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return yes;
}

// all tiles of this thread are 16 rows of 64 bytes, as long as this lives
struct Tiles {
  Tiles() {
    // static: of a local one, compilers drop all stores but those to its first bytes
    alignas(64) static const struct {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

struct alignas(64) Line {
  int8_t of[64];
};

// numbers as two signed bytes each, w = step * (256 * high + low), and the step
struct Fixed {
  std::vector<Line> lines;  // 8 rows of high ones, then 8 rows of low ones
  std::vector<float> step, lost;  // lost: what rounding took from the sum of a row
  int width = 0;  // lines of a row
  void size(int rows, int n) {
    width = (n + 63) / 64;
    lines.assign(16 * width, Line{});
    step.resize(rows), lost.resize(rows);
  }
  // row r becomes x[0..n), the rest of it 0
  void set(int r, const float* x, int n) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) most = _mm512_max_epu32(most, words::size_of(head(x + i, n - i)));
    step[r] = words::step_of(most);
    const float inverse = step[r] > 0.0f ? 1.0f / step[r] : 0.0f;
    int8_t *h = lines[r * width].of, *l = lines[(8 + r) * width].of;
    V rest = {};
    for (int i = 0; i < 64 * width; i += 16) {
      const V y = i < n && inverse != 0.0f ? head(x + i, n - i) * inverse : V{};  // all 0 where any is not finite
      const __m512i w = _mm512_cvtps_epi32((__m512)y);
      const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(128)), 8);
      const __m128i a = _mm512_cvtepi32_epi8(top), b = _mm512_cvtepi32_epi8(_mm512_sub_epi32(w, _mm512_slli_epi32(top, 8)));
      rest += y - (V)_mm512_cvtepi32_ps(w);
      _mm_store_si128(reinterpret_cast<__m128i*>(h + i), a);
      _mm_store_si128(reinterpret_cast<__m128i*>(l + i), b);
    }
    lost[r] = sum(rest) * step[r];
  }
};

// 64 codes of a row, one a byte
template <int BITS> struct Chunk {
  static constexpr int BYTES = 8 * BITS;
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
  static inline void add(float* to, __m512i high, __m512i low, float step, float more) {
    const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
    const __m512 y = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(more));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(step), y));
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

// which code of a row lies in byte b of its chunks
inline int code_at(int b, int bits) {
  const int bytes = 8 * bits, in = b % 64;
  return (b / 64 * bytes + in % bytes) * (8 / bits) + in / bytes;
}

// which code of a row the a-th sum of `rows` belongs to
inline int sum_at(int a, int bits) {
  const int in = a % 64, u = in / 16, word = in % 16;
  return code_at(a - in + word / 4 * 16 + 4 * u + word % 4, bits);
}

// whether rows of n codes can be read
inline bool fits(int n) { return n % 64 == 0 && n <= 256; }  // as many as `Buffers` holds

inline void fence() { asm volatile("" ::: "memory"); }  // compilers do not know that tiles read and write memory

// word c of vector r -> word r of vector c
inline void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // y[i + 4 * j]: words i, i + 4, i + 8, i + 12 of vectors 4 * j to 4 * j + 3
    const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88), d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Tiles of codes are stored well before they are loaded, with other work between: a load right behind its stores waits.
struct Buffers {
  alignas(64) char keys[4 * 4096], values[4 * 4096];  // codes of BLOCK tokens of 256 channels
  alignas(64) int32_t sums[16][256];
  std::vector<Line> queries;  // a tile for each 64 channels
  void keep_sums(int first) {
    _tile_stored(0, sums[first], 64);
    _tile_stored(1, sums[first + 1], 64);
    _tile_stored(2, sums[first + 2], 64);
    _tile_stored(3, sums[first + 3], 64);
  }
};

// queries as the other side of `dots`: four channels of each row behind one another
inline void lay(const Fixed& q, Buffers& to) {
  to.queries.resize(16 * q.width);
  for (int j = 0; j < q.width; ++j) {
    __m512i x[16];
    for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(q.lines.data() + r * q.width + j);
    transpose(x);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(to.queries.data() + 16 * j + r, x[r]);
  }
}

// n tokens' codes, for `dots` with the same arguments; bytes are codes, and whole tiles of them are read where they lie
template <int BITS> inline void lay_keys(const char* k, int64_t step, int n, int codes, Buffers& b) {
  using C = Chunk<BITS>;
  if (BITS == 8 && n == BLOCK) return;
  for (int t = 0; t < BLOCK; ++t)
    for (int j = 0; j < codes / 64; ++j)
      _mm512_store_si512(b.keys + 4096 * j + 64 * t, C::load(k + std::min(t, n - 1) * step + j * C::BYTES));
}

// `dots` and `scores`: as words::dots, n at most BLOCK
template <int BITS> inline void dots(const char* k, int64_t step, int n, int codes, Buffers& b) {
  const int chunks = codes / 64;
  const bool whole = BITS == 8 && n == BLOCK;
  fence();
  const int64_t row = whole ? step : 64;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int j = 0; j < chunks; ++j) {
    const char* from = whole ? k + 64 * j : b.keys + 4096 * j;
    _tile_loadd(7, b.queries.data() + 16 * j, 64);
    _tile_loadd(4, from, row);
    _tile_dpbusd(0, 4, 7);
    _tile_loadd(5, from + 16 * row, row);
    _tile_dpbusd(1, 5, 7);
    _tile_loadd(6, from + 32 * row, row);
    _tile_dpbusd(2, 6, 7);
    _tile_loadd(4, from + 48 * row, row);
    _tile_dpbusd(3, 4, 7);
  }
  b.keep_sums(0);
  fence();
}

// scores from the sums of `dots`
template <int BITS> inline void scores(int n, const Fixed& q, int R, float* s, Buffers& b) {
  for (int t = 0; t < n; t += 16) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(b.sums[t / 16] + 16 * i);
    transpose(x);
    for (int r = 0; r < R; ++r) {
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x[r]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(x[8 + r]));
      const __m512 more = _mm512_set1_ps(MIDDLE<BITS> * q.lost[r]);
      _mm512_storeu_ps(s + r * SCORES + t, _mm512_fmadd_ps(y, _mm512_set1_ps(q.step[r]), more));
    }
  }
}

// n rows of codes, for `rows`; behind the last row weights are 0, whatever they meet
template <int BITS> inline void lay_values(const char* p, int64_t step, int n, int codes, Buffers& b) {
  using C = Chunk<BITS>;
  for (int g = 0; g < 16; ++g)
    for (int j = 0; j < codes / 64; ++j) {
      const auto row = [&](int i) { return p + std::min(4 * g + i, n - 1) * step + j * C::BYTES; };
      char* to = b.values + 4096 * j + 64 * g;
      __m512i four[4];
      weave(C::load(row(0)), C::load(row(1)), C::load(row(2)), C::load(row(3)), four);
      for (int u = 0; u < 4; ++u) _mm512_store_si512(to + 1024 * u, four[u]);
    }
}
// `rows` and `add`: as words::rows for codes in chunks of 64, at most BLOCK rows of them
inline void rows(int codes, const Fixed& w, Buffers& b) {
  fence();
  _tile_loadd(7, w.lines.data(), 64);
  for (int j = 0; j < codes / 64; ++j) {
    const char* woven = b.values + 4096 * j;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, woven, 64);
    _tile_dpbsud(0, 7, 4);
    _tile_loadd(5, woven + 1024, 64);
    _tile_dpbsud(1, 7, 5);
    _tile_loadd(6, woven + 2048, 64);
    _tile_dpbsud(2, 7, 6);
    _tile_loadd(4, woven + 3072, 64);
    _tile_dpbsud(3, 7, 4);
    b.keep_sums(4 * j);
  }
  fence();
}

template <int BITS> inline void add(int codes, const Fixed& w, int R, float* to, int width, Buffers& b) {
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < codes / 16; ++u)
      Chunk<BITS>::add(to + static_cast<size_t>(r) * width + 16 * u, _mm512_load_si512(b.sums[u] + 16 * r),
                                 _mm512_load_si512(b.sums[u] + 16 * (8 + r)), w.step[r], MIDDLE<BITS> * w.lost[r]);
}

}  // namespace amx
#endif
