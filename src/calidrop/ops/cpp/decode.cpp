// Decode attention on a CPU: a few queries per kv head over any number of pieces of cache, joined by their log-sum-exp
// in one call. The oracle is calidrop.attention (attend, merge) on the decoded tokens. Portable C++17 with GCC/Clang
// vector types of the size of a register of AVX-512, AVX2 or NEON.
#include "tasks.h"

namespace {

void ask(const Call& c, const Piece& x, const Stretch& at, Answer& a) {
  a.reset();
  if (x.kind == EXACT || x.kind == FLOAT8) return ask_exact(c, x, at, a);
  if (x.kind == PER_TOKEN) return ask_per_token(c, x, at, a);
  ask_groups(c, x, at, a);
}

// how many numbers rows of D are read as
int width(const Piece& x, int D) {
  if (x.kind == EXACT || (x.kind == TIERS && x.bits == 16)) return width_of<Float32>(D);
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

}  // namespace

extern "C" void calidrop_decode(const Asked* asked) {
  const Asked& a = *asked;
  const Piece* pieces = a.pieces ? a.pieces : reinterpret_cast<const Piece*>(asked + 1);
  const int64_t H = a.H;
  const int R = a.R, Dv = a.Dv, count = a.count;
  const Queries q(a);
  const Call c{q.first, H, R, Dv, a.scale, a.softcap};
  if (a.k.p) take_in(a, pieces[count - 1]);
  int D = 0, wide = 0, v_wide = Dv;
  for (int p = 0; p < count; ++p) {
    if (pieces[p].kind == ANSWERED) continue;
    D = std::max(D, pieces[p].D);
    wide = std::max(wide, width(pieces[p], pieces[p].D)), v_wide = std::max(v_wide, width(pieces[p], Dv));
  }
  const auto given = [&](int64_t bh, Answer& whole) {
    for (int p = 0; p < count; ++p) {
      if (pieces[p].kind != ANSWERED) continue;
      const auto *o = reinterpret_cast<const float*>(pieces[p].k.p), *lse = reinterpret_cast<const float*>(pieces[p].v.p);
      const std::vector<float> none(o ? 0 : Dv, 0.0f);
      for (int64_t r = 0, i = bh * R; r < R; ++r, ++i) whole.join(r, lse[i], 1.0f, o ? o + i * Dv : none.data(), Dv, nullptr);
    }
  };
  const auto ask_one = [&](int64_t bh, const Piece& x, int64_t start, int64_t from, int64_t to, Answer& heard) {
    ask(c, x, {bh / H, bh % H, start, from, to}, heard);
  };
  Tasks(pieces, count, a.B * H, a.threads).answer(R, v_wide, a.mean ? wide : 0, given, ask_one, [&](int64_t bh, Answer& whole) {
    for (int r = 0; r < R; ++r) {
      const int64_t i = bh * R + r;
      const float l = whole.l[r], *keys = whole.mean + static_cast<size_t>(r) * whole.K;
      a.lse[i] = divided(whole, r, Dv);
      put(a.out, i * Dv, a.out_dtype, whole.o + static_cast<size_t>(r) * whole.D, Dv);
      for (int d = 0; a.mean && d < D; ++d) a.mean[i * D + d] = l == 0.0f ? 0.0f : keys[d] / l;
    }
  });
}
