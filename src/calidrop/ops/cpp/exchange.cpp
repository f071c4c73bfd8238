// What AttentionPredictor holds of the host's spans changes: the best of each head come to where others are given up. The
// oracle is calidrop.methods.attention_predictor.Predicted in torch.
#include <atomic>

#include "threads.h"
#include "vectors.h"

namespace {

// of what is held, [N,m] units before and [N,w] behind
struct Column {
  const char* old;
  char* now;
  int64_t bytes;  // of a unit
};

// a part of the host's lists, one head behind the other: how many units each has, and where the columns lie
struct Part {
  const int64_t* lens;
  const char* const* columns;
  std::vector<int64_t> starts;
};

struct Scratch {
  std::vector<float> score;
  std::vector<int64_t> order;
  std::vector<char> wanted;
};

}  // namespace

// Each of N heads shall have w of its spans[n] units (at least one, and no more than there are): those with the largest of
// `per` numbers of row [N,C], of equals the first. ids [N,m]: which it has, in the order in which it has them. What stays
// keeps its place, what comes takes the places of what goes, in order, and then those behind the last. parts: of each the
// addresses of lens [N] and of `count` columns.
// -> whether anything changes; if it does, to [N,w] and the columns `now`
extern "C" void calidrop_exchange(const float* row, int64_t N, int64_t C, int64_t per, const int64_t* spans, const int64_t* ids,
                                  int64_t m, int64_t w, int64_t* to, const void* columns, int64_t count, const int64_t* parts,
                                  int64_t lists, int32_t* changes, int32_t threads) {
  std::vector<Part> of;
  for (int64_t p = 0; p < lists; ++p) {
    const int64_t* x = parts + p * (count + 1);
    of.push_back({reinterpret_cast<const int64_t*>(x[0]), reinterpret_cast<const char* const*>(x + 1), {}});
    int64_t start = 0;
    for (int64_t n = 0; n < N; ++n) of[p].starts.push_back(start), start += of[p].lens[n];
  }
  std::vector<int64_t> from(N * w);  // the place it had, or -1
  std::atomic<bool> other{m != w};
  each(N, threads, [] { return Scratch{}; }, [&](int64_t n, Scratch& x) {
    const int64_t S = spans[n];
    x.score.assign(S, -INFINITY), x.order.resize(S), x.wanted.assign(S, 0);
    for (int64_t s = 0; s < S; ++s) {
      x.order[s] = s;
      for (int64_t i = 0; i < per; ++i) {
        const float y = row[n * C + s * per + i];
        x.score[s] = y != y ? INFINITY : std::max(x.score[s], y);  // what is no number is the largest, as for torch
      }
    }
    const auto better = [&](int64_t a, int64_t b) { return x.score[a] != x.score[b] ? x.score[a] > x.score[b] : a < b; };
    std::nth_element(x.order.begin(), x.order.begin() + (w - 1), x.order.end(), better);
    for (int64_t i = 0; i < w; ++i) x.wanted[x.order[i]] = 1;
    for (int64_t i = 0; i < m; ++i)
      if (char& y = x.wanted[ids[n * m + i]]) y = 2;  // stays
    int64_t next = 0, at = 0;
    const auto put = [&](int64_t id, int64_t place) {
      to[n * w + at] = id, from[n * w + at++] = place;
      if (place < 0) other = true;
    };
    const auto come = [&] {
      while (next < S && x.wanted[next] != 1) ++next;
      if (next == S) return false;
      put(next++, -1);
      return true;
    };
    for (int64_t i = 0; i < m; ++i) {
      const int64_t id = ids[n * m + i];
      if (x.wanted[id] == 2)
        put(id, i);
      else
        come();
    }
    while (come()) {
    }
  });
  *changes = other;
  if (!other) return;
  constexpr int64_t SOME = 16;  // units that are a task
  const int64_t tasks = (w + SOME - 1) / SOME;
  each(N * tasks, threads, [] { return 0; }, [&](int64_t task, int) {
    const int64_t n = task / tasks, first = task % tasks * SOME, last = std::min(w, first + SOME);
    for (int64_t i = first; i < last; ++i) {
      const int64_t place = from[n * w + i];
      int64_t id = to[n * w + i], p = 0;
      if (place < 0)
        while (id >= of[p].lens[n]) id -= of[p++].lens[n];
      for (int64_t c = 0; c < count; ++c) {
        const auto& x = static_cast<const Column*>(columns)[c];
        const char* source = place < 0 ? of[p].columns[c] + (of[p].starts[n] + id) * x.bytes : x.old + (n * m + place) * x.bytes;
        std::memcpy(x.now + (n * w + i) * x.bytes, source, x.bytes);
      }
    }
  });
}
