"""KV-cache compression for Hugging Face models: bytes really freed, any method with any other.

model, tokenizer = calidrop.load()
cache = calidrop.KVCache(model, "snapkv(budget=256)+calidrop")
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)
"""

from calidrop.cache import KVCache as KVCache
from calidrop.load import load as load
from calidrop.recipe import Recipe as Recipe

__version__ = "0.1.0"
__all__ = ["KVCache", "Recipe", "load"]
