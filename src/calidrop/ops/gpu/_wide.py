"""`_split` for keys of more channels than a product is best made of at once (latents of multi-head latent attention):
they are cut into the largest power of two there is, and the rest. Queries are asked some rows at a time, as all query
heads share the one kv head of latents. Where values are the keys, they are loaded once.
"""

# pyright: basic, reportAssignmentType=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from calidrop.ops.gpu._shared import code, exp2, log2, product, woven
from calidrop.ops.gpu._split import LOG2E, _bent, _lifted, _place, _scales, _weigh, _zero, unit_of


@triton.jit
def _tile(
    p, at, seen, F: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
    dt: tl.constexpr,
):  # fmt: skip
    """Channels from FIRST on of some tokens, [tokens,WIDE]: as they are, or codes less HALF. seen: [tokens], which are
    there."""
    if F[0] == 0:
        d = FIRST + tl.arange(0, WIDE)
        y = tl.load(p + at[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0).to(dt)
    else:
        P: tl.constexpr = 16 // F[1]  # codes a word holds
        d = FIRST // P + tl.arange(0, WIDE // P)
        x = tl.load(p + at[:, None] * (D // P) + d[None, :], mask=seen[:, None] & (d < D // P)[None, :], other=0)
        found = ()
        for i in tl.static_range(P):
            found += (code(x, i, F[0], F[1], HALF, dt),)
        y = woven(found, P)
        if WIDE > D - FIRST:  # what fills up is no code
            y = tl.where((FIRST + tl.arange(0, WIDE) < D)[None, :], y, 0.0).to(dt)
    return y


@triton.jit
def _answer(
    rows, there, p, to, F: tl.constexpr, base, start, stop, scale, softcap, CAPPED: tl.constexpr, SAME: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-> m, l, and sums of A channels and of the B others. Codes have a scale (and a zero) per token, which are
    treated as in `_split._codes`."""
    coded: tl.constexpr = F[0] > 0
    HALF: tl.constexpr = 2 ** (F[1] - 1) if F[0] == 1 else 0
    own: tl.constexpr = rows.dtype.element_ty
    as_is: tl.constexpr = own if p[0].dtype.element_ty == own else tl.float32
    dt: tl.constexpr = as_is if F[0] == 0 else (tl.float32 if own == tl.float32 else tl.float16)
    a, b = tl.arange(0, A), A + tl.arange(0, BP)
    D: tl.constexpr = A + B
    x = tl.load(rows[:, None] + a[None, :], mask=there[:, None], other=0.0)
    y = tl.load(rows[:, None] + b[None, :], mask=there[:, None] & (b < D)[None, :], other=0.0)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, acc, more = tl.zeros([RP], tl.float32), tl.zeros([RP, A], tl.float32), tl.zeros([RP, BP], tl.float32)
    sums, zeros = tl.zeros([RP, BLOCK], tl.float32), tl.zeros([RP, BLOCK], tl.float32)  # of codes' weights
    if coded:
        size = unit_of(tl.maximum(tl.max(tl.abs(x.to(tl.float32)), 1), tl.max(tl.abs(y.to(tl.float32)), 1)))
        x, y = (x.to(tl.float32) / size[:, None]).to(dt), (y.to(tl.float32) / size[:, None]).to(dt)
        total = tl.sum(x.to(tl.float32), 1) + tl.sum(y.to(tl.float32), 1)
        by = (scale * size)[:, None]
        ahead = _scales(p, base, start + tl.arange(0, BLOCK), stop)
    else:
        x, y, by = x.to(dt), y.to(dt), scale
    for t in range(start, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        inside, at = n < stop, base + n
        k = _tile(p[0], at, inside, F, D, 0, A, HALF, dt)
        s = product(x, tl.trans(k))
        if B:
            k_rest = _tile(p[0], at, inside, F, D, A, BP, HALF, dt)
            s = product(y, tl.trans(k_rest), s)
        if coded:
            scales = ahead
            ahead = _scales(p, base, n + BLOCK, stop)
            v_scale = scales[1].to(tl.float32)
            depth = log2(v_scale)
            inverse = exp2(-depth)
            s *= scales[0].to(tl.float32)[None, :]
            if F[0] == 1:
                s += total[:, None] * _zero(scales, 0, 1.0, HALF)[None, :]
            s = _bent(s * by, p, to, at, inside, softcap, CAPPED) + (depth / LOG2E)[None, :]
            w, shrink, m = _lifted(s, m)
            sums = sums * shrink[:, None] + w * inverse[None, :]
            if F[0] == 1:
                zeros = zeros * shrink[:, None] + w * _zero(scales, 1, inverse, HALF)[None, :]
        else:
            w, shrink, m, l = _weigh(_bent(s * by, p, to, at, inside, softcap, CAPPED), m, l)
        v = k if SAME else _tile(p[1], at, inside, F, D, 0, A, HALF, dt)
        acc = acc * shrink[:, None] + product(w.to(dt), v)
        if B:
            v_rest = k_rest if SAME else _tile(p[1], at, inside, F, D, A, BP, HALF, dt)
            more = more * shrink[:, None] + product(w.to(dt), v_rest)
    if coded:
        l, offset = tl.sum(sums, 1), tl.sum(zeros, 1)[:, None]
        acc, more = acc + offset, more + offset
    return m, l, acc, more


@triton.jit(do_not_specialize=["splits", "first", "n", "row", "head", "per"])
def _wide(
    q, o, lse, splits, first, scale, softcap, p, n, row, head, per,
    F: tl.constexpr, CAPPED: tl.constexpr, SAME: tl.constexpr, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, BP: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, split of one piece, RP rows of queries). q: as keys lie. first: the first of the piece's
    splits."""
    bh, part = tl.program_id(0), tl.program_id(1)
    base, count = _place(p, bh, n, row, head, H, BH)
    start = part * per
    stop = tl.minimum(start + per, count).to(tl.int32)
    r = tl.program_id(2) * RP + tl.arange(0, RP)
    scale *= 1.0 / F[4] ** 0.5
    rows, there = q + (bh.to(tl.int64) * R + r) * D, r < R
    # as in `_split._ask`: Triton 3.6 knows no function that returns None
    to = (p[16] + bh.to(tl.int64) * R * n, r * n, base, there) if p[16] is not None else None
    m, l, acc, more = _answer(rows, there, p, to, F, base, start, stop, scale, softcap, CAPPED, SAME,
                              A, D - A, BP, RP, F[5])  # fmt: skip
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    place = (bh.to(tl.int64) * splits + first + part) * R + r
    tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log(l)), mask=there)
    a, b = tl.arange(0, A), A + tl.arange(0, BP)
    tl.store(o + place[:, None] * D + a[None, :], acc / l[:, None], mask=there[:, None])
    if A < D:
        tl.store(o + place[:, None] * D + b[None, :], more / l[:, None], mask=there[:, None] & (b < D)[None, :])
