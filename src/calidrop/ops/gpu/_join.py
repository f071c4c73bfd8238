"""The second launch of decode attention: what all splits and other answers say together, by their log-sum-exp."""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(o, lse, bh, r, d, first, last, splits, top, R: tl.constexpr, DV: tl.constexpr):
    """Weighted outputs of some splits, of channels d, and their weights."""
    acc, l = tl.zeros([d.shape[0]], tl.float32), 0.0
    for start in range(first, last, 32):
        s = start + tl.arange(0, 32)
        place = (bh.to(tl.int64) * splits + s) * R + r
        w = tl.exp(tl.load(lse + place, mask=s < last, other=float("-inf")) - top)
        x = tl.load(o + place[:, None] * DV + d[None, :], mask=(s < last)[:, None] & (d < DV)[None, :], other=0.0)
        acc += tl.sum(w[:, None] * x, 0)
        l += tl.sum(w, 0)
    return acc, l


@triton.jit(do_not_specialize=["splits", "turned"])
def _join(
    o, lse, answers, out, out_lse, splits, turned,
    ANSWERS: tl.constexpr, TURNS: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """grid (row, kv head and query; SOME channels, which are whole blocks of TURNS). turned: the first so many splits
    answer in the basis behind a Hadamard rotation of blocks of TURNS channels. answers: (o, lse) of what was answered
    otherwise."""
    row = tl.program_id(0)
    bh, r = row // R, row % R
    d = tl.program_id(1) * SOME + tl.arange(0, SOME)
    top = float("-inf")
    for start in range(0, splits, 64):
        s = start + tl.arange(0, 64)
        place = (bh.to(tl.int64) * splits + s) * R + r
        top = tl.maximum(top, tl.max(tl.load(lse + place, mask=s < splits, other=float("-inf")), 0))
    for i in tl.static_range(ANSWERS):
        top = tl.maximum(top, tl.load(answers[i][1] + row))
    top = tl.where(top == float("-inf"), 0.0, top)
    acc, l = _sum(o, lse, bh, r, d, 0, turned, splits, top, R, DV)
    if TURNS:
        x = d[:, None] & d[None, :] & (TURNS - 1)
        x = x ^ (x >> 4)
        x = x ^ (x >> 2)
        odd = (x ^ (x >> 1)) & 1
        sign = tl.where((d[:, None] // TURNS) == (d[None, :] // TURNS), 1.0 - 2.0 * odd.to(tl.float32), 0.0)
        acc = tl.sum(acc[:, None] * sign, 0) / tl.sqrt(TURNS * 1.0)
    more, weight = _sum(o, lse, bh, r, d, turned, splits, splits, top, R, DV)
    acc, l = acc + more, l + weight
    for i in tl.static_range(ANSWERS):
        w = tl.exp(tl.load(answers[i][1] + row) - top)
        place = answers[i][0] + row.to(tl.int64) * DV + d
        acc += w * tl.load(place, mask=d < DV, other=0.0).to(tl.float32)
        l += w
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    if tl.program_id(1) == 0:
        tl.store(out_lse + row, tl.where(empty, float("-inf"), top + tl.log(l)))
    tl.store(out + row.to(tl.int64) * DV + d, acc / l, mask=d < DV)
