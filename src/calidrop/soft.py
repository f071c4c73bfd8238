"""Trained soft tokens that look at a prompt in place of its own last tokens (Judge Q).

They ride along in the pass that attends the prompt: a hook in front of the decoder appends their embeddings, each layer
takes their queries aside (`LayerKV.attend`), and a hook behind the decoder cuts their hidden states off. The hooks act
only for a cache whose recipe has some; the model keeps nothing but them.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calidrop.layer import LayerKV
from calidrop.masks import ASSISTED, called_from, prefill
from calidrop.plugin import CACHE


def install(model: Any, soft: Tensor) -> None:
    """Install the hooks, once per model. soft: [n,hidden]. Raises ValueError for a model that cannot take it."""
    decoder = model.get_decoder()
    name, config = type(model).__name__, decoder.config
    takes = inspect.signature(decoder.forward).parameters
    if not {"inputs_embeds", "input_ids", "position_ids"} <= takes.keys():
        raise ValueError(f"{name} cannot take soft tokens: its decoder has no inputs_embeds and position_ids")
    if hasattr(model, "_pp_stage"):
        raise ValueError(f"{name} cannot take soft tokens: they do not cross from one stage of a pipeline to the next")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(f"{name} cannot take soft tokens: its layers look up token ids of their own")
    if soft.shape[1] != config.hidden_size:
        raise ValueError(f"soft tokens of {soft.shape[1]} dims do not fit {name}, which has {config.hidden_size}")
    if _append not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_append, with_kwargs=True)
        decoder.register_forward_hook(_cut, with_kwargs=True)


def _layers(kwargs: dict[str, Any]) -> list[LayerKV]:
    """Those of the cache in use, if its recipe has soft tokens."""
    cache = kwargs.get(CACHE, kwargs.get("past_key_values"))  # newer versions still take the old name
    layers: list[Any] = cache.layers if isinstance(cache, Cache) else []
    mine = all(isinstance(layer, LayerKV) for layer in layers)
    return layers if mine and any(layer.plan.soft is not None for layer in layers) else []


def _append(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if torch.compiler.is_compiling():  # a generated token: no prompt ends there
        return None
    if args:
        kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
    layers = _layers(kwargs)
    if not layers:
        return None
    ids, embeds, mask, positions = map(kwargs.get, ("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
    given: Any = ids if embeds is None else embeds
    B, T = given.shape[:2]
    furthest = max(layers, key=lambda layer: layer.state.seen)
    caller = sys._getframe(1)
    prompt, ends = prefill(caller)
    for layer in layers:
        layer.keep_recording(prompt, called_from(caller, ASSISTED) is not None)
    end = 0 if ends is False else furthest.prompt_part(T, prompt)  # of the new columns; proposals may follow
    if end and mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(f"soft tokens need a padding mask [rows, columns], got {_kind(mask)}")
    soft = next(layer.plan.soft for layer in layers if layer.plan.soft is not None)
    for layer in layers:
        layer.soft_columns = len(soft) if end else 0
    if not end:
        return None
    if embeds is None:
        embeds = decoder.get_input_embeddings()(ids)
    if positions is None:
        positions = torch.arange(furthest.state.seen, furthest.state.seen + T, device=embeds.device)[None]
    after = positions[..., end - 1 : end] + torch.arange(1, len(soft) + 1, device=positions.device)
    kwargs["input_ids"] = None
    kwargs["inputs_embeds"] = torch.cat([embeds, soft.to(embeds).expand(B, -1, -1)], 1)
    kwargs["position_ids"] = torch.cat([positions, after], -1)
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(B, len(soft))], 1)
    return (), kwargs


def _cut(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    layers = _layers(kwargs)
    n = layers[0].soft_columns if layers else 0
    if n == 0:
        return None
    for layer in layers:
        layer.soft_columns = 0
    B, T = kwargs["inputs_embeds"].shape[:2]

    def cut(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(cut(one) for one in x)
        if isinstance(x, Tensor) and x.dim() == 2 and len(x) == B * T:  # what routes tokens to experts
            return x.view(B, T, -1)[:, :-n].flatten(0, 1)
        return x[:, :-n] if isinstance(x, Tensor) and x.dim() == 3 else x

    if isinstance(output, tuple):
        return cut(output)
    for name, value in output.items():
        output[name] = cut(value)
    return output


def _kind(mask: Any) -> str:
    return f"a tensor of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
