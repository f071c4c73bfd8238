// The network of AttentionPredictor next to one end of its rows: two 3x3 convolutions over rows and blocks (1 to 16 to 32
// channels, ReLU) and one weight per channel; and a whole step of those rows. The oracles are in torch:
// calidrop.methods._predictor.Predictor, and calidrop.methods._rows.Rows.
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int SEEN = 5, INNER = 4, TOLD = 3;  // rows of the input, of the first convolution, of the answer
constexpr int FIRST = 16, SECOND = 32;        // channels
constexpr int TILE = 32;                      // blocks at a time
constexpr int INPUT = TILE + 32, WIDTH = TILE + 16;  // what they see, in whole vectors
#ifdef __AVX512F__
constexpr int AT_ONCE = 8, VECTORS = 2;  // channels and vectors of blocks whose sums registers hold
#else
constexpr int AT_ONCE = 4, VECTORS = 1;
#endif

struct Weights {
  const float *w1, *b1, *b2, *head;  // [16,9], [16], [32], [32]
  float w2[SECOND / AT_ONCE][FIRST * 9][AT_ONCE];
  // w2 [32,16,9]
  Weights(const float* w1, const float* b1, const float* w2, const float* b2, const float* head)
      : w1(w1), b1(b1), b2(b2), head(head) {
    for (int o = 0; o < SECOND; ++o)
      for (int i = 0; i < FIRST * 9; ++i) this->w2[o / AT_ONCE][i][o % AT_ONCE] = w2[o * FIRST * 9 + i];
  }
};

struct Tile {
  float x[SEEN + 1][INPUT];              // from two blocks before the first; a row of zeros at the end of the rows
  float there[WIDTH];                    // 1 for the blocks there are, from one before the first
  float h[INNER + 1][FIRST][WIDTH + 2];  // the first convolution, from one before

  // blocks `from` on of five rows of C; real: which blocks there are, or null
  void take(const float* rows, const uint8_t* real, int64_t from, int64_t C, bool newest) {
    std::memset(x, 0, sizeof(x));
    std::memset(there, 0, sizeof(there));
    const int64_t begin = std::max<int64_t>(0, from - 2), end = std::min<int64_t>(C, from - 2 + INPUT);
    for (int r = 0; r < SEEN; ++r)
      std::memcpy(x[r + (newest ? 0 : 1)] + (begin - (from - 2)), rows + r * C + begin, sizeof(float) * (end - begin));
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t c = from - 1 + i;
      there[i] = c >= 0 && c < C && (!real || real[c]) ? 1.0f : 0.0f;
    }
  }
  void root() {
    for (auto& row : x)
      for (float& y : row) y = std::sqrt(y);
  }
};

// rows 0 to 3 of h from rows 0 to 5 of x; `to` shifts them where the rows end before the first
void first(const Weights& w, Tile& t, int to) {
  std::memset(t.h[to ? 0 : INNER], 0, sizeof(t.h[0]));
  for (int j = 0; j < INNER; ++j)
    for (int i = 0; i < WIDTH; i += 16) {
      V x[9];
      for (int tap = 0; tap < 9; ++tap) x[tap] = load<V>(t.x[j + tap / 3] + i + tap % 3);
      const V there = load<V>(t.there + i);
      for (int c = 0; c < FIRST; ++c) {
        V y = splat(w.b1[c]);
        for (int tap = 0; tap < 9; ++tap) y += x[tap] * w.w1[9 * c + tap];
        store(t.h[j + to][c] + i, pick(y < V{}, V{}, y) * there);
      }
    }
}

// what VECTORS vectors of blocks add to row j, of AT_ONCE channels
inline void second(const Weights& w, const Tile& t, int j, int i, int part, V* total) {
  V y[AT_ONCE][VECTORS];
#pragma GCC unroll 8
  for (int o = 0; o < AT_ONCE; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) y[o][v] = splat(w.b2[part * AT_ONCE + o]);
  const float* by = w.w2[part][0];
  for (int c = 0; c < FIRST; ++c)
    for (int tap = 0; tap < 9; ++tap, by += AT_ONCE) {
      const float* h = t.h[j + tap / 3][c] + i + tap % 3;
      V x[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) x[v] = load<V>(h + 16 * v), in_register(x[v]);
#pragma GCC unroll 8
      for (int o = 0; o < AT_ONCE; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) y[o][v] += x[v] * by[o];
    }
#pragma GCC unroll 8
  for (int o = 0; o < AT_ONCE; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) total[v] += pick(y[o][v] < V{}, V{}, y[o][v]) * w.head[part * AT_ONCE + o];
}

// what the rows of a tile add, sixteen blocks at a time: give(row, first block, V)
template <class Give> inline void asked(const Weights& w, Tile& t, bool newest, int blocks, const Give& give) {
  first(w, t, newest ? 0 : 1);
  for (int j = 0; j < TOLD; ++j)
    for (int i = 0; i < blocks; i += 16 * VECTORS) {
      V total[VECTORS] = {};
      for (int part = 0; part < SECOND / AT_ONCE; ++part) second(w, t, j, i, part, total);
      for (int v = 0; v < VECTORS && i + 16 * v < blocks; ++v) give(j, i + 16 * v, total[v]);
    }
}

// the first n of sixteen numbers
inline void put(float* to, V x, int n) {
  if (n >= 16)
    store(to, x);
  else
    std::memcpy(to, &x, sizeof(float) * n);
}

}  // namespace

// x [N,5,C], heads `step` floats apart; real bool [N,C] or none; w1 [16,9], w2 [32,16,9] -> out [N,3,C]. newest: the rows
// end behind x, and begin before it otherwise.
extern "C" void calidrop_network(const float* x, int64_t step, const uint8_t* real, const float* w1, const float* b1,
                                 const float* w2, const float* b2, const float* head, int64_t N, int64_t C, int32_t newest,
                                 float* out, int32_t threads) {
  const Weights w(w1, b1, w2, b2, head);
  const int64_t tiles = (C + TILE - 1) / TILE;
  each(N * tiles, threads, [] { return std::make_unique<Tile>(); }, [&](int64_t task, std::unique_ptr<Tile>& t) {
    const int64_t n = task / tiles, from = task % tiles * TILE;
    t->take(x + n * step, real ? real + n * C : nullptr, from, C, newest);
    const int blocks = static_cast<int>(std::min<int64_t>(TILE, C - from));
    asked(w, *t, newest, blocks, [&](int j, int i, V y) { put(out + (n * TOLD + j) * C + from + i, y, blocks - i); });
  });
}

// A step: the rows of N heads move on by one, and what the row behind them is expected to be. history [N,R,C]; the new row
// has weights [N,spans * per] of the blocks of spans ids [N,spans] (-1: of none), and 0 of others, or is weights [N,C]
// where there are no ids; sum [N,C], of what the inner rows add. The network sees numbers after `roots` square roots; each
// older row weighs `decay` of the next, the oldest nothing.
// -> moved [N,R,C], moved_sum [N,C], expected [N,C]
extern "C" void calidrop_follow(const float* history, int64_t N, int64_t R, int64_t C, const float* weights,
                                const int64_t* ids, int64_t spans, int64_t per, const uint8_t* real, const double* sum,
                                int32_t roots, double decay, const float* w1, const float* b1, const float* w2,
                                const float* b2, const float* head, float bias, float* moved, double* moved_sum,
                                float* expected, int32_t threads) {
  const Weights w(w1, b1, w2, b2, head);
  each(N, threads, [] { return 0; }, [&](int64_t n, int) {
    float* to = moved + n * R * C;
    std::memcpy(to, history + (n * R + 1) * C, sizeof(float) * (R - 1) * C);
    float* row = to + (R - 1) * C;
    if (!ids) {
      std::memcpy(row, weights + n * C, sizeof(float) * C);
      return;
    }
    std::fill(row, row + C, 0.0f);
    for (int64_t i = 0; i < spans; ++i)
      if (const int64_t id = ids[n * spans + i]; id >= 0)
        std::memcpy(row + id * per, weights + (n * spans + i) * per, sizeof(float) * per);
  });
  double all = 0.0;  // what the rows weigh together
  for (int64_t r = 0; r < R; ++r) all = all * decay + 1.0;
  const int64_t tiles = (C + TILE - 1) / TILE;
  struct Scratch {
    Tile tile;
    float told[TOLD][TILE];
  };
  each(N * tiles, threads, [] { return std::make_unique<Scratch>(); }, [&](int64_t task, std::unique_ptr<Scratch>& x) {
    const int64_t n = task / tiles, from = task % tiles * TILE;
    x->tile.take(moved + (n * R + R - SEEN) * C, real ? real + n * C : nullptr, from, C, true);
    for (int i = 0; i < roots; ++i) x->tile.root();
    const int blocks = static_cast<int>(std::min<int64_t>(TILE, C - from));
    asked(w, x->tile, true, blocks, [&](int j, int i, V y) { store(x->told[j] + i, y); });
    for (int i = 0; i < blocks; ++i) {
      const int64_t c = n * C + from + i;
      const double inner = decay * sum[c] + decay * decay * x->told[0][i];
      moved_sum[c] = inner;
      expected[c] = static_cast<float>((inner + x->told[2][i] + decay * x->told[1][i]) / all) + bias;
    }
  });
}
