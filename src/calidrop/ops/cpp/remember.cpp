// A step of CaliDrop: what query heads remember of evicted tokens, asked again where queries drifted. The oracle is
// calidrop.methods.calidrop.Calibrated in torch.
#include "pieces.h"

extern "C" void calidrop_decode(const Asked*);

namespace {

// of query heads: the query that evicted tokens were asked, their answer, its lse, and the weighted mean key
template <class T> struct Memory {
  T *q, *o, *lse, *mean;
};

float cosine(const float* a, const float* b, int n) {
  const auto length = [n](const float* x) { return std::max(std::sqrt(inner(x, x, n)), 1e-8f); };  // as torch bounds it
  return inner(a, b, n) / (length(a) * length(b));
}

// how far a query went along a slope
float moved(const float* to, const float* from, const float* slope, int n) {
  V total = {};
  for (int i = 0; i < n; i += 16) total += (head(to + i, n - i) - head(from + i, n - i)) * head(slope + i, n - i);
  return sum(total);
}

// the lists of some (row, head) pairs: where they begin in the columns, and how many slots they have
struct Lists {
  std::vector<Piece> pieces;
  std::vector<std::vector<int64_t>> starts, lens;
  Lists(const Piece* given, int count, const std::vector<int64_t>& pairs, int64_t all)
      : pieces(given, given + count), starts(count), lens(count) {
    for (int i = 0; i < count; ++i) {
      const Piece& x = given[i];
      int64_t start = 0;
      size_t next = 0;
      for (int64_t pair = 0; pair < all; ++pair) {
        if (next < pairs.size() && pairs[next] == pair) starts[i].push_back(start), lens[i].push_back(x.lens[pair]), ++next;
        start += x.lens[pair];
      }
      pieces[i].lens = lens[i].data(), pieces[i].starts = starts[i].data();
    }
  }
};

}  // namespace

// q [B,H,G,D], one query per head; q0, lse0 [B,H,G], o0 [B,H,G,Dv], mean0 [B,H,G,D]: what is remembered. Heads that remember
// something and whose cosine is below `recompute` are asked again, of the evicted tokens in `pieces` (exact, with `lens`;
// none where they are gone): *asked says how many, and if any did q1 to mean1 become what is remembered from now on. said
// [B,H,G]: the lse of what answers now, moved along its slope (order 1), -inf below `apply`; applied [B,H,G]: whether it does.
// counts [B,2]: heads that were asked again, and that could have been.
extern "C" void calidrop_remember(const float* q, const float* q0, const float* o0, const float* lse0, const float* mean0,
                                  int64_t B, int64_t H, int32_t G, int32_t D, int32_t Dv, float scale, int32_t order,
                                  float recompute, float apply, const Piece* pieces, int32_t count, float* q1, float* o1,
                                  float* lse1, float* mean1, float* said, uint8_t* applied, int64_t* counts, int64_t* asked,
                                  int32_t threads) {
  const int64_t pairs = B * H, heads = pairs * G;
  Memory<const float> now{q0, o0, lse0, mean0};
  std::vector<uint8_t> ask(heads);
  std::vector<int64_t> those;  // pairs of which any head asks
  std::fill(counts, counts + 2 * B, 0);
  *asked = 0;
  for (int64_t i = 0; i < heads; ++i) {
    const float near = cosine(q + i * D, q0 + i * D, D);
    const bool there = lse0[i] > NONE;
    ask[i] = count && there && near < recompute;
    applied[i] = near >= apply || ask[i];
    counts[i / (H * G) * 2] += ask[i], counts[i / (H * G) * 2 + 1] += there, *asked += ask[i];
    if (ask[i] && (those.empty() || those.back() != i / G)) those.push_back(i / G);
  }
  if (*asked) {
    const auto copied = [heads](const float* from, float* to, int64_t n) { std::memcpy(to, from, sizeof(float) * heads * n); };
    copied(q0, q1, D), copied(o0, o1, Dv), copied(lse0, lse1, 1), copied(mean0, mean1, D);
    now = {q1, o1, lse1, mean1};
    const int64_t P = static_cast<int64_t>(those.size());
    std::vector<float> room(P * G * (2 * D + Dv + 1));
    const Memory<float> found{room.data(), room.data() + P * G * D, room.data() + P * G * (D + Dv),
                              room.data() + P * G * (D + Dv + 1)};
    for (int64_t p = 0; p < P; ++p) std::memcpy(found.q + p * G * D, q + those[p] * G * D, sizeof(float) * G * D);
    Lists lists(pieces, count, those, pairs);
    Asked about = {};
    about.q = reinterpret_cast<const char*>(found.q), about.out = reinterpret_cast<char*>(found.o);
    about.lse = found.lse, about.mean = found.mean, about.pieces = lists.pieces.data();
    about.B = P, about.H = 1, about.R = G, about.D = D, about.Dv = Dv;
    about.count = count, about.threads = threads, about.scale = scale;
    calidrop_decode(&about);
    for (int64_t i = 0; i < P * G; ++i) {
      const int64_t head = those[i / G] * G + i % G;
      if (!ask[head]) continue;
      std::memcpy(q1 + head * D, found.q + i * D, sizeof(float) * D);
      std::memcpy(o1 + head * Dv, found.o + i * Dv, sizeof(float) * Dv);
      std::memcpy(mean1 + head * D, found.mean + i * D, sizeof(float) * D);
      lse1[head] = found.lse[i];
    }
  }
  for (int64_t i = 0; i < heads; ++i) {
    said[i] = NONE;
    if (!applied[i]) continue;
    said[i] = now.lse[i];
    if (order == 1 && !ask[i]) said[i] += scale * moved(q + i * D, now.q + i * D, now.mean + i * D, D);
  }
}
