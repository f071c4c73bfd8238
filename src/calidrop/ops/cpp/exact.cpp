// Exact tokens, and 8-bit floats with a scale per token.
#include "pieces.h"

namespace {

struct Scratch {
  std::vector<float> q, s;
  std::vector<uint16_t> pairs;
  std::vector<char> keys, values;
};

// queries times the scale of the logits, in rows of `width` that zeros fill up
inline void scaled(const Call& c, const Piece& x, const Stretch& at, int width, Scratch& w) {
  const float* q = c.queries(x, at);
  w.q.resize(c.R * width), w.s.resize(c.R * SCORES);
  float* to = w.q.data();
  for (int r = 0; r < c.R; ++r) {
    for (int d = 0; d < x.D; ++d) to[r * width + d] = q[r * x.D + d] * c.scale;
    std::fill(to + r * width + x.D, to + (r + 1) * width, 0.0f);
  }
}

#ifdef CALIDROP_PAIRS
constexpr int MANY = 8;  // queries that wait for products; fewer wait for memory, and four lose 3 % by asking it faster

// the same queries in bf16 and without the scale, where they are such numbers; else false
inline bool paired(const Call& c, const Piece& x, const Stretch& at, int width, Scratch& w) {
  const float* q = c.queries(x, at);
  w.pairs.assign(static_cast<size_t>(c.R) * width, 0);
  bool all = true;
  for (int r = 0; r < c.R; ++r)
    for (int d = 0; d < x.D; ++d) {
      const uint16_t y = w.pairs[r * width + d] = bfloat(q[r * x.D + d]);
      all &= of_bfloat(y) == q[r * x.D + d];
    }
  return all;
}

// the scores of n of their tokens
void pair_scores(const Call& c, int width, const char* k, int64_t step, int n, Scratch& w) {
  dots_of<Pairs>(width, k, step, w.pairs.data(), w.s.data(), n, c.R);
  for (int r = 0; r < c.R; ++r)
    for (float* s = w.s.data() + r * SCORES; s < w.s.data() + r * SCORES + n; s += 16) store(s, load<V>(s) * c.scale);
}
#endif

// of the scores of slot t and those behind it
inline Turns turns(const Piece& x, int64_t t) {
  const int64_t end = x.slots - x.turns + 1 - t;  // of the first query
  return {x.turns, x.reach ? end - x.reach : -x.turns, end};
}

template <class F>
void exact(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  const Head p(x, at);
  const int D = width_of<F>(x.D), Dv = width_of<F>(c.Dv);
  const Rows keys(p.k, x.k.slot, x.D * F::BITS / 8, D * F::BITS / 8, w.keys);
  const Rows values(p.v, x.v.slot, c.Dv * F::BITS / 8, Dv * F::BITS / 8, w.values);
  scaled(c, x, at, D, w);
#ifdef CALIDROP_PAIRS
  const bool pairs = std::is_same_v<F, BFloat16> && c.R >= MANY && known<Pairs>(D) && paired(c, x, at, D, w);
#endif
  for (int64_t t = at.from; t < at.to; t += SCORES) {
    const int n = static_cast<int>(std::min<int64_t>(SCORES, at.to - t));
    const char* k = keys.at(t, n);
#ifdef CALIDROP_PAIRS
    if (pairs)
      pair_scores(c, D, k, keys.step, n, w);
    else
#endif
      dots_of<F>(D, k, keys.step, w.q.data(), w.s.data(), n, c.R);
    softmax(a, w.s.data(), n, c.softcap, p.pos ? p.pos + t * x.pos.slot : nullptr, x.pos.slot,
            p.bias ? p.bias + t * x.bias.slot : nullptr, x.bias.slot, c.heard(x, at, t), turns(x, t));
    weigh_of<F>(Dv, values.at(t, n), values.step, w.s.data(), a.o, a.D, n, c.R);
    if (a.K) weigh_of<F>(D, k, keys.step, w.s.data(), a.mean, a.K, n, c.R);
  }
}

void float8(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  const Head p(x, at);
  const int D = width_of<E4M3>(x.D), Dv = width_of<E4M3>(c.Dv);
  const Rows keys(p.k, x.k.slot, x.D, D, w.keys), values(p.v, x.v.slot, c.Dv, Dv, w.values);
  scaled(c, x, at, D, w);
  alignas(64) float scale[SCORES];
  const auto by_scale = [&](const Array& of, const char* first, int64_t t, int n) {
    halves(first + t * of.slot, of.slot, n, scale);
    for (int r = 0; r < c.R; ++r)
      for (int i = 0; i < n; ++i) w.s[r * SCORES + i] *= 256.0f * scale[i];  // of what E4M3 divides
  };
  for (int64_t t = at.from; t < at.to; t += SCORES) {
    const int n = static_cast<int>(std::min<int64_t>(SCORES, at.to - t));
    dots_of<E4M3>(D, keys.at(t, n), keys.step, w.q.data(), w.s.data(), n, c.R);
    by_scale(x.k_scale, p.k_scale, t, n);
    softmax(a, w.s.data(), n, c.softcap, p.pos ? p.pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0,
            c.heard(x, at, t));
    by_scale(x.v_scale, p.v_scale, t, n);
    weigh_of<E4M3>(Dv, values.at(t, n), values.step, w.s.data(), a.o, a.D, n, c.R);
  }
}

}  // namespace

void calidrop::ask_exact(const Call& c, const Piece& x, const Stretch& at, Answer& a) {
  thread_local Scratch w;
  if (x.kind == FLOAT8) return float8(c, x, at, a, w);
  if (x.dtype == F32) exact<Float32>(c, x, at, a, w);
  if (x.dtype == BF16) exact<BFloat16>(c, x, at, a, w);
  if (x.dtype == F16) exact<Float16>(c, x, at, a, w);
}
