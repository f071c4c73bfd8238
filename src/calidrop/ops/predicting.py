"""What `attention_predictor` asks of the kernel for CPUs. Each function does what its caller does in torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from calidrop.ops import cpu


def runs_networks(x: Tensor) -> bool:
    """Whether `network` can be asked."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad and not cpu.kernel().reason


def network(x: Tensor, real: Tensor | None, weights: Sequence[Tensor], newest: bool) -> Tensor:
    """`Predictor.edge` of what `runs_networks` allows: x [N,5,C], real bool [N,C]; weights and biases of the two
    convolutions and the weights of their channels, fp32. -> [N,3,C]"""
    N, _, C = x.shape
    if x.stride()[1:] != (C, 1):
        x = x.contiguous()
    held = [w.contiguous() for w in weights]
    real = None if real is None else real.contiguous()
    out = cpu.blank(N, 3, C)
    cpu.kernel().network(
        x.data_ptr(), x.stride(0), None if real is None else real.data_ptr(), *(w.data_ptr() for w in held),
        N, C, newest, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def follow(
    history: Tensor, weights: Tensor, ids: Tensor | None, real: Tensor | None, sums: Tensor, roots: int, decay: float,
    given: Sequence[Tensor], bias: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A step of the rows of `attention_predictor`, of what `runs_networks` allows. history [B,H,R,C] moves on by a row
    that has weights [B,H,n] of the blocks of spans `ids` [B,H,spans] (-1: of none) and is 0 elsewhere, or is weights
    [B,H,C]; real bool [B*H,C], or None: the blocks there are. sums fp64 [B,H,C], of what the inner rows add. The
    network (given: `network`'s weights; and a bias) sees them after `roots` square roots; each older row weighs `decay`
    of the next, the oldest nothing. -> history and sums a row later, and the row that is expected then [B,H,C]."""
    B, H, R, C = history.shape
    held = [w.contiguous() for w in given]
    history, weights, sums = history.contiguous(), weights.contiguous(), sums.contiguous()
    real, ids = (None if x is None else x.contiguous() for x in (real, ids))
    spans = 0 if ids is None else ids.shape[2]
    assert ids is None or spans, "no address says that there are no ids"
    moved, later, row = torch.empty_like(history), torch.empty_like(sums), cpu.blank(B, H, C)
    at, there = (None if x is None else x.data_ptr() for x in (ids, real))
    cpu.kernel().follow(
        history.data_ptr(), B * H, R, C, weights.data_ptr(), at, spans, weights.shape[2] // max(1, spans), there,
        sums.data_ptr(), roots, decay, *(w.data_ptr() for w in held), bias,
        *(x.data_ptr() for x in (moved, later, row)), torch.get_num_threads(),
    )  # fmt: skip
    return moved, later, row


def exchanges(row: Tensor, held: Sequence[Tensor]) -> bool:
    """Whether `exchange` can be asked about such columns."""
    known = row.device.type == "cpu" and row.dtype == torch.float32 and all(x.is_contiguous() for x in held)
    return known and not cpu.kernel().reason


def exchange(
    row: Tensor, per: int, spans: Sequence[int], ids: Tensor, w: int, held: Sequence[Tensor],
    parts: Sequence[tuple[Tensor, ...]],
) -> tuple[Tensor, list[Tensor]] | None:  # fmt: skip
    """What `attention_predictor` holds of the host's spans becomes the w best of every head, by the largest of `per`
    numbers of row [B,H,C]. spans: how many each of the B rows has, w or more; ids int64 [B,H,m]: those held, in `held`,
    columns [B,H,m,...]; parts of the host's lists, columns [units,...] one (row, head) behind the other and how many
    each has, int64 [B,H]. -> ids and columns then; None where nothing changes."""
    B, H, C = row.shape
    row, ids, m = row.contiguous(), ids.contiguous(), ids.shape[2]
    to, now = ids.new_empty(B, H, w), [x.new_empty(B, H, w, *x.shape[3:]) for x in held]
    many = [n for n in spans for _ in range(H)]
    width = [x.nbytes // max(1, B * H * m) for x in held]
    columns = [n for of in zip(held, now, width, strict=True) for n in (of[0].data_ptr(), of[1].data_ptr(), of[2])]
    lists = [n for *of, lens in parts for n in (lens.data_ptr(), *(x.data_ptr() for x in of))]
    room, told, read = ((ctypes.c_int64 * len(x))(*x) for x in (many, columns, lists))
    changes = (ctypes.c_int32 * 1)()
    cpu.kernel().exchange(
        row.data_ptr(), B * H, C, per, room, ids.data_ptr(), m, w, to.data_ptr(), told, len(held), read, len(parts),
        changes, torch.get_num_threads(),
    )  # fmt: skip
    return (to, now) if changes[0] else None
