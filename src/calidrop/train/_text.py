"""What trainings read, and short names for it."""

from __future__ import annotations

import hashlib
import json
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


def read_rows(text: str, source: str, *fields: str) -> list[dict[str, str]]:
    """These fields of the JSON object on each line. Raises ValueError, which names the source, for a line that is none
    or lacks one."""
    made = []
    for i, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            made.append({name: str(row[name]) for name in fields})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{source}, line {i + 1}: expected a JSON object with {' and '.join(fields)}") from None
    return made


def digest(x: Any) -> str:
    """Of a tensor, or of what JSON can write."""
    data = x.numpy().tobytes() if isinstance(x, Tensor) else json.dumps(x).encode()
    return hashlib.sha256(data).hexdigest()[:16]
