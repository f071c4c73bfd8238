"""Files that `calidrop train` writes: tensors, what they are, and for which model.

meta always has model, model_type, layers, kv_heads and head_dim; samples are a few key weights of each layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calidrop.parts import Layer


def kind(method: str) -> str:
    """The metadata entry that tells one method's files from others."""
    return f"calidrop.{method}"


def save(method: str, file: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    # a single entry, since safetensors writes several in no fixed order
    save_file({n: x.contiguous().cpu() for n, x in tensors.items()}, file, {kind(method): json.dumps(meta)})


def load(method: str, file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """meta and tensors. Raises ValueError for a file that is not there or not one of this method's."""
    command = f"calidrop train {method.replace('_', '-')}"
    if not Path(file).is_file():
        raise ValueError(f"{method}: no file {file!r}; make it with: {command} --out {file}")
    try:
        with safe_open(file, "pt") as f:
            text = (f.metadata() or {}).get(kind(method))
            data = {name: f.get_tensor(name) for name in f.keys()} if text else {}  # noqa: SIM118 not a dict
    except SafetensorError:
        text, data = None, {}
    if text is None:
        raise ValueError(f"{method}: {file!r} was not written by {command}")
    return json.loads(text), data


def facts(layers: Sequence[Layer], hidden: int) -> dict[str, Any]:
    """What `check_shape` compares, and the width of hidden states. layers: the compressed ones."""
    one = layers[0]
    shape = {"kv_heads": one.kv_heads, "head_dim": one.head_dim, "hidden": hidden}
    return {"model_type": one.model_type, "layers": len(layers), **shape}


def key_samples(layers: Sequence[Layer]) -> Tensor:
    """What tells this model's weights from others', fp32 [layers,64]; zeros where there are none."""
    return torch.stack([torch.zeros(64) if x.sample is None else x.sample.cpu() for x in layers])


def made_for(meta: dict[str, Any]) -> str:
    return f"it was made for {meta['model']} ({meta['model_type']})"


def check_shape(method: str, meta: dict[str, Any], layer: Layer, *more: tuple[str, str, int]) -> None:
    """Raises ValueError for a layer of a model of another kind or shape. more: what else is compared: its name, that in
    meta, and the layer's."""
    known = (
        ("model type", "model_type", layer.model_type or meta["model_type"]),
        ("compressed layers", "layers", layer.layers),
        ("key dims per head", "head_dim", layer.head_dim),
    )
    for what, name, theirs in (*known, *more):
        if theirs != meta[name]:
            raise ValueError(f"{method}: {made_for(meta)}: {what} {meta[name]}, this model has {theirs}")


def check_weights(method: str, meta: dict[str, Any], samples: Tensor, layer: Layer) -> None:
    """Raises ValueError for a layer of a model of the same shape with other weights."""
    if layer.sample is not None:
        own = samples[layer.index]
        if not torch.allclose(layer.sample.cpu(), own, rtol=0.02, atol=0.02 * float(own.abs().mean())):
            raise ValueError(f"{method}: {made_for(meta)}, whose key weights are not this model's")
