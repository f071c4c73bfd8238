// Codes with a scale and zero per token.
#include "amx.h"
#include "hadamard.h"
#include "pieces.h"
#include "words.h"

namespace {

struct Scratch {
  std::vector<float> q, s, of_part, zeros, straight;
  std::vector<int> k_order, v_order;
  std::vector<char> keys, values;
#ifdef CALIDROP_WORDS
  std::vector<words::Words<true>> left;  // one per part of a row
  words::Words<false> right;
#endif
#ifdef CALIDROP_AMX
  amx::Fixed tile_left, tile_right;
  amx::Buffers buffers;
#endif
};

// rows of codes that are converted to floats
template <int BITS> struct Converted : Codes<BITS> {
#ifdef CALIDROP_WORDS
  static constexpr bool reads(int D) { return !words::part<BITS>(D); }
#endif
};

// asks for the memory of n slots of a column from the t-th on
inline void ask_for(const char* first, const Array& of, int64_t t, int64_t n) {
  for (int64_t i = 0; first && i < n * of.slot; i += 64) __builtin_prefetch(first + t * of.slot + i);
}

// the order in which products see a row of keys, and in which sums over rows of values are left: place -> code
template <int BITS> void orders(int D, int Dv, [[maybe_unused]] bool tiles, Scratch& w) {
  w.k_order.resize(D), w.v_order.resize(Dv);
  plane_order<BITS>(D, w.k_order.data()), plane_order<BITS>(Dv, w.v_order.data());
#ifdef CALIDROP_WORDS
  if (const int part = words::part<BITS>(D))
    for (int g = 0; g < D; g += part) {
      words::code_order<BITS>(part, w.k_order.data() + g);
      for (int i = g; i < g + part; ++i) w.k_order[i] += g;
    }
  if (words::fits(Dv)) words::sum_order<BITS>(Dv, w.v_order.data());
#endif
#ifdef CALIDROP_AMX
  if (!tiles) return;
  for (int i = 0; i < D; ++i) w.k_order[i] = amx::code_at(i, BITS);
  for (int i = 0; i < Dv; ++i) w.v_order[i] = amx::sum_at(i, BITS);
#endif
}

// every c of n channels times a matrix
inline void mixed(const float* matrix, int c, float* __restrict o, int n, float* __restrict room) {
  std::memcpy(room, o, sizeof(float) * n);
  std::fill(o, o + n, 0.0f);
  for (int g = 0; g < n; g += c)
    for (int i = 0; i < c; ++i)
      for (int d = 0; d < c; ++d) o[g + d] += room[g + i] * matrix[i * c + d];
}

template <int BITS>
void per_token(const Call& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  const Head p(x, at);
  const float* q = c.queries(x, at);
  const int D = width_of<Codes<BITS>>(x.D), Dv = width_of<Codes<BITS>>(c.Dv);
  const Rows keys(p.k, x.k.slot, x.D * BITS / 8, D * BITS / 8, w.keys);
  const Rows values(p.v, x.v.slot, c.Dv * BITS / 8, Dv * BITS / 8, w.values);
  // of scales too little is read at once for processors to see it coming
  const auto scales = [&](int64_t t) {
    const int64_t n = std::min<int64_t>(SCORES, at.to - t);
    ask_for(p.k_scale, x.k_scale, t, n), ask_for(p.k_zero, x.k_zero, t, n);
    ask_for(p.v_scale, x.v_scale, t, n), ask_for(p.v_zero, x.v_zero, t, n);
  };
  const int64_t beginning = std::min<int64_t>(SCORES, at.to - at.from);  // what nobody asked for before
  ask_for(p.k, x.k, at.from, beginning), scales(at.from), ask_for(p.v, x.v, at.from, beginning), scales(at.from + SCORES);
  bool tiles = false;
#ifdef CALIDROP_AMX
  const bool in_place = !keys.copied && !values.copied;
  tiles = in_place && c.R <= amx::ROWS && amx::fits(D) && amx::fits(Dv) && amx::allowed();
#endif
  orders<BITS>(D, Dv, tiles, w);
  w.q.resize(c.R * D), w.s.resize(c.R * SCORES), w.straight.resize(std::max(D, Dv));
  w.zeros.assign(2 * c.R, 0.0f);  // what zeros of keys add to the scores of each query, and those of values to its o
  float *zero_q = w.zeros.data(), *zero_v = zero_q + c.R;
  for (int r = 0; r < c.R; ++r) {  // the scale of the logits goes into the queries
    float* mine = w.straight.data();
    std::memcpy(mine, q + r * x.D, sizeof(float) * x.D);
    if (x.rotate) hadamard(mine, x.D);
    std::fill(mine + x.D, mine + D, 0.0f);
    V total = {};
    for (int d = 0; d < D; d += 16) {
      const V y = load<V>(mine + d) * c.scale;
      store(mine + d, y);
      total += y;
    }
    zero_q[r] = sum(total);
    for (int d = 0; d < D; ++d) w.q[r * D + d] = mine[w.k_order[d]];
  }
#ifdef CALIDROP_WORDS
  const int part = words::part<BITS>(D), parts = part ? D / part : 0;
  if (!tiles) {
    w.right.size(c.R, SCORES);
    w.left.resize(std::max<size_t>(w.left.size(), parts));
    for (int g = 0; g < parts; ++g) w.left[g].size(c.R, part), w.left[g].set(w.q.data() + g * part, D, part);
  }
  const auto dots = [&](const char* rows, int n) {
    words::dots<BITS>(rows, keys.step, n, part, w.left[0], c.R, w.s.data());
    for (int g = 1; g < parts; ++g) {
      w.of_part.resize(c.R * SCORES);
      words::dots<BITS>(rows + g * part * BITS / 8, keys.step, n, part, w.left[g], c.R, w.of_part.data());
      for (int r = 0; r < c.R; ++r)
        for (int i = r * SCORES; i < r * SCORES + n; i += 16)
          store(w.s.data() + i, load<V>(w.s.data() + i) + load<V>(w.of_part.data() + i));
    }
  };
#endif
  const int most = tiles ? 64 : SCORES;
  const auto block = [&](int64_t t) { return static_cast<int>(std::min<int64_t>(most, at.to - t)); };
#ifdef CALIDROP_AMX
  std::optional<amx::Tiles> mine;
  if (tiles) {
    mine.emplace();
    w.tile_left.size(c.R, D), w.tile_right.size(c.R, most);
    for (int r = 0; r < c.R; ++r) w.tile_left.set(r, w.q.data() + r * D, D);
    amx::lay(w.tile_left, w.buffers);
    amx::lay_keys<BITS>(p.k + at.from * x.k.slot, x.k.slot, block(at.from), D, w.buffers);
  }
#endif
  alignas(64) float scale[SCORES] = {}, zero[SCORES] = {};
  // symmetric codes have no zeros of their own: theirs is the middle code
  const auto grid = [&](const char* scales, const Array& of, const char* zeros, const Array& zeros_of, int64_t t, int n) {
    halves(scales + t * of.slot, of.slot, n, scale);
    if (zeros)
      halves(zeros + t * zeros_of.slot, zeros_of.slot, n, zero);
    else
      for (int i = 0; i < n; ++i) zero[i] = scale[i] * -static_cast<float>((1 << (BITS - 1)) - 1);
  };
  for (int64_t t = at.from; t < at.to; t += most) {
    const int n = block(t);
    scales(t + 2 * SCORES);
    const char *rows = keys.at(t, n), *v_rows = values.at(t, n);
#ifdef CALIDROP_AMX
    if (tiles) {
      amx::dots<BITS>(rows, x.k.slot, n, D, w.buffers);
      amx::lay_values<BITS>(v_rows, x.v.slot, n, Dv, w.buffers);
      amx::scores<BITS>(n, w.tile_left, c.R, w.s.data(), w.buffers);
    } else
#endif
#ifdef CALIDROP_WORDS
    if (parts)
      dots(rows, n);
    else
#endif
      dots_of<Converted<BITS>>(D, rows, keys.step, w.q.data(), w.s.data(), n, c.R);
    grid(p.k_scale, x.k_scale, p.k_zero, x.k_zero, t, n);
    for (int r = 0; r < c.R; ++r) {
      float* s = w.s.data() + r * SCORES;
      for (int i = 0; i < n; i += 16) store(s + i, load<V>(s + i) * load<V>(scale + i) + load<V>(zero + i) * zero_q[r]);
    }
    softmax(a, w.s.data(), n, c.softcap, p.pos ? p.pos + t * x.pos.slot : nullptr, x.pos.slot, nullptr, 0,
            c.heard(x, at, t));
    grid(p.v_scale, x.v_scale, p.v_zero, x.v_zero, t, n);
    for (int r = 0; r < c.R; ++r) zero_v[r] = zero_v[r] * a.shrink[r] + inner(w.s.data() + r * SCORES, zero, n);
    const auto by_scale = [&] {
      for (int r = 0; r < c.R; ++r)
        for (int i = 0; i < n; i += 16) {
          float* s = w.s.data() + r * SCORES + i;
          store(s, load<V>(s) * load<V>(scale + i));
        }
    };
#ifdef CALIDROP_AMX
    if (tiles) {
      by_scale();
      for (int r = 0; r < c.R; ++r) w.tile_right.set(r, w.s.data() + r * SCORES, n);
      amx::rows(Dv, w.tile_right, w.buffers);
      if (t + n < at.to) amx::lay_keys<BITS>(rows + n * x.k.slot, x.k.slot, block(t + n), D, w.buffers);
      amx::add<BITS>(Dv, w.tile_right, c.R, a.o, a.D, w.buffers);
      continue;
    }
#endif
#ifdef CALIDROP_WORDS
    if (words::fits(Dv)) {
      w.right.set(w.s.data(), SCORES, n, scale);
      words::rows<BITS>(v_rows, values.step, n, Dv, w.right, c.R, a.o, a.D);
      continue;
    }
#endif
    by_scale();
    weigh_of<Converted<BITS>>(Dv, v_rows, values.step, w.s.data(), a.o, a.D, n, c.R);
  }
  for (int r = 0; r < c.R; ++r) {
    float* o = a.o + static_cast<size_t>(r) * a.D;
    for (int d = 0; d < Dv; ++d) w.straight[w.v_order[d]] = o[d];
    for (int d = 0; d < c.Dv; ++d) o[d] = w.straight[d] + zero_v[r];
    if (x.rotate) hadamard(o, c.Dv);
    if (x.mix) mixed(x.mix + at.b * x.channels * x.channels, x.channels, o, c.Dv, w.straight.data());
  }
}

}  // namespace

void calidrop::ask_per_token(const Call& c, const Piece& x, const Stretch& at, Answer& a) {
  thread_local const std::unique_ptr<Scratch> mine(new Scratch);  // behind a pointer: its own address would be asked for in loops
  Scratch& w = *mine;
  if (x.bits == 8) per_token<8>(c, x, at, a, w);
  if (x.bits == 4) per_token<4>(c, x, at, a, w);
  if (x.bits == 2) per_token<2>(c, x, at, a, w);
}
