// Decode attention on a CPU: a few queries per kv head over any number of pieces of cache, joined by their log-sum-exp
// in one call. The oracle is calidrop.attention (attend, merge) on the decoded tokens. Portable C++17 with GCC/Clang
// vector types of the size of a register of AVX-512, AVX2 or NEON.
#include "pieces.h"
#include "threads.h"

namespace {

void ask(const Call& c, const Piece& x, const Stretch& at, Answer& a) {
  a.reset();
  if (x.kind == EXACT || x.kind == FLOAT8) return ask_exact(c, x, at, a);
  if (x.kind == PER_TOKEN) return ask_per_token(c, x, at, a);
  ask_groups(c, x, at, a);
}

// how many numbers rows of D are read as
int width(const Piece& x, int D) {
  if (x.kind == EXACT) return width_of<Float32>(D);
  if (x.kind == FLOAT8) return width_of<E4M3>(D);
  if (x.kind != PER_TOKEN) return D;
  return x.bits == 8 ? width_of<Codes<8>>(D) : x.bits == 4 ? width_of<Codes<4>>(D) : width_of<Codes<2>>(D);
}

// the new tokens of every (row, head) to their places
void take_in(const Asked& a, const Piece& x) {
  const int64_t slot = x.skip + x.slots - x.turns, size = x.dtype == F32 ? 4 : 2;
  const auto copy = [&](const Array& to, const Array& from, int64_t bytes, int64_t b, int64_t h) {
    for (int64_t i = 0; i < x.turns; ++i)
      std::memcpy(const_cast<char*>(at_head(to, b, h)) + (slot + i) * to.slot, at_head(from, b, h) + i * from.slot, bytes);
  };
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t h = 0; h < a.H; ++h) {
      copy(x.k, a.k, x.D * size, b, h), copy(x.v, a.v, a.Dv * size, b, h);
      copy(a.at, a.pos, sizeof(int32_t), b, h);
    }
}

// what a thread works with: memory that it has only the first time to find
struct Own {
  Answer heard, whole;
};
Own* own() {
  thread_local Own mine;
  return &mine;
}

}  // namespace

// Every (row, head) is cut into `splits` tasks of about equal length.
extern "C" void calidrop_decode(const Asked* asked) {
  const Asked& a = *asked;
  const Piece* pieces = a.pieces ? a.pieces : reinterpret_cast<const Piece*>(asked + 1);
  const int64_t H = a.H, heads = a.B * H;
  const int R = a.R, Dv = a.Dv, count = a.count;
  std::vector<float> floats(a.q_dtype == F32 ? 0 : heads * R * a.D);
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = number(a.q, i, a.q_dtype);
  const Call c{floats.empty() ? reinterpret_cast<const float*>(a.q) : floats.data(), H, R, Dv, a.scale, a.softcap};
  if (a.k.p) take_in(a, pieces[count - 1]);
  std::vector<int64_t> slots(heads, 0), starts(heads * count, 0);
  int64_t longest = 0;
  int D = 0, wide = 0, v_wide = Dv;
  for (int p = 0; p < count; ++p) {
    if (pieces[p].kind == ANSWERED) continue;
    D = std::max(D, pieces[p].D);
    wide = std::max(wide, width(pieces[p], pieces[p].D)), v_wide = std::max(v_wide, width(pieces[p], Dv));
  }
  for (int64_t i = 0; i < heads; ++i) {
    for (int p = 0; p < count; ++p) {
      if (pieces[p].kind == ANSWERED) continue;
      slots[i] += (pieces[p].lens ? pieces[p].lens[i] : pieces[p].slots) * pieces[p].group;
      if (pieces[p].starts)
        starts[p * heads + i] = pieces[p].starts[i];
      else if (pieces[p].lens && i)
        starts[p * heads + i] = starts[p * heads + i - 1] + pieces[p].lens[i - 1];
    }
    longest = std::max(longest, slots[i]);
  }
  int64_t splits = heads % a.threads == 0 && heads >= a.threads ? 1 : (4 * a.threads + heads - 1) / heads;
  splits = std::max<int64_t>(1, std::min(splits, longest / 256));
  const auto done = [&](int64_t bh, Answer& whole) {
    for (int r = 0; r < R; ++r) {
      const float l = whole.l[r];
      const int64_t i = bh * R + r;
      const bool empty = l == 0.0f;
      a.lse[i] = empty ? NONE : whole.m[r] + std::log(l);
      float *o = whole.o + static_cast<size_t>(r) * whole.D, *keys = whole.mean + static_cast<size_t>(r) * whole.K;
      for (int d = 0; d < Dv; ++d) o[d] = empty ? 0.0f : o[d] / l;
      put(a.out, i * Dv, a.out_dtype, o, Dv);
      for (int d = 0; a.mean && d < D; ++d) a.mean[i * D + d] = empty ? 0.0f : keys[d] / l;
    }
  };
  thread_local std::vector<Answer> kept;
  auto& answers = kept;  // of tasks, where a head has several; other threads must not find their own
  if (splits > 1 && answers.size() < static_cast<size_t>(heads * splits)) answers.resize(heads * splits);
  each(heads * splits, a.threads, own, [&](int64_t task, Own* w) {
    const int64_t bh = task / splits, part = task % splits, b = bh / H, h = bh % H;
    Answer &heard = w->heard, &mine = splits == 1 ? w->whole : answers[task];
    heard.begin(R, v_wide, a.mean ? wide : 0), mine.begin(R, v_wide, a.mean ? wide : 0);
    const int64_t first = slots[bh] * part / splits, last = slots[bh] * (part + 1) / splits;
    int64_t at = 0;  // tokens of the pieces before
    for (int p = 0; p < count; ++p) {
      const Piece& x = pieces[p];
      if (x.kind == ANSWERED) {
        if (part == 0)
          for (int r = 0; r < R; ++r) {
            const int64_t i = bh * R + r;
            const float m = load<float>(x.v.p + 4 * i);
            if (x.k.p)
              mine.join(r, m, 1.0f, reinterpret_cast<const float*>(x.k.p) + i * Dv, Dv, nullptr);
            else
              mine.join(r, m, 1.0f, std::vector<float>(Dv, 0.0f).data(), Dv, nullptr);
          }
        continue;
      }
      const int64_t n = x.lens ? x.lens[bh] : x.slots;
      // a unit belongs to the task in which it begins
      auto begin = [&](int64_t token) {
        return std::max<int64_t>(0, std::min(n, (token - at + x.group - 1) / x.group));
      };
      const int64_t from = first <= at ? 0 : begin(first), to = last <= at ? 0 : begin(last);
      at += n * x.group;
      if (from >= to) continue;
      ask(c, x, {b, h, x.lens ? starts[p * heads + bh] : x.skip, from, to}, heard);
      for (int r = 0; r < R; ++r) mine.join(r, heard);
    }
    if (splits == 1) done(bh, mine);
  });
  for (int64_t bh = 0; splits > 1 && bh < heads; ++bh) {
    Answer& whole = answers[bh * splits];
    for (int64_t i = 1; i < splits; ++i)
      for (int r = 0; r < R; ++r) whole.join(r, answers[bh * splits + i]);
    done(bh, whole);
  }
}
