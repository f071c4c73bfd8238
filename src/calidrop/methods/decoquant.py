from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from calidrop.coded import Coded
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer, Storage, check_choice, check_int, method
from calidrop.quant import LARGEST, SMALLEST, pack, unpack
from calidrop.state import State
from calidrop.store import Store
from calidrop.tokens import Tokens

CHUNK = 16  # channels that share the small factor
LEAST = 1e-30  # energy of a token, even of zeros


class Split16(State):
    """X = L S for chunks of 16 channels: S = Lambda^(1/4) E', the balanced small factor of X's singular value
    decomposition, read off the Gram matrix X'X = E Lambda E'. small, inverse: fp32 [B,1,1,16,16]."""

    def __init__(self, gram: Tensor):
        """gram: fp64 [B,16,16]"""
        values, vectors = torch.linalg.eigh(gram)
        root = values.clamp(min=values.amax(-1, keepdim=True) * 1e-12).clamp(min=1e-30) ** 0.25
        self.small = (root[..., None] * vectors.transpose(-1, -2)).float()[:, None, None]
        self.inverse = (vectors / root[..., None, :]).float()[:, None, None]

    def where(self, rows: Tensor, other: Split16) -> Split16:
        """`other` in the marked rows, bool [B]."""
        new, mark = copy.copy(self), rows[:, None, None, None, None]
        new.small, new.inverse = (
            torch.where(mark, b, a) for a, b in ((self.small, other.small), (self.inverse, other.inverse))
        )
        return new

    def large(self, x: Tensor) -> Tensor:
        """[B,H,N,D] -> its large factor, same shape."""
        return (x.float().unflatten(-1, (-1, CHUNK)) @ self.inverse).flatten(-2)

    def whole(self, large: Tensor) -> Tensor:
        return (large.float().unflatten(-1, (-1, CHUNK)) @ self.small).flatten(-2)

    def fold(self, q: Tensor) -> Tensor:
        """What has the same product with the large factor as q has with the whole."""
        return (q.float().unflatten(-1, (-1, CHUNK)) @ self.small.transpose(-1, -2)).flatten(-2)


class Decomposed(Coded):
    """The large factors, symmetric per token and head: k, v uint8 [B,H,n,1,D*bits/8], scales fp16 [B,H,n,1]. bits=16
    keeps them as they are."""

    def __init__(self, bits: int, heads: HeadGroup):
        super().__init__(1)
        self.bits, self.heads = bits, heads
        self.of_keys: Split16 | None = None
        self.of_values: Split16 | None = None
        self.missing: Tensor | None = None  # bool [B], rows that have had no token, where others had

    def arrive(self, t: Tokens) -> None:
        if self.of_keys is not None and self.missing is None:
            return
        keys, values = (self._gram(x, t.valid) for x in (t.k, t.v))
        came = keys.flatten(1).any(1)  # each row has those of its own first tokens
        if not bool(came.any()):
            return
        none = torch.eye(CHUNK, dtype=keys.dtype, device=keys.device)
        found = [Split16(torch.where(came[:, None, None], x, none)) for x in (keys, values)]
        if self.missing is None or self.of_keys is None or self.of_values is None:
            self.of_keys, self.of_values = found
            missing = ~came
        else:
            new, missing = came & self.missing, self.missing & ~came
            self.of_keys, self.of_values = self.of_keys.where(new, found[0]), self.of_values.where(new, found[1])
        self.missing = missing if bool(missing.any()) else None

    def _gram(self, x: Tensor, valid: Tensor) -> Tensor:
        """[B,16,16], as though each head had had one token more, of their mean energy and in no direction: of a token
        or two, directions are missing, through which the next tokens would be lost."""
        rows = (x.double() * valid[..., None]).unflatten(-1, (-1, CHUNK)).flatten(2, 3)  # [B,H,M,16]
        gram, n = rows.transpose(-1, -2) @ rows, valid.sum(-1)
        even = (gram.diagonal(dim1=-2, dim2=-1).mean(-1) / n.clamp(min=1)).clamp(min=LEAST) * (n > 0)
        gram = gram + even[..., None, None] * torch.eye(CHUNK, dtype=gram.dtype, device=x.device)
        return self.heads.gather(gram).sum(1)

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        assert self.of_keys is not None and self.of_values is not None
        data, top = {}, 2 ** (self.bits - 1) - 1
        for name, x in (("k", self.of_keys.large(k[:, :, :, 0])), ("v", self.of_values.large(v[:, :, :, 0]))):
            if self.bits == 16:
                data[name] = x[:, :, :, None].to(self.dtype)
                continue
            scale = (x.abs().amax(-1) / top).clamp(SMALLEST, LARGEST).to(torch.float16)
            codes = (x / scale.float()[..., None]).round().clamp(-top, top) + top
            data[f"{name}_scale"] = scale[:, :, :, None]
            data[name] = pack(codes.to(torch.uint8), self.bits)[:, :, :, None]
        return data

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.bits == 16:
            return data["k"], data["v"]
        top = 2 ** (self.bits - 1) - 1
        k, v = ((unpack(data[n], self.bits).float() - top) * data[f"{n}_scale"].float()[..., None] for n in ("k", "v"))
        return k, v

    def layout(self, q: Tensor) -> dict[str, Any]:
        if self.bits == 16:
            return {}
        assert self.of_values is not None
        mix = self.of_values.small[:, 0, 0].expand(len(q), -1, -1).contiguous()
        return {"kind": "per token", "bits": self.bits, "channels": CHUNK, "q": self.turn(q).to(q.dtype), "mix": mix}

    def turn(self, q: Tensor) -> Tensor:
        assert self.of_keys is not None
        return self.of_keys.fold(q)

    def unturn(self, o: Tensor) -> Tensor:
        assert self.of_values is not None
        return self.of_values.whole(o)

    def restore(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert self.of_keys is not None and self.of_values is not None
        return self.of_keys.whole(k), self.of_values.whole(v)

    def format(self) -> str:
        return f"{self.bits}-bit large factors"


@method("DecoQuant, arXiv 2405.12591")
def decoquant(bits: int = 4, residual: int | None = None) -> Storage:
    """DecoQuant (Liu et al., arXiv 2405.12591, sec. 3): keys and values as a product whose large factor is quantized.

    Every 16 channels of a token are a row of one tall matrix per layer; its small 16 x 16 factor comes from the Gram
    matrix of the first tokens compressed, is folded into queries and outputs, and serves later tokens too. bits: 2, 4
    or 8, symmetric, or 16 (not quantized). residual: the last tokens that stay exact (32 when None) if no evictor
    decides that. Bytes per token and head, D channels: 2 * (D * bits / 8 + 2), and 4096 per row and layer.

    Deviations: a scale per token and kv head rather than per token, since evictors give heads different tokens; to the
    Gram matrix one token per head is added whose energy lies evenly in all directions, without which a factor of a
    token or two ruins what follows (LOG.md).
    """
    check_choice("decoquant: bits", bits, (2, 4, 8, 16))
    if residual is not None:
        check_int("decoquant: residual", residual, 0)

    def make(layer: Layer) -> Store:
        for dim in (layer.head_dim, layer.value_dim):
            if dim % CHUNK:
                raise ValueError(f"decoquant: head_dim must be a multiple of {CHUNK}, got {dim}")
        return Decomposed(bits, layer.heads)

    recent = 32 if residual is None else residual
    return Storage(make, recent, 16, chose_recent=residual is not None)
