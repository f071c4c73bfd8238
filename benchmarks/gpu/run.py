"""Sections that fail alone, stay within a time, and write what they have."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Run:
    """device: where; tiny: shapes an interpreter manages; out: where the JSON goes after each section."""

    device: torch.device
    tiny: bool
    out: Path | None
    layers: int | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def section(self, name: str, seconds: float, rows: Callable[[Run], Iterable[dict]]) -> None:
        """Rows as they come, until they end, fail or take too long; whatever happens, the rest of the run goes on."""
        start, done, error = time.perf_counter(), [], ""
        print(f"\n== {name}", flush=True)
        try:
            for row in rows(self):
                done.append(row)
                if time.perf_counter() - start > seconds:
                    error = f"stopped after {seconds:.0f} s"
                    break
        except Exception:
            error = traceback.format_exc()
        took = time.perf_counter() - start
        self.found[name] = {"rows": done, "error": error, "seconds": round(took, 1)}
        print(f"-- {name}: {took:.0f} s{'; ' + error if error else ''}", flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.found, indent=1))
        self.clear()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> int:
        """Bytes."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1 << 30

    def guarded(self, row: dict, measure: Callable[[], dict]) -> dict:
        """The row with what was measured, or with why it was not."""
        try:
            row |= measure()
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(traceback.format_exc(limit=-4), flush=True)
        self.clear()
        return row


def show(row: dict, columns: Sequence[tuple[str, str]]) -> dict:
    """Print a row as it comes. columns: name and format."""
    cells = [f"{row[name]:{spec}}" for name, spec in columns if row.get(name) is not None]
    print("  ".join([*cells, row.get("error", "")]), flush=True)
    return row
