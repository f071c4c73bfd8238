"""Random tokens in every format a kernel reads, with what they decode to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from calidrop.attention import Partial, Queries
from calidrop.methods._per_token import Float8, PerToken
from calidrop.methods.decoquant import Decomposed
from calidrop.methods.kivi import ChannelKeys
from calidrop.methods.mikv import Balanced
from calidrop.methods.mixkvq import Tiers
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.parallel import HeadGroup
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens

FORMATS: dict[str, Callable[[int, int], Store]] = {  # of so many tokens of so many channels
    "exact": lambda N, D: Exact(),
    "int8": lambda N, D: PerToken(8, False),
    "int4": lambda N, D: PerToken(4, True),
    "int2": lambda N, D: PerToken(2, True),
    "fp8": lambda N, D: Float8(1),
    "kivi8": lambda N, D: ChannelKeys(8, 32),
    "kivi4": lambda N, D: ChannelKeys(4, 32),
    "kivi2": lambda N, D: ChannelKeys(2, 32),
    "mikv4": lambda N, D: Balanced(4, D // 2, True),
    "mikv3": lambda N, D: Balanced(3, D // 2, True),
    "decoquant4": lambda N, D: Decomposed(4, HeadGroup()),
    "mixkvq": lambda N, D: Tiers(128 if N >= 128 else 64, 32, (D // 32, D // 32 * 3, D - D // 32 * 4), 2, 32),
}


def tokens(B: int, H: int, N: int, D: int, dtype: torch.dtype, device: torch.device, uneven: bool = False) -> Tokens:
    """uneven: heads of different lengths."""
    pos = torch.arange(N, dtype=torch.int32, device=device).expand(B, H, N)
    if uneven:
        lens = torch.randint(N // 3, N + 1, (B, H, 1), device=device)
        pos = pos.masked_fill(pos >= lens, -1)
    k, v = (torch.randn(B, H, N, D, device=device, dtype=dtype) for _ in range(2))
    return Tokens(k, v, pos, dense=not uneven)


def latents(B: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> Tokens:
    """Of multi-head latent attention: one kv head, whose values are its keys."""
    t = tokens(B, 1, N, D, dtype, device)
    return replace(t, v=t.v[..., :0])


def queries(B: int, Hq: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> Queries:
    q = torch.randn(B, Hq, T, D, device=device, dtype=dtype)
    return Queries(q, torch.full((B, T), 1 << 30, device=device), D**-0.5)


def stored(name: str, t: Tokens) -> Store:
    B, H, N, D = t.k.shape
    store, none = FORMATS[name](N, D), torch.zeros(B, dtype=torch.long, device=t.k.device)
    qs = replace(queries(B, H, 1, D, t.k.dtype, t.k.device), prompt=True)
    seen = Observation(qs, torch.zeros(B, H, 1, device=t.k.device), none + N, none)
    store.observe(seen)
    store.add(t, seen)
    return store


def held_bytes(parts: list[Partial | Piece]) -> int:
    """What a kernel has to read: values that are the keys once."""
    columns = {x.data_ptr(): x.nbytes for p in parts if isinstance(p, Piece) for x in p.columns.values()}
    return sum(columns.values())
