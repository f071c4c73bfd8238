"""KV-cache compression for Hugging Face models: bytes really freed, any method with any other.

model, tokenizer = calidrop.load()
cache = calidrop.KVCache(model, "snapkv(budget=256)+calidrop")
out = model.generate(**inputs, cache=cache, max_new_tokens=64)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calidrop.adapter import adapt as adapt
    from calidrop.cache import KVCache as KVCache
    from calidrop.linear import fast_linear as fast_linear
    from calidrop.models import load as load
    from calidrop.planning import plan as plan
    from calidrop.recipe import Recipe as Recipe
    from calidrop.showing import show as show

__version__ = "0.1.0"
__all__ = ["KVCache", "Recipe", "adapt", "fast_linear", "load", "plan", "show"]

_HOME = {
    "KVCache": "cache", "Recipe": "recipe", "adapt": "adapter", "fast_linear": "linear", "load": "models",
    "plan": "planning", "show": "showing",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported when first asked for: torch and transformers take seconds that `calidrop --help` need not."""
    if name not in _HOME:
        raise AttributeError(f"module 'calidrop' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"calidrop.{_HOME[name]}"), name)
