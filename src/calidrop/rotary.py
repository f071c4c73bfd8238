"""How a model rotates its keys: found by trying, as neither names nor configs tell."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from calidrop.rope import Rope

NAMES = ("full_attention_inv_freq", "inv_freq")  # the first where kinds of layers differ in their frequencies
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def rotary_of(decoder: nn.Module) -> tuple[nn.Module, str] | None:
    """Its first module with rotary frequencies, and the name these have there. None if it has none."""
    for module in decoder.modules():
        for name in NAMES:
            if isinstance(getattr(module, name, None), Tensor):
                return module, name
    return None


def scaling_of(rotary: nn.Module, name: str) -> float:
    """What rotated queries and keys are multiplied by (yarn)."""
    return float(getattr(rotary, name.replace("inv_freq", "attention_scaling"), 1.0))


def half_split(decoder: nn.Module, rotary: nn.Module, name: str) -> bool:
    """Whether the model's own function rotates as `Rope` does, up to `scaling_of`. False too where there is none to
    ask. rotary, name: as `rotary_of` has them."""
    if rotary not in _TRIED:
        _TRIED[rotary] = _try(decoder, rotary, name)
    return _TRIED[rotary]


def _try(decoder: nn.Module, rotary: nn.Module, name: str) -> bool:
    files = {type(m).__module__: None for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)}
    found = (getattr(sys.modules.get(file), "apply_rotary_pos_emb", None) for file in files)
    apply = next((f for f in found if f is not None), None)
    if apply is None:
        return False
    try:
        return _same(apply, rotary, name)
    except Exception:  # code of any model: what cannot be called this way is no rotation that is known
        return False


@torch.no_grad()
def _same(apply: Callable[..., Any], rotary: Any, name: str) -> bool:
    own = copy.deepcopy(rotary)  # as a call may set frequencies anew (dynamic)
    if getattr(rotary, name).is_meta:  # frequencies have no values; any will do
        own.to_empty(device="cpu")
        for held in own.buffers():
            held.copy_(0.5 ** torch.arange(held.numel(), device="cpu").view_as(held))
    own.cpu()
    positions = torch.tensor([[0, 1, 5, 11]], device="cpu")
    kind = {"layer_type": name.removesuffix("_inv_freq")} if name != "inv_freq" else {}
    # of the class: an instance may have one that moves data between devices (accelerate)
    turn = functools.partial(type(own).forward, own, torch.zeros(1, device="cpu"), **kind)
    try:
        cos, sin = turn(position_ids=positions)
    except IndexError:  # some want those of text, height and width (Qwen-VL before transformers 5.24)
        cos, sin = turn(position_ids=positions.expand(3, -1, -1))
    freq = getattr(own, name).float()
    draw = torch.Generator("cpu").manual_seed(0)
    k = torch.randn(1, 2, 4, 2 * len(freq), generator=draw, device="cpu", dtype=torch.float32)
    pair = "k" in inspect.signature(apply).parameters
    got = apply(k, k, cos, sin)[1] if pair else apply(k, cos, sin)
    want = Rope(freq).rotate(k, positions[:, None]) * scaling_of(own, name)
    return got.shape == want.shape and torch.allclose(got.float(), want, rtol=1e-3, atol=1e-3)
