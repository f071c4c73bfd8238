// Softmax weights of many queries summed per token: the column sums of an attention matrix that is never held. The
// oracle is calidrop.ops.mass_in_torch. A block of keys, laid out by channels, stays in the first cache while the
// queries stream past it; of few queries the keys are read as they lie.
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int FEW = 16;  // queries that are not worth laying out keys for

struct Asked {
  Array k, pos;
  const float *q, *lse;  // [B,H,R,D], [B,H,R]; R = G * W
  const int32_t* at;     // [B,W], the queries' positions
  int64_t B, H, G, W, N;
  int D;
  float scale, softcap;
  int pool;      // tokens of which the largest weight counts
  bool largest;  // of the query heads of a kv head, and not their mean
};

// weights of the i-th sixteen tokens, the largest of `most` among the first of a pool
inline void take(const Asked& c, int i, V y, V& most, V* total) {
  if (c.pool > 1) {
    most = pick(y > most, y, most);
    if ((i + 1) * 16 % c.pool) return;
    const int first = (i + 1) * 16 / c.pool - 1;
    y = V{} + ::most(most), most = V{};
    total[first] = c.largest ? pick(y > total[first], y, total[first]) : total[first] + y;
  } else if (c.largest)
    total[i] = pick(y > total[i], y, total[i]);
  else
    total[i] += y;
}

// e^(score - lse) of the tokens that a query at `at` may see; a logit is below its lse but for rounding
inline void weigh(const Asked& c, const Block& x, const float* s, int32_t at, float lse, V* total) {
  const bool all = x.last <= at;
  V most = {};
  for (int i = 0; i < BLOCK / 16; ++i) {
    V y = load<V>(s + 16 * i) * c.scale;
    if (c.softcap > 0.0f) y = tanh(y / c.softcap) * c.softcap;
    y = exp(y - lse);
    if (!all) y = pick(load<Lanes<16>::I>(x.pos + 16 * i) <= at, y, V{});
    take(c, i, y, most, total);
  }
}

// what n tokens from `from` on got of G query heads
inline void give(const Asked& c, int64_t bh, int64_t from, int n, const V* total, float* out) {
  const V mean = splat(c.largest ? 1.0f : 1.0f / static_cast<float>(c.G));
  if (c.pool > 1)
    for (int i = 0; i * c.pool < n; ++i) out[(bh * c.N + from) / c.pool + i] = (total[i] * mean)[0];
  else
    for (int t = 0; t < n; ++t) out[bh * c.N + from + t] = (total[t / 16] * mean)[t % 16];
}

// the last position of every ROWS queries of a kv head
std::vector<int32_t> latest(const int32_t* at, int64_t G, int64_t W) {
  std::vector<int32_t> of((G * W + ROWS - 1) / ROWS, -1);
  for (int64_t r = 0; r < G * W; ++r) of[r / ROWS] = std::max(of[r / ROWS], at[r % W]);
  return of;
}

template <class F> void sums(const Asked& c, float* out, int threads) {
  const int64_t R = c.G * c.W, blocks = (c.N + BLOCK - 1) / BLOCK;
  std::vector<std::vector<int32_t>> last;
  for (int64_t b = 0; b < c.B; ++b) last.push_back(latest(c.at + b * c.W, c.G, c.W));
  struct Scratch {
    std::vector<float> laid, s;
  };
  const auto scratch = [&] {
    const size_t all = R < FEW ? 0 : static_cast<size_t>(BLOCK) * c.D;
    return Scratch{std::vector<float>(all, 0.0f), std::vector<float>(std::max(ROWS * BLOCK, FEW * SCORES))};
  };
  each(c.B * c.H * blocks, threads, scratch, [&](int64_t task, Scratch& w) {
    const int64_t bh = task / blocks, b = bh / c.H, from = task % blocks * BLOCK;
    const Block x(at_head(c.k, b, bh % c.H), c.k.slot, at_head(c.pos, b, bh % c.H), c.pos.slot, from, c.N);
    const float *q = c.q + bh * R * c.D, *lse = c.lse + bh * R;
    const int32_t* at = c.at + b * c.W;
    V total[BLOCK / 16] = {};
    const auto weights = [&](int64_t row, const float* scores) {
      const int32_t mine = at[row % c.W];
      if (x.first <= mine) weigh(c, x, scores, mine, lse[row] == NONE ? 0.0f : lse[row], total);
    };
    if (R < FEW) {
      dots_of<F>(c.D, x.k, c.k.slot, q, w.s.data(), x.n, static_cast<int>(R));
      for (int64_t r = 0; r < R; ++r) weights(r, w.s.data() + r * SCORES);
    } else {
      lay<F>(x.k, x.n, c.k.slot, c.D, w.laid.data());
      for (int64_t r = 0; r < R; r += ROWS) {
        if (last[b][r / ROWS] < x.first) continue;
        const int rows = static_cast<int>(std::min<int64_t>(ROWS, R - r));
        products(rows, q + r * c.D, c.D, c.D, w.laid.data(), w.s.data(), BLOCK);
        for (int i = 0; i < rows; ++i) weights(r + i, w.s.data() + i * BLOCK);
      }
    }
    give(c, bh, from, x.n, total, out);
  });
}

// the same of one query whose scores are there, [B,H,G,N]
void sums_of(const Asked& c, const float* scores, float* out, int threads) {
  constexpr int STRETCH = 16 * BLOCK;  // tokens that are a task
  const int64_t parts = (c.N + STRETCH - 1) / STRETCH;
  each(c.B * c.H * parts, threads, [] { return 0; }, [&](int64_t task, int) {
    const int64_t bh = task / parts, begin = task % parts * STRETCH, end = std::min(begin + STRETCH, c.N);
    for (int64_t from = begin; from < end; from += BLOCK) {
      const int n = static_cast<int>(std::min<int64_t>(BLOCK, end - from));
      V total[BLOCK / 16] = {};
      for (int64_t g = 0; c.at[bh / c.H] >= 0 && g < c.G; ++g) {
        const float *s = scores + (bh * c.G + g) * c.N + from, lse = c.lse[bh * c.G + g];
        V most = {};
        for (int i = 0; i * 16 < n; ++i) take(c, i, exp(head(s + 16 * i, n - 16 * i) - (lse == NONE ? 0.0f : lse)), most, total);
      }
      give(c, bh, from, n, total, out);
    }
  });
}

}  // namespace

// out [B,H,N / pool] fp32: sums over the W queries, means over the G query heads of a kv head or, of one query, the largest;
// pool, of one query too: 1, or a multiple of 16 that divides BLOCK and N, tokens of which the largest weight counts
extern "C" void calidrop_columns(Array k, Array pos, int32_t dtype, const float* q, const float* lse, const int32_t* at,
                                 int64_t B, int64_t H, int64_t G, int64_t W, int64_t N, int32_t D, float scale,
                                 float softcap, int32_t pool, int32_t largest, float* out, int32_t threads) {
  const Asked c{k, pos, q, lse, at, B, H, G, W, N, D, scale, softcap, pool, largest != 0};
  if (dtype == F32) sums<Float32>(c, out, threads);
  if (dtype == BF16) sums<BFloat16>(c, out, threads);
  if (dtype == F16) sums<Float16>(c, out, threads);
}

// the same of one query whose logits [B,H,G,N] are there (`Piece::heard`)
extern "C" void calidrop_weights(const float* logits, const float* lse, const int32_t* at, int64_t B, int64_t H, int64_t G,
                                 int64_t N, int32_t pool, int32_t largest, float* out, int32_t threads) {
  sums_of({{}, {}, nullptr, lse, at, B, H, G, 1, N, 0, 1.0f, 0.0f, pool, largest != 0}, logits, out, threads);
}
