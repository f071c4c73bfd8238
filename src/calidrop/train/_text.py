"""Calibration text."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from calidrop.parts import check_int


def windows(tokenizer: Any, text: str, n: int, length: int) -> Tensor:
    """int64 [n,length], spread evenly over the text, none overlapping."""
    check_int("windows", n, 1)
    check_int("length", length, 2)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < n * length:
        raise ValueError(f"text too short: got {len(ids)} tokens, need {n * length} ({n} windows of {length})")
    starts = [i * (len(ids) - length) // max(1, n - 1) for i in range(n)]
    return torch.tensor([ids[start : start + length] for start in starts])


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
