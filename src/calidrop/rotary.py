"""How a model rotates its keys: found by trying, as neither names nor configs tell."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from calidrop.plugin import using
from calidrop.rope import Rope

NAMES = ("full_attention_inv_freq", "inv_freq")  # the first where kinds of layers differ in their frequencies
WAYS = [(sign, interleaved) for sign in (1.0, -1.0) for interleaved in (False, True)]
LENGTH = 12  # tokens of a trial
ROUNDING = 0.03  # of keys in 16 bits; another rotation changes them by their size
Way = tuple[float, bool]  # the sign of frequencies, and whether pairs are interleaved
NOT: Way = (0.0, False)
_WAYS: WeakKeyDictionary[nn.Module, Way | None] = WeakKeyDictionary()
_LAYERS: WeakKeyDictionary[nn.Module, dict[int, Way | None] | None] = WeakKeyDictionary()


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


def way_of(decoder: nn.Module, rotary: nn.Module, name: str) -> Way | None:
    """The way in which `Rope` rotates as the model's own function does, up to `scaling_of`. None if there is none, or
    no function to ask. rotary, name: as `rotary_of` has them."""
    if rotary not in _WAYS:
        _WAYS[rotary] = _try(decoder, rotary, name)
    return _WAYS[rotary]


def _try(decoder: nn.Module, rotary: nn.Module, name: str) -> Way | None:
    files = {type(m).__module__: None for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)}
    found = (getattr(sys.modules.get(file), "apply_rotary_pos_emb", None) for file in files)
    apply = next((f for f in found if f is not None), None)
    if apply is None:
        return None
    try:
        return _same(apply, rotary, name)
    except Exception:  # code of any model: what cannot be called this way is no rotation that is known
        return None


@torch.no_grad()
def _same(apply: Callable[..., Any], rotary: Any, name: str) -> Way | None:
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
    for sign, interleaved in WAYS:
        want = Rope(sign * freq, interleaved).rotate(k, positions[:, None]) * scaling_of(own, name)
        if got.shape == want.shape and torch.allclose(got.float(), want, rtol=1e-3, atol=1e-3):
            return sign, interleaved
    return None


def rotations(decoder: nn.Module, config: Any, layers: list[int]) -> dict[int, Rope]:
    """How these layers rotate their keys, as some models do not in every layer and some in none; without those that
    do it as `Rope` cannot. One pass of the decoder over a few tokens tells, once a model. Without weights there are no
    keys to compare, and what the model's function does is taken for granted."""
    found = rotary_of(decoder)
    if decoder not in _LAYERS:
        _LAYERS[decoder] = _tried(decoder, config, found)
    tried, said = _LAYERS[decoder], NOT if found is None else way_of(decoder, *found)
    if tried == {}:  # it failed
        return {}
    # without weights, or (pipeline parallelism) with those of other layers
    ways = {i: said if tried is None or i not in tried else tried[i] for i in layers}
    ropes = _ropes(_frequencies(found))
    return {i: ropes[way] for i, way in ways.items() if way is not None}


def _frequencies(found: tuple[nn.Module, str] | None) -> Tensor:
    return torch.empty(0) if found is None else getattr(*found).detach().float()


def _ropes(freq: Tensor) -> dict[Way, Rope]:
    """One of each way, for all layers that go it."""
    return {NOT: Rope(freq[:0]), **{way: Rope(way[0] * freq, way[1]) for way in WAYS}}


def _tried(decoder: nn.Module, config: Any, found: tuple[nn.Module, str] | None) -> dict[int, Way | None] | None:
    """The way of each layer that has keys here; {} where the trial failed, None where there are no weights. Every
    attention is handed what the first place has, as what it sees may differ from place to place (sinks, states)."""
    one = next(decoder.parameters())
    if one.is_meta and not any(hasattr(m, "_hf_hook") for m in decoder.modules()):  # accelerate's may bring weights
        return None
    cache: Any = DynamicCache(config=config)
    device = torch.device("cpu") if one.is_meta else one.device
    try:
        with ExitStack() as put_back, torch.no_grad():
            put_back.enter_context(_as_it_was(decoder, found))
            for module in decoder.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    put_back.enter_context(module.register_forward_pre_hook(_alike, with_kwargs=True))
            decoder(**_tokens(decoder, config, device), use_cache=True, **using(cache))
            freq = _frequencies(found)  # dynamic ones may be others than before
    except Exception:  # code of any model
        return {}
    keys = {i: getattr(layer, "keys", None) for i, layer in enumerate(cache.layers)}
    return {i: _explained(k[0].float(), freq) for i, k in keys.items() if isinstance(k, Tensor) and k.dim() == 4}


def _tokens(decoder: Any, config: Any, device: torch.device) -> dict[str, Tensor]:
    """Some, as arguments; as hidden states where a pipeline has their embeddings in another process."""
    table = getattr(decoder.get_input_embeddings(), "weight", None)
    if table is not None:
        return {"input_ids": torch.full((1, LENGTH), min(5, len(table) - 1), device=device)}
    draw = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(1, 1, config.hidden_size, generator=draw, device="cpu", dtype=torch.float32)
    return {"inputs_embeds": hidden.to(device, decoder.dtype).expand(-1, LENGTH, -1)}


def _explained(keys: Tensor, freq: Tensor) -> Way | None:
    """The first way that explains keys [H,N,D] of the same token at N places."""
    for way, rope in _ropes(freq.to(keys.device)).items():
        if 2 * len(rope.inv_freq) <= keys.shape[-1]:
            want = rope.rotate(keys[:, :1].expand_as(keys), torch.arange(keys.shape[1], device=keys.device))
            if (keys - want).norm() <= ROUNDING * want.norm():
                return way
    return None


@contextmanager
def _as_it_was(decoder: nn.Module, found: tuple[nn.Module, str] | None) -> Iterator[None]:
    """Without dropout; afterwards modules are in the modes they were, and frequencies (dynamic) what they were."""
    modes, rotary = {m: m.training for m in decoder.modules()}, decoder if found is None else found[0]
    facts, held = dict(vars(rotary)), dict(rotary._buffers)
    decoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        vars(rotary).update(facts, _buffers=held)


def _alike(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """With the hidden states [1,N,D] of the first place at all places."""

    def alike(x: Any) -> Any:
        return x[:, :1].expand_as(x) if isinstance(x, Tensor) and x.dim() == 3 else x

    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": alike(kwargs["hidden_states"])}
    return (alike(args[0]), *args[1:]) if args else args, kwargs
