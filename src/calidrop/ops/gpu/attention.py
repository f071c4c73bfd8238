"""Decode attention in Triton: a few queries per kv head over any number of pieces of cache in one launch, and a second
one that joins what the splits say. The oracle is `attention.attend` on the decoded tokens, joined by `attention.merge`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.hadamard import hadamard
from calidrop.ops.gpu._join import _join
from calidrop.ops.gpu._shared import launch, padded
from calidrop.ops.gpu._split import SLOTS, _split
from calidrop.ops.piece import Piece

KINDS = {"exact": 0, "per token": 1, "per channel": 2, "e4m3": 3}
COLUMNS = ("k", "v", "pos", "bias", "k_scale", "k_zero", "v_scale", "v_zero")  # then lens
LEAST = 256  # tokens worth a program


@functools.cache
def _programs(device: torch.device) -> int:
    """How many it takes to keep the device busy."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def decode(qs: Queries, parts: Sequence[Partial | Piece], least: int = LEAST) -> Partial:
    """Attention over the union of disjoint sets, all of them visible: two launches (and one more per four further
    pieces), no synchronisation. -> o fp32 [B,Hq,T,Dv], lse [B,Hq,T]. least: tokens worth a program."""
    B, Hq, T, D = qs.q.shape
    pieces = sorted((p for p in parts if isinstance(p, Piece)), key=lambda p: not p.rotate)  # rotated first
    answers = tuple((p[0].contiguous(), p[1].float().contiguous()) for p in parts if not isinstance(p, Piece))
    H, Dv = pieces[0].heads, pieces[0].value_dim
    R, q = Hq // H * T, qs.q.contiguous()
    turned = hadamard(q.float()).to(q.dtype) if pieces[0].rotate else q
    block, warps, stages = blocks(D, Dv, q.dtype)
    share = max(least, -(-sum(p.slots * p.group for p in pieces) * B * H // _programs(q.device)))
    told, ends = [], [0]
    for p in pieces:
        splits = -(-p.slots * p.group // share)
        per = -(-p.slots // splits)
        step = max(1, block // p.group)
        per = -(-per // step) * step  # whole blocks
        ends.append(ends[-1] - (-p.slots // per))
        told.append((p, per))
    total = ends[-1]
    o = torch.empty(B * H, total, R, Dv, device=q.device, dtype=torch.float32)
    lse = torch.empty(B * H, total, R, device=q.device, dtype=torch.float32)
    shape = {"H": H, "R": R, "D": D, "DV": Dv, "DP": padded(D), "DVP": padded(Dv), "RP": padded(R)}
    shape |= {"BH": triton.next_power_of_2(B * H), "BLOCK": block, "CAPPED": qs.softcap is not None}
    for i in range(0, len(told), SLOTS):
        args: list[Any] = []
        formats: dict[str, Any] = {f"F{j}": None for j in range(SLOTS)}
        for j in range(SLOTS):
            if i + j < len(told):
                p, per = told[i + j]
                pitch = p.pitch()
                assert pitch is not None
                args += [_columns(p), p.slots, *pitch, per, ends[i + j + 1]]
                formats[f"F{j}"] = (KINDS[p.kind], p.bits, p.group, p.channels, p.rotate)
            else:
                args += [None, 0, 0, 0, 0, 0]
        grid = (B * H, ends[min(i + SLOTS, len(told))] - ends[i])
        launch(
            _split, grid, q, turned, o, lse, total, ends[i], qs.scale, qs.softcap or 0.0, *args, **formats, **shape,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    out = torch.empty(B, Hq, T, Dv, device=q.device, dtype=torch.float32)
    out_lse = torch.empty(B, Hq, T, device=q.device, dtype=torch.float32)
    rotated = sum(p.rotate for p in pieces)
    launch(
        _join, (B * H * R,), o, lse, answers or None, out, out_lse, total, ends[rotated],
        ANSWERS=len(answers), TURNS=(Dv & -Dv) * bool(rotated), R=R, DV=Dv, DVP=padded(Dv),
        num_warps=4 if Dv <= 128 else 8,
    )  # fmt: skip
    return out, out_lse


def blocks(D: int, Dv: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens at a time, warps, pipeline stages."""
    wide = padded(max(D, Dv)) * (2 if dtype == torch.float32 else 1)
    return (128, 4, 3) if wide <= 64 else (64, 4, 3) if wide <= 128 else (32, 4, 2)


def _columns(p: Piece) -> tuple[Tensor | None, ...]:
    return (*(p.columns.get(name) for name in COLUMNS), p.lens)
