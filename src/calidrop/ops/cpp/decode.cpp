// Decode attention on a CPU: a few queries per kv head over any number of pieces of cache, joined by their log-sum-exp
// in one call. The oracle is calidrop.attention (attend, merge) on the decoded tokens. Portable C++17 with GCC/Clang
// vector types, which become AVX-512, AVX2 or NEON.
#include "amx.h"
#include "array.h"
#include "rows.h"
#include "threads.h"
#include "vnni.h"

namespace {

struct Piece {
  int32_t kind, dtype, bits, group, channels, rotate, D;
  const float* q;       // [B,H,R,D]
  int64_t slots;        // per (row, head) where lens is null
  const int64_t* lens;  // [B*H], slots of each; they then lie one behind the other, or where
  const int64_t* starts;  // [B*H] says
  Array k, v, pos, bias, k_scale, k_zero, v_scale, v_zero;
};
enum Kind { EXACT, PER_TOKEN, PER_CHANNEL, ANSWERED, PER_GROUP, FLOAT8 };

struct Place {
  int64_t b, h, start;  // start: the first slot, where heads lie one behind the other
};

inline const char* base(const Piece& x, const Array& a, const Place& at) {
  return x.lens ? a.p + at.start * a.slot : a.p + at.b * a.row + at.h * a.head;
}

// what a set of tokens said to R queries: o and, where keys are wanted too (K > 0), their mean, not yet divided by l
struct Answer {
  int R, D, K;
  std::vector<float> m, l, o, mean, shrink;  // shrink: by what the last `softmax` multiplied the others
  Answer(int R, int D, int K)
      : R(R), D(D), K(K), m(R, NONE), l(R, 0.0f), o(static_cast<size_t>(R) * D, 0.0f),
        mean(static_cast<size_t>(R) * K, 0.0f), shrink(R, 1.0f) {}
  void reset() {
    std::fill(m.begin(), m.end(), NONE);
    std::fill(l.begin(), l.end(), 0.0f);
    std::fill(o.begin(), o.end(), 0.0f);
    std::fill(mean.begin(), mean.end(), 0.0f);
  }
  void shrink_by(int r, float by) {
    shrink[r] = by;
    l[r] *= by;
    for (int d = 0; d < D; ++d) o[static_cast<size_t>(r) * D + d] *= by;
    for (int d = 0; d < K; ++d) mean[static_cast<size_t>(r) * K + d] *= by;
  }
  void join(int r, float m2, float l2, const float* o2, const float* mean2) {
    if (m2 == NONE || l2 == 0.0f) return;
    float top = std::max(m[r], m2), a = std::exp(m[r] - top), b = std::exp(m2 - top);
    if (m[r] == NONE) a = 0.0f;
    float *mine = o.data() + static_cast<size_t>(r) * D, *keys = mean.data() + static_cast<size_t>(r) * K;
    for (int d = 0; d < D; ++d) mine[d] = a * mine[d] + b * o2[d];
    for (int d = 0; d < K; ++d) keys[d] = a * keys[d] + b * mean2[d];
    l[r] = a * l[r] + b * l2;
    m[r] = top;
  }
  void join(int r, const Answer& x) {
    join(r, x.m[r], x.l[r], x.o.data() + static_cast<size_t>(r) * D, x.mean.data() + static_cast<size_t>(r) * K);
  }
};

struct Call {
  float *out, *lse, *mean;
  int64_t B, H;
  int R, Dv;
  float scale, softcap;
};

// scores [R][BLOCK] of n tokens become weights against the running maximum; o and l are rescaled
void softmax(Answer& a, float* s, int n, float softcap, const char* pos, int64_t pos_slot, const char* bias,
             int64_t bias_slot) {
  for (int r = 0; r < a.R; ++r) {  // rows are independent: what one waits for, another computes
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
    Lanes<16>::I odd = top != top;
    for (int t = 16; t < BLOCK; t += 16) {
      V y = load<V>(x + t);
      odd |= y != y;
      top = y > top ? y : top;
    }
    a.shrink[r] = 1.0f;
    float m = a.m[r];
    if (any(odd)) {  // what is no number stays none, to the end
      a.l[r] = NAN, m = std::max(m, 0.0f);
      for (int i = 0; i < 16; ++i) m = std::max(m, top[i]);
    } else
      m = std::max(m, most(top));
    if (m > a.m[r]) {
      a.shrink_by(r, a.m[r] == NONE ? 0.0f : std::exp(a.m[r] - m));
      a.m[r] = m;
    }
  }
  for (int r = 0; r < a.R; ++r) {
    float* x = s + r * BLOCK;
    const float m = a.m[r] == NONE ? 0.0f : a.m[r];  // nothing visible so far: all weigh e^-inf
    V total = {};
    for (int t = 0; t < BLOCK; t += 16) {
      V y = exp(load<V>(x + t) - m);
      store(x + t, y);
      total += y;
    }
    a.l[r] += sum(total);
  }
}

// sums and differences of lanes HALF apart
template <int HALF> inline V butterflies(V x) {
  V y, sign;
#ifdef __clang__
  for (int i = 0; i < 16; ++i) y[i] = x[i ^ HALF];
#else
  Lanes<16>::I other;
  for (int i = 0; i < 16; ++i) other[i] = i ^ HALF;
  y = __builtin_shuffle(x, other);
#endif
  for (int i = 0; i < 16; ++i) sign[i] = i & HALF ? -1.0f : 1.0f;
  return y + sign * x;
}

// D: a multiple of 16
void hadamard(float* x, int D) {
  const int block = D & -D;
  const V c = splat(1.0f / std::sqrt(static_cast<float>(block)));
  for (int i = 0; i < D; i += 16)
    store(x + i, butterflies<8>(butterflies<4>(butterflies<2>(butterflies<1>(load<V>(x + i))))) * c);
  for (int half = 16; half < block; half *= 2)
    for (int i = 0; i < D; i += 2 * half)
      for (int j = i; j < i + half; j += 16) {
        const V a = load<V>(x + j), b = load<V>(x + j + half);
        store(x + j, a + b);
        store(x + j + half, a - b);
      }
}

struct Scratch {
  std::vector<float> q, s, w, scores, zeros, scale, zero, straight;
  std::vector<int> k_order, v_order;
  Answer part;
#ifdef CALIDROP_VNNI
  vnni::Words left, right;
#endif
#ifdef CALIDROP_AMX
  amx::Fixed tile_left, tile_right;
  amx::Buffers buffers;
#endif
  Scratch(const Call& c, int D)  // D: channels of the widest piece
      : q(c.R * D), s(c.R * BLOCK), w(c.R * BLOCK), straight(std::max(D, c.Dv)), part(c.R, c.Dv, c.mean ? D : 0) {}
};

// ---- exact tokens

template <class F>
void exact(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  const float* q = x.q + (at.b * c.H + at.h) * c.R * x.D;
  for (int i = 0; i < c.R * x.D; ++i) w.q[i] = q[i] * c.scale;
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  const char* bias = x.bias.p ? base(x, x.bias, at) : nullptr;
  w.part.reset();
  for (int64_t t = from; t < to; t += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, to - t));
    dots_of<F>(x.D, k + t * x.k.slot, x.k.slot, w.q.data(), w.s.data(), n, c.R);
    softmax(w.part, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot,
            bias ? bias + t * x.bias.slot : nullptr, x.bias.slot);
    weigh_of<F>(c.Dv, v + t * x.v.slot, x.v.slot, w.s.data(), w.part.o.data(), n, c.R);
    if (w.part.K) weigh_of<F>(x.D, k + t * x.k.slot, x.k.slot, w.s.data(), w.part.mean.data(), n, c.R);
  }
}

// ---- 8-bit floats with a scale per token

void float8(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  const float* q = x.q + (at.b * c.H + at.h) * c.R * x.D;
  for (int i = 0; i < c.R * x.D; ++i) w.q[i] = q[i] * c.scale;
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char *ks = base(x, x.k_scale, at), *vs = base(x, x.v_scale, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  alignas(64) float scale[BLOCK];
  const auto scaled = [&](const Array& of, const char* first, int64_t t, int n) {
    halves(first + t * of.slot, of.slot, n, scale);
    for (int r = 0; r < c.R; ++r)
      for (int i = 0; i < n; ++i) w.s[r * BLOCK + i] *= scale[i];
  };
  w.part.reset();
  for (int64_t t = from; t < to; t += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, to - t));
    dots_of<E4M3>(x.D, k + t * x.k.slot, x.k.slot, w.q.data(), w.s.data(), n, c.R);
    scaled(x.k_scale, ks, t, n);
    softmax(w.part, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0);
    scaled(x.v_scale, vs, t, n);
    weigh_of<E4M3>(c.Dv, v + t * x.v.slot, x.v.slot, w.s.data(), w.part.o.data(), n, c.R);
  }
}

// ---- codes with a scale and zero per token

// the order in which products see a row of keys, and in which sums over rows of values are left: place -> code
template <int BITS> void orders(int D, int Dv, [[maybe_unused]] bool tiles, Scratch& w) {
  w.k_order.resize(D), w.v_order.resize(Dv);
  plane_order<BITS>(D, w.k_order.data()), plane_order<BITS>(Dv, w.v_order.data());
#ifdef CALIDROP_VNNI
  if (vnni::fits(D)) vnni::code_order<BITS>(D, w.k_order.data());
  if (vnni::fits(Dv)) vnni::sum_order<BITS>(Dv, w.v_order.data());
#endif
#ifdef CALIDROP_AMX
  if (!tiles) return;
  for (int i = 0; i < D; ++i) w.k_order[i] = amx::code_at(i, BITS);
  for (int i = 0; i < Dv; ++i) w.v_order[i] = amx::sum_at(i, BITS);
#endif
}

template <int BITS>
void per_token(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  const float* q = x.q + (at.b * c.H + at.h) * c.R * x.D;
  bool tiles = false;
#ifdef CALIDROP_AMX
  tiles = c.R <= amx::ROWS && amx::fits(x.D) && amx::fits(c.Dv) && amx::allowed();
#endif
  orders<BITS>(x.D, c.Dv, tiles, w);
  w.zeros.assign(2 * c.R, 0.0f);  // what zeros of keys add to the scores of each query, and those of values to its o
  float *zero_q = w.zeros.data(), *zero_v = zero_q + c.R;
  for (int r = 0; r < c.R; ++r) {  // the scale of the logits goes into the queries
    std::memcpy(w.straight.data(), q + r * x.D, sizeof(float) * x.D);
    if (x.rotate) hadamard(w.straight.data(), x.D);
    V total = {};
    for (int d = 0; d < x.D; d += 16) {
      const V y = load<V>(w.straight.data() + d) * c.scale;
      store(w.straight.data() + d, y);
      total += y;
    }
    zero_q[r] = sum(total);
    for (int d = 0; d < x.D; ++d) w.q[r * x.D + d] = w.straight[w.k_order[d]];
  }
#ifdef CALIDROP_VNNI
  if (!tiles) {
    w.left.size(c.R, x.D), w.right.size(c.R, BLOCK);
    w.left.set(w.q.data(), x.D, x.D);
  }
#endif
  const auto block = [&](int64_t t) { return static_cast<int>(std::min<int64_t>(BLOCK, to - t)); };
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
#ifdef CALIDROP_AMX
  std::optional<amx::Tiles> mine;
  if (tiles) {
    mine.emplace();
    w.tile_left.size(c.R, x.D), w.tile_right.size(c.R, BLOCK);
    for (int r = 0; r < c.R; ++r) w.tile_left.set(r, w.q.data() + r * x.D, x.D);
    amx::lay(w.tile_left, w.buffers);
    amx::lay_keys<BITS>(k + from * x.k.slot, x.k.slot, block(from), x.D, w.buffers);
  }
#endif
  const char *ks = base(x, x.k_scale, at), *kz = base(x, x.k_zero, at);
  const char *vs = base(x, x.v_scale, at), *vz = base(x, x.v_zero, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  alignas(64) float scale[BLOCK], zero[BLOCK];
  w.part.reset();
  for (int64_t t = from; t < to; t += BLOCK) {
    const int n = block(t);
    const char *rows = k + t * x.k.slot, *v_rows = v + t * x.v.slot;
#ifdef CALIDROP_AMX
    if (tiles) {
      amx::dots<BITS>(rows, x.k.slot, n, x.D, w.buffers);
      amx::lay_values<BITS>(v_rows, x.v.slot, n, c.Dv, w.buffers);
      amx::scores<BITS>(n, w.tile_left, c.R, w.s.data(), w.buffers);
    } else
#endif
#ifdef CALIDROP_VNNI
    if (vnni::fits(x.D))
      vnni::dots<BITS>(rows, x.k.slot, n, x.D, w.left, c.R, w.s.data(), {v_rows, x.v.slot});
    else
#endif
      dots_of<Codes<BITS>>(x.D, rows, x.k.slot, w.q.data(), w.s.data(), n, c.R);
    halves(ks + t * x.k_scale.slot, x.k_scale.slot, n, scale);
    halves(kz + t * x.k_zero.slot, x.k_zero.slot, n, zero);
    for (int r = 0; r < c.R; ++r) {
      float* __restrict s = w.s.data() + r * BLOCK;
      const float z = zero_q[r];
      for (int i = 0; i < n; ++i) s[i] = s[i] * scale[i] + zero[i] * z;
    }
    softmax(w.part, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0);
    halves(vs + t * x.v_scale.slot, x.v_scale.slot, n, scale);
    halves(vz + t * x.v_zero.slot, x.v_zero.slot, n, zero);
    for (int r = 0; r < c.R; ++r) {
      float* __restrict s = w.s.data() + r * BLOCK;
      zero_v[r] = zero_v[r] * w.part.shrink[r] + inner(s, zero, n);
      for (int i = 0; i < n; ++i) s[i] *= scale[i];
    }
#ifdef CALIDROP_AMX
    if (tiles) {
      for (int r = 0; r < c.R; ++r) w.tile_right.set(r, w.s.data() + r * BLOCK, n);
      amx::rows(c.Dv, w.tile_right, w.buffers);
      if (t + n < to) amx::lay_keys<BITS>(rows + n * x.k.slot, x.k.slot, block(t + n), x.D, w.buffers);
      amx::add<BITS>(c.Dv, w.tile_right, c.R, w.part.o.data(), c.Dv, w.buffers);
      continue;
    }
#endif
#ifdef CALIDROP_VNNI
    if (vnni::fits(c.Dv)) {
      w.right.set(w.s.data(), BLOCK, n);
      vnni::rows<BITS>(v_rows, x.v.slot, n, c.Dv, w.right, c.R, w.part.o.data(), c.Dv,
                       {rows + n * x.k.slot, x.k.slot});
      continue;
    }
#endif
    weigh_of<Codes<BITS>>(c.Dv, v_rows, x.v.slot, w.s.data(), w.part.o.data(), n, c.R);
  }
  for (int r = 0; r < c.R; ++r) {
    float* o = w.part.o.data() + static_cast<size_t>(r) * c.Dv;
    for (int d = 0; d < c.Dv; ++d) w.straight[w.v_order[d]] = o[d];
    for (int d = 0; d < c.Dv; ++d) o[d] = w.straight[d] + zero_v[r];
    if (x.rotate) hadamard(o, c.Dv);
  }
}

// ---- keys with a scale and zero per channel over units of tokens, values per token over groups of channels (KIVI)

// sums over `n` rows of `codes` codes, as `rows` of vnni.h but portable; in the order of `plane_order`
template <int BITS, int L>
void rows_of(const char* p, int64_t step, int n, int codes, const float* w, int R, int w_width, float* to, int width) {
  using F = typename Lanes<L>::F;
  constexpr int PER = 8 / BITS;
  constexpr uint8_t MASK = (1 << BITS) - 1;
  const int bytes = codes / PER;
  for (int r0 = 0; r0 < R; r0 += 4) {
    const int rows = std::min(4, R - r0);
    for (int j = 0; j < bytes / L; ++j) {
      F sum[4][PER] = {};
      for (int t = 0; t < n; ++t) {
        const auto x = load<typename Lanes<L>::B>(p + t * step + j * L);
        for (int b = 0; b < PER; ++b) {
          const F f = __builtin_convertvector(
              __builtin_convertvector((x >> static_cast<uint8_t>(BITS * b)) & MASK, typename Lanes<L>::I), F);
          for (int r = 0; r < rows; ++r) sum[r][b] += f * w[(r0 + r) * w_width + t];
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int b = 0; b < PER; ++b) {
          float* o = to + static_cast<size_t>(r0 + r) * width + b * bytes + j * L;
          F y = load<F>(o) + sum[r][b];
          std::memcpy(o, &y, sizeof(F));
        }
    }
  }
}

template <int BITS>
void rows(const char* p, int64_t step, int n, int codes, const float* x, int R, int x_width, float* to, int width,
          Scratch& w) {
#ifdef CALIDROP_VNNI
  if (vnni::fits(codes)) {
    w.right.size(R, n);
    w.right.set(x, x_width, n);
    vnni::rows<BITS>(p, step, n, codes, w.right, R, to, width, {p, 0});
    return;
  }
#endif
  if (codes * BITS / 8 % 16 == 0)
    rows_of<BITS, 16>(p, step, n, codes, x, R, x_width, to, width);
  else
    rows_of<BITS, 8>(p, step, n, codes, x, R, x_width, to, width);
}

template <int BITS> void row_order(int codes, std::vector<int>& order) {
  order.resize(codes);
  plane_order<BITS>(codes, order.data());
#ifdef CALIDROP_VNNI
  if (vnni::fits(codes)) vnni::sum_order<BITS>(codes, order.data());
#endif
}

// n numbers in the order of codes, code i from where place[i] says
inline void in_order(const float* from, const std::vector<int>& place, int n, float* to) {
#ifdef CALIDROP_VNNI
  if (n == 32) return vnni::take32(from, place.data(), to);
#endif
  for (int i = 0; i < n; ++i) to[i] = from[place[i]];
}

// adds what n tokens say in the g-th group of channels, weights being in w.s; zeros [R][groups]: what zeros add up to
template <int BITS>
void weigh_group(const Call& c, const Piece& x, const char* v, int64_t step, int n, int g, const float* scale,
                 const float* zero, float* zeros, Scratch& w) {
  const int groups = c.Dv / x.channels;
  for (int r = 0; r < c.R; ++r) {
    const float* s = w.s.data() + r * BLOCK;
    for (int t = 0; t < n; ++t) w.w[r * BLOCK + t] = s[t] * scale[t];
    zeros[r * groups + g] = zeros[r * groups + g] * w.part.shrink[r] + inner(s, zero, n);
  }
  rows<BITS>(v, step, n, x.channels, w.w.data(), c.R, BLOCK, w.part.o.data() + g * x.channels, c.Dv, w);
}

// a group of channels out of the order of `row_order`, and what zeros add
inline void straighten(float* o, int n, float zero, Scratch& w) {
  for (int d = 0; d < n; ++d) w.straight[w.v_order[d]] = o[d];
  for (int d = 0; d < n; ++d) o[d] = w.straight[d] + zero;
}

template <int BITS>
void per_channel(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  constexpr int PER = 8 / BITS;
  const int group = x.group, groups = c.Dv / x.channels, row = c.Dv / PER;
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char *ks = base(x, x.k_scale, at), *kz = base(x, x.k_zero, at);
  const char *vs = base(x, x.v_scale, at), *vz = base(x, x.v_zero, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  const float* q = x.q + (at.b * c.H + at.h) * c.R * x.D;
  Answer& a = w.part;
  a.reset();
  row_order<BITS>(group, w.k_order), row_order<BITS>(x.channels, w.v_order);
  std::vector<int> place(group);
  for (int i = 0; i < group; ++i) place[w.k_order[i]] = i;
  // short units share a softmax where their values lie one behind the other
  const bool behind = x.v.slot == static_cast<int64_t>(group) * row && x.v_scale.slot == 2L * group * groups;
  const int together = behind && group < BLOCK ? BLOCK / group : 1, width = together * group;
  w.scores.resize(c.R * width + group), w.zeros.assign(c.R * groups, 0.0f);
  w.scale.resize(std::max(x.D, BLOCK * groups)), w.zero.resize(std::max(x.D, BLOCK * groups));
  for (int64_t u = from; u < to; u += together) {
    const int units = static_cast<int>(std::min<int64_t>(together, to - u)), tokens = units * group;
    std::fill(w.scores.begin(), w.scores.end(), 0.0f);
    for (int i = 0; i < units; ++i) {
      halves(ks + (u + i) * x.k_scale.slot, 2, x.D, w.scale.data());
      halves(kz + (u + i) * x.k_zero.slot, 2, x.D, w.zero.data());
      for (int r = 0; r < c.R; ++r)
        for (int d = 0; d < x.D; ++d) w.q[r * x.D + d] = q[r * x.D + d] * w.scale[d];
      float* scores = w.scores.data() + i * group;
      rows<BITS>(k + (u + i) * x.k.slot, group / PER, x.D, group, w.q.data(), c.R, x.D, scores, width, w);
      for (int r = 0; r < c.R; ++r) {
        float *mine = scores + static_cast<size_t>(r) * width, *own = w.scores.data() + c.R * width;
        const float offset = inner(q + r * x.D, w.zero.data(), x.D);
        for (int t = 0; t < group; ++t) own[t] = (mine[t] + offset) * c.scale;
        in_order(own, place, group, mine);
      }
    }
    for (int t0 = 0; t0 < tokens; t0 += BLOCK) {
      const int n = std::min(BLOCK, tokens - t0);
      for (int r = 0; r < c.R; ++r)
        std::memcpy(w.s.data() + r * BLOCK, w.scores.data() + r * width + t0, sizeof(float) * n);
      const char* held = pos ? pos + u * x.pos.slot + 4 * t0 : nullptr;
      softmax(a, w.s.data(), n, c.softcap, held, 4, nullptr, 0);
      halves(vs + u * x.v_scale.slot + 2L * t0 * groups, 2, n * groups, w.scale.data());
      halves(vz + u * x.v_zero.slot + 2L * t0 * groups, 2, n * groups, w.zero.data());
      for (int g = 0; g < groups; ++g) {
        alignas(64) float scale[BLOCK], zero[BLOCK];
        every(w.scale.data() + g, groups, n, scale);
        every(w.zero.data() + g, groups, n, zero);
        const char* first = v + u * x.v.slot + static_cast<int64_t>(t0) * row + g * (x.channels / PER);
        weigh_group<BITS>(c, x, first, row, n, g, scale, zero, w.zeros.data(), w);
      }
    }
  }
  for (int r = 0; r < c.R; ++r)
    for (int g = 0; g < groups; ++g)
      straighten(a.o.data() + static_cast<size_t>(r) * c.Dv + g * x.channels, x.channels, w.zeros[r * groups + g], w);
}

// ---- codes with a scale and zero per token and group of channels

// scores of n tokens for R rows of queries, in the order of `plane_order`
template <int BITS, int L>
void dots_by(const char* p, int64_t step, int n, int codes, const float* q, int R, int q_width, float* s) {
  using F = typename Lanes<L>::F;
  constexpr int PER = 8 / BITS;
  constexpr uint8_t MASK = (1 << BITS) - 1;
  const int bytes = codes / PER;
  for (int r0 = 0; r0 < R; r0 += 4) {
    const int rows = std::min(4, R - r0);
    for (int t = 0; t < n; ++t) {
      F total[4] = {};
      for (int j = 0; j < bytes / L; ++j) {
        const auto x = load<typename Lanes<L>::B>(p + t * step + j * L);
        for (int b = 0; b < PER; ++b) {
          const F f = __builtin_convertvector(
              __builtin_convertvector((x >> static_cast<uint8_t>(BITS * b)) & MASK, typename Lanes<L>::I), F);
          for (int r = 0; r < rows; ++r) total[r] += f * load<F>(q + (r0 + r) * q_width + b * bytes + j * L);
        }
      }
      for (int r = 0; r < rows; ++r) s[(r0 + r) * BLOCK + t] = sum(total[r]);
    }
  }
}

template <int BITS>
void per_group(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  constexpr int PER = 8 / BITS;
  const int size = x.channels, groups = x.D / size, v_groups = c.Dv / size, bytes = size / PER;
  const char *k = base(x, x.k, at), *v = base(x, x.v, at);
  const char *ks = base(x, x.k_scale, at), *kz = base(x, x.k_zero, at);
  const char *vs = base(x, x.v_scale, at), *vz = base(x, x.v_zero, at);
  const char* pos = x.pos.p ? base(x, x.pos, at) : nullptr;
  const float* q = x.q + (at.b * c.H + at.h) * c.R * x.D;
  Answer& a = w.part;
  a.reset();
  w.k_order.resize(size), plane_order<BITS>(size, w.k_order.data());
  row_order<BITS>(size, w.v_order);
  w.zeros.assign(c.R * (groups + v_groups), 0.0f);
  float *zero_q = w.zeros.data(), *zero_v = zero_q + c.R * groups;
  for (int r = 0; r < c.R; ++r)
    for (int g = 0; g < groups; ++g)
      for (int d = 0; d < size; ++d) {
        const float y = q[r * x.D + g * size + w.k_order[d]] * c.scale;
        w.q[r * x.D + g * size + d] = y;
        zero_q[r * groups + g] += y;
      }
  alignas(64) float scale[BLOCK], zero[BLOCK];
  for (int64_t t = from; t < to; t += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, to - t));
    for (int g = 0; g < groups; ++g) {
      const char* first = k + t * x.k.slot + g * bytes;
      if (bytes % 16 == 0)
        dots_by<BITS, 16>(first, x.k.slot, n, size, w.q.data() + g * size, c.R, x.D, w.w.data());
      else
        dots_by<BITS, 8>(first, x.k.slot, n, size, w.q.data() + g * size, c.R, x.D, w.w.data());
      halves(ks + t * x.k_scale.slot + 2 * g, x.k_scale.slot, n, scale);
      halves(kz + t * x.k_zero.slot + 2 * g, x.k_zero.slot, n, zero);
      for (int r = 0; r < c.R; ++r) {
        float* __restrict s = w.s.data() + r * BLOCK;
        const float *mine = w.w.data() + r * BLOCK, z = zero_q[r * groups + g];
        for (int i = 0; i < n; ++i) s[i] = (g ? s[i] : 0.0f) + mine[i] * scale[i] + zero[i] * z;
      }
    }
    softmax(a, w.s.data(), n, c.softcap, pos ? pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0);
    for (int g = 0; g < v_groups; ++g) {
      halves(vs + t * x.v_scale.slot + 2 * g, x.v_scale.slot, n, scale);
      halves(vz + t * x.v_zero.slot + 2 * g, x.v_zero.slot, n, zero);
      weigh_group<BITS>(c, x, v + t * x.v.slot + g * bytes, x.v.slot, n, g, scale, zero, zero_v, w);
    }
  }
  for (int r = 0; r < c.R; ++r)
    for (int g = 0; g < v_groups; ++g)
      straighten(a.o.data() + static_cast<size_t>(r) * c.Dv + g * size, size, zero_v[r * v_groups + g], w);
}

void run(const Call& c, const Piece& x, const Place& at, int64_t from, int64_t to, Scratch& w) {
  if (x.kind == EXACT) {
    if (x.dtype == F32) exact<Float32>(c, x, at, from, to, w);
    if (x.dtype == BF16) exact<BFloat16>(c, x, at, from, to, w);
    if (x.dtype == F16) exact<Float16>(c, x, at, from, to, w);
  } else if (x.kind == PER_TOKEN) {
    if (x.bits == 8) per_token<8>(c, x, at, from, to, w);
    if (x.bits == 4) per_token<4>(c, x, at, from, to, w);
    if (x.bits == 2) per_token<2>(c, x, at, from, to, w);
  } else if (x.kind == FLOAT8) {
    float8(c, x, at, from, to, w);
  } else if (x.kind == PER_GROUP) {
    if (x.bits == 4) per_group<4>(c, x, at, from, to, w);
    if (x.bits == 2) per_group<2>(c, x, at, from, to, w);
  } else {
    if (x.bits == 8) per_channel<8>(c, x, at, from, to, w);
    if (x.bits == 4) per_channel<4>(c, x, at, from, to, w);
    if (x.bits == 2) per_channel<2>(c, x, at, from, to, w);
  }
}

}  // namespace

// out [B,H,R,Dv], lse [B,H,R] fp32; mean [B,H,R,D] or null, the weighted mean key, of exact pieces alone. Every (row, head) is cut into `splits` tasks of about equal length.
extern "C" void calidrop_decode(float* out, float* lse, float* mean, int64_t B, int64_t H, int32_t R, int32_t Dv, float scale,
                                float softcap, const Piece* pieces, int32_t count, int32_t threads) {
  const Call c{out, lse, mean, B, H, R, Dv, scale, softcap};
  const int64_t heads = B * H;
  std::vector<int64_t> slots(heads, 0), starts(heads * count, 0);
  int64_t longest = 0;
  int D = 0;
  for (int p = 0; p < count; ++p) D = std::max(D, pieces[p].D);
  for (int64_t i = 0; i < heads; ++i) {
    for (int p = 0; p < count; ++p) {
      if (pieces[p].kind == ANSWERED) continue;
      slots[i] += (pieces[p].lens ? pieces[p].lens[i] : pieces[p].slots) * pieces[p].group;
      if (pieces[p].starts)
        starts[p * heads + i] = pieces[p].starts[i];
      else if (pieces[p].lens && i)
        starts[p * heads + i] = starts[p * heads + i - 1] + pieces[p].lens[i - 1];
    }
    longest = std::max(longest, slots[i]);
  }
  int64_t splits = heads % threads == 0 && heads >= threads ? 1 : (4 * threads + heads - 1) / heads;
  splits = std::max<int64_t>(1, std::min(splits, longest / 256));
  std::vector<Answer> answers(heads * splits, Answer(R, Dv, mean ? D : 0));
  each(heads * splits, threads, [&] { return Scratch(c, D); }, [&](int64_t task, Scratch& w) {
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
              mine.join(r, m, 1.0f, reinterpret_cast<const float*>(x.k.p) + i * Dv, nullptr);
            else
              mine.join(r, m, 1.0f, std::vector<float>(Dv, 0.0f).data(), nullptr);
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
      for (int r = 0; r < R; ++r) mine.join(r, w.part);
    }
  });
  for (int64_t bh = 0; bh < heads; ++bh) {
    Answer& a = answers[bh * splits];
    for (int64_t i = 1; i < splits; ++i)
      for (int r = 0; r < R; ++r) a.join(r, answers[bh * splits + i]);
    for (int r = 0; r < R; ++r) {
      const float l = a.l[r];
      const bool empty = l == 0.0f;
      lse[bh * R + r] = empty ? NONE : a.m[r] + std::log(l);
      for (int d = 0; d < Dv; ++d) out[(bh * R + r) * Dv + d] = empty ? 0.0f : a.o[static_cast<size_t>(r) * Dv + d] / l;
      for (int d = 0; d < a.K; ++d)
        mean[(bh * R + r) * D + d] = empty ? 0.0f : a.mean[static_cast<size_t>(r) * D + d] / l;
    }
  }
}
