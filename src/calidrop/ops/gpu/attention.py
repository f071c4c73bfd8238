"""Decode attention in Triton: a few queries per kv head over any number of pieces of cache in one launch, and a second
one that joins what the splits say. The oracle is `attention.attend` on the decoded tokens, joined by `attention.merge`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calidrop.attention import Partial, Queries, merge
from calidrop.hadamard import hadamard, signs
from calidrop.ops.gpu import MOST_CHANNELS
from calidrop.ops.gpu._join import _join
from calidrop.ops.gpu._shared import launch, padded
from calidrop.ops.gpu._split import SLOTS, _split
from calidrop.ops.gpu._wide import _wide
from calidrop.ops.piece import Heard, Piece

KINDS = {"exact": 0, "per token": 1, "per channel": 2, "e4m3": 3, "per group": 4, "tiers": 5}
COLUMNS = ("k", "v", "pos", "bias", "k_scale", "k_zero", "v_scale", "v_zero")  # then lens, own queries, `mix`,
TIERS = ("k16", "k4", "k4_scale", "k4_zero", "order")  # and where logits go
LEAST = 256  # tokens worth a program
Tile = tuple[int, int, int]  # tokens at a time, warps, pipeline stages
# by kind and bits, for up to 16 rows of 128 channels of half precision
TILES = {
    ("per token", 8): (64, 4, 3),
    ("per token", 4): (128, 4, 3),
    ("e4m3", 8): (128, 4, 3),
    ("per channel", 8): (64, 2, 3),
    ("per channel", 4): (64, 2, 3),
    ("per group", 3): (32, 4, 3),
    ("per group", 4): (64, 4, 3),
    ("tiers", 8): (64, 4, 2),
    ("tiers", 4): (64, 4, 2),
}
# warps divide the columns of a product: where it has 16, the words of a value, all but one would be idle
NARROW = {
    "per token": (32, 1, 3),
    "per channel": (64, 1, 3),
    "e4m3": (64, 1, 3),
    "per group": (64, 1, 3),
    "tiers": (64, 4, 2),
}


@functools.cache
def _warps(device: torch.device) -> int:
    """How many it takes to keep the device busy."""
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


def decode(
    qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None, least: int = LEAST,
    tile: Tile | None = None,
) -> Partial:  # fmt: skip
    """Attention over the union of disjoint sets, all of them visible: two launches (and one more per four further
    pieces), no synchronisation. -> o fp32 [B,Hq,T,Dv], lse [B,Hq,T]. heard: gets the logits of all pieces, if there is
    one query. least: tokens worth a program. tile: of the first launch, where it is not to be `tile_of` the pieces
    (wide ones have `wide_tile_of` theirs)."""
    B, Hq, T, D = qs.q.shape
    pieces = sorted((p for p in parts if isinstance(p, Piece)), key=lambda p: not p.rotate)  # rotated first
    answers = tuple((p[0].contiguous(), p[1].float().contiguous()) for p in parts if not isinstance(p, Piece))
    if pieces[0].value_dim > MOST_CHANNELS:  # which wide keys have; thin ones may be of a model's wide ones
        return _decode_wide(qs, pieces, answers, heard, least)
    H, Dv, q = pieces[0].heads, pieces[0].value_dim, qs.q.contiguous()
    R, rotated = Hq // H * T, sum(p.rotate for p in pieces)
    turned = _turned(q) if any(p.rotate and p.q is None for p in pieces) else q
    block, warps, stages = tile or tile_of(pieces, D, R, q.dtype)
    blocks = [block if p.kind != "exact" or _all_exact(pieces) else max(16, min(block, 8 * warps)) for p in pieces]
    per, ends = _stretches(pieces, B * H, blocks, least, _warps(q.device) // warps)
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    o, lse = new(B * H, ends[-1], R, Dv), new(B * H, ends[-1], R)
    for i in range(0, len(pieces), SLOTS):
        left = [None if heard is None or T > 1 else heard.room(p, B, R) for p in pieces[i : i + SLOTS]]
        told, formats = _told(pieces[i : i + SLOTS], left, per[i:], ends[i + 1 :], blocks[i:], D)
        launch(
            _split, (B * H, ends[min(i + SLOTS, len(pieces))] - ends[i]), q, turned, o, lse, ends[-1], ends[i],
            qs.scale, qs.softcap or 0.0, *told, **formats, CAPPED=qs.softcap is not None,
            H=H, R=R, DV=Dv, DVP=padded(Dv), RP=padded(R), BH=padded(B * H),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return joined(qs, o, lse, answers, ends[rotated])


def joined(qs: Queries, o: Tensor, lse: Tensor, answers: tuple[Partial, ...] = (), turned: int = 0) -> Partial:
    """What splits say, o [B*H,splits,R,Dv] and lse [B*H,splits,R], and other answers. turned: so many splits answer
    behind a rotation."""
    (B, Hq, T, _), (_, splits, R, Dv) = qs.q.shape, o.shape
    out, out_lse = o.new_empty(B, Hq, T, Dv), o.new_empty(B, Hq, T)
    some = padded(Dv) if Dv <= MOST_CHANNELS else 128
    launch(
        _join, (B * Hq * T, -(-Dv // some)), o, lse, answers or None, out, out_lse, splits, turned,
        ANSWERS=len(answers), TURNS=(Dv & -Dv) * bool(turned), R=R, DV=Dv, SOME=some,
        num_warps=4 if some <= 128 else 8,
    )  # fmt: skip
    return out, out_lse


def _decode_wide(
    qs: Queries, pieces: list[Piece], answers: tuple[Partial, ...], heard: Heard | None, least: int
) -> Partial:
    """`decode` of pieces of more channels, a launch each (see `_wide`). What is said behind a rotation is joined and
    rotated back first: rotations may be as wide as keys."""
    turned, straight = [p for p in pieces if p.rotate], [p for p in pieces if not p.rotate]
    if turned:
        o, lse = joined(qs, *_split_wide(replace(qs, q=_turned(qs.q)), turned, heard, least))
        answers = (*answers, (hadamard(o), lse))
    if straight:
        return joined(qs, *_split_wide(qs, straight, heard, least), answers)
    return merge(list(answers))


def _split_wide(qs: Queries, pieces: list[Piece], heard: Heard | None, least: int) -> tuple[Tensor, Tensor]:
    """What every split of some pieces says: o [B*H,splits,R,D], lse [B*H,splits,R]. qs: as keys lie."""
    (B, Hq, T, D), H, q = qs.q.shape, pieces[0].heads, qs.q.contiguous()
    R, A = Hq // H * T, 1 << (D.bit_length() - 1)  # A: channels of the first part
    tiles = [wide_tile_of(p, R, q.dtype) for p in pieces]
    blocks, groups = [block for block, *_ in tiles], max(-(-R // rows) for _, rows, *_ in tiles)
    programs = _warps(q.device) // max(warps for _, _, warps, _ in tiles)
    per, ends = _stretches(pieces, B * H * groups, blocks, least // 4, programs)  # few tokens are many bytes already
    o = torch.empty(B * H, ends[-1], R, D, dtype=torch.float32, device=q.device)
    lse = o.new_empty(o.shape[:3])
    for p, some, first, last, (block, rows, warps, stages) in zip(pieces, per, ends, ends[1:], tiles, strict=False):
        left = None if heard is None or T > 1 else heard.room(p, B, R)
        told, formats = _told([p], [left], [some], [last], [block], D)
        launch(
            _wide, (B * H, last - first, -(-R // rows)), q, o, lse, ends[-1], first, qs.scale, qs.softcap or 0.0,
            *told[:5], F=formats["F0"], CAPPED=qs.softcap is not None, H=H, R=R, D=D, A=A,
            SAME=p.columns["v"].data_ptr() == p.columns["k"].data_ptr(), BP=padded(D - A), RP=rows, BH=padded(B * H),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return o, lse


def _turned(q: Tensor) -> Tensor:
    """Rotated as codes are, not normalised."""
    return q @ signs(q.shape[-1], q.device, q.dtype)


def _own(p: Piece) -> Tensor | None:
    """The piece's own queries as its keys lie."""
    return None if p.q is None else (_turned(p.q) if p.rotate else p.q).contiguous()


def _all_exact(pieces: list[Piece]) -> bool:
    return all(p.kind == "exact" for p in pieces)


def tile_of(pieces: list[Piece], D: int, rows: int, dtype: torch.dtype) -> Tile:
    """What the largest piece in codes is read fastest with (exact tokens beside it take less at a time, as the launch
    has the shared memory of its largest), within what a GPU has (100 kB on the smaller ones)."""
    wide = padded(max(D, pieces[0].value_dim)) * (2 if dtype == torch.float32 else 1)
    coded = [p for p in pieces if p.kind != "exact"]
    if coded and (dtype == torch.float32 or rows > 16):
        return 32, 4, 2
    if coded and wide <= 128:
        p = max(coded, key=lambda p: p.slots * p.group)
        return NARROW[p.kind] if padded(p.value_dim) * p.bits <= 256 else TILES[p.kind, p.bits]
    stages = 3 if wide <= 128 and rows <= 32 else 2
    return (128 if wide <= 64 else 64 if wide <= 128 else 32), 4, stages


def wide_tile_of(p: Piece, rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Of a wide piece: tokens at a time, rows of queries a program asks for (more would spill), warps, pipeline
    stages."""
    most = 16 if dtype == torch.float32 or 0 < p.bits < 8 else 32
    return (16 if dtype == torch.float32 else 32), min(most, padded(rows)), 8, 2


def _stretches(
    pieces: list[Piece], heads: int, blocks: list[int], least: int, programs: int
) -> tuple[list[int], list[int]]:
    """How many slots a program takes of each piece, and the splits before each piece, from lengths the host knows.
    Programs take about the same number of tokens; a shorter head leaves some idle."""
    share = max(least, *blocks, -(-sum(p.slots * p.group for p in pieces) * heads // programs))
    per, ends = [], [0]
    for p, block in zip(pieces, blocks, strict=True):
        slots = -(-p.slots // -(-p.slots * p.group // share))
        step = max(1, block // p.group)
        per.append(-(-slots // step) * step)  # whole blocks
        ends.append(ends[-1] - (-p.slots // per[-1]))
    return per, ends


def _told(
    pieces: list[Piece], left: list[Tensor | None], per: list[int], ends: list[int], blocks: list[int], D: int
) -> tuple[list[Any], dict[str, Any]]:
    """What `_split` is told of the pieces of one launch, and their formats."""
    args: list[Any] = []
    formats: dict[str, Any] = {f"F{i}": None for i in range(SLOTS)}
    for i, p in enumerate(pieces):
        pitch = p.pitch()
        assert pitch is not None
        columns: tuple[Tensor | None, ...] = (*(_words(p, name) for name in COLUMNS), p.lens, _own(p), p.mix)
        columns += (*(_words(p, name) for name in TIERS), left[i])
        width = D if p.q is None else p.q.shape[-1]
        turn = (width & -width) if p.rotate else 1
        args += [columns, p.slots, *pitch, per[i], ends[i]]
        n16, n4, _ = p.tiers
        tiers = *p.tiers, padded(n16), padded(n4), min(64, padded(width - n16 - n4))  # more at a time would spill
        formats[f"F{i}"] = (KINDS[p.kind], p.bits, p.group, p.channels, turn, blocks[i], width, padded(width), *tiers)
    return args + [None, 0, 0, 0, 0, 0] * (SLOTS - len(pieces)), formats


def _words(p: Piece, name: str) -> Tensor | None:
    """A column, bytes of codes as words of two (but of 3 bits)."""
    column = p.columns.get(name)
    if column is None or column.dtype != torch.uint8 or name == "order" or p.bits == 3:
        return column
    return column.view(torch.int16)
