from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries
from calidrop.holding import Holding
from calidrop.methods._latents import Artefact, Basis
from calidrop.observe import Observation
from calidrop.ops import rebuilding
from calidrop.ops.piece import Piece
from calidrop.parts import Layer, Shrink, check_int, method
from calidrop.rope import Rope
from calidrop.store import Store
from calidrop.tokens import Tokens

TILE = 4096  # tokens whose keys are rebuilt at once


class Latents(Store):
    """All heads of a token as one latent key and one latent value, tokens of a single head in a store of their own.

    scaling: what the model multiplies rotated keys by (yarn)."""

    def __init__(self, inner: Store, basis: Basis, rope: Rope, scaling: float):
        self.inner, self.basis, self.rope, self.scaling = inner, basis, rope, scaling
        self.start: Tensor | None = None  # int64 [B], left pads: positions count from there
        self.dtype = torch.float32

    def add(self, t: Tokens, obs: Observation) -> None:
        assert bool((t.pos == t.pos[:, :1]).all()), "heads hold different tokens"
        self.start, self.dtype = obs.start, t.k.dtype
        self.basis = self.basis.on(t.k.device)
        k = self.rope.rotate(t.k, -obs.index(t)) / self.scaling
        k, v = (x[:, None].to(self.dtype) for x in (self.basis.code_keys(k), self.basis.code_values(t.v)))
        self.inner.add(Tokens(k, v, t.pos[:, :1], dense=t.dense), obs)

    def _keys(self, z: Tokens) -> Tensor:
        assert self.start is not None
        basis, pos = self.basis, z.pos - self.start[:, None, None]
        if ops.gpu.runs(pos.device):
            freq = self.rope.inv_freq.to(pos.device)
            return ops.gpu.keys(z.k[:, 0], pos[:, 0], basis.keys, basis.key_bias, basis.at, freq, self.scaling)
        return (self.rope.rotate(basis.keys_of(z.k[:, 0]), pos) * self.scaling).to(self.dtype)

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        basis, H, said = self.basis, self.basis.heads, []
        if self.start is not None and not rebuilding.refusal(qs):
            return self._in_kernel(qs, self.start)
        for z in self.inner.tokens():
            if ops.gpu.takes_latents(qs, H, basis.value_rank):
                freq, at = self.rope.inv_freq.to(z.k.device), (z.k[:, 0], z.v[:, 0], z.pos[:, 0], self.start)
                said.append(ops.gpu.ask_latents(qs, *at, basis.keys, basis.key_bias, basis.slots, freq, self.scaling))
                continue
            for tile in (z.slice(i, i + TILE) for i in range(0, len(z), TILE)):
                v, pos = tile.v.expand(-1, H, -1, -1), tile.pos.expand(-1, H, -1)
                said.append(ops.attend(qs, Tokens(self._keys(tile), v, pos, dense=tile.dense)))
        return [(basis.output_of(o).masked_fill(lse[..., None] == float("-inf"), 0.0), lse) for o, lse in said]

    def _in_kernel(self, qs: Queries, start: Tensor) -> list[Partial | Piece]:
        """The answer of the kernel for CPUs, which reads some codes as they are stored."""
        like = qs.q.new_zeros(len(qs.q), 1, len(qs), self.basis.key_rank)
        pieces = self.inner.lying(like)
        if not all(map(rebuilding.reads, pieces)):
            pieces = Store.lying(self.inner, like)
        if not pieces:
            return []
        return [rebuilding.attend(qs, pieces, self.basis, start, self.rope.inv_freq, self.scaling)]

    def _whole(self, z: Tokens) -> Tokens:
        v = self.basis.values_of(z.v[:, 0]).to(self.dtype)
        return Tokens(self._keys(z), v, z.pos.expand(-1, self.basis.heads, -1), dense=z.dense)

    def tokens(self) -> list[Tokens]:
        return [self._whole(z) for z in self.inner.tokens()]

    def holdings(self) -> list[Holding]:
        return [
            replace(h, pos=h.pos.expand(-1, self.basis.heads, -1)) if h.pos is not None else h
            for h in (inner.narrower(self._dims()) for inner in self.inner.holdings())
        ]

    def open(self) -> list[Tokens]:
        return [self._whole(z) for z in self.inner.open()]

    @property
    def drops(self) -> bool:
        return self.inner.drops

    def describe(self) -> str:
        return f"{self._dims()}: {self.inner.describe()}"

    def _dims(self) -> str:
        whole = self.basis.values.shape[0]
        return f"keys and values of all heads in {self.basis.key_rank} and {self.basis.value_rank} of {whole} dims"


@method("ReCalKV, arXiv 2505.24357")
def recalkv(file: str, recent: int = 32) -> Shrink:
    """ReCalKV (Yan et al., arXiv 2505.24357, sec. 3): keys before the rotary embedding and values of all heads of a
    token as latents of a lower rank, on bases learned offline (`calidrop train recalkv`).

    file: what the training wrote, for this model only. recent: the last tokens that stay exact, if no evictor or
    quantizer decides that. Keys are rebuilt and rotated again when they are read; attention runs over value latents
    and its output is mapped back per head: the paper's fusion into the output weights without touching them. A
    quantizer behind it rounds latents. Bytes per token and layer: (key rank + value rank) elements and a position;
    the bases come with the model, not with a cache.

    Deviations: prompts are attended exactly before they are compressed (the paper compresses in prefill too), and the
    last tokens are exact. Heads cannot hold different tokens, so only evictors that keep the same ones in every head
    can stand in front. Positions are columns less left pads: pads inside a conversation cost accuracy. The
    training's deviations are in `train/recalkv.py`.
    """
    if not isinstance(file, str):
        raise ValueError(f"recalkv: file must be a path in quotes, got {file!r}")
    check_int("recalkv: recent", recent, 0)
    artefact = Artefact.load(file)

    def make(layer: Layer, inner: Callable[[Layer], Store]) -> Store:
        artefact.check(layer)
        assert layer.rope is not None
        basis = artefact.layers[layer.index]
        narrow = replace(layer, query_heads=1, kv_heads=1, rope=None)
        narrow = replace(narrow, head_dim=basis.key_rank, value_dim=basis.value_rank)
        return Latents(inner(narrow), basis, layer.rope, artefact.meta["scaling"])

    return Shrink(make, recent, 16, joint=True, rotations=True)
