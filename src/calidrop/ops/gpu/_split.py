"""The first launch of decode attention: what every split of every piece says, `_join` joins. See `attention`.

A program answers for one kv head from one stretch (split) of one piece; all queries of the head are the rows of a
matrix product. Products are in the queries' dtype with fp32 sums: fp32 is exact, bf16 and fp16 round the weights once.
Per token, scales and zeros are folded into scores and weights; per channel, codes are decoded in registers, as folding
would cost as much on the 16 rows that a product has at least.
"""

# pyright: basic, reportAssignmentType=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from calidrop.ops.gpu._shared import product, unpacked

SLOTS = 4  # pieces a launch has room for
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
def _bent(s, p, at, there, softcap, CAPPED: tl.constexpr):
    """Logits with everything that changes them after the product. at: the token's place in memory."""
    if CAPPED:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    if p[3] is not None:
        s += tl.load(p[3] + at, mask=there, other=0.0)[None, :]
    if p[2] is not None:
        there = there & (tl.load(p[2] + at, mask=there, other=-1) >= 0)
    return tl.where(there[None, :], s, float("-inf"))


@triton.jit
def _tokens(
    x, p, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a slot: exact, or with a scale (and a zero) per token."""
    coded: tl.constexpr = F[0] == 1
    scaled: tl.constexpr = F[0] != 0
    shrunk: tl.constexpr = 8 // F[1] if coded else 1  # channels an element of memory holds
    HALF: tl.constexpr = 2.0 ** (F[1] - 1) if coded else 0.0  # what codes are less
    dt: tl.constexpr = x.dtype if scaled or p[0].dtype.element_ty == x.dtype else tl.float32
    d, dv = tl.arange(0, DP // shrunk), tl.arange(0, DVP // shrunk)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, zeros, acc = tl.zeros([RP], tl.float32), tl.zeros([RP], tl.float32), tl.zeros([RP, DVP], tl.float32)
    x = x.to(dt)
    total = tl.sum(x.to(tl.float32), 1)
    for t in range(start, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        there, at = n < stop, base + n
        seen_k = there[:, None] & (d < D // shrunk)[None, :]
        seen_v = there[:, None] & (dv < DV // shrunk)[None, :]
        k = unpacked(tl.load(p[0] + at[:, None] * (D // shrunk) + d[None, :], mask=seen_k, other=0), F[0], F[1])
        v = unpacked(tl.load(p[1] + at[:, None] * (DV // shrunk) + dv[None, :], mask=seen_v, other=0), F[0], F[1])
        s = product(x, tl.trans(k.to(dt)))
        if scaled:
            k_scale = tl.load(p[4] + at, mask=there, other=0.0).to(tl.float32)
            v_scale = tl.load(p[6] + at, mask=there, other=0.0).to(tl.float32)
            s *= k_scale[None, :]
        if coded:
            zero = tl.load(p[5] + at, mask=there, other=0.0).to(tl.float32) + k_scale * HALF
            s += total[:, None] * zero[None, :]
        w, shrink, m, l = _weigh(_bent(s * scale, p, at, there, softcap, CAPPED), m, l)
        if coded:
            zero = tl.load(p[7] + at, mask=there, other=0.0).to(tl.float32) + v_scale * HALF
            zeros = zeros * shrink + tl.sum(w * zero[None, :], 1)
        if scaled:
            w *= v_scale[None, :]
        acc = acc * shrink[:, None] + product(w.to(dt), v.to(dt))
    return m, l, acc + zeros[:, None]


@triton.jit
def _units(
    x, p, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A unit of tokens a slot: keys [D,group] with a scale and zero per channel, values [group,Dv] per token over
    groups of channels."""
    per: tl.constexpr = 8 // F[1]
    group: tl.constexpr = F[2]
    many: tl.constexpr = BLOCK // group if group < BLOCK else 1  # units at a time
    size: tl.constexpr = many * group
    HALF: tl.constexpr = 2.0 ** (F[1] - 1)  # what codes are less
    sets: tl.constexpr = DVP // F[3]  # groups of channels, with those of the padding
    d, dv, byte, g = tl.arange(0, DP), tl.arange(0, DVP // per), tl.arange(0, group // per), tl.arange(0, sets)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, acc = tl.zeros([RP], tl.float32), tl.zeros([RP, DVP], tl.float32)
    for t in range(start, stop, many):
        u = t + tl.arange(0, many)
        seen = (u < stop)[None, :] & (d < D)[:, None]  # [DP,many]
        channel = (base + u)[None, :] * D + d[:, None]
        k = tl.load(p[0] + channel[:, :, None] * (group // per) + byte[None, None, :], mask=seen[:, :, None], other=0)
        k_scale = tl.load(p[4] + channel, mask=seen, other=0.0).to(tl.float32)
        k_zero = tl.load(p[5] + channel, mask=seen, other=0.0).to(tl.float32) + k_scale * HALF
        k = unpacked(k, F[0], F[1]).to(tl.float32) * k_scale[:, :, None] + k_zero[:, :, None]
        n = t * group + tl.arange(0, size)
        there, at = n < stop * group, base * group + n
        seen_v = there[:, None] & (dv < DV // per)[None, :]
        v = tl.load(p[1] + at[:, None] * (DV // per) + dv[None, :], mask=seen_v, other=0)
        place = at[:, None] * (DV // F[3]) + g[None, :]
        seen_g = there[:, None] & (g < DV // F[3])[None, :]
        v_scale = tl.load(p[6] + place, mask=seen_g, other=0.0).to(tl.float32)
        v_zero = tl.load(p[7] + place, mask=seen_g, other=0.0).to(tl.float32) + v_scale * HALF
        v = tl.reshape(unpacked(v, F[0], F[1]).to(tl.float32), (size, sets, F[3]))
        v = tl.reshape(v * v_scale[:, :, None] + v_zero[:, :, None], (size, DVP))
        s = product(x, tl.reshape(k, (DP, size)).to(x.dtype))
        w, shrink, m, l = _weigh(_bent(s * scale, p, at, there, softcap, CAPPED), m, l)
        acc = acc * shrink[:, None] + product(w.to(x.dtype), v.to(x.dtype))
    return m, l, acc


@triton.jit
def _ask(
    q, turned, o, lse, part, splits, p, F: tl.constexpr, n, row, head, per, first, scale, softcap, CAPPED: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    RP: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What slots (part - first) * per ... of a piece say. first: the piece's first split."""
    bh = tl.program_id(0)
    if p[8] is not None:  # heads lie one behind the other
        i = tl.arange(0, BH)
        base = tl.sum(tl.load(p[8] + i, mask=i < bh, other=0), 0)
        count = tl.load(p[8] + bh)
    else:
        base = (bh // H).to(tl.int64) * row + (bh % H).to(tl.int64) * head
        count = n.to(tl.int64)
    start = (part - first) * per
    stop = tl.minimum(start + per, count).to(tl.int32)
    r, d, dv = tl.arange(0, RP), tl.arange(0, DP), tl.arange(0, DVP)
    source = turned if F[4] > 1 else q
    scale *= 1.0 / F[4] ** 0.5  # the rotated queries are not normalised
    x = tl.load(
        source + (bh.to(tl.int64) * R + r)[:, None] * D + d[None, :],
        mask=(r < R)[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    if F[0] == 2:
        m, l, acc = _units(x, p, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, BLOCK)
    else:
        m, l, acc = _tokens(x, p, F, base, start, stop, scale, softcap, CAPPED, D, DV, DP, DVP, RP, BLOCK)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    place = (bh.to(tl.int64) * splits + part) * R + r
    tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log(l)), mask=r < R)
    here = (r < R)[:, None] & (dv < DV)[None, :]
    tl.store(o + place[:, None] * DV + dv[None, :], acc / l[:, None], mask=here)


@triton.jit(do_not_specialize=["splits", "skip", *LENGTHS])
def _split(
    q, turned, o, lse, splits, skip, scale, softcap,
    p0, n0, row0, head0, per0, end0, p1, n1, row1, head1, per1, end1,
    p2, n2, row2, head2, per2, end2, p3, n3, row3, head3, per3, end3,
    F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, F3: tl.constexpr, CAPPED: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    RP: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, split). skip: splits of earlier launches. end: the split behind a piece's last."""
    part = tl.program_id(1) + skip
    if part < end0:
        _ask(q, turned, o, lse, part, splits, p0, F0, n0, row0, head0, per0, skip, scale, softcap, CAPPED,
             H, R, D, DV, DP, DVP, RP, BH, BLOCK)  # fmt: skip
    if F1 is not None:
        if (part >= end0) & (part < end1):
            _ask(q, turned, o, lse, part, splits, p1, F1, n1, row1, head1, per1, end0, scale, softcap, CAPPED,
                 H, R, D, DV, DP, DVP, RP, BH, BLOCK)  # fmt: skip
    if F2 is not None:
        if (part >= end1) & (part < end2):
            _ask(q, turned, o, lse, part, splits, p2, F2, n2, row2, head2, per2, end1, scale, softcap, CAPPED,
                 H, R, D, DV, DP, DVP, RP, BH, BLOCK)  # fmt: skip
    if F3 is not None:
        if part >= end2:
            _ask(q, turned, o, lse, part, splits, p3, F3, n3, row3, head3, per3, end2, scale, softcap, CAPPED,
                 H, R, D, DV, DP, DVP, RP, BH, BLOCK)  # fmt: skip
