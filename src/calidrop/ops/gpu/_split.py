"""The first launch of decode attention: what every split of every piece says, `_join` joins. See `attention`.

A program answers for one kv head from one stretch (split) of one piece; all queries of the head are the rows of a
matrix product. Products have fp32 sums and are in the queries' dtype, of codes in fp16 instead of bf16: fp32 is exact,
half precision rounds the weights once. Per token, scales and zeros are folded into scores and weights; per channel,
codes are decoded in registers, as folding would cost as much on the 16 rows that a product has at least.

What codes cost is instructions, and the way of numbers between threads. So memory is read as words of two bytes that
lie in registers as a product wants its operand, and `code` decodes them there. The words' first codes are one matrix,
their second codes another, ...: their products are added up (keys per token), or `woven` together (all others).

to: where logits go, or None: those of the kv head, where in them each row begins, the token in memory that is its
first, and which rows there are. (Pointers of 64 bits to every logit would take a quarter more registers.)
"""

# pyright: basic, reportAssignmentType=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from calidrop.ops.gpu._shared import code, exp2, log2, product, woven

SLOTS = 4  # pieces a launch has room for
LIFT = tl.constexpr(9.0)  # exp(9) is 8103, fp16 ends at 65504
LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = [f"{name}{i}" for i in range(SLOTS) for name in ("n", "row", "head", "per", "end")]


@triton.jit
def _weigh(s, m, l):
    """Scores -> weights against the running maximum, what earlier weights shrink by, the new maximum and sum."""
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing visible so far
    w = tl.exp(s - base[:, None])
    shrink = tl.exp(m - base)
    return w, shrink, top, l * shrink + tl.sum(w, 1)


@triton.jit
def _bent(s, p, to, at, there, softcap, CAPPED: tl.constexpr):
    """Logits with everything that changes them after the product. at: the token's place in memory."""
    inside = there
    if CAPPED:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    if p[3] is not None:
        s += tl.load(p[3] + at, mask=there, other=0.0)[None, :]
    if p[2] is not None:
        there = there & (tl.load(p[2] + at, mask=there, other=-1) >= 0)
    s = tl.where(there[None, :], s, float("-inf"))
    if to is not None:
        n = (at - to[2]).to(tl.int32)
        tl.store(to[0] + (to[1][:, None] + n[None, :]), s, mask=to[3][:, None] & inside[None, :])
    return s


@triton.jit
def _tokens(
    x, p, to, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exact tokens."""
    dt: tl.constexpr = x.dtype if p[0].dtype.element_ty == x.dtype else tl.float32
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, acc = tl.zeros([RP], tl.float32), tl.zeros([RP, DVP], tl.float32)
    x = x.to(dt)
    for t in range(start, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        there, at = n < stop, base + n
        seen_k = there[:, None] & (d < D)[None, :]
        seen_v = there[:, None] & (dv < DV)[None, :]
        k = tl.load(p[0] + at[:, None] * D + d[None, :], mask=seen_k, other=0)
        v = tl.load(p[1] + at[:, None] * DV + dv[None, :], mask=seen_v, other=0)
        s = product(x, tl.trans(k.to(dt)))
        w, shrink, m, l = _weigh(_bent(s * scale, p, to, at, there, softcap, CAPPED), m, l)
        acc = acc * shrink[:, None] + product(w.to(dt), v.to(dt))
    return m, l, acc


@triton.jit
def unit_of(most):
    """The power of two that brings numbers of up to so much into fp16's range."""
    size = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(size > 0.0, size, 1.0)


@triton.jit
def _rows(q, there, P: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, RP: tl.constexpr, dtype: tl.constexpr):
    """Queries as P matrices, of every P-th channel, over the power of two that brings them into fp16's range; and it.
    q: [RP], where rows begin."""
    raw, rows, most = (), (), tl.zeros([RP], tl.float32)
    for i in tl.static_range(P):
        d = tl.arange(0, WIDE) * P + i
        x = tl.load(q[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        raw += (x,)
        most = tl.maximum(most, tl.max(tl.abs(x), 1))
    size = unit_of(most)
    for i in tl.static_range(P):
        rows += ((raw[i] / size[:, None]).to(dtype),)
    return rows, size


@triton.jit
def _lifted(s, m):
    """`_weigh` for codes: weights of up to exp(LIFT), so that fp16 loses none that count. They are added up after the
    loop, as every sum over tokens is a barrier."""
    top = tl.maximum(m, tl.max(s, 1) - LIFT)
    base = tl.where(top == float("-inf"), 0.0, top) * LOG2E
    return exp2(s * LOG2E - base[:, None]), exp2(m * LOG2E - base), top


@triton.jit
def _scales(p, base, n, stop):
    """Scales of keys and values of some tokens, and zeros where there are any."""
    there = n < stop
    scales = (tl.load(p[4] + base + n, mask=there, other=0.0), tl.load(p[6] + base + n, mask=there, other=1.0))
    if p[5] is not None:
        zeros = (tl.load(p[5] + base + n, mask=there, other=0.0), tl.load(p[7] + base + n, mask=there, other=0.0))
        scales += zeros
    return scales


@triton.jit
def _zero(scales, i: tl.constexpr, by, HALF: tl.constexpr):
    """What the code HALF stands for, times `by`. scales: of `_scales`; i: 0 for keys, 1 for values."""
    y = scales[i].to(tl.float32) * by  # symmetric codes: 0 is the code below HALF
    if len(scales) > 2:
        y = scales[2 + i].to(tl.float32) * by + y * HALF
    return y


@triton.jit
def _codes(
    q, rows, p, to, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token a slot, with a scale (and a zero) per token. The scale of a token's values is in its weight, which would
    leave fp16's range if it were multiplied with it later."""
    bits: tl.constexpr = F[1]
    P: tl.constexpr = 16 // bits  # codes a word holds
    HALF: tl.constexpr = 2 ** (bits - 1) if F[0] == 1 else 0
    K: tl.constexpr = DP // P if DP // P > 16 else 16  # words of a key
    V: tl.constexpr = DVP // P if DVP // P > 16 else 16  # and of a value
    dt: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    d, dv = tl.arange(0, K), tl.arange(0, V)
    x, size_of = _rows(q, rows, P, D, K, RP, dt)
    total, acc = tl.zeros([RP], tl.float32), ()
    for i in tl.static_range(P):
        total += tl.sum(x[i].to(tl.float32), 1)
        acc += (tl.zeros([RP, V], tl.float32),)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, zeros = tl.zeros([RP, BLOCK], tl.float32), tl.zeros([RP, BLOCK], tl.float32)
    keys, values = p[0] + base * (D // P), p[1] + base * (DV // P)
    ahead = _scales(p, base, start + tl.arange(0, BLOCK), stop)
    for t in range(start, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        there, scales = n < stop, ahead
        ahead = _scales(p, base, n + BLOCK, stop)  # of the next tokens: nobody else asks for them in time
        seen_k = there[:, None] & (d < D // P)[None, :]
        seen_v = there[:, None] & (dv < DV // P)[None, :]
        k = tl.trans(tl.load(keys + n[:, None] * (D // P) + d[None, :], mask=seen_k, other=0))
        v = tl.load(values + n[:, None] * (DV // P) + dv[None, :], mask=seen_v, other=0)
        s = tl.zeros([RP, BLOCK], tl.float32)
        for i in tl.static_range(P):
            s = product(x[i], code(k, i, F[0], bits, HALF, dt), s)
        k_scale = scales[0].to(tl.float32)
        v_scale = scales[1].to(tl.float32)
        depth = log2(v_scale)
        inverse = exp2(-depth)
        s *= k_scale[None, :]
        if F[0] == 1:
            s += total[:, None] * _zero(scales, 0, 1.0, HALF)[None, :]
        s = _bent(s * (scale * size_of)[:, None], p, to, base + n, there, softcap, CAPPED) + (depth / LOG2E)[None, :]
        w, shrink, m = _lifted(s, m)
        l = l * shrink[:, None] + w * inverse[None, :]
        if F[0] == 1:
            zeros = zeros * shrink[:, None] + w * _zero(scales, 1, inverse, HALF)[None, :]
        new = ()
        for i in tl.static_range(P):
            new += (product(w.to(dt), code(v, i, F[0], bits, HALF, dt), acc[i] * shrink[:, None]),)
        acc = new
    return m, tl.sum(l, 1), woven(acc, P) + tl.sum(zeros, 1)[:, None]


@triton.jit
def _repeated(x, n: tl.constexpr):
    """[rows,columns] -> [rows,columns*n]"""
    y = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], n))
    return tl.reshape(y, (x.shape[0], x.shape[1] * n))


@triton.jit
def _units(
    q, rows, p, to, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A unit of tokens a slot: keys [D,group] with a scale and zero per channel, values [group,Dv] per token over
    groups of channels."""
    P: tl.constexpr = 16 // F[1]  # codes a word holds
    group: tl.constexpr = F[2]
    size: tl.constexpr = BLOCK if BLOCK > 8 * P else 8 * P  # a product has 8 columns at least
    many: tl.constexpr = size // group if group < size else 1  # units at a time
    K: tl.constexpr = group // P  # words of a channel of a unit
    V: tl.constexpr = DVP // P if DVP // P > 16 else 16  # words of a token
    G: tl.constexpr = F[3] // P  # words of a group of channels
    dt: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    d, dv = tl.arange(0, DP), tl.arange(0, V)
    x, size_of = _rows(q, rows, 1, D, DP, RP, dt)
    acc = ()
    for _ in tl.static_range(P):
        acc += (tl.zeros([RP, V], tl.float32),)
    m = tl.full([RP], float("-inf"), tl.float32)
    l = tl.zeros([RP, size], tl.float32)
    for t in range(start * group, stop * group, size):
        word = t // P + tl.arange(0, size // P)
        seen = (word < stop * K)[None, :] & (d < D)[:, None]
        place = ((base + word // K)[None, :] * D + d[:, None]) * K + (word % K)[None, :]
        k = tl.load(p[0] + place, mask=seen, other=0)
        u = t // group + tl.arange(0, many)
        seen = (u < stop)[None, :] & (d < D)[:, None]
        place = (base + u)[None, :] * D + d[:, None]
        k_scale = _repeated(tl.load(p[4] + place, mask=seen, other=0.0), size // P // many).to(dt)
        k_zero = _repeated(tl.load(p[5] + place, mask=seen, other=0.0), size // P // many).to(dt)
        n = t + tl.arange(0, size)
        there, at = n < stop * group, base * group + n
        seen = there[:, None] & (dv < DV // P)[None, :]
        v = tl.load(p[1] + at[:, None] * (DV // P) + dv[None, :], mask=seen, other=0)
        v_scale, v_zero = _grid(p[6], p[7], at, there, DV, F[3], V, G, dt)
        s = ()
        for i in tl.static_range(P):
            s += (product(x[0], tl.fma(code(k, i, 2, F[1], 0, dt), k_scale, k_zero)),)
        s = woven(s, P) * (scale * size_of)[:, None]
        w, shrink, m = _lifted(_bent(s, p, to, at, there, softcap, CAPPED), m)
        l = l * shrink[:, None] + w
        new = ()
        for i in tl.static_range(P):
            y = tl.fma(code(v, i, 2, F[1], 0, dt), v_scale, v_zero)
            new += (product(w.to(dt), y, acc[i] * shrink[:, None]),)
        acc = new
    return m, tl.sum(l, 1), woven(acc, P)


@triton.jit
def _grid(scale, zero, at, there, size: tl.constexpr, channels: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr, dt):
    """Scales and zeros of some tokens' words. size: channels of a token; G: words of a group."""
    g = tl.arange(0, WORDS // G)
    seen = there[:, None] & (g < size // channels)[None, :]
    place = at[:, None] * (size // channels) + g[None, :]
    scale = _repeated(tl.load(scale + place, mask=seen, other=0.0), G).to(dt)
    return scale, _repeated(tl.load(zero + place, mask=seen, other=0.0), G).to(dt)


@triton.jit
def _read(p, at, there, SIZE: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """The words that hold the codes of some tokens [tokens,WORDS]; with 3 bits, which words do not, the codes
    themselves. SIZE: channels of a token."""
    d = tl.arange(0, WORDS)
    if BITS == 3:
        bit = d * 3
        place = at[:, None] * (SIZE * 3 // 8) + (bit // 8)[None, :]
        seen = there[:, None] & (d < SIZE)[None, :]
        low = tl.load(p + place, mask=seen, other=0).to(tl.int32)
        high = tl.load(p + place + 1, mask=seen & (bit % 8 > 5)[None, :], other=0).to(tl.int32)
        x = ((low | (high << 8)) >> (bit % 8)[None, :]).to(tl.int16) & 7
    else:
        P: tl.constexpr = 16 // BITS
        seen = there[:, None] & (d < SIZE // P)[None, :]
        x = tl.load(p + at[:, None] * (SIZE // P) + d[None, :], mask=seen, other=0)
    return x


@triton.jit
def _groups(
    q, rows, p, to, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token a slot, with a scale and zero per group of channels."""
    P: tl.constexpr = 16 // F[1] if F[1] != 3 else 1  # codes a word holds
    wide: tl.constexpr = F[1] if F[1] != 3 else 4  # bits of a code there
    K: tl.constexpr = DP // P if DP // P > 16 else 16  # words of a key
    V: tl.constexpr = DVP // P if DVP // P > 16 else 16  # and of a value
    G: tl.constexpr = F[3] // P  # and of a group
    dt: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    x, size_of = _rows(q, rows, P, D, K, RP, dt)
    acc = ()
    for _ in tl.static_range(P):
        acc += (tl.zeros([RP, V], tl.float32),)
    m = tl.full([RP], float("-inf"), tl.float32)
    l = tl.zeros([RP, BLOCK], tl.float32)
    for t in range(start, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        there, at = n < stop, base + n
        k = _read(p[0], at, there, D, K, F[1])
        v = _read(p[1], at, there, DV, V, F[1])
        size, zero = _grid(p[4], p[5], at, there, D, F[3], K, G, dt)
        s = tl.zeros([RP, BLOCK], tl.float32)
        for i in tl.static_range(P):
            s = product(x[i], tl.trans(tl.fma(code(k, i, 4, wide, 0, dt), size, zero)), s)
        w, shrink, m = _lifted(_bent(s * (scale * size_of)[:, None], p, to, at, there, softcap, CAPPED), m)
        l = l * shrink[:, None] + w
        size, zero = _grid(p[6], p[7], at, there, DV, F[3], V, G, dt)
        new = ()
        for i in tl.static_range(P):
            y = tl.fma(code(v, i, 4, wide, 0, dt), size, zero)
            new += (product(w.to(dt), y, acc[i] * shrink[:, None]),)
        acc = new
    return m, tl.sum(l, 1), woven(acc, P)


@triton.jit
def _tier(
    q, rows, unit, p, at, t, D: tl.constexpr, group: tl.constexpr, size: tl.constexpr, per: tl.constexpr,
    first: tl.constexpr, many: tl.constexpr, WIDE: tl.constexpr, bits: tl.constexpr, dt: tl.constexpr,
):  # fmt: skip
    """Scores [RP,size] of channels first ... first + many - 1 of a unit's order, that have codes of so many bits: of
    the tokens from t on of unit `at`. p: codes, scales, zeros and orders; WIDE: channels at a time."""
    P: tl.constexpr = 16 // bits
    W: tl.constexpr = group // P  # words of a channel
    step: tl.constexpr = per if per < size else size  # tokens that share a scale, of these
    w = tl.arange(0, size // P)
    s = ()
    for _ in tl.static_range(P):
        s += (tl.zeros([q.shape[0], size // P], tl.float32),)
    for start in tl.static_range(0, many, WIDE):
        c = start + tl.arange(0, WIDE)
        here = c < many
        order = tl.load(p[3] + at * D + first + c, mask=here, other=0).to(tl.int32)
        x = tl.load(q[:, None] + order[None, :], mask=rows[:, None] & here[None, :], other=0.0).to(tl.float32)
        x = (x * unit[:, None]).to(dt)
        row = at * many + c
        k = tl.load(p[0] + row[:, None] * W + (t // P + w)[None, :], mask=here[:, None], other=0)
        place = row[:, None] * (group // per) + (t // per + tl.arange(0, size // step))[None, :]
        scale = _repeated(tl.load(p[1] + place, mask=here[:, None], other=0.0), step // P).to(dt)
        zero = _repeated(tl.load(p[2] + place, mask=here[:, None], other=0.0), step // P).to(dt)
        new = ()
        for i in tl.static_range(P):
            new += (product(x, tl.fma(code(k, i, 2, bits, 0, dt), scale, zero), s[i]),)
        s = new
    return woven(s, P)


@triton.jit
def _tiers(
    q, rows, p, to, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A unit of tokens a slot, with an order of the channels of its keys: the first are exact, the next have 4 bits,
    the others 2. Queries are read in that order: a unit has more numbers than they have."""
    P: tl.constexpr = 16 // F[1]  # codes a word of values holds
    group: tl.constexpr = F[2]
    size: tl.constexpr = group if group <= BLOCK else (BLOCK if BLOCK > 64 else 64)  # words of 8 codes: 8 at least
    V: tl.constexpr = DVP // P if DVP // P > 16 else 16  # words of a token
    G: tl.constexpr = F[3] // P  # words of a group of channels
    n16: tl.constexpr = F[8]
    n4: tl.constexpr = F[9]
    n2: tl.constexpr = D - n16 - n4
    per: tl.constexpr = F[10]
    dt: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    dv = tl.arange(0, V)
    size_of = _rows(q, rows, 1, D, DP, RP, dt)[1]
    inverse = 1.0 / size_of  # a power of two
    acc = ()
    for _ in tl.static_range(P):
        acc += (tl.zeros([RP, V], tl.float32),)
    m = tl.full([RP], float("-inf"), tl.float32)
    l = tl.zeros([RP], tl.float32)
    for t in range(start * group, stop * group, size):
        unit = base + t // group
        n = t + tl.arange(0, size)
        at = base * group + n
        s = tl.zeros([RP, size], tl.float32)
        if n16 > 0:
            exact: tl.constexpr = q.dtype.element_ty if q.dtype.element_ty == p[11].dtype.element_ty else tl.float32
            c = tl.arange(0, F[11])
            order = tl.load(p[15] + unit * D + c, mask=c < n16, other=0).to(tl.int32)
            x = tl.load(q[:, None] + order[None, :], mask=rows[:, None] & (c < n16)[None, :], other=0.0)
            x = (x.to(tl.float32) * inverse[:, None]).to(exact)
            k = tl.load(p[11] + at[:, None] * n16 + c[None, :], mask=(c < n16)[None, :], other=0.0)
            s = product(x, tl.trans(k.to(exact)), s)
        if n4 > 0:
            codes = p[12], p[13], p[14], p[15]
            s += _tier(q, rows, inverse, codes, unit, t % group, D, group, size, per, n16, n4, F[12], 4, dt)
        if n2 > 0:
            codes = p[0], p[4], p[5], p[15]
            s += _tier(q, rows, inverse, codes, unit, t % group, D, group, size, per, n16 + n4, n2, F[13], 2, dt)
        there = n < stop * group
        w, shrink, m = _lifted(_bent(s * (scale * size_of)[:, None], p, to, at, there, softcap, CAPPED), m)
        l = l * shrink + tl.sum(w, 1)
        v = tl.load(p[1] + at[:, None] * (DV // P) + dv[None, :], mask=(dv < DV // P)[None, :], other=0)
        v_scale, v_zero = _grid(p[6], p[7], at, there, DV, F[3], V, G, dt)
        new = ()
        for i in tl.static_range(P):
            y = tl.fma(code(v, i, 2, F[1], 0, dt), v_scale, v_zero)
            new += (product(w.to(dt), y, acc[i] * shrink[:, None]),)
        acc = new
    return m, l, woven(acc, P)


@triton.jit
def _mixed(x, matrix, C: tl.constexpr):
    """Every C columns of x [rows,columns] times a matrix [C,C]; not by tl.dot, which spills such small ones."""
    c = tl.arange(0, C)
    x = tl.reshape(x, (x.shape[0], x.shape[1] // C, C))
    y = tl.zeros(x.shape, tl.float32)
    for i in range(C):
        column = tl.sum(tl.where(c[None, None, :] == i, x, 0.0), 2)
        y += column[:, :, None] * tl.load(matrix + i * C + c)[None, None, :]
    return tl.reshape(y, (x.shape[0], x.shape[1] * C))


@triton.jit
def _place(p, bh, n, row, head, H: tl.constexpr, BH: tl.constexpr):
    """Where the slots of a (row, kv head) begin, and how many it has."""
    if p[8] is not None:  # heads lie one behind the other
        i = tl.arange(0, BH)
        base = tl.sum(tl.load(p[8] + i, mask=i < bh, other=0), 0)
        count = tl.load(p[8] + bh)
    else:
        base = (bh // H).to(tl.int64) * row + (bh % H).to(tl.int64) * head
        count = n.to(tl.int64)
    return base, count


@triton.jit
def _ask(
    q, turned, o, lse, part, splits, p, F: tl.constexpr, n, row, head, per, first, scale, softcap, CAPPED: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """What slots (part - first) * per ... of a piece say. first: the piece's first split."""
    bh = tl.program_id(0)
    base, count = _place(p, bh, n, row, head, H, BH)
    start = (part - first) * per
    stop = tl.minimum(start + per, count).to(tl.int32)
    r = tl.arange(0, RP)
    D: tl.constexpr = F[6]
    DP: tl.constexpr = F[7]
    if p[9] is not None:
        source = p[9]
    elif F[4] > 1:
        source = turned
    else:
        source = q
    scale *= 1.0 / F[4] ** 0.5  # the rotated queries are not normalised
    rows = source + (bh.to(tl.int64) * R + r) * D
    room = n * F[2]  # logits of a row
    to = (p[16] + bh.to(tl.int64) * R * room, r * room, base * F[2], r < R) if p[16] is not None else None
    if F[0] == 0:
        d = tl.arange(0, DP)
        x = tl.load(rows[:, None] + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        m, l, acc = _tokens(x, p, to, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, F[5])
    elif F[0] == 2:
        m, l, acc = _units(rows, r < R, p, to, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, F[5])
    elif F[0] == 5:
        m, l, acc = _tiers(rows, r < R, p, to, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, F[5])
    elif F[0] == 4:
        m, l, acc = _groups(rows, r < R, p, to, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, F[5])
    else:
        m, l, acc = _codes(rows, r < R, p, to, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, F[5])
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc /= l[:, None]
    if p[10] is not None:
        acc = _mixed(acc, p[10] + (bh // H) * F[3] * F[3], F[3])
    place = (bh.to(tl.int64) * splits + part) * R + r
    tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log(l)), mask=r < R)
    dv = tl.arange(0, acc.shape[1])
    here = (r < R)[:, None] & (dv < DV)[None, :]
    tl.store(o + place[:, None] * DV + dv[None, :], acc, mask=here)


@triton.jit(do_not_specialize=["splits", "skip", *LENGTHS])
def _split(
    q, turned, o, lse, splits, skip, scale, softcap,
    p0, n0, row0, head0, per0, end0, p1, n1, row1, head1, per1, end1,
    p2, n2, row2, head2, per2, end2, p3, n3, row3, head3, per3, end3,
    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr, CAPPED: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, split). skip: splits of earlier launches. end: the split behind a piece's last."""
    part = tl.program_id(1) + skip
    if part < end0:
        _ask(q, turned, o, lse, part, splits, p0, F0, n0, row0, head0, per0, skip, scale, softcap, CAPPED,
             H, R, DV, DVP, RP, BH)  # fmt: skip
    if F1 is not None:
        if (part >= end0) & (part < end1):
            _ask(q, turned, o, lse, part, splits, p1, F1, n1, row1, head1, per1, end0, scale, softcap, CAPPED,
                 H, R, DV, DVP, RP, BH)  # fmt: skip
    if F2 is not None:
        if (part >= end1) & (part < end2):
            _ask(q, turned, o, lse, part, splits, p2, F2, n2, row2, head2, per2, end1, scale, softcap, CAPPED,
                 H, R, DV, DVP, RP, BH)  # fmt: skip
    if F3 is not None:
        if part >= end2:
            _ask(q, turned, o, lse, part, splits, p3, F3, n3, row3, head3, per3, end2, scale, softcap, CAPPED,
                 H, R, DV, DVP, RP, BH)  # fmt: skip
