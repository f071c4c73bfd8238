// Causal attention of a prompt over itself that says, beside the answer, what every token got in all: the column sums.
// A few queries are attended at a time, with all of their scores held, so that each weight is known when it is summed
// and no product is made twice. The oracles are calidrop.attention.attend and calidrop.ops.mass_in_torch.
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int TILE = 24;                  // rows of scores held by a thread ...
constexpr int64_t HELD = 24 * 8192;       // ... as long as they are no more numbers than this, then fewer

struct Prompt {
  Array k, v, pos;
  const float* q;     // [B,Hq,W,D]
  const int32_t* at;  // [B,W]
  float *out, *lse, *sums;  // [B,Hq,W,Dv], [B,Hq,W], [B,H,N]
  int64_t B, H, G, W, N;
  int D, Dv;
  float scale, softcap;
};

// R rows of weights times the values of n tokens, NV vectors of their channels, added to o
template <int R, int NV>
inline void add(const float* p, int64_t step, const float* v, int64_t row, int n, float* o, int Dv) {
  V sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) sum[r][i] = load<V>(o + r * Dv + 16 * i);
  for (int t = 0; t < n; ++t) {
    V x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load<V>(v + t * row + 16 * i);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NV; ++i) sum[r][i] += x[i] * p[r * step + t];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) store(o + r * Dv + 16 * i, sum[r][i]);
}

template <int R> inline void add(const float* p, int64_t step, const float* v, int64_t row, int n, float* o, int Dv) {
  int i = 0;
  for (; i + WIDE <= Dv / 16; i += WIDE) add<R, WIDE>(p, step, v + 16 * i, row, n, o + 16 * i, Dv);
  for (; i < Dv / 16; ++i) add<R, 1>(p, step, v + 16 * i, row, n, o + 16 * i, Dv);
}

template <class F> struct Worker {
  const Prompt& c;
  const int64_t columns;  // from one row of scores to the next: no power of 2, which would crowd one part of a cache
  const int tall;         // rows of a tile
  std::vector<float> q, s, o, values, sums, inverse;
  std::vector<float> top;  // of each row the largest score of every 16th token
  std::vector<int64_t> blocks;  // that a tile sees any of
  Worker(const Prompt& c)
      : c(c), columns((c.N + BLOCK - 1) / BLOCK * BLOCK + 16),
        tall(static_cast<int>(std::max<int64_t>(c.G, std::min<int64_t>(TILE, HELD / columns) / c.G * c.G))),
        q(static_cast<size_t>(tall) * c.D), s(static_cast<size_t>(tall) * columns), o(static_cast<size_t>(tall) * c.Dv),
        values(static_cast<size_t>(BLOCK) * c.Dv), sums(columns, 0.0f), inverse(tall), top(16 * tall) {}

  // queries from `first` on, as many as fit a tile, of all query heads of one kv head; laid: its keys
  void tile(int64_t b, int64_t h, int64_t first, const std::vector<Block>& keys, const float* laid) {
    const int64_t queries = std::min<int64_t>(tall / c.G, c.W - first);
    const int rows = static_cast<int>(queries * c.G);
    int32_t early = NEVER, late = -1;
    for (int64_t w = first; w < first + queries; ++w) {
      early = std::min(early, c.at[b * c.W + w]), late = std::max(late, c.at[b * c.W + w]);
      for (int64_t g = 0; g < c.G; ++g) {
        const float* from = c.q + (((b * c.H + h) * c.G + g) * c.W + w) * c.D;
        float* to = q.data() + ((w - first) * c.G + g) * c.D;
        for (int d = 0; d < c.D; ++d) to[d] = from[d] * c.scale;
      }
    }
    blocks.clear();
    for (size_t i = 0; i < keys.size(); ++i)
      if (keys[i].first <= late) blocks.push_back(i);
    std::fill(top.begin(), top.end(), NONE);
    for (size_t j = 0; j < blocks.size(); ++j) {
      const Block& x = keys[blocks[j]];
      for (int r = 0; r < rows; r += ROWS)
        products(std::min(ROWS, rows - r), q.data() + r * c.D, c.D, c.D, laid + blocks[j] * BLOCK * c.D,
                 s.data() + r * columns + j * BLOCK, columns);
      const bool all = x.last <= early;
      for (int r = 0; r < rows; ++r) {
        float* y = s.data() + r * columns + j * BLOCK;
        const int32_t mine = c.at[b * c.W + first + r / c.G];
        V largest = load<V>(top.data() + 16 * r);
        for (int i = 0; i < BLOCK; i += 16) {
          V z = load<V>(y + i);
          if (c.softcap > 0.0f) z = tanh(z / c.softcap) * c.softcap;
          if (!all) z = pick(load<Lanes<16>::I>(x.pos + i) <= mine, z, splat(NONE));
          if (!all || c.softcap > 0.0f) store(y + i, z);
          largest = pick(z > largest, z, largest);
        }
        store(top.data() + 16 * r, largest);
      }
    }
    for (int r = 0; r < rows; ++r) weights(b, h, first, r);
    std::fill(o.begin(), o.begin() + rows * c.Dv, 0.0f);
    for (size_t j = 0; j < blocks.size(); ++j) answer(b, h, j, keys[blocks[j]].n, blocks[j] * BLOCK, rows);
    for (int r = 0; r < rows; ++r) {
      float* to = c.out + (((b * c.H + h) * c.G + r % c.G) * c.W + first + r / c.G) * c.Dv;
      for (int d = 0; d < c.Dv; ++d) to[d] = o[r * c.Dv + d] * inverse[r];
    }
  }

  // scores of one row become weights, not yet divided by their sum; divided, they are added to the column sums
  void weights(int64_t b, int64_t h, int64_t first, int r) {
    float* y = s.data() + r * columns;
    const int64_t n = static_cast<int64_t>(blocks.size()) * BLOCK;
    V total = {};
    const float largest = most(load<V>(top.data() + 16 * r)), base = largest == NONE ? 0.0f : largest;
    for (int64_t i = 0; i < n; i += 16) {
      const V z = exp(load<V>(y + i) - base);
      store(y + i, z);
      total += z;
    }
    const float l = sum(total);
    inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
    c.lse[((b * c.H + h) * c.G + r % c.G) * c.W + first + r / c.G] = l == 0.0f ? NONE : base + std::log(l);
    for (size_t j = 0; j < blocks.size(); ++j)
      for (int i = 0; i < BLOCK; i += 16) {
        float* to = sums.data() + blocks[j] * BLOCK + i;
        const V z = load<V>(to) + load<V>(y + j * BLOCK + i) * inverse[r];
        store(to, z);
      }
  }

  void answer(int64_t b, int64_t h, size_t j, int n, int64_t from, int rows) {
    const char* v = at_head(c.v, b, h) + from * c.v.slot;
    const float* values = reinterpret_cast<const float*>(v);
    int64_t step = c.v.slot / static_cast<int64_t>(sizeof(float));
    if constexpr (F::BITS != 32) {
      for (int t = 0; t < n; ++t)
        for (int i = 0; i < c.Dv / 16; ++i) {
          const V x = F::at(v + t * c.v.slot, i, c.Dv / 16);
          store(this->values.data() + t * c.Dv + 16 * i, x);
        }
      values = this->values.data(), step = c.Dv;
    }
    for (int r = 0; r < rows; r += ROWS) {
      const float* p = s.data() + r * columns + j * BLOCK;
      float* to = o.data() + r * c.Dv;
      switch (std::min(ROWS, rows - r)) {
        case 1: add<1>(p, columns, values, step, n, to, c.Dv); break;
        case 2: add<2>(p, columns, values, step, n, to, c.Dv); break;
        case 3: add<3>(p, columns, values, step, n, to, c.Dv); break;
        case 4: add<4>(p, columns, values, step, n, to, c.Dv); break;
        case 5: add<5>(p, columns, values, step, n, to, c.Dv); break;
        case 6: add<6>(p, columns, values, step, n, to, c.Dv); break;
      }
    }
  }
};

template <class F> void prompt(const Prompt& c, int threads) {
  const int64_t count = (c.N + BLOCK - 1) / BLOCK;
  std::vector<float> laid(static_cast<size_t>(count) * BLOCK * c.D, 0.0f);
  std::vector<Block> keys;
  std::vector<Worker<F>> workers(threads, Worker<F>(c));
  const auto none = [] { return 0; };
  const int64_t queries = workers[0].tall / c.G, tiles = (c.W + queries - 1) / queries;
  for (int64_t bh = 0; bh < c.B * c.H; ++bh) {
    const int64_t b = bh / c.H, h = bh % c.H;
    keys.clear();
    for (int64_t i = 0; i < count; ++i)
      keys.emplace_back(at_head(c.k, b, h), c.k.slot, at_head(c.pos, b, h), c.pos.slot, i * BLOCK, c.N);
    each(count, threads, none, [&](int64_t i, int) {
      lay<F>(keys[i].k, keys[i].n, c.k.slot, c.D, laid.data() + i * BLOCK * c.D);
    });
    // each worker has tiles of its own, so that sums come out the same every time
    each(threads, threads, none, [&](int64_t worker, int) {
      for (int64_t i = worker; i < tiles; i += threads) workers[worker].tile(b, h, i * queries, keys, laid.data());
    });
    for (int64_t i = 0; i < c.N; ++i) {
      float total = 0.0f;
      for (Worker<F>& w : workers) total += w.sums[i], w.sums[i] = 0.0f;
      c.sums[bh * c.N + i] = total / static_cast<float>(c.G);
    }
  }
}

}  // namespace

extern "C" void calidrop_prompt(Array k, Array v, Array pos, int32_t dtype, const float* q, const int32_t* at, int64_t B,
                                int64_t H, int64_t G, int64_t W, int64_t N, int32_t D, int32_t Dv, float scale,
                                float softcap, float* out, float* lse, float* sums, int32_t threads) {
  const Prompt c{k, v, pos, q, at, out, lse, sums, B, H, G, W, N, D, Dv, scale, softcap};
  if (dtype == F32) prompt<Float32>(c, threads);
  if (dtype == BF16) prompt<BFloat16>(c, threads);
  if (dtype == F16) prompt<Float16>(c, threads);
}
