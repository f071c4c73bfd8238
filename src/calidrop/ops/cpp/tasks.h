// Pieces asked side by side: the slots of every list (those of a head of a row) cut into tasks of about equal length, whose
// answers are joined.
#pragma once
#include "pieces.h"
#include "threads.h"

namespace {

// what a thread works with: memory that it has only the first time to find
struct Own {
  Answer heard, whole;
};
inline Own* own() {
  thread_local Own mine;
  return &mine;
}

class Tasks {
 public:
  Tasks(const Piece* pieces, int count, int64_t lists, int threads)
      : pieces(pieces), count(count), lists(lists), threads(threads), slots(lists, 0), starts(lists * count, 0) {
    int64_t longest = 0, all = 0;
    for (int64_t i = 0; i < lists; ++i) {
      for (int p = 0; p < count; ++p) {
        if (pieces[p].kind == ANSWERED) continue;
        slots[i] += (pieces[p].lens ? pieces[p].lens[i] : pieces[p].slots) * pieces[p].group;
        if (pieces[p].starts)
          starts[p * lists + i] = pieces[p].starts[i];
        else if (pieces[p].lens && i)
          starts[p * lists + i] = starts[p * lists + i - 1] + pieces[p].lens[i - 1];
      }
      longest = std::max(longest, slots[i]), all += slots[i];
    }
    const bool alike = longest * lists <= all + all / 4;
    splits = alike && lists % threads == 0 && lists >= threads ? 1 : (4 * threads + lists - 1) / lists;
    splits = std::max<int64_t>(1, std::min(splits, longest / 256));
  }

  // Answers of R rows, D and K as Answer has them: begin(list, whole) puts into one what is answered already,
  // ask(list, x, start, from, to, heard) asks slots `from` to `to` - 1 behind the first of a piece, and done(list, whole) is
  // told the answer of each list.
  template <class Begin, class Ask, class Done>
  void answer(int R, int D, int K, const Begin& begin, const Ask& ask, const Done& done) const {
    thread_local std::vector<Answer> kept;
    auto& answers = kept;  // of tasks, where a list has several; other threads must not find their own
    if (splits > 1 && answers.size() < static_cast<size_t>(lists * splits)) answers.resize(lists * splits);
    each(lists * splits, threads, own, [&](int64_t task, Own* w) {
      const int64_t list = task / splits, part = task % splits;
      Answer &heard = w->heard, &mine = splits == 1 ? w->whole : answers[task];
      heard.begin(R, D, K), mine.begin(R, D, K);
      if (part == 0) begin(list, mine);
      const int64_t first = slots[list] * part / splits, last = slots[list] * (part + 1) / splits;
      int64_t before = 0;  // tokens of the pieces before
      for (int p = 0; p < count; ++p) {
        const Piece& x = pieces[p];
        if (x.kind == ANSWERED) continue;
        const int64_t n = x.lens ? x.lens[list] : x.slots;
        // a unit belongs to the task in which it begins
        const auto slot = [&](int64_t token) {
          return token <= before ? 0 : std::max<int64_t>(0, std::min(n, (token - before + x.group - 1) / x.group));
        };
        const int64_t from = slot(first), to = slot(last);
        before += n * x.group;
        if (from >= to) continue;
        ask(list, x, x.lens ? starts[p * lists + list] : x.skip, from, to, heard);
        for (int r = 0; r < R; ++r) mine.join(r, heard);
      }
      if (splits == 1) done(list, mine);
    });
    for (int64_t list = 0; splits > 1 && list < lists; ++list) {
      Answer& whole = answers[list * splits];
      for (int64_t i = 1; i < splits; ++i)
        for (int r = 0; r < R; ++r) whole.join(r, answers[list * splits + i]);
      done(list, whole);
    }
  }

 private:
  const Piece* pieces;
  int count;
  int64_t lists;
  int threads;
  std::vector<int64_t> slots, starts;  // [lists]: of all pieces; [count,lists]: where those of a piece begin
  int64_t splits;                      // tasks of a list
};

// the log-sum-exp of a row, and its answer in place; 0 where nothing was asked
inline float divided(Answer& a, int r, int n) {
  const float l = a.l[r];
  float* o = a.o + static_cast<size_t>(r) * a.D;
  for (int d = 0; d < n; ++d) o[d] = l == 0.0f ? 0.0f : o[d] / l;
  return l == 0.0f ? NONE : a.m[r] + std::log(l);
}

}  // namespace
