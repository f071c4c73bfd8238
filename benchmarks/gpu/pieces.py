"""Random tokens in every format a kernel reads, with what they decode to."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from calidrop.attention import Partial, Queries
from calidrop.methods._per_token import Float8, PerToken
from calidrop.methods.kivi import ChannelKeys
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens

FORMATS: dict[str, Callable[[], Store]] = {
    "exact": Exact,
    "int8": lambda: PerToken(8, False),
    "int4": lambda: PerToken(4, True),
    "int2": lambda: PerToken(2, True),
    "fp8": lambda: Float8(1),
    "kivi8": lambda: ChannelKeys(8, 32),
    "kivi4": lambda: ChannelKeys(4, 32),
    "kivi2": lambda: ChannelKeys(2, 32),
}
UNSEEN = cast(Observation, None)  # these formats look at no query


def tokens(B: int, H: int, N: int, D: int, dtype: torch.dtype, device: torch.device, uneven: bool = False) -> Tokens:
    """uneven: heads of different lengths."""
    pos = torch.arange(N, dtype=torch.int32, device=device).expand(B, H, N)
    if uneven:
        lens = torch.randint(N // 3, N + 1, (B, H, 1), device=device)
        pos = pos.masked_fill(pos >= lens, -1)
    k, v = (torch.randn(B, H, N, D, device=device, dtype=dtype) for _ in range(2))
    return Tokens(k, v, pos, dense=not uneven)


def queries(B: int, Hq: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> Queries:
    q = torch.randn(B, Hq, T, D, device=device, dtype=dtype)
    return Queries(q, torch.full((B, T), 1 << 30, device=device), D**-0.5)


def stored(name: str, t: Tokens) -> Store:
    store = FORMATS[name]()
    store.add(t, UNSEEN)
    return store


def held_bytes(parts: list[Partial | Piece]) -> int:
    """What a kernel has to read."""
    return sum(x.nbytes for p in parts if isinstance(p, Piece) for x in p.columns.values())
