"""Attention with its inputs recorded: what a recipe gets wrong in a layer when earlier layers got nothing wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calidrop import KVCache
from calidrop.layer import LayerKV
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.plugin import using
from calidrop.recipe import parse
from helpers import QKV


@torch.no_grad()
def record(model: nn.Module, ids: Tensor, monkeypatch) -> list[QKV]:
    """Rotated queries, keys and values of every layer in one forward pass over ids [1,N]."""
    seen: list[QKV] = []
    attend = LayerKV.attend

    def spy(self: LayerKV, q: Tensor, *args) -> Tensor:
        seen.append((q, *(x.clone() for x in self.pending)))
        return attend(self, q, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LayerKV, "attend", spy)
        model(ids, **using(KVCache(model)), logits_to_keep=1)
    return seen


def built(recipe: str, qkv: QKV, index: int, layers: int) -> LayerKV:
    """One layer as the recipe plans it for a model of so many layers."""
    q, k, _ = qkv
    layer = Layer(index, layers, q.shape[1], k.shape[1], k.shape[-1], None, HeadGroup())
    return LayerKV(make=lambda: parse(recipe).plan(layer))
