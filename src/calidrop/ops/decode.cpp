// Decode attention on a CPU: a few queries per kv head over any number of pieces of cache, joined by their log-sum-exp
// in one call. The oracle is calidrop.attention (attend, merge) on the decoded tokens. Portable C++17 with GCC/Clang
// vector types, which become AVX-512, AVX2 or NEON; OpenMP where the caller's process has a runtime.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

template <int L> struct Lanes {
  typedef float F __attribute__((vector_size(4 * L), aligned(4)));
  typedef int32_t I __attribute__((vector_size(4 * L), aligned(4)));
  typedef uint32_t U __attribute__((vector_size(4 * L), aligned(4)));
  typedef uint16_t H __attribute__((vector_size(2 * L), aligned(2)));
  typedef uint8_t B __attribute__((vector_size(L), aligned(1)));
};
using V = Lanes<16>::F;
constexpr int BLOCK = 64;  // tokens whose scores are held at once
constexpr float NONE = -INFINITY;

inline V splat(float x) { return V{} + x; }

inline float sum(V x) {
  Lanes<8>::F a, b;
  std::memcpy(&a, &x, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + 32, 32);
  a += b;
  Lanes<4>::F c, d;
  std::memcpy(&c, &a, 16);
  std::memcpy(&d, reinterpret_cast<const char*>(&a) + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

// e^x for x <= 0, relative error 2e-7; below -87 it is 0
inline V exp(V x) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Lanes<16>::I tiny = x < splat(-87.0f);
  x = tiny ? splat(-87.0f) : x;
  V n = (x * 1.44269504f + magic) - magic;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Lanes<16>::I e = (__builtin_convertvector(n, Lanes<16>::I) + 127) << 23;
  V two;
  std::memcpy(&two, &e, 64);
  return tiny ? V{} : p * two;
}

inline float half(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return static_cast<float>(x);
}

template <class T> inline T load(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

// ---- rows of one token as NV vectors of 16 floats; codes come plane by plane (the first code of every byte, ...)

struct Float32 {
  static constexpr int BITS = 32;
  static inline V at(const char* row, int i, int) { return load<V>(row + 64 * i); }
};
struct BFloat16 {
  static constexpr int BITS = 16;
  static inline V at(const char* row, int i, int) {
    auto x = __builtin_convertvector(load<Lanes<16>::H>(row + 32 * i), Lanes<16>::U) << 16;
    V f;
    std::memcpy(&f, &x, 64);
    return f;
  }
};
struct Float16 {
  static constexpr int BITS = 16;
  typedef _Float16 T __attribute__((vector_size(32), aligned(2)));
  static inline V at(const char* row, int i, int) { return __builtin_convertvector(load<T>(row + 32 * i), V); }
};
template <int N> struct Codes {
  static constexpr int BITS = N;
  static inline V at(const char* row, int i, int vectors) {
    const int per_plane = vectors * N / 8, plane = i / per_plane;
    auto x = load<Lanes<16>::B>(row + 16 * (i % per_plane));
    auto c = (x >> static_cast<uint8_t>(N * plane)) & static_cast<uint8_t>((1 << N) - 1);
    return __builtin_convertvector(__builtin_convertvector(c, Lanes<16>::I), V);
  }
};

struct Array {
  const char* p;
  int64_t row, head, slot;  // strides in bytes
};
struct Piece {
  int32_t kind, dtype, bits, group, channels, rotate;
  int64_t slots;        // per (row, head) where lens is null
  const int64_t* lens;  // [B*H], slots of each; they then lie one behind the other
  Array k, v, pos, bias, k_scale, k_zero, v_scale, v_zero;
};
enum Kind { EXACT, PER_TOKEN, PER_CHANNEL, ANSWERED };
enum Dtype { F32, BF16, F16 };

struct Place {
  int64_t b, h, start;  // start: the first slot, where heads lie one behind the other
};

inline const char* base(const Piece& x, const Array& a, const Place& at) {
  return x.lens ? a.p + at.start * a.slot : a.p + at.b * a.row + at.h * a.head;
}

// what a set of tokens said to R queries: o not yet divided by l
struct Answer {
  int R, D;
  std::vector<float> m, l, o;
  Answer(int R, int D) : R(R), D(D), m(R, NONE), l(R, 0.0f), o(static_cast<size_t>(R) * D, 0.0f) {}
  void reset() {
    std::fill(m.begin(), m.end(), NONE);
    std::fill(l.begin(), l.end(), 0.0f);
    std::fill(o.begin(), o.end(), 0.0f);
  }
  void join(int r, float m2, float l2, const float* o2) {
    if (m2 == NONE || l2 == 0.0f) return;
    float top = std::max(m[r], m2), a = std::exp(m[r] - top), b = std::exp(m2 - top);
    if (m[r] == NONE) a = 0.0f;
    float* mine = o.data() + static_cast<size_t>(r) * D;
    for (int d = 0; d < D; ++d) mine[d] = a * mine[d] + b * o2[d];
    l[r] = a * l[r] + b * l2;
    m[r] = top;
  }
};

struct Call {
  const float* q;  // [B,H,R,D]
  float *out, *lse;
  int64_t B, H;
  int R, D, Dv;
  float scale, softcap;
};

// scores [R][BLOCK] of n tokens become weights against the running maximum; o and l are rescaled
void softmax(Answer& a, float* s, int n, float softcap, const char* pos, int64_t pos_slot, const char* bias,
             int64_t bias_slot) {
  for (int r = 0; r < a.R; ++r) {
    float* x = s + r * BLOCK;
    if (softcap > 0.0f)
      for (int t = 0; t < n; ++t) x[t] = softcap * std::tanh(x[t] / softcap);
    if (bias)
      for (int t = 0; t < n; ++t) x[t] += load<float>(bias + t * bias_slot);
    if (pos)
      for (int t = 0; t < n; ++t)
        if (load<int32_t>(pos + t * pos_slot) < 0) x[t] = NONE;
    for (int t = n; t < BLOCK; ++t) x[t] = NONE;
    V top = load<V>(x);
    for (int t = 16; t < BLOCK; t += 16) {
      V y = load<V>(x + t);
      top = y > top ? y : top;
    }
    float m = a.m[r];
    for (int i = 0; i < 16; ++i) m = std::max(m, top[i]);
    if (m == NONE) {  // nothing visible so far
      std::memset(x, 0, sizeof(float) * BLOCK);
      continue;
    }
    if (m > a.m[r]) {
      float shrink = a.m[r] == NONE ? 0.0f : std::exp(a.m[r] - m);
      a.l[r] *= shrink;
      float* o = a.o.data() + static_cast<size_t>(r) * a.D;
      for (int d = 0; d < a.D; ++d) o[d] *= shrink;
      a.m[r] = m;
    }
    V total = {};
    for (int t = 0; t < BLOCK; t += 16) {
      V y = exp(load<V>(x + t) - m);
      std::memcpy(x + t, &y, 64);
      total += y;
    }
    a.l[r] += sum(total);
  }
}

// RT rows of scores at a time, four tokens in flight
template <class F, int NV, int RT>
inline void dots(const char* k, int64_t step, const float* q, int D, float* s, int n) {
  for (int t = 0; t < n; ++t) {
    const char* row = k + t * step;
    V a[RT] = {};
    for (int i = 0; i < NV; ++i) {
      V x = F::at(row, i, NV);
      for (int r = 0; r < RT; ++r) a[r] += x * load<V>(q + r * D + 16 * i);
    }
    for (int r = 0; r < RT; ++r) s[r * BLOCK + t] = sum(a[r]);
  }
}

template <class F, int NV, int RT>
inline void weigh(const char* v, int64_t step, const float* p, float* o, int D, int n) {
  V acc[RT][NV];
  for (int r = 0; r < RT; ++r)
    for (int i = 0; i < NV; ++i) acc[r][i] = load<V>(o + r * D + 16 * i);
  for (int t = 0; t < n; ++t) {
    const char* row = v + t * step;
    for (int i = 0; i < NV; ++i) {
      V x = F::at(row, i, NV);
      for (int r = 0; r < RT; ++r) acc[r][i] += x * p[r * BLOCK + t];
    }
  }
  for (int r = 0; r < RT; ++r)
    for (int i = 0; i < NV; ++i) std::memcpy(o + r * D + 16 * i, &acc[r][i], 64);
}

// as many rows at once as fit the registers
template <class F, int NV> void all_dots(const char* k, int64_t step, const float* q, int D, float* s, int n, int R) {
  int r = 0;
  for (; r + 4 <= R; r += 4) dots<F, NV, 4>(k, step, q + r * D, D, s + r * BLOCK, n);
  switch (R - r) {
    case 3: dots<F, NV, 3>(k, step, q + r * D, D, s + r * BLOCK, n); break;
    case 2: dots<F, NV, 2>(k, step, q + r * D, D, s + r * BLOCK, n); break;
    case 1: dots<F, NV, 1>(k, step, q + r * D, D, s + r * BLOCK, n); break;
  }
}

template <class F, int NV> void all_weigh(const char* v, int64_t step, const float* p, float* o, int D, int n, int R) {
  constexpr int RT = NV <= 6 ? 4 : NV <= 8 ? 3 : 1;
  int r = 0;
  for (; r + RT <= R; r += RT) weigh<F, NV, RT>(v, step, p + r * BLOCK, o + r * D, D, n);
  if constexpr (RT > 1) {
    if (RT > 3 && R - r == 3) weigh<F, NV, 3>(v, step, p + r * BLOCK, o + r * D, D, n);
    if (R - r == 2) weigh<F, NV, 2>(v, step, p + r * BLOCK, o + r * D, D, n);
    if (R - r == 1) weigh<F, NV, 1>(v, step, p + r * BLOCK, o + r * D, D, n);
  }
}

template <class F>
bool dots_of(int D, const char* k, int64_t step, const float* q, float* s, int n, int R) {
  switch (D) {
    case 32: if constexpr (F::BITS >= 4) { all_dots<F, 2>(k, step, q, D, s, n, R); return true; } return false;
    case 64: all_dots<F, 4>(k, step, q, D, s, n, R); return true;
    case 80: if constexpr (F::BITS >= 8) { all_dots<F, 5>(k, step, q, D, s, n, R); return true; } return false;
    case 96: if constexpr (F::BITS >= 4) { all_dots<F, 6>(k, step, q, D, s, n, R); return true; } return false;
    case 128: all_dots<F, 8>(k, step, q, D, s, n, R); return true;
    case 256: all_dots<F, 16>(k, step, q, D, s, n, R); return true;
  }
  return false;
}

template <class F>
bool weigh_of(int D, const char* v, int64_t step, const float* p, float* o, int n, int R) {
  switch (D) {
    case 32: if constexpr (F::BITS >= 4) { all_weigh<F, 2>(v, step, p, o, D, n, R); return true; } return false;
    case 64: all_weigh<F, 4>(v, step, p, o, D, n, R); return true;
    case 80: if constexpr (F::BITS >= 8) { all_weigh<F, 5>(v, step, p, o, D, n, R); return true; } return false;
    case 96: if constexpr (F::BITS >= 4) { all_weigh<F, 6>(v, step, p, o, D, n, R); return true; } return false;
    case 128: all_weigh<F, 8>(v, step, p, o, D, n, R); return true;
    case 256: all_weigh<F, 16>(v, step, p, o, D, n, R); return true;
  }
  return false;
}

// channel c of a token's codes is code c % per of byte c / per; planes put the first codes of all bytes first
void to_planes(const float* from, float* to, int D, int bits) {
  const int per = 8 / bits, bytes = D / per;
  for (int i = 0; i < bytes; ++i)
    for (int p = 0; p < per; ++p) to[p * bytes + i] = from[i * per + p];
}
void from_planes(const float* from, float* to, int D, int bits) {
  const int per = 8 / bits, bytes = D / per;
  for (int i = 0; i < bytes; ++i)
    for (int p = 0; p < per; ++p) to[i * per + p] = from[p * bytes + i];
}

void hadamard(float* x, int D) {
  const int block = D & -D;
  for (int half = 1; half < block; half *= 2)
    for (int i = 0; i < D; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
  const float c = 1.0f / std::sqrt(static_cast<float>(block));
  for (int i = 0; i < D; ++i) x[i] *= c;
}

struct Scratch {
  std::vector<float> q, s, w, zero;
  Answer part;
  Scratch(const Call& c) : q(c.R * c.D), s(c.R * BLOCK), w(c.R * BLOCK), zero(c.R * 64), part(c.R, c.Dv) {}
};

// ---- tokens one by one: exact, or codes with a scale and zero per token

template <class F>
void per_token(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  const int64_t bh = at.b * c.H + at.h;
  constexpr bool coded = F::BITS <= 8;
  const float* q = c.q + bh * c.R * c.D;
  std::vector<float> zero_q(c.R);
  for (int r = 0; r < c.R; ++r) {  // the scale of the logits goes into the queries
    float* mine = w.q.data() + r * c.D;
    std::vector<float> turned(q + r * c.D, q + (r + 1) * c.D);
    if (x.rotate) hadamard(turned.data(), c.D);
    for (int d = 0; d < c.D; ++d) zero_q[r] += turned[d] *= c.scale;
    if constexpr (coded)
      to_planes(turned.data(), mine, c.D, F::BITS);
    else
      std::memcpy(mine, turned.data(), sizeof(float) * c.D);
  }
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  const char* bias = x.bias.p ? base(x, x.bias, at) : nullptr;
  const char *ks = nullptr, *kz = nullptr, *vs = nullptr, *vz = nullptr;
  if constexpr (coded) {
    ks = base(x, x.k_scale, at), kz = base(x, x.k_zero, at);
    vs = base(x, x.v_scale, at), vz = base(x, x.v_zero, at);
  }
  w.part.reset();
  std::vector<float> zero_v(c.R, 0.0f);
  for (int64_t t = from; t < to; t += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, to - t));
    dots_of<F>(c.D, k + t * x.k.slot, x.k.slot, w.q.data(), w.s.data(), n, c.R);
    if constexpr (coded)
      for (int i = 0; i < n; ++i) {
        float scale = half(load<uint16_t>(ks + (t + i) * x.k_scale.slot));
        float zero = half(load<uint16_t>(kz + (t + i) * x.k_zero.slot));
        for (int r = 0; r < c.R; ++r) w.s[r * BLOCK + i] = w.s[r * BLOCK + i] * scale + zero * zero_q[r];
      }
    if constexpr (coded) {  // the weight of zeros shrinks with the rest when the maximum moves
      std::vector<float> before(w.part.m);
      softmax(w.part, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot,
              bias ? bias + t * x.bias.slot : nullptr, x.bias.slot);
      for (int r = 0; r < c.R; ++r)
        if (w.part.m[r] > before[r]) zero_v[r] *= before[r] == NONE ? 0.0f : std::exp(before[r] - w.part.m[r]);
      for (int i = 0; i < n; ++i) {
        float scale = half(load<uint16_t>(vs + (t + i) * x.v_scale.slot));
        float zero = half(load<uint16_t>(vz + (t + i) * x.v_zero.slot));
        for (int r = 0; r < c.R; ++r) {
          zero_v[r] += w.s[r * BLOCK + i] * zero;
          w.s[r * BLOCK + i] *= scale;
        }
      }
    } else {
      softmax(w.part, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot,
              bias ? bias + t * x.bias.slot : nullptr, x.bias.slot);
    }
    weigh_of<F>(c.Dv, v + t * x.v.slot, x.v.slot, w.s.data(), w.part.o.data(), n, c.R);
  }
  if constexpr (coded) {
    std::vector<float> straight(c.Dv);
    for (int r = 0; r < c.R; ++r) {
      float* o = w.part.o.data() + static_cast<size_t>(r) * c.Dv;
      from_planes(o, straight.data(), c.Dv, F::BITS);
      for (int d = 0; d < c.Dv; ++d) o[d] = straight[d] + zero_v[r];
      if (x.rotate) hadamard(o, c.Dv);
    }
  }
}

// ---- keys with a scale and zero per channel over units of tokens, values per token over groups of channels (KIVI)

template <int BITS, int L>
void per_channel(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  using F = typename Lanes<L>::F;
  using Bytes = typename Lanes<L>::B;
  using Ints = typename Lanes<L>::I;
  constexpr int PER = 8 / BITS;
  constexpr uint8_t MASK = (1 << BITS) - 1;
  const int64_t bh = at.b * c.H + at.h;
  const int group = x.group, bytes = group / PER, chunks = bytes / L;  // of a channel's codes
  const int groups = c.Dv / x.channels, v_bytes = x.channels / PER, v_chunks = v_bytes / L;
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char *ks = base(x, x.k_scale, at), *kz = base(x, x.k_zero, at);
  const char *vs = base(x, x.v_scale, at), *vz = base(x, x.v_zero, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  const float* q = c.q + bh * c.R * c.D;
  Answer& a = w.part;
  a.reset();
  std::vector<float> zeros(c.R * groups, 0.0f), scores(c.R * group), planes(c.R * c.Dv, 0.0f);
  std::vector<float> qs(c.R * c.D), before(c.R), factor(c.R * groups);
  for (int64_t u = from; u < to; ++u) {
    const char *ku = k + u * x.k.slot, *ksu = ks + u * x.k_scale.slot, *kzu = kz + u * x.k_zero.slot;
    std::vector<float> offset(c.R, 0.0f);
    for (int d = 0; d < c.D; ++d) {
      const float scale = half(load<uint16_t>(ksu + 2 * d)) * c.scale, zero = half(load<uint16_t>(kzu + 2 * d)) * c.scale;
      for (int r = 0; r < c.R; ++r) {
        qs[r * c.D + d] = q[r * c.D + d] * scale;
        offset[r] += q[r * c.D + d] * zero;
      }
    }
    for (int r0 = 0; r0 < c.R; r0 += 4) {
      const int rows = std::min(4, c.R - r0);
      for (int j = 0; j < chunks; ++j) {
        F acc[4][PER] = {};
        for (int d = 0; d < c.D; ++d) {
          const auto codes = load<Bytes>(ku + static_cast<int64_t>(d) * bytes + j * L);
          for (int p = 0; p < PER; ++p) {
            const F f = __builtin_convertvector(
                __builtin_convertvector((codes >> static_cast<uint8_t>(BITS * p)) & MASK, Ints), F);
            for (int r = 0; r < rows; ++r) acc[r][p] += f * qs[(r0 + r) * c.D + d];
          }
        }
        for (int r = 0; r < rows; ++r)
          for (int p = 0; p < PER; ++p)
            for (int i = 0; i < L; ++i)
              scores[(r0 + r) * group + (j * L + i) * PER + p] = acc[r][p][i] + offset[r0 + r];
      }
    }
    for (int t0 = 0; t0 < group; t0 += BLOCK) {
      const int n = std::min(BLOCK, group - t0);
      for (int r = 0; r < c.R; ++r) {
        std::memcpy(w.s.data() + r * BLOCK, scores.data() + r * group + t0, sizeof(float) * n);
        before[r] = a.m[r];
      }
      softmax(a, w.s.data(), n, c.softcap, pos ? pos + u * x.pos.slot + 4 * t0 : nullptr, 4, nullptr, 0);
      for (int r = 0; r < c.R; ++r)
        if (a.m[r] > before[r]) {
          const float shrink = before[r] == NONE ? 0.0f : std::exp(before[r] - a.m[r]);
          for (int g = 0; g < groups; ++g) zeros[r * groups + g] *= shrink;
        }
      for (int i = 0; i < n; ++i) {
        const int t = t0 + i;
        const char* row = v + u * x.v.slot + static_cast<int64_t>(t) * (c.Dv / PER);
        const char *s = vs + u * x.v_scale.slot + 2 * t * groups, *z = vz + u * x.v_zero.slot + 2 * t * groups;
        for (int g = 0; g < groups; ++g) {
          const float scale = half(load<uint16_t>(s + 2 * g)), zero = half(load<uint16_t>(z + 2 * g));
          for (int r = 0; r < c.R; ++r) {
            factor[r * groups + g] = w.s[r * BLOCK + i] * scale;
            zeros[r * groups + g] += w.s[r * BLOCK + i] * zero;
          }
          for (int j = 0; j < v_chunks; ++j) {
            const auto codes = load<Bytes>(row + g * v_bytes + j * L);
            for (int p = 0; p < PER; ++p) {
              const F f = __builtin_convertvector(
                  __builtin_convertvector((codes >> static_cast<uint8_t>(BITS * p)) & MASK, Ints), F);
              for (int r = 0; r < c.R; ++r) {
                float* o = a.o.data() + static_cast<size_t>(r) * c.Dv + g * x.channels + p * v_bytes + j * L;
                F y = load<F>(o);
                y += f * factor[r * groups + g];
                std::memcpy(o, &y, sizeof(F));
              }
            }
          }
        }
      }
    }
  }
  std::vector<float> straight(x.channels);
  for (int r = 0; r < c.R; ++r)
    for (int g = 0; g < groups; ++g) {
      float* o = a.o.data() + static_cast<size_t>(r) * c.Dv + g * x.channels;
      from_planes(o, straight.data(), x.channels, BITS);
      for (int d = 0; d < x.channels; ++d) o[d] = straight[d] + zeros[r * groups + g];
    }
}

bool run(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  if (x.kind == EXACT) {
    if (x.dtype == F32) per_token<Float32>(c, x, at, from, to, w);
    if (x.dtype == BF16) per_token<BFloat16>(c, x, at, from, to, w);
    if (x.dtype == F16) per_token<Float16>(c, x, at, from, to, w);
  } else if (x.kind == PER_TOKEN) {
    if (x.bits == 8) per_token<Codes<8>>(c, x, at, from, to, w);
    if (x.bits == 4) per_token<Codes<4>>(c, x, at, from, to, w);
    if (x.bits == 2) per_token<Codes<2>>(c, x, at, from, to, w);
  } else {
    const bool wide = x.group * x.bits / 8 % 16 == 0 && x.channels * x.bits / 8 % 16 == 0;
    if (x.bits == 8) wide ? per_channel<8, 16>(c, x, at, from, to, w) : per_channel<8, 8>(c, x, at, from, to, w);
    if (x.bits == 4) wide ? per_channel<4, 16>(c, x, at, from, to, w) : per_channel<4, 8>(c, x, at, from, to, w);
    if (x.bits == 2) wide ? per_channel<2, 16>(c, x, at, from, to, w) : per_channel<2, 8>(c, x, at, from, to, w);
  }
  return true;
}

}  // namespace

// q [B,H,R,D] fp32; out [B,H,R,Dv], lse [B,H,R] fp32. Every (row, head) is cut into `splits` tasks of about equal length.
extern "C" void calidrop_decode(const float* q, float* out, float* lse, int64_t B, int64_t H, int32_t R, int32_t D,
                                int32_t Dv, float scale, float softcap, const Piece* pieces, int32_t count,
                                int32_t threads) {
  const Call c{q, out, lse, B, H, R, D, Dv, scale, softcap};
  const int64_t heads = B * H;
  std::vector<int64_t> slots(heads, 0), starts(heads * count, 0);
  int64_t longest = 0;
  for (int64_t i = 0; i < heads; ++i) {
    for (int p = 0; p < count; ++p) {
      if (pieces[p].kind == ANSWERED) continue;
      slots[i] += (pieces[p].lens ? pieces[p].lens[i] : pieces[p].slots) * pieces[p].group;
      if (pieces[p].lens && i) starts[p * heads + i] = starts[p * heads + i - 1] + pieces[p].lens[i - 1];
    }
    longest = std::max(longest, slots[i]);
  }
  int64_t splits = heads % threads == 0 && heads >= threads ? 1 : (4 * threads + heads - 1) / heads;
  splits = std::max<int64_t>(1, std::min(splits, longest / 256));
  std::vector<Answer> answers(heads * splits, Answer(R, Dv));
#pragma omp parallel num_threads(threads)
  {
    Scratch w(c);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * splits; ++task) {
      const int64_t bh = task / splits, part = task % splits, b = bh / H, h = bh % H;
      Answer& mine = answers[task];
      const int64_t first = slots[bh] * part / splits, last = slots[bh] * (part + 1) / splits;
      int64_t at = 0;  // tokens of the pieces before
      for (int p = 0; p < count; ++p) {
        const Piece& x = pieces[p];
        if (x.kind == ANSWERED) {
          if (part == 0)
            for (int r = 0; r < R; ++r) {
              const int64_t i = bh * R + r;
              const float m = load<float>(x.v.p + 4 * i);
              if (x.k.p)
                mine.join(r, m, 1.0f, reinterpret_cast<const float*>(x.k.p) + i * Dv);
              else
                mine.join(r, m, 1.0f, std::vector<float>(Dv, 0.0f).data());
            }
          continue;
        }
        const int64_t n = x.lens ? x.lens[bh] : x.slots;
        // a unit belongs to the task in which it begins
        auto begin = [&](int64_t token) {
          return std::max<int64_t>(0, std::min(n, (token - at + x.group - 1) / x.group));
        };
        const int64_t from = first <= at ? 0 : begin(first), to = last <= at ? 0 : begin(last);
        at += n * x.group;
        if (from >= to) continue;
        run(c, x, Place{b, h, x.lens ? starts[p * heads + bh] : 0}, from, to, w);
        for (int r = 0; r < R; ++r)
          mine.join(r, w.part.m[r], w.part.l[r], w.part.o.data() + static_cast<size_t>(r) * Dv);
      }
    }
  }
  for (int64_t bh = 0; bh < heads; ++bh) {
    Answer& a = answers[bh * splits];
    for (int64_t i = 1; i < splits; ++i) {
      const Answer& o = answers[bh * splits + i];
      for (int r = 0; r < R; ++r) a.join(r, o.m[r], o.l[r], o.o.data() + static_cast<size_t>(r) * Dv);
    }
    for (int r = 0; r < R; ++r) {
      const float l = a.l[r];
      lse[bh * R + r] = l > 0.0f ? a.m[r] + std::log(l) : NONE;
      for (int d = 0; d < Dv; ++d) out[(bh * R + r) * Dv + d] = l > 0.0f ? a.o[static_cast<size_t>(r) * Dv + d] / l : 0.0f;
    }
  }
}
