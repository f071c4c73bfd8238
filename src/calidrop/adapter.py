"""Adapters: what `calidrop train` taught a model about living with a compressed cache, as a PEFT folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from calidrop.cache import layers_of
from calidrop.support import check_model

ABOUT = "calidrop.json"  # beside adapter_config.json: which model it is for, how it was made, what it measured
SAMPLE = 8  # key weights kept of each layer


def facts(model: Any) -> dict[str, Any]:
    """What tells this model from others, for JSON."""
    config = check_model(model)
    samples = [layer.sample for layer, _ in layers_of(model)]
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "samples": [None if x is None else x[:SAMPLE].tolist() for x in samples],
    }


def check_same(what: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises ValueError naming the first fact that differs. Weights may differ as much as their rounding does."""
    for name, own in mine.items():
        other = theirs.get(name)
        if name == "samples" and other is not None and len(other) == len(own):
            pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(own, other, strict=True) if a and b]
            if all(torch.allclose(a, b, rtol=0.02, atol=0.02 * float(b.abs().mean())) for a, b in pairs):
                continue
            raise ValueError(f"{what} is for a {mine['model_type']} with other weights than this one")
        if other != own:
            raise ValueError(f"{what} is for another model: {name} is {other!r} there, {own!r} here")


def adapt(model: Any, folder: str | Path) -> Any:
    """The model with the adapter in `folder` merged into its weights: a plain transformers model, for any cache.

    The weights of `model` itself are changed. Needs PEFT (`pip install 'calidrop[train]'`). Raises ValueError for a
    folder that holds no adapter, or one made for another model; then nothing is changed."""
    about = Path(folder) / ABOUT
    if not about.is_file():
        raise ValueError(f"no adapter in {str(folder)!r}: it has no {ABOUT}; give the folder calidrop train wrote")
    check_same(str(folder), json.loads(about.read_text())["model"], facts(model))
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[operator]
