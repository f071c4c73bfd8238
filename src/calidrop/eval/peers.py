"""Caches of other libraries that can be measured in place of a recipe, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from calidrop.support import layer_kinds

PEERS: dict[str, Callable[[Any], Cache]] = {
    "transformers:DynamicCache": lambda model: DynamicCache(config=model.config),
    "transformers:QuantizedCache-fp8": lambda model: QuantizedCache("fp8", model.config),
}


def is_peer(name: str) -> bool:
    """Whether a name means another library's cache and no recipe: LIBRARY:CACHE."""
    return ":" in name.partition("(")[0]


def check_peer(name: str, model: Any) -> None:
    """Raises ValueError for a name that is none, or a model that it cannot work with."""
    if name not in PEERS:
        raise ValueError(f"unknown cache {name!r}; known: {', '.join(PEERS)}")
    if "Quantized" in name and any(layer_kinds(model.config.get_text_config(decoder=True)).values()):
        raise ValueError(f"{name} refuses models with sliding-window layers ({model.config.model_type})")
