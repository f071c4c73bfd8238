// Tokens as they are stored, and who asks them: each kind of code in a file of its own, compiled side by side.
#pragma once
#include "answer.h"
#include "array.h"
#include "rows.h"

namespace calidrop {

struct Piece {
  const float* q;    // [B,H,R,D], or null where it is asked with the queries of the call
  float* heard;      // [B,H,R,room], to be filled with the logits of all tokens, or null
  int64_t room;
  const float* mix;  // [B,channels,channels]: what every `channels` channels of an answer are multiplied with, or null
  int64_t slots;     // per (row, head) where lens is null, behind the first `skip`
  int64_t skip;
  int32_t D;
  int32_t turns;  // queries of the last tokens, in turn, each of which sees its own token and none behind it; 0: all see all
  int32_t reach;  // how many tokens such a query sees at most; 0: any number
  // from here on the same in every call, as long as the tokens are
  int32_t kind, dtype, bits, group, channels, rotate;  // bits: of TIERS, those of values; 16: values are of the dtype
  int32_t tiers[3];     // channels that are exact, those that have 4 bits, tokens that share a scale
  const int64_t* lens;  // [B*H], slots of each; they then lie one behind the other, or where
  const int64_t* starts;  // [B*H] says
  Array k, v, pos, bias, k_scale, k_zero, v_scale, v_zero, order, k16, k4, k4_scale, k4_zero;
};
enum Kind { EXACT, PER_TOKEN, PER_CHANNEL, ANSWERED, PER_GROUP, FLOAT8, TIERS };

// slots `from` to `to` - 1 of a head
struct Stretch {
  int64_t b, h, start;  // start: the first slot of the head that is asked
  int64_t from, to;
};

// What `calidrop_decode` is called with. q [B,H,R,D] and out [B,H,R,Dv] in fp32 or bf16, lse [B,H,R]; mean [B,H,R,D] or
// null, the weighted mean key, of exact pieces alone. k, v, pos: the `turns` tokens of each (row, head) on their way to the
// last slots of the last piece, which is exact, and to where `at` says their positions go; null where there are none.
struct Asked {
  const char* q;
  char* out;
  float *lse, *mean;
  const Piece* pieces;  // null where they lie behind this
  int64_t B, H;
  int32_t R, D, Dv, count, threads, q_dtype, out_dtype;
  float scale, softcap;
  Array k, v, pos, at;
};

// the queries of a call in fp32
struct Queries {
  const float* first;
  explicit Queries(const Asked& a) : floats(a.q_dtype == F32 ? 0 : a.B * a.H * a.R * a.D) {
    for (size_t i = 0; i < floats.size(); ++i) floats[i] = number(a.q, i, a.q_dtype);
    first = floats.empty() ? reinterpret_cast<const float*>(a.q) : floats.data();
  }

 private:
  std::vector<float> floats;
};

struct Call {
  const float* q;
  int64_t H;
  int R, Dv;
  float scale, softcap;
  // [R,D] of a head
  const float* queries(const Piece& x, const Stretch& at) const { return (x.q ? x.q : q) + (at.b * H + at.h) * R * x.D; }
  // where the logits of a head's tokens from the t-th on go
  Heard heard(const Piece& x, const Stretch& at, int64_t t) const {
    return {x.heard ? x.heard + (at.b * H + at.h) * R * x.room + t : nullptr, x.room};
  }
};

// what they say; a is as good as new
void ask_exact(const Call& c, const Piece& x, const Stretch& at, Answer& a);
void ask_per_token(const Call& c, const Piece& x, const Stretch& at, Answer& a);
void ask_groups(const Call& c, const Piece& x, const Stretch& at, Answer& a);

}  // namespace calidrop

namespace {

// where the columns of a head begin; null where there is none
struct Head {
  const char *k, *v, *pos, *bias, *k_scale, *k_zero, *v_scale, *v_zero;
  Head(const Piece& x, const Stretch& at)
      : k(of(x, x.k, at)), v(of(x, x.v, at)), pos(of(x, x.pos, at)), bias(of(x, x.bias, at)),
        k_scale(of(x, x.k_scale, at)), k_zero(of(x, x.k_zero, at)), v_scale(of(x, x.v_scale, at)),
        v_zero(of(x, x.v_zero, at)) {}
  static const char* of(const Piece& x, const Array& a, const Stretch& at) {
    if (!a.p) return nullptr;
    return a.p + at.start * a.slot + (x.lens ? 0 : at.b * a.row + at.h * a.head);
  }
};

// Rows of a column as wide as there are loops for: where they lie, or copies that zeros fill up.
struct Rows {
  Rows(const char* first, int64_t slot, int bytes, int wide, std::vector<char>& room)
      : first(first), slot(slot), bytes(bytes), copied(bytes != wide), room(room), step(copied ? wide : slot) {
    if (copied) room.assign(static_cast<size_t>(SCORES) * wide, 0);
  }
  // row t and the n - 1 behind it, until the next call
  const char* at(int64_t t, int n) const {
    const char* from = first + t * slot;
    if (!copied) return from;
    for (int i = 0; i < n; ++i) std::memcpy(room.data() + i * step, from + i * slot, bytes);
    return room.data();
  }

  const char* first;
  int64_t slot;
  int bytes;
  bool copied;
  std::vector<char>& room;
  int64_t step;  // bytes between two
};

// n numbers of a dtype
inline void numbers(const char* p, int dtype, int n, float* to) {
  if (dtype == F32)
    std::memcpy(to, p, sizeof(float) * n);
  else if (dtype == F16)
    halves(p, 2, n, to);
  else
    for (int i = 0; i < n; ++i) to[i] = of_bfloat(load<uint16_t>(p + 2 * i));
}

}  // namespace
