// Attention over tokens of which latents of all heads are stored (ReCalKV): keys are rebuilt, rotated to their positions and
// asked, a block of tokens at a time; values stay latents. The oracle is methods/recalkv.py in torch.
#include "hadamard.h"
#include "tasks.h"
#include "tiles.h"

namespace {

// How keys come from latents. basis [groups,width / 16,rank,16]: channels of the heads of a group, filled up to whole blocks;
// bias [H,D] of heads in that order; at [H]: which heads they are; freq [half]; start [B], the column of position 0. And how
// values do: values [H,Dv,latents], value_bias [H,Dv].
struct Bases {
  const float *basis, *bias, *freq, *values, *value_bias;
  const int64_t* start;
  const int32_t* at;
  int32_t groups, rank, half, D, Dv;
};

constexpr int MANY = 10 * ROWS;  // tokens that are rebuilt at once

struct Scratch {
  std::vector<float> q, keys, values, x, rotated, s, cos, sin, scale, zero;
  int32_t pos[MANY];
};

struct Latents {
  const Asked& a;
  const Bases& b;
  int rows, D, values;  // rows of queries; what a rotated key and a value are filled up to
  int heads, width;     // of a group: heads, and channels filled up
  Latents(const Asked& a, const Bases& b)
      : a(a), b(b), rows(static_cast<int>(a.H) * a.R), D(width_of<Float32>(b.D)), values((a.Dv + 31) / 32 * 32),
        heads(static_cast<int>(a.H) / b.groups), width((heads * b.D + BLOCK - 1) / BLOCK * BLOCK) {}
};

template <int BITS> void codes(const char* p, int n, float scale, float zero, float* to) {
  constexpr int PER = 8 / BITS;
  for (int i = 0; i < n / PER; ++i)
    for (int j = 0; j < PER; ++j)
      to[PER * i + j] = static_cast<float>(static_cast<uint8_t>(p[i]) >> BITS * j & ((1 << BITS) - 1)) * scale + zero;
}

void codes(int bits, const char* p, int n, float scale, float zero, float* to) {
  if (bits == 8) codes<8>(p, n, scale, zero, to);
  if (bits == 4) codes<4>(p, n, scale, zero, to);
  if (bits == 2) codes<2>(p, n, scale, zero, to);
}

// the n numbers of a row as they were before they were stored, but for a rotation; scale, zero: of the row, or null
void numbers_of(const Piece& x, const char* row, int n, const char* scale, const char* zero, float* to) {
  if (x.kind == EXACT) return numbers(row, x.dtype, n, to);
  const float by = half(load<uint16_t>(scale));
  if (x.kind == PER_TOKEN)
    return codes(x.bits, row, n, by, zero ? half(load<uint16_t>(zero)) : by * -static_cast<float>((1 << (x.bits - 1)) - 1), to);
  for (int i = 0; i < n; i += 16) {
    const int left = std::min(16, n - i);
    alignas(64) char last[16] = {};
    if (left < 16) std::memcpy(last, row + i, left);
    alignas(64) float all[16];
    store(all, E4M3::at(left < 16 ? last : row + i, 0, 1) * (256.0f * by));  // by which E4M3 divides
    std::memcpy(to + i, all, sizeof(float) * left);
  }
}

// slots t to t + n - 1 of a head, of a token each
void read_tokens(const Latents& c, const Piece& x, const Head& p, int64_t t, int n, Scratch& w) {
  const int latents = c.b.groups * c.b.rank;
  const auto row = [](const char* first, const Array& of, int64_t slot) { return first ? first + slot * of.slot : nullptr; };
  for (int i = 0; i < n; ++i, ++t) {
    float* key = w.keys.data() + i * latents;
    numbers_of(x, p.k + t * x.k.slot, latents, row(p.k_scale, x.k_scale, t), row(p.k_zero, x.k_zero, t), key);
    if (x.rotate) hadamard(key, latents);
    numbers_of(x, p.v + t * x.v.slot, c.a.Dv, row(p.v_scale, x.v_scale, t), row(p.v_zero, x.v_zero, t),
               w.values.data() + i * c.values);
    w.pos[i] = load<int32_t>(p.pos + t * x.pos.slot);
  }
}

// n tokens from the t-th on, of units whose keys have a scale and zero per channel, and values per group of channels
void read_units(const Latents& c, const Piece& x, const Head& p, int64_t t, int n, Scratch& w) {
  const int latents = c.b.groups * c.b.rank, groups = c.a.Dv / x.channels, part = x.channels * x.bits / 8;
  w.scale.resize(std::max(latents, groups)), w.zero.resize(std::max(latents, groups));
  for (int i = 0; i < n;) {
    const int64_t unit = (t + i) / x.group;
    const int first = static_cast<int>((t + i) % x.group), some = std::min(n - i, x.group - first);
    halves(p.k_scale + unit * x.k_scale.slot, 2, latents, w.scale.data());
    halves(p.k_zero + unit * x.k_zero.slot, 2, latents, w.zero.data());
    for (int d = 0; d < latents; ++d) {
      const char* channel = p.k + unit * x.k.slot + static_cast<int64_t>(d) * x.group * x.bits / 8;
      for (int j = 0; j < some; ++j) {
        const int bit = (first + j) * x.bits;
        const int code = static_cast<uint8_t>(channel[bit / 8]) >> bit % 8 & ((1 << x.bits) - 1);
        w.keys[(i + j) * latents + d] = static_cast<float>(code) * w.scale[d] + w.zero[d];
      }
    }
    for (int j = first; j < first + some; ++j, ++i) {
      const char* v = p.v + unit * x.v.slot + static_cast<int64_t>(j) * groups * part;
      halves(p.v_scale + unit * x.v_scale.slot + 2L * j * groups, 2, groups, w.scale.data());
      halves(p.v_zero + unit * x.v_zero.slot + 2L * j * groups, 2, groups, w.zero.data());
      for (int g = 0; g < groups; ++g)
        codes(x.bits, v + g * part, x.channels, w.scale[g], w.zero[g], w.values.data() + i * c.values + g * x.channels);
      w.pos[i] = load<int32_t>(p.pos + unit * x.pos.slot + 4 * j);
    }
  }
}

// of the angles of a position, which are rounded to fp32 as torch does, and large: their quarters of a turn are taken off in fp64
void turned(float position, const float* freq, int n, float* cos, float* sin) {
  constexpr double WHOLE = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
  for (int i = 0; i < n; ++i) {
    const double angle = position * freq[i], quarters = (angle * 0.63661977236758134 + WHOLE) - WHOLE;
    const auto x = static_cast<float>(angle - quarters * 1.57079632679489662), y = x * x;
    const auto quarter = static_cast<int32_t>(quarters);
    const float s = x + x * y * (-1.6666667e-1f + y * (8.3333333e-3f + y * (-1.9841270e-4f + y * 2.7557319e-6f)));
    const float c = 1.0f - 0.5f * y + y * y * (4.1666667e-2f + y * (-1.3888889e-3f + y * 2.4801587e-5f));
    const float along = quarter & 1 ? s : c, across = quarter & 1 ? c : s;
    cos[i] = (quarter + 1) & 2 ? -along : along;
    sin[i] = quarter & 2 ? -across : across;
  }
}

// latents of n tokens become channels, [MANY][groups * width]
void rebuild(const Latents& c, int n, Scratch& w) {
  const int latents = c.b.groups * c.b.rank, wide = c.b.groups * c.width;
  for (int g = 0; g < c.b.groups; ++g)
    for (int i = 0; i < c.width; i += BLOCK) {
      const float* basis = c.b.basis + (static_cast<int64_t>(g) * c.width + i) * c.b.rank;
      for (int t = 0; t < n; t += ROWS)
        products(std::min(ROWS, n - t), w.keys.data() + t * latents + g * c.b.rank, latents, c.b.rank, basis,
                 w.x.data() + t * wide + g * c.width + i, wide);
    }
}

// as many channels as X has, of the first half of those that turn, and their partners half behind
template <class X> ALWAYS void pair(const float* x, const float* bias, const float* cos, const float* sin, int half, float* to) {
  const X first = load<X>(x) + load<X>(bias), second = load<X>(x + half) + load<X>(bias + half);
  const X low = first * load<X>(cos) - second * load<X>(sin), high = second * load<X>(cos) + first * load<X>(sin);
  std::memcpy(to, &low, sizeof low), std::memcpy(to + half, &high, sizeof high);
}

// channels of the t-th token become keys, [H][MANY][D]
void rotate(const Latents& c, int t, float position, Scratch& w) {
  const int half = c.b.half, wide = c.b.groups * c.width;
  turned(position, c.b.freq, half, w.cos.data(), w.sin.data());
  const float *cos = w.cos.data(), *sin = w.sin.data();
  for (int j = 0; j < c.a.H; ++j) {
    const float* x = w.x.data() + t * wide + j / c.heads * c.width + j % c.heads * c.b.D;
    const float* bias = c.b.bias + j * c.b.D;
    float* to = w.rotated.data() + (static_cast<size_t>(c.b.at[j]) * MANY + t) * c.D;
    int d = 0;
    for (; d + 16 <= half; d += 16) pair<V>(x + d, bias + d, cos + d, sin + d, half, to + d);
    for (; d < half; ++d) pair<float>(x + d, bias + d, cos + d, sin + d, half, to + d);
    for (int i = 2 * half; i < c.b.D; ++i) to[i] = x[i] + bias[i];
  }
}

// o += weights of n tokens times their values
void weigh(const Latents& c, int n, const Scratch& w, Answer& a) {
  int at = 0;
  for (int some : {256, 128, 64, 32})
    for (; at + some <= c.values; at += some)
      weigh_of<Float32>(some, reinterpret_cast<const char*>(w.values.data() + at), sizeof(float) * c.values, w.s.data(), a.o + at,
                        a.D, n, c.rows);
}

void ask(const Latents& c, const Piece& x, const Stretch& at, Answer& a, Scratch& w) {
  a.reset();
  const Head p(x, at);
  const int64_t start = c.b.start[at.b], end = at.to * x.group;
  for (int64_t t = at.from * x.group; t < end; t += MANY) {
    const int n = static_cast<int>(std::min<int64_t>(MANY, end - t));
    if (x.kind == PER_CHANNEL)
      read_units(c, x, p, t, n, w);
    else
      read_tokens(c, x, p, t, n, w);
    rebuild(c, n, w);
    for (int i = 0; i < n; ++i) rotate(c, i, static_cast<float>(w.pos[i] - start), w);
    for (int h = 0; h < c.a.H; ++h)
      dots_of<Float32>(c.D, reinterpret_cast<const char*>(w.rotated.data() + static_cast<size_t>(h) * MANY * c.D),
                       sizeof(float) * c.D, w.q.data() + h * c.a.R * c.D, w.s.data() + h * c.a.R * SCORES, n, c.a.R);
    softmax(a, w.s.data(), n, c.a.softcap, reinterpret_cast<const char*>(w.pos), sizeof(int32_t), nullptr, 0, {});
    weigh(c, n, w, a);
  }
  for (int r = 0; x.rotate && r < c.rows; ++r) hadamard(a.o + static_cast<size_t>(r) * a.D, c.a.Dv);
}

// a mean of value latents becomes one of the values of a head; none: of no token
void restore(const Latents& c, int h, const float* latents, bool none, float* to) {
  const float* bias = c.b.value_bias + h * c.b.Dv;
  for (int d = 0; d < c.b.Dv; ++d)
    to[d] = none ? 0.0f : inner(c.b.values + (static_cast<int64_t>(h) * c.b.Dv + d) * c.a.Dv, latents, c.a.Dv) + bias[d];
}

}  // namespace

// As calidrop_decode, of pieces whose rows are latents of all heads and have positions: D of Asked is that of a head, Dv how
// many latents a value has. out [B,H,R,Dv of Bases] in fp32.
extern "C" void calidrop_latents(const Asked* asked, const Bases* bases) {
  const Asked& a = *asked;
  const Queries q(a);
  const Latents c(a, *bases);
  const auto none = [](int64_t, Answer&) {};
  const auto ask_one = [&](int64_t b, const Piece& x, int64_t start, int64_t from, int64_t to, Answer& heard) {
    thread_local const std::unique_ptr<Scratch> mine(new Scratch);
    Scratch& w = *mine;
    w.q.assign(static_cast<size_t>(c.rows) * c.D, 0.0f), w.s.resize(static_cast<size_t>(c.rows) * SCORES);
    w.keys.resize(MANY * c.b.groups * c.b.rank), w.values.assign(MANY * c.values, 0.0f);
    w.x.resize(static_cast<size_t>(MANY) * c.b.groups * c.width), w.rotated.assign(a.H * MANY * c.D, 0.0f);
    w.cos.resize(c.b.half), w.sin.resize(c.b.half);
    for (int r = 0; r < c.rows; ++r)
      for (int d = 0; d < c.b.D; ++d) w.q[r * c.D + d] = q.first[(b * c.rows + r) * c.b.D + d] * a.scale;
    ask(c, x, {b, 0, start, from, to}, heard, w);
  };
  Tasks(reinterpret_cast<const Piece*>(asked + 1), a.count, a.B, a.threads)
      .answer(c.rows, c.values, 0, none, ask_one, [&](int64_t b, Answer& whole) {
        for (int r = 0; r < c.rows; ++r) {
          const int64_t i = b * c.rows + r;
          a.lse[i] = divided(whole, r, a.Dv);
          float* to = reinterpret_cast<float*>(a.out) + i * bases->Dv;
          restore(c, r / a.R, whole.o + static_cast<size_t>(r) * whole.D, a.lse[i] == NONE, to);
        }
      });
}
