"""What the kernels for CPUs are told of tensors and of pieces: the structs of ops/cpp/pieces.h, as bytes."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from calidrop.attention import Partial, values
from calidrop.ops.piece import Heard, Piece
from calidrop.state import Ragged

KINDS = {"exact": 0, "per token": 1, "per channel": 2, "answered": 3, "per group": 4, "e4m3": 5, "tiers": 6}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ARRAYS = (
    *("k", "v", "pos", "bias", "k_scale", "k_zero", "v_scale", "v_zero"),
    *("order", "k16", "k4", "k4_scale", "k4_zero"),
)


class Array(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("row", "head", "slot"))]


# Piece of pieces.h in two: what is of a call, and what is stored. Packed at once: filling a ctypes.Structure field by
# field takes three times as long.
NOW = struct.Struct("@2QqQ2q3i")
STORED = struct.Struct("=9i2Q" + "Q3q" * len(ARRAYS))
OFFSET = {name: 4 * i for i, name in enumerate(ARRAYS)}
Place = tuple[int, int, int, int]  # where a column lies, and its strides in bytes
Layout = tuple[int, int, int, bool, tuple[int, int, int]]  # bits, group, channels, rotate and tiers of a Piece


def array(x: Tensor) -> Array:
    return Array(*strided(x))


def strided(x: Tensor) -> Place:
    """x: [row, head, slot, ...]: where it lies, and its strides in bytes."""
    size = x.element_size()
    row, head, slot = x.stride()[:3]
    return x.data_ptr(), row * size, head * size, slot * size


def flat(x: Tensor) -> Place:
    """x: [slot, ...]"""
    return x.data_ptr(), 0, 0, x.stride(0) * x.element_size()


def packed(
    columns: dict[str, Place], kind: str, dtype: int = 0, layout: Layout = (0, 1, 0, False, (0, 0, 0)),
    lens: Tensor | None = None, starts: Tensor | None = None,
) -> bytes:  # fmt: skip
    *sizes, tiers = layout
    arrays = [0] * (4 * len(ARRAYS))
    for name, place in columns.items():
        arrays[OFFSET[name] : OFFSET[name] + 4] = place
    of = (0 if x is None else x.data_ptr() for x in (lens, starts))
    return STORED.pack(KINDS[kind], dtype, *sizes, *tiers, *of, *arrays)


def listed(k: Tensor, v: Tensor, lens: Tensor, starts: Tensor | None = None) -> bytes:
    """Exact tokens k [slots,D] and v [slots,Dv], of which each (row, head) has some; asked by the queries of a call."""
    columns = {"k": flat(k), "v": flat(values(k, v))}
    now = NOW.pack(*[0] * 6, k.shape[-1], 0, 0)
    return now + packed(columns, "exact", DTYPES[k.dtype], lens=lens, starts=starts)


def whole(s: Ragged) -> bytes:
    """`listed` of all exact tokens k and v of every (row, head)."""
    k, v = s.data["k"], s.data["v"]
    tensors = k, v, s.lens
    found = s.note.get(tensors, whole)
    if found is None:
        k, v = (x.view(-1, x.shape[-1]) for x in (k, values(k, v)))
        found = listed(k, v, s.lens)
        s.note.put(tensors, whole, found)
    return found


def describe(part: Partial | Piece, q: Tensor, keep: list[Tensor], heard: Heard | None) -> bytes:
    """q: of the call. keep: tensors made on the way, which must outlive it."""
    if not isinstance(part, Piece):
        o, lse = (x.float().contiguous() for x in part)
        keep += [o, lse]
        return NOW.pack(*[0] * 9) + packed({"k": (o.data_ptr(), 0, 0, 0), "v": (lse.data_ptr(), 0, 0, 0)}, "answered")
    own, width = 0, q.shape[-1]
    if part.q is not None:
        asking = part.q.float().contiguous()
        keep.append(asking)
        own, width = asking.data_ptr(), asking.shape[-1]
    logits, room = 0, 0
    if heard is not None:
        found = heard.room(part, len(q), q.shape[1] // part.heads)
        logits, room = found.data_ptr(), found.shape[-1]
    mix = 0 if part.mix is None else part.mix.data_ptr()
    return NOW.pack(own, logits, room, mix, part.slots, 0, width, 0, 0) + _of(part)


def _of(part: Piece) -> bytes:
    """What is stored of it."""
    layout = part.bits, part.group, part.channels, part.rotate, part.tiers
    tensors = [*part.columns.values()] if part.lens is None else [*part.columns.values(), part.lens]
    found = part.note.get(tensors, (part.kind, layout)) if part.note is not None else None
    if found is None:
        place = strided if part.lens is None else flat
        first = part.columns["k16" if part.kind == "tiers" else "k"]
        columns = {name: place(x) for name, x in part.columns.items()}
        found = packed(columns, part.kind, DTYPES.get(first.dtype, 0), layout, part.lens)
        if part.note is not None:
            part.note.put(tensors, (part.kind, layout), found)
    return found
