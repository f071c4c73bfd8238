// The network of AttentionPredictor next to one end of its rows: two 3x3 convolutions over rows and blocks (1 to 16 to 32
// channels, ReLU) and one weight per channel. The oracle is calidrop.methods._predictor.Predictor in torch.
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
};

struct Tile {
  float x[SEEN + 1][INPUT];              // from two blocks before the first; a row of zeros at the end of the rows
  float there[WIDTH];                    // 1 for the blocks there are, from one before the first
  float h[INNER + 1][FIRST][WIDTH + 2];  // the first convolution, from one before
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

}  // namespace

// x [N,5,C], heads `step` floats apart; real bool [N,C] or none; w1 [16,9], w2 [32,16,9] -> out [N,3,C]. newest: the rows
// end behind x, and begin before it otherwise.
extern "C" void calidrop_network(const float* x, int64_t step, const uint8_t* real, const float* w1, const float* b1,
                                 const float* w2, const float* b2, const float* head, int64_t N, int64_t C, int32_t newest,
                                 float* out, int32_t threads) {
  Weights w{w1, b1, b2, head, {}};
  for (int o = 0; o < SECOND; ++o)
    for (int i = 0; i < FIRST * 9; ++i) w.w2[o / AT_ONCE][i][o % AT_ONCE] = w2[o * FIRST * 9 + i];
  const int64_t tiles = (C + TILE - 1) / TILE;
  each(N * tiles, threads, [] { return std::make_unique<Tile>(); }, [&](int64_t task, std::unique_ptr<Tile>& t) {
    const int64_t n = task / tiles, from = task % tiles * TILE;
    std::memset(t->x, 0, sizeof(t->x));
    std::memset(t->there, 0, sizeof(t->there));
    const int64_t begin = std::max<int64_t>(0, from - 2), end = std::min<int64_t>(C, from - 2 + INPUT);
    for (int r = 0; r < SEEN; ++r)
      std::memcpy(t->x[r + (newest ? 0 : 1)] + (begin - (from - 2)), x + n * step + r * C + begin, sizeof(float) * (end - begin));
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t c = from - 1 + i;
      t->there[i] = c >= 0 && c < C && (!real || real[n * C + c]) ? 1.0f : 0.0f;
    }
    first(w, *t, newest ? 0 : 1);
    const int blocks = static_cast<int>(std::min<int64_t>(TILE, C - from));
    for (int j = 0; j < TOLD; ++j)
      for (int i = 0; i < blocks; i += 16 * VECTORS) {
        V total[VECTORS] = {};
        for (int part = 0; part < SECOND / AT_ONCE; ++part) second(w, *t, j, i, part, total);
        for (int v = 0; v < VECTORS; ++v) {
          float* to = out + (n * TOLD + j) * C + from + i + 16 * v;
          const int left = blocks - i - 16 * v;
          if (left >= 16) store(to, total[v]);
          else if (left > 0) std::memcpy(to, &total[v], sizeof(float) * left);
        }
      }
  });
}
