"""The full cache and others side by side through the same tokens, one by one; can be stopped and goes on."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calidrop import KVCache
from calidrop.abreast import Abreast
from calidrop.parts import Part
from calidrop.plugin import using
from calidrop.recipe import Recipe

TEMPERATURE, SAVE = 0.8, 256
Found = dict[str, np.ndarray]
"""Of one recipe: kl, agree, nll, nll_full [n,prompts]; bytes, ms [n]."""


class Saver(pickle.Pickler):
    """Pickles caches without the functions in them: empty caches of the same recipes have them in the same order."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.functions: dict[FunctionType, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, FunctionType) or "<locals>" not in obj.__qualname__:
            return None
        return self.functions.setdefault(obj, len(self.functions))


class Loader(pickle.Unpickler):
    def __init__(self, file: Any, functions: list[FunctionType]):
        super().__init__(file)
        self.functions = functions

    def persistent_load(self, pid: int) -> FunctionType:
        return self.functions[pid]


class Run:
    """The full cache and others side by side. What it knows after i steps is all in `state`."""

    def __init__(self, model: Any, recipes: list[Part | Recipe], inputs: dict[str, Tensor], n: int, saved: Path):
        self.model, self.n, self.saved = model, n, saved
        self.caches = [KVCache(model, recipe, eager=True) for recipe in ("full", *recipes)]
        self.abreast = Abreast(self.caches)
        self.inputs = {name: x.repeat(len(self.caches), 1) for name, x in inputs.items()}
        rows, self.at = inputs["input_ids"].shape
        mask = self.inputs["attention_mask"]
        self.mask = torch.cat([mask, mask.new_ones(len(mask), n)], 1)
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.state: dict[str, Any] = {
            "tokens": [],
            "draws": [torch.Generator().manual_seed(row).get_state() for row in range(rows)],
            "logits": None,
            "found": [{} for _ in recipes],
        }

    @torch.inference_mode()
    def __call__(self, special: list[int], written: Tensor | None) -> tuple[Tensor, list[Found]]:
        """written: the tokens [rows,n+1], or None: draw them, none of the `special` ones."""
        if self.saved.is_file():
            self._load()
        else:
            self.state["logits"] = self._forward(self.inputs["input_ids"], slice(0, self.at))
        s = self.state
        began, first = time.monotonic(), len(s["tokens"])
        for i in range(first, self.n + 1):
            s["tokens"].append(self._draw(special) if written is None else written[:, i])
            if i:
                self._measure(s["tokens"][-1])
            if i < self.n:
                now = slice(self.at + i, self.at + i + 1)
                s["logits"] = self._forward(s["tokens"][-1].repeat(len(self.caches))[:, None], now)
            if (i + 1) % SAVE == 0 and i < self.n:
                self._save()
                left = (time.monotonic() - began) / (i + 1 - first) * (self.n - i - 1) / 60
                print(f"{i + 1} of {self.n} tokens, {left:.0f} min left", flush=True)
        self.saved.unlink(missing_ok=True)
        return torch.stack(s["tokens"], 1), [{k: np.stack(v) for k, v in found.items()} for found in s["found"]]

    def _forward(self, ids: Tensor, now: slice) -> Tensor:
        self.abreast.seconds()
        mask, position = self.mask[:, : now.stop], self.position[:, now]
        out = self.model(ids, attention_mask=mask, position_ids=position, **using(self.abreast), logits_to_keep=1)
        return out.logits[:, -1]

    def _draw(self, special: list[int]) -> Tensor:
        p = self.state["logits"][: len(self.state["draws"])] / TEMPERATURE
        p, tokens, draw = p.index_fill(-1, torch.tensor(special), float("-inf")).softmax(-1), [], torch.Generator()
        for row, state in enumerate(self.state["draws"]):
            draw.set_state(state)
            tokens.append(p[row].multinomial(1, generator=draw))
            self.state["draws"][row] = draw.get_state()
        return torch.cat(tokens)

    def _measure(self, target: Tensor) -> None:
        full, *others = self.state["logits"].log_softmax(-1).chunk(len(self.caches))
        spent = self.abreast.seconds()[1:]
        for q, cache, seconds, found in zip(others, self.caches[1:], spent, self.state["found"], strict=True):
            for name, x in {
                "kl": (full.exp() * (full - q)).sum(-1).clamp(min=0.0),
                "agree": (full.argmax(-1) == q.argmax(-1)).float(),
                "nll": -q.gather(1, target[:, None])[:, 0],
                "nll_full": -full.gather(1, target[:, None])[:, 0],
                "bytes": torch.tensor(cache.nbytes),
                "ms": torch.tensor(1000 * seconds),
            }.items():
                found.setdefault(name, []).append(x.numpy())

    def _states(self) -> list[Any]:
        return [[layer.state for layer in cache.layers] for cache in self.caches]

    def _save(self) -> None:
        new = self.saved.with_suffix(".new")
        with new.open("wb") as file:
            Saver(file).dump({"caches": self._states(), **self.state})
        new.replace(self.saved)

    def _load(self) -> None:
        empty = Saver(io.BytesIO())
        empty.dump(self._states())
        with self.saved.open("rb") as file:
            self.state = Loader(file, list(empty.functions)).load()
        for cache, states in zip(self.caches, self.state.pop("caches"), strict=True):
            for layer, state in zip(cache.layers, states, strict=True):
                layer.state = state
