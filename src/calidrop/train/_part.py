"""What a killed training continues from: one file beside its output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KIND = "calidrop.part"


class PartFile:
    """Tensors, and how many steps of each stage are in them. Raises ValueError where the file belongs to another run.

    every: seconds between two writes; what came after the last one is done again."""

    def __init__(self, out: Path, settings: dict[str, Any], every: float):
        self.out, self.file, self.settings, self.every = out, out.with_name(out.name + ".part"), settings, every
        self.tensors: dict[str, Tensor] = {}
        self.done: dict[str, int] = {}
        self.written = time.monotonic()
        if self.file.is_file():
            self._read()

    def _read(self) -> None:
        with safe_open(self.file, "pt") as f:
            told = json.loads((f.metadata() or {}).get(KIND, "{}"))
            theirs = told.get("settings", {})
            for name, mine in self.settings.items():
                if theirs.get(name) != mine:
                    raise ValueError(
                        f"{self.file} is of another run: {name} was {theirs.get(name)!r}, now {mine!r}; delete it or "
                        "choose another output"
                    )
            self.done = told["done"]
            self.tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 not a dict

    def step(self, stage: str, done: int) -> None:
        """Note that `done` steps of a stage are in the tensors, and write them if it is time."""
        self.done[stage] = done
        if time.monotonic() - self.written >= self.every:
            beside = self._new()
            text = json.dumps({"settings": self.settings, "done": self.done})
            save_file({n: x.contiguous() for n, x in self.tensors.items()}, beside, {KIND: text})
            os.replace(beside, self.file)
            self.written = time.monotonic()

    def finish(self, save: Callable[[Path], None]) -> None:
        """Write the output, whole or not at all, and remove this file."""
        beside = self.out.with_name(self.out.name + ".new")
        save(beside)
        beside.replace(self.out)
        for file in (self.file, self._new()):  # the latter where a run was killed as it wrote
            file.unlink(missing_ok=True)

    def _new(self) -> Path:
        return self.file.with_name(self.file.name + ".new")
