"""Orthonormal bases of a model's keys and values, and the file they are kept in.

For any left factor L, the best right factor of W is L⁺ W, so a latent R x is L⁺ (W x): a projection of the key or value
itself. Hence a basis needs neither the layer's input nor its weights, and is applied to what the cache is given.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.methods import _artefact
from calidrop.parts import Layer


class Basis:
    """One layer's: keys [groups, heads*D, r] over groups of kv heads (`order` lists the heads group by group), values
    [H*D, r] over all of them, and the biases that are taken off first [H*D]. A constant of the model, like its rotary
    frequencies; keys are those before the rotary embedding."""

    def __init__(self, order: list[int], keys: Tensor, values: Tensor, key_bias: Tensor, value_bias: Tensor):
        self.order, self.heads = order, len(order)
        self.at = torch.tensor(order, dtype=torch.int32, device=keys.device)
        self.slots = self.at.argsort().int()  # where a head is in `order`
        self.keys, self.values, self.key_bias, self.value_bias = keys, values, key_bias, value_bias
        self.key_rank, self.value_rank = keys.shape[0] * keys.shape[2], values.shape[1]
        self.elsewhere: dict[torch.device, Basis] = {}

    def __deepcopy__(self, memo: dict) -> Basis:
        return self

    def on(self, device: torch.device) -> Basis:
        """A copy there, made once."""
        if device == self.keys.device:
            return self
        if device not in self.elsewhere:
            tensors = (x.to(device) for x in (self.keys, self.values, self.key_bias, self.value_bias))
            self.elsewhere[device] = Basis(self.order, *tensors)
        return self.elsewhere[device]

    @functools.cached_property
    def for_cpu(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What its kernel reads: `keys` as [groups,width / 16,r,16], channels of a group filled up to a width that 64
        divides; their biases [H*D], of heads in the order of the groups; `values`; their biases."""
        full = F.pad(self.keys, (0, 0, 0, -self.keys.shape[1] % 64)).unflatten(1, (-1, 16)).transpose(2, 3)
        bias = self.key_bias.view(self.heads, -1)[self.order]
        given = full, bias, self.values, self.value_bias
        laid, bias, values, value_bias = (x.float().contiguous() for x in given)
        return laid, bias, values, value_bias

    def code_keys(self, k: Tensor) -> Tensor:
        """[B,H,N,D], not rotated -> fp32 [B,N,r]."""
        x = (k.float() - self._per_head(self.key_bias))[:, self.order]
        x = x.unflatten(1, (self.keys.shape[0], -1)).transpose(2, 3).flatten(3)  # [B,groups,N,heads*D]
        return (x @ self.keys).transpose(1, 2).flatten(2)

    def keys_of(self, z: Tensor) -> Tensor:
        """The inverse of `code_keys`, as nearly as the rank allows."""
        groups = self.keys.shape[0]
        x = z.float().unflatten(2, (groups, -1)).transpose(1, 2) @ self.keys.transpose(1, 2)  # [B,groups,N,heads*D]
        x = x.unflatten(3, (self.heads // groups, -1)).transpose(2, 3).flatten(1, 2)
        back = torch.empty_like(x)
        back[:, self.order] = x
        return back + self._per_head(self.key_bias)

    def code_values(self, v: Tensor) -> Tensor:
        """[B,H,N,Dv] -> fp32 [B,N,r]."""
        return (v.float() - self._per_head(self.value_bias)).transpose(1, 2).flatten(2) @ self.values

    def values_of(self, z: Tensor) -> Tensor:
        """The inverse of `code_values`, as nearly as the rank allows."""
        x = (z.float() @ self.values.T).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return x + self._per_head(self.value_bias)

    def output_of(self, z: Tensor) -> Tensor:
        """Attention over latents, [B,Hq,T,r] -> the same attention over values, [B,Hq,T,Dv]: each query head needs the
        rows of its own kv head alone."""
        rows = self.values.unflatten(0, (self.heads, -1)).transpose(1, 2)  # [H,r,Dv]
        B, Hq, T, r = z.shape
        o = z.float().reshape(B, self.heads, -1, r) @ rows + self._per_head(self.value_bias)
        return o.reshape(B, Hq, T, -1)

    def _per_head(self, bias: Tensor) -> Tensor:
        return bias.view(self.heads, 1, -1)


class Artefact:
    """What one training wrote. meta: model, model_type, layers, kv_heads, head_dim, scaling (of rotated keys), orders,
    and how it was made. rope: the model's inverse frequencies. samples: a few key weights of each layer."""

    def __init__(self, meta: dict[str, Any], layers: list[Basis], rope: Tensor, samples: Tensor):
        self.meta, self.layers, self.rope, self.samples = meta, layers, rope, samples

    def save(self, file: Path) -> None:
        data = {"rope": self.rope, "samples": self.samples}
        for i, basis in enumerate(self.layers):
            data |= {f"{i}.keys": basis.keys, f"{i}.values": basis.values}
            data |= {f"{i}.key_bias": basis.key_bias, f"{i}.value_bias": basis.value_bias}
        _artefact.save("recalkv", file, self.meta | {"orders": [basis.order for basis in self.layers]}, data)

    @staticmethod
    def load(file: str) -> Artefact:
        """Raises ValueError for a file that is not there or not one of these."""
        meta, data = _artefact.load("recalkv", file)
        names = ("keys", "values", "key_bias", "value_bias")
        layers = [Basis(order, *(data[f"{i}.{n}"] for n in names)) for i, order in enumerate(meta["orders"])]
        return Artefact(meta, layers, data["rope"], data["samples"])

    def check(self, layer: Layer) -> None:
        """Raises ValueError for a layer of another model."""
        made = _artefact.made_for(self.meta)
        more = ("kv heads", "kv_heads", layer.kv_heads), ("value dims per head", "head_dim", layer.value_dim)
        _artefact.check_shape("recalkv", self.meta, layer, *more)
        if layer.rope is None or layer.rope.interleaved:
            raise ValueError("recalkv: needs rotary positions in the half-split layout")
        if layer.heads.size > 1:
            raise ValueError(f"recalkv: needs all kv heads in one process, got {layer.heads.size} (tensor parallel)")
        freq = layer.rope.inv_freq.cpu()
        if freq.shape != self.rope.shape or not torch.allclose(freq, self.rope, rtol=1e-3):
            raise ValueError(f"recalkv: {made}, whose rotary frequencies are not this model's")
        _artefact.check_weights("recalkv", self.meta, self.samples, layer)
