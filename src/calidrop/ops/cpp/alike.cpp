// The last key that is like each key, looked for from the end. The oracle is calidrop.ops.alike.in_torch. Most keys find
// one soon, and those that are left move together, so that tiles of products stay full.
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int PART = 512;  // keys that look together

// of n products the last above `limit` that may be taken, -1 if none
template <class May> inline int last_of(const float* s, int n, float limit, May may) {
  for (int i = BLOCK - 16; i >= 0; i -= 16) {
    if (!any(load<V>(s + i) > splat(limit))) continue;
    for (int t = std::min(n, i + 16) - 1; t >= i; --t)
      if (s[t] > limit && may(t)) return t;
  }
  return -1;
}

struct Look {
  std::vector<float> rows, laid, s;  // the keys that look; a block of keys by channels; products
  std::vector<int64_t> of;           // which keys look
  Look(int D) : rows(static_cast<size_t>(PART) * D), laid(static_cast<size_t>(BLOCK) * D), s(ROWS * BLOCK), of(PART) {}
};

// keys first to last - 1 of N look among all
void look(const float* k, int64_t N, int D, float limit, bool later, int64_t first, int64_t last, Look& w, int64_t* out) {
  int64_t open = last - first;
  std::memcpy(w.rows.data(), k + first * D, sizeof(float) * open * D);
  for (int64_t i = 0; i < open; ++i) w.of[i] = first + i, out[first + i] = -1;
  for (int64_t start = (N - 1) / BLOCK * BLOCK; start >= 0 && open; start -= BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, N - start));
    std::fill(w.laid.begin(), w.laid.end(), 0.0f);
    lay<Float32>(reinterpret_cast<const char*>(k + start * D), n, sizeof(float) * D, D, w.laid.data());
    int64_t kept = 0;
    for (int64_t r = 0; r < open; r += ROWS) {
      const int rows = static_cast<int>(std::min<int64_t>(ROWS, open - r));
      products(rows, w.rows.data() + r * D, D, D, w.laid.data(), w.s.data(), BLOCK);
      for (int i = 0; i < rows; ++i) {
        const int64_t own = w.of[r + i];
        const auto may = [&](int t) { return later ? start + t > own : start + t != own; };
        const int found = last_of(w.s.data() + i * BLOCK, n, limit, may);
        if (found >= 0)
          out[own] = start + found;
        else if (!later || own < start) {
          if (kept < r + i) {
            std::memmove(w.rows.data() + kept * D, w.rows.data() + (r + i) * D, sizeof(float) * D);
            w.of[kept] = own;
          }
          ++kept;
        }
      }
    }
    open = kept;
  }
}

}  // namespace

// k [heads,N,D] fp32, D a multiple of 16; out [heads,N]. later: only keys behind the one that looks
extern "C" void calidrop_alike(const float* k, int64_t heads, int64_t N, int32_t D, float limit, int32_t later, int64_t* out,
                               int32_t threads) {
  const int64_t parts = (N + PART - 1) / PART;
  each(heads * parts, threads, [&] { return Look(D); }, [&](int64_t task, Look& w) {
    const int64_t h = task / parts, first = task % parts * PART;
    look(k + h * N * D, N, D, limit, later, first, std::min<int64_t>(first + PART, N), w, out + h * N);
  });
}
