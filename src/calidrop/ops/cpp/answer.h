// What a set of tokens says to a few queries, and how scores become weights.
#pragma once
#include "vectors.h"

namespace calidrop {

// what a set of tokens said to R queries: o and, where keys are wanted too (K > 0), their mean, not yet divided by l;
// D, K: numbers of a row, what fills it up included
struct Answer {
  int R = 0, D = 0, K = 0;
  float *m, *l, *shrink, *o, *mean;  // shrink: by what the last `softmax` multiplied the others
  // as of no token; memory is kept for the next time
  void begin(int rows, int width, int keys) {
    R = rows, D = width, K = keys;
    room.resize(static_cast<size_t>(R) * (3 + D + K));
    m = room.data(), l = m + R, shrink = l + R, o = shrink + R, mean = o + static_cast<size_t>(R) * D;
    std::fill(shrink, o, 1.0f);
    reset();
  }
  void reset() {
    std::fill(m, l, NONE);
    std::fill(l, shrink, 0.0f);
    std::fill(o, room.data() + room.size(), 0.0f);
  }
  void shrink_by(int r, float by) {
    shrink[r] = by;
    l[r] *= by;
    for (int d = 0; d < D; ++d) o[static_cast<size_t>(r) * D + d] *= by;
    for (int d = 0; d < K; ++d) mean[static_cast<size_t>(r) * K + d] *= by;
  }
  // n: numbers of o2
  void join(int r, float m2, float l2, const float* o2, int n, const float* mean2) {
    if (m2 == NONE || l2 == 0.0f) return;
    float top = std::max(m[r], m2), a = std::exp(m[r] - top), b = std::exp(m2 - top);
    if (m[r] == NONE) a = 0.0f;
    float *mine = o + static_cast<size_t>(r) * D, *keys = mean + static_cast<size_t>(r) * K;
    for (int d = 0; d < n; ++d) mine[d] = a * mine[d] + b * o2[d];
    for (int d = 0; d < K; ++d) keys[d] = a * keys[d] + b * mean2[d];
    l[r] = a * l[r] + b * l2;
    m[r] = top;
  }
  void join(int r, const Answer& x) {
    join(r, x.m[r], x.l[r], x.o + static_cast<size_t>(r) * D, D, x.mean + static_cast<size_t>(r) * K);
  }

 private:
  std::vector<float> room;  // one for all, as each would be memory of its own to find
};

// Rows that are of `many` queries in turn: the i-th sees the tokens from `first + i` to `end + i - 1`. 0: all see all.
struct Turns {
  int many;
  int64_t first, end;
};

// where the logits of R queries are wanted, a number of floats apart; null where they are not
struct Heard {
  float* to;
  int64_t apart;
};

}  // namespace calidrop
using namespace calidrop;

namespace {

// scores [R][SCORES] of n tokens become weights against the running maximum, 0 behind them to a whole vector; o and l are
// rescaled. heard: gets the logits that became weights
inline void softmax(Answer& a, float* s, int n, float softcap, const char* pos, int64_t pos_slot, const char* bias,
                    int64_t bias_slot, const Heard& heard, const Turns& turns = {}) {
  const int end = whole_vectors(n);
  for (int r = 0; r < a.R; ++r) {  // rows are independent: what one waits for, another computes
    float* x = s + r * SCORES;
    if (softcap > 0.0f)
      for (int t = 0; t < n; ++t) x[t] = softcap * std::tanh(x[t] / softcap);
    if (bias)
      for (int t = 0; t < n; ++t) x[t] += load<float>(bias + t * bias_slot);
    if (pos)
      for (int t = 0; t < n; ++t)
        if (load<int32_t>(pos + t * pos_slot) < 0) x[t] = NONE;
    if (turns.many) {
      const auto in = [&](int64_t t) { return std::clamp<int64_t>(t + r % turns.many, 0, n); };
      std::fill(x, x + in(turns.first), NONE), std::fill(x + in(turns.end), x + n, NONE);
    }
    if (heard.to) std::memcpy(heard.to + r * heard.apart, x, sizeof(float) * n);
    for (int t = n; t < end; ++t) x[t] = NONE;
    V top = load<V>(x);
    Lanes<16>::I odd = top != top;
    for (int t = 16; t < end; t += 16) {
      V y = load<V>(x + t);
      odd |= y != y;
      top = pick(y > top, y, top);
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
    float* x = s + r * SCORES;
    const float m = a.m[r] == NONE ? 0.0f : a.m[r];  // nothing visible so far: all weigh e^-inf
    V total = {};
    for (int t = 0; t < end; t += 16) {
      V y = exp(load<V>(x + t) - m);
      store(x + t, y);
      total += y;
    }
    a.l[r] += sum(total);
  }
}

}  // namespace
