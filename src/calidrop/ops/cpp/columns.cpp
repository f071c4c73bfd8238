// Softmax weights of many queries summed per token: the column sums of an attention matrix that is never held. The
// oracle is calidrop.ops.mass_in_torch. A block of keys, laid out by channels, stays in the first cache while the
// queries stream past it; of few queries the keys are read as they lie.
#include "array.h"
#include "rows.h"

namespace {

#ifdef __AVX512F__
constexpr int ROWS = 6, WIDE = 4;  // of scores in flight: 24 vectors of 16 of 32 registers
#else
constexpr int ROWS = 6, WIDE = 1;
#endif
constexpr int FEW = 16;  // queries that are not worth laying out keys for
constexpr int32_t NEVER = INT32_MAX;

struct Asked {
  Array k, pos;
  int32_t dtype;
  const float *q, *lse;  // [B,H,R,D], [B,H,R]; R = G * W
  const int32_t* at;     // [B,W], the queries' positions
  int64_t B, H, G, W, N;
  int D;
  float scale, softcap;
};

// positions of a block of keys, NEVER behind its end and for empty slots
struct Block {
  const char* k;
  int n;
  int32_t first = NEVER, last = 0;
  alignas(64) int32_t pos[BLOCK];
  Block(const Asked& c, int64_t b, int64_t h, int64_t from) {
    k = c.k.p + b * c.k.row + h * c.k.head + from * c.k.slot;
    n = static_cast<int>(std::min<int64_t>(BLOCK, c.N - from));
    const char* p = c.pos.p + b * c.pos.row + h * c.pos.head + from * c.pos.slot;
    for (int t = 0; t < BLOCK; ++t) {
      const int32_t x = t < n ? load<int32_t>(p + t * c.pos.slot) : -1;
      pos[t] = x < 0 ? NEVER : x;
      first = std::min(first, pos[t]), last = std::max(last, pos[t]);
    }
  }
};

// x of any sign and size
inline V tanh(V x) {
  const V e = exp(x < V{} ? 2.0f * x : -2.0f * x), t = (1.0f - e) / (1.0f + e);
  return x < V{} ? -t : t;
}

// e^(score - lse) of the tokens that a query at `at` may see; a logit is below its lse but for rounding
inline void weigh(const Asked& c, const Block& x, const float* s, int32_t at, float lse, V* total) {
  const bool all = x.last <= at;
  for (int i = 0; i < BLOCK / 16; ++i) {
    V y = load<V>(s + 16 * i) * c.scale;
    if (c.softcap > 0.0f) y = tanh(y / c.softcap) * c.softcap;
    y = exp(y - lse);
    total[i] += all ? y : load<Lanes<16>::I>(x.pos + 16 * i) <= at ? y : V{};
  }
}

// a tile of scores: rows of q against 16 * WIDE keys laid out by channels
template <int R> inline void products(const float* q, int D, const float* k, float* s) {
  V sum[R][WIDE] = {};
  for (int d = 0; d < D; ++d) {
    V x[WIDE];
    for (int i = 0; i < WIDE; ++i) x[i] = load<V>(k + (d * WIDE + i) * 16);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < WIDE; ++i) sum[r][i] += x[i] * q[r * D + d];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < WIDE; ++i) std::memcpy(s + r * BLOCK + 16 * i, &sum[r][i], 64);
}

inline void products(int rows, const float* q, int D, const float* k, float* s) {
  for (int i = 0; i < BLOCK / 16 / WIDE; ++i, k += 16 * WIDE * D, s += 16 * WIDE) switch (rows) {
      case 1: products<1>(q, D, k, s); break;
      case 2: products<2>(q, D, k, s); break;
      case 3: products<3>(q, D, k, s); break;
      case 4: products<4>(q, D, k, s); break;
      case 5: products<5>(q, D, k, s); break;
      case 6: products<6>(q, D, k, s); break;
    }
}

template <class F> void lay(const Block& x, int64_t step, int D, float* to) {
  for (int t = 0; t < x.n; ++t)
    for (int i = 0; i < D / 16; ++i) {
      const V row = F::at(x.k + t * step, i, D / 16);
      float* at = to + (t / (16 * WIDE) * D + 16 * i) * 16 * WIDE + t % (16 * WIDE);
      for (int d = 0; d < 16; ++d) at[d * 16 * WIDE] = row[d];
    }
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
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> laid(R < FEW ? 0 : static_cast<size_t>(BLOCK) * c.D, 0.0f), s(std::max<int>(ROWS, FEW) * BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < c.B * c.H * blocks; ++task) {
      const int64_t bh = task / blocks, b = bh / c.H, from = task % blocks * BLOCK;
      const Block x(c, b, bh % c.H, from);
      const float *q = c.q + bh * R * c.D, *lse = c.lse + bh * R;
      const int32_t* at = c.at + b * c.W;
      V total[BLOCK / 16] = {};
      const auto weights = [&](int64_t row, const float* scores) {
        const int32_t mine = at[row % c.W];
        if (x.first <= mine) weigh(c, x, scores, mine, lse[row] == NONE ? 0.0f : lse[row], total);
      };
      if (R < FEW) {
        dots_of<F>(c.D, x.k, c.k.slot, q, s.data(), x.n, static_cast<int>(R));
        for (int64_t r = 0; r < R; ++r) weights(r, s.data() + r * BLOCK);
      } else {
        lay<F>(x, c.k.slot, c.D, laid.data());
        for (int64_t r = 0; r < R; r += ROWS) {
          if (last[b][r / ROWS] < x.first) continue;
          const int rows = static_cast<int>(std::min<int64_t>(ROWS, R - r));
          products(rows, q + r * c.D, c.D, laid.data(), s.data());
          for (int i = 0; i < rows; ++i) weights(r + i, s.data() + i * BLOCK);
        }
      }
      const V mean = splat(1.0f / static_cast<float>(c.G));
      for (int t = 0; t < x.n; ++t) out[bh * c.N + from + t] = (total[t / 16] * mean)[t % 16];
    }
  }
}

}  // namespace

// out [B,H,N] fp32: sums over the W queries, means over the G query heads of a kv head
extern "C" void calidrop_columns(Array k, Array pos, int32_t dtype, const float* q, const float* lse, const int32_t* at,
                                 int64_t B, int64_t H, int64_t G, int64_t W, int64_t N, int32_t D, float scale,
                                 float softcap, float* out, int32_t threads) {
  const Asked c{k, pos, dtype, q, lse, at, B, H, G, W, N, D, scale, softcap};
  if (dtype == F32) sums<Float32>(c, out, threads);
  if (dtype == BF16) sums<BFloat16>(c, out, threads);
  if (dtype == F16) sums<Float16>(c, out, threads);
}
