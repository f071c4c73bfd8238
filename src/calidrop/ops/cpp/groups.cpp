// Codes with a scale and zero for a group of channels or of tokens.
#include "pieces.h"
#include "words.h"

namespace {

struct Scratch {
  std::vector<float> q, s, x, w, scores, own, zeros, scale, zero, straight;
  std::vector<int> k_order, v_order;
  std::vector<char> keys, values;
#ifdef CALIDROP_WORDS
  std::vector<words::Words<true>> left;
  words::Words<false> right;
#endif
  void size(const Call& c, const Piece& x) {
    q.resize(c.R * x.D), s.resize(c.R * SCORES), w.resize(c.R * SCORES), straight.resize(c.Dv);
  }
};

// the b-th codes of L bytes
template <int BITS, int L> inline typename Lanes<L>::F opened(typename Lanes<L>::B x, int b) {
  const auto code = (x >> static_cast<uint8_t>(BITS * b)) & static_cast<uint8_t>((1 << BITS) - 1);
  return converted<typename Lanes<L>::F>(widened(code));
}

// sums over `n` rows of `codes` codes, as `rows` of words.h but portable; in the order of `plane_order`
template <int BITS, int L>
void rows_of(const char* p, int64_t step, int n, int codes, const float* w, int R, int w_width, float* to, int width) {
  using F = typename Lanes<L>::F;
  constexpr int PER = 8 / BITS;
  const int bytes = codes / PER;
  for (int r0 = 0; r0 < R; r0 += 4) {
    const int rows = std::min(4, R - r0);
    for (int j = 0; j < bytes / L; ++j) {
      F sum[4][PER] = {};
      for (int t = 0; t < n; ++t) {
        const auto x = load<typename Lanes<L>::B>(p + t * step + j * L);
        for (int b = 0; b < PER; ++b) {
          const F f = opened<BITS, L>(x, b);
          for (int r = 0; r < rows; ++r) sum[r][b] += f * w[(r0 + r) * w_width + t];
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int b = 0; b < PER; ++b) {
          float* o = to + static_cast<size_t>(r0 + r) * width + b * bytes + j * L;
          store(o, load<F>(o) + sum[r][b]);
        }
    }
  }
}

// sums over n rows of `codes` codes of x times scale times code
template <int BITS>
void rows(const char* p, int64_t step, int n, int codes, const float* x, int R, int x_width, const float* scale, float* to,
          int width, Scratch& w) {
#ifdef CALIDROP_WORDS
  if (words::fits(codes)) {
    for (int i = 0; i < n; i += words::ROWS) {
      const int some = std::min(words::ROWS, n - i);
      w.right.size(R, some);
      w.right.set(x + i, x_width, some, scale + i);
      words::rows<BITS>(p + i * step, step, some, codes, w.right, R, to, width);
    }
    return;
  }
#endif
  w.x.resize(R * n);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < n; ++t) w.x[r * n + t] = x[r * x_width + t] * scale[t];
  if (codes * BITS / 8 % 16 == 0)
    rows_of<BITS, 16>(p, step, n, codes, w.x.data(), R, n, to, width);
  else
    rows_of<BITS, 8>(p, step, n, codes, w.x.data(), R, n, to, width);
}

template <int BITS> void row_order(int codes, std::vector<int>& order) {
  order.resize(codes);
  plane_order<BITS>(codes, order.data());
#ifdef CALIDROP_WORDS
  if (words::fits(codes)) words::sum_order<BITS>(codes, order.data());
#endif
}

// n numbers in the order of codes, code i from where place[i] says
inline void in_order(const float* from, const std::vector<int>& place, int n, float* to) {
#ifdef CALIDROP_VNNI
  if (n == 32) return words::take32(from, place.data(), to);
#endif
  for (int i = 0; i < n; ++i) to[i] = from[place[i]];
}

// adds what n tokens say in the g-th group of channels, weights being in w.s; zeros [R][groups]: what zeros add up to
template <int BITS>
void weigh_group(const Call& c, const Piece& x, const char* v, int64_t step, int n, int g, const float* scale,
                 const float* zero, float* zeros, Answer& a, Scratch& w) {
  const int groups = c.Dv / x.channels;
  for (int r = 0; r < c.R; ++r)
    zeros[r * groups + g] = zeros[r * groups + g] * a.shrink[r] + inner(w.s.data() + r * SCORES, zero, n);
  rows<BITS>(v, step, n, x.channels, w.s.data(), c.R, SCORES, scale, a.o + g * x.channels, a.D, w);
}

// puts the answer out of the order of `row_order`, and adds what zeros do
inline void straighten(const Call& c, const Piece& x, const float* zeros, Answer& a, Scratch& w) {
  const int groups = c.Dv / x.channels;
  for (int r = 0; r < c.R; ++r)
    for (int g = 0; g < groups; ++g) {
      float* o = a.o + static_cast<size_t>(r) * a.D + g * x.channels;
      for (int d = 0; d < x.channels; ++d) w.straight[w.v_order[d]] = o[d];
      for (int d = 0; d < x.channels; ++d) o[d] = w.straight[d] + zeros[r * groups + g];
    }
}

// ---- keys with a scale and zero per channel over units of tokens, values per token over groups of channels (KIVI)

// where code i of a group of n tokens is left by `rows`
template <int BITS> std::vector<int> places(int n, Scratch& w) {
  row_order<BITS>(n, w.k_order);
  std::vector<int> place(n);
  for (int i = 0; i < n; ++i) place[w.k_order[i]] = i;
  return place;
}

// adds to scores, rows `width` apart, what `channels` channels of a group of n tokens say to q, rows of `wide`; scales
// and zeros of channels are `slot` bytes apart
template <int BITS>
void ask_channels(const Call& c, const char* k, int64_t step, const char* scales, const char* zeros, int64_t slot,
                  int channels, int n, const float* q, int wide, const std::vector<int>& place, float* scores, int width,
                  Scratch& w) {
  w.scale.resize(channels + 16), w.zero.resize(channels + 16), w.own.assign((c.R + 1) * n, 0.0f);
  halves(scales, slot, channels, w.scale.data());
  halves(zeros, slot, channels, w.zero.data());
  rows<BITS>(k, step, channels, n, q, c.R, wide, w.scale.data(), w.own.data(), n, w);
  float* straight = w.own.data() + c.R * n;
  for (int r = 0; r < c.R; ++r) {
    const float offset = inner(q + r * wide, w.zero.data(), channels);
    in_order(w.own.data() + r * n, place, n, straight);
    float* mine = scores + static_cast<size_t>(r) * width;
    for (int t = 0; t < n; ++t) mine[t] += (straight[t] + offset) * c.scale;
  }
}

// scores of n tokens from the t-th on, in w.scores with rows `width` apart, become weights
void weights(const Call& c, const char* pos, int t, int n, int width, const Heard& heard, Answer& a, Scratch& w) {
  for (int r = 0; r < c.R; ++r) std::memcpy(w.s.data() + r * SCORES, w.scores.data() + r * width + t, sizeof(float) * n);
  softmax(a, w.s.data(), n, c.softcap, pos ? pos + 4 * t : nullptr, 4, nullptr, 0, {heard.to ? heard.to + t : nullptr, heard.apart});
}

// scores of tokens one behind the other, in w.scores with rows `width` apart, become weights of their values, which are as
// they came
void weigh_exact(const Call& c, const Piece& x, const char* v, const char* pos, int tokens, int width, const Heard& heard,
                 Answer& a, Scratch& w) {
  const int size = x.dtype == F32 ? 4 : 2, wide = width_of<Float32>(c.Dv);
  const Rows values(v, c.Dv * size, c.Dv * size, wide * size, w.values);
  for (int t = 0; t < tokens; t += SCORES) {
    const int n = std::min(SCORES, tokens - t);
    weights(c, pos, t, n, width, heard, a, w);
    const char* first = values.at(t, n);
    if (x.dtype == F32) weigh_of<Float32>(wide, first, values.step, w.s.data(), a.o, a.D, n, c.R);
    if (x.dtype == BF16) weigh_of<BFloat16>(wide, first, values.step, w.s.data(), a.o, a.D, n, c.R);
    if (x.dtype == F16) weigh_of<Float16>(wide, first, values.step, w.s.data(), a.o, a.D, n, c.R);
  }
}

// or which have a scale and zero per token and group of channels
template <int BITS>
void weigh_tokens(const Call& c, const Piece& x, const char* v, const char* scales, const char* zeros, const char* pos,
                  int tokens, int width, float* zero_sums, const Heard& heard, Answer& a, Scratch& w) {
  constexpr int PER = 8 / BITS;
  const int groups = c.Dv / x.channels, row = c.Dv / PER;
  w.scale.resize(SCORES * groups), w.zero.resize(SCORES * groups);
  for (int t0 = 0; t0 < tokens; t0 += SCORES) {
    const int n = std::min(SCORES, tokens - t0);
    weights(c, pos, t0, n, width, heard, a, w);
    halves(scales + 2L * t0 * groups, 2, n * groups, w.scale.data());
    halves(zeros + 2L * t0 * groups, 2, n * groups, w.zero.data());
    for (int g = 0; g < groups; ++g) {
      alignas(64) float scale[SCORES], zero[SCORES];
      every(w.scale.data() + g, groups, n, scale);
      every(w.zero.data() + g, groups, n, zero);
      const char* first = v + static_cast<int64_t>(t0) * row + g * (x.channels / PER);
      weigh_group<BITS>(c, x, first, row, n, g, scale, zero, zero_sums, a, w);
    }
  }
}

template <int BITS>
void per_channel(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  constexpr int PER = 8 / BITS;
  const Head p(x, at);
  const int group = x.group, groups = c.Dv / x.channels, row = c.Dv / PER;
  const float* q = c.queries(x, at);
  row_order<BITS>(x.channels, w.v_order);
  const std::vector<int> place = places<BITS>(group, w);
  // short units share a softmax where their values lie one behind the other
  const bool behind = x.v.slot == static_cast<int64_t>(group) * row && x.v_scale.slot == 2L * group * groups;
  const int together = behind && group < SCORES ? SCORES / group : 1, width = together * group;
  w.scores.resize(c.R * width), w.zeros.assign(c.R * groups, 0.0f);
  for (int64_t u = at.from; u < at.to; u += together) {
    const int units = static_cast<int>(std::min<int64_t>(together, at.to - u));
    std::fill(w.scores.begin(), w.scores.end(), 0.0f);
    for (int64_t i = u; i < u + units; ++i)
      ask_channels<BITS>(c, p.k + i * x.k.slot, group / PER, p.k_scale + i * x.k_scale.slot,
                         p.k_zero + i * x.k_zero.slot, 2, x.D, group, q, x.D, place,
                         w.scores.data() + (i - u) * group, width, w);
    weigh_tokens<BITS>(c, x, p.v + u * x.v.slot, p.v_scale + u * x.v_scale.slot, p.v_zero + u * x.v_zero.slot,
                       p.pos ? p.pos + u * x.pos.slot : nullptr, units * group, width, w.zeros.data(),
                       c.heard(x, at, u * group), a, w);
  }
  straighten(c, x, w.zeros.data(), a, w);
}

// ---- keys whose channels have 16, 4 or 2 bits, each unit of tokens in an order of its own (MixKVQ)

// BITS: of values, 16 where they are as they came
template <int BITS>
void tiers(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  const Head p(x, at);
  const char *order = Head::of(x, x.order, at), *exact = Head::of(x, x.k16, at), *k4 = Head::of(x, x.k4, at);
  const char *scale4 = Head::of(x, x.k4_scale, at), *zero4 = Head::of(x, x.k4_zero, at);
  const int tokens = x.group, n16 = x.tiers[0], n4 = x.tiers[1], n2 = x.D - n16 - n4, per = x.tiers[2];
  const int64_t slot = 2L * (tokens / per);  // bytes from a channel's scale to that of the next
  const float* q = c.queries(x, at);
  const std::vector<int> place4 = places<4>(per, w), place2 = places<2>(per, w);
  std::vector<float> mine(c.R * x.D), numbers16(static_cast<size_t>(tokens) * n16);
  if constexpr (BITS < 16) row_order<BITS>(x.channels, w.v_order);
  w.scores.resize(c.R * tokens), w.zeros.assign(c.R * (c.Dv / x.channels), 0.0f);
  for (int64_t u = at.from; u < at.to; ++u) {
    const auto* channel = reinterpret_cast<const uint8_t*>(order + u * x.order.slot);
    for (int r = 0; r < c.R; ++r)
      for (int d = 0; d < x.D; ++d) mine[r * x.D + d] = q[r * x.D + channel[d]];
    numbers(exact + u * x.k16.slot, x.dtype, tokens * n16, numbers16.data());
    for (int r = 0; r < c.R; ++r)
      for (int t = 0; t < tokens; ++t) {
        float total = 0.0f;
        for (int d = 0; d < n16; ++d) total += mine[r * x.D + d] * numbers16[t * n16 + d];
        w.scores[r * tokens + t] = total * c.scale;
      }
    for (int g = 0; g < tokens / per; ++g) {
      float* scores = w.scores.data() + g * per;
      if (n4)
        ask_channels<4>(c, k4 + u * x.k4.slot + g * per / 2, tokens / 2, scale4 + u * x.k4_scale.slot + 2 * g,
                        zero4 + u * x.k4_zero.slot + 2 * g, slot, n4, per, mine.data() + n16, x.D, place4, scores,
                        tokens, w);
      if (n2)
        ask_channels<2>(c, p.k + u * x.k.slot + g * per / 4, tokens / 4, p.k_scale + u * x.k_scale.slot + 2 * g,
                        p.k_zero + u * x.k_zero.slot + 2 * g, slot, n2, per, mine.data() + n16 + n4, x.D, place2, scores,
                        tokens, w);
    }
    const char *v = p.v + u * x.v.slot, *pos = p.pos ? p.pos + u * x.pos.slot : nullptr;
    if constexpr (BITS == 16)
      weigh_exact(c, x, v, pos, tokens, tokens, c.heard(x, at, u * tokens), a, w);
    else
      weigh_tokens<BITS>(c, x, v, p.v_scale + u * x.v_scale.slot, p.v_zero + u * x.v_zero.slot, pos, tokens, tokens,
                         w.zeros.data(), c.heard(x, at, u * tokens), a, w);
  }
  if constexpr (BITS < 16) straighten(c, x, w.zeros.data(), a, w);
}

// ---- codes with a scale and zero per token and group of channels

// scores of n tokens for R rows of queries, as `dots` of words.h but portable; in the order of `plane_order`
template <int BITS, int L>
void dots_by(const char* p, int64_t step, int n, int codes, const float* q, int R, int q_width, float* s) {
  using F = typename Lanes<L>::F;
  constexpr int PER = 8 / BITS;
  const int bytes = codes / PER;
  for (int r0 = 0; r0 < R; r0 += 4) {
    const int rows = std::min(4, R - r0);
    for (int t = 0; t < n; ++t) {
      F total[4] = {};
      for (int j = 0; j < bytes / L; ++j) {
        const auto x = load<typename Lanes<L>::B>(p + t * step + j * L);
        for (int b = 0; b < PER; ++b) {
          const F f = opened<BITS, L>(x, b);
          for (int r = 0; r < rows; ++r) total[r] += f * load<F>(q + (r0 + r) * q_width + b * bytes + j * L);
        }
      }
      for (int r = 0; r < rows; ++r) s[(r0 + r) * SCORES + t] = sum(total[r]);
    }
  }
}

// n rows of codes of 3 bits, eight in three bytes, as rows of codes of 4
inline void widen(const char* from, int64_t step, int n, int codes, std::vector<char>& to) {
  const int eights = codes / 8;
  to.resize(static_cast<size_t>(SCORES) * eights * 4);
  for (int t = 0; t < n; ++t) {
    const char* row = from + t * step;
    const auto* last = reinterpret_cast<const uint8_t*>(row) + 3 * (eights - 1);
    auto* x = reinterpret_cast<uint32_t*>(to.data()) + static_cast<size_t>(t) * eights;
    for (int i = 0; i < eights - 1; ++i) x[i] = load<uint32_t>(row + 3 * i);
    x[eights - 1] = last[0] | last[1] << 8 | last[2] << 16;  // behind the row there may be nothing to read
    for (int i = 0; i < eights; ++i) {
      uint32_t y = x[i];
      y = (y & 0x000fffu) | (y & 0xfff000u) << 4;
      y = (y & 0x003f003fu) | (y & 0x0fc00fc0u) << 2;
      x[i] = (y & 0x07070707u) | (y & 0x38383838u) << 1;
    }
  }
}

// BITS: 4 where the piece has 3
template <int BITS>
void per_group(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  constexpr int PER = 8 / BITS;
  const int size = x.channels, groups = x.D / size, v_groups = c.Dv / size, bytes = size / PER;
  const Head p(x, at);
  const float* q = c.queries(x, at);
  w.k_order.resize(size), plane_order<BITS>(size, w.k_order.data());
#ifdef CALIDROP_WORDS
  const bool whole = words::multiplies<BITS>(size);
  if (whole) words::code_order<BITS>(size, w.k_order.data());
#endif
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
#ifdef CALIDROP_WORDS
  w.left.resize(std::max<size_t>(w.left.size(), groups));
  for (int g = 0; whole && g < groups; ++g) {
    w.left[g].size(c.R, size), w.left[g].set(w.q.data() + g * size, x.D, size);
    if (x.bits == 3)
      for (float& lost : w.left[g].lost) lost *= 7.0f / 15.0f;  // their middle code is not that of 4 bits
  }
#endif
  alignas(64) float scale[SCORES], zero[SCORES];
  const bool widened = x.bits != BITS;
  const int64_t step = widened ? x.D / PER : x.k.slot, v_step = widened ? c.Dv / PER : x.v.slot;
  for (int64_t t = at.from; t < at.to; t += SCORES) {
    const int n = static_cast<int>(std::min<int64_t>(SCORES, at.to - t));
    const char *k = p.k + t * x.k.slot, *v = p.v + t * x.v.slot;
    if (widened) {
      widen(k, x.k.slot, n, x.D, w.keys), widen(v, x.v.slot, n, c.Dv, w.values);
      k = w.keys.data(), v = w.values.data();
    }
    for (int g = 0; g < groups; ++g) {
      const char* first = k + g * bytes;
#ifdef CALIDROP_WORDS
      if (whole)
        words::dots<BITS>(first, step, n, size, w.left[g], c.R, w.w.data());
      else
#endif
      if (bytes % 16 == 0)
        dots_by<BITS, 16>(first, step, n, size, w.q.data() + g * size, c.R, x.D, w.w.data());
      else
        dots_by<BITS, 8>(first, step, n, size, w.q.data() + g * size, c.R, x.D, w.w.data());
      halves(p.k_scale + t * x.k_scale.slot + 2 * g, x.k_scale.slot, n, scale);
      halves(p.k_zero + t * x.k_zero.slot + 2 * g, x.k_zero.slot, n, zero);
      for (int r = 0; r < c.R; ++r) {
        float* __restrict s = w.s.data() + r * SCORES;
        const float *mine = w.w.data() + r * SCORES, z = zero_q[r * groups + g];
        for (int i = 0; i < n; ++i) s[i] = (g ? s[i] : 0.0f) + mine[i] * scale[i] + zero[i] * z;
      }
    }
    softmax(a, w.s.data(), n, c.softcap, p.pos ? p.pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0,
            c.heard(x, at, t));
    for (int g = 0; g < v_groups; ++g) {
      halves(p.v_scale + t * x.v_scale.slot + 2 * g, x.v_scale.slot, n, scale);
      halves(p.v_zero + t * x.v_zero.slot + 2 * g, x.v_zero.slot, n, zero);
      weigh_group<BITS>(c, x, v + g * bytes, v_step, n, g, scale, zero, zero_v, a, w);
    }
  }
  straighten(c, x, zero_v, a, w);
}

}  // namespace

void calidrop::ask_groups(const Call& c, const Piece& x, const Stretch& at, Answer& a) {
  thread_local const std::unique_ptr<Scratch> mine(new Scratch);
  Scratch& w = *mine;
  w.size(c, x);
  if (x.kind == PER_GROUP) {
    if (x.bits == 4 || x.bits == 3) per_group<4>(c, x, at, a, w);
    if (x.bits == 2) per_group<2>(c, x, at, a, w);
  } else if (x.kind == TIERS) {
    if (x.bits == 16) tiers<16>(c, x, at, a, w);
    if (x.bits == 8) tiers<8>(c, x, at, a, w);
    if (x.bits == 4) tiers<4>(c, x, at, a, w);
    if (x.bits == 2) tiers<2>(c, x, at, a, w);
  } else {
    if (x.bits == 8) per_channel<8>(c, x, at, a, w);
    if (x.bits == 4) per_channel<4>(c, x, at, a, w);
    if (x.bits == 2) per_channel<2>(c, x, at, a, w);
  }
}
