"""Models without weights: enough to know what their cache would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig


def read_config(path: str | Path) -> Any:
    """The config of a checkpoint's folder or config.json. Raises ValueError for anything else."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"no such config: {file}; give a config.json or the folder that holds one")
    try:
        return AutoConfig.from_pretrained(file)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file} is no config of a model that transformers knows: {_first_line(error)}") from error


def skeleton(config: Any) -> Any:
    """The decoder a config describes, on the meta device: no memory, half a second. Raises ValueError for a config that
    describes no decoder."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"expected a transformers model or config, got {type(config).__name__}")
    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(text)
    except ValueError as error:
        raise ValueError(f"{config.model_type} is not supported: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]
