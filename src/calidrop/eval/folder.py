"""A run's folder: run.json says under which settings its rows were made, rows.jsonl holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from calidrop.eval.rows import Row, append, mend, read, there, unpack
from calidrop.eval.table import Line, table
from calidrop.eval.versions import machine, versions


class Folder:
    """settings: what all rows must have in common. Raises ValueError, saying which, where the folder has others, and
    where another run is writing to it. Nothing is written before `open`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = path, dict(settings)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is no folder")
        self.rows = read(self._rows) if there(self._rows) else []
        self.told = json.loads(self._run.read_text("utf-8")) if self._run.is_file() else None
        if self.told is None and (self.rows or (path.is_dir() and any(path.iterdir()))):
            raise ValueError(f"{path} has no run.json: no folder of a run, and not empty; give another one with --out")
        if self.told is not None:
            now = {"settings": self.settings, "versions": versions()}
            theirs = {**self.told["settings"], **self.told["versions"]}
            ours = {**now["settings"], **now["versions"]}
            if differ := [
                f"{name} ({theirs.get(name)} there, {ours.get(name)} now)"
                for name in {**theirs, **ours}
                if theirs.get(name) != ours.get(name)
            ]:
                raise ValueError(f"{path} was made under other settings: {', '.join(differ)}; give another --out")

    @property
    def _rows(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    def open(self, command: str, asked: Mapping[str, Any]) -> None:
        """Make the folder, or note that it goes on. asked: what this command wants measured."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing to {self.path}") from None
        unpack(self._rows)
        if self._rows.is_file():
            mend(self._rows)
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.told = self.told or {
            "settings": self.settings, "versions": versions(), "environment": machine(), "commands": [],
        }  # fmt: skip
        self.told["commands"].append({"command": command, "time": when, "asked": dict(asked)})
        _write(self._run, self.told)

    def add(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        append(self._rows, rows)
        self.rows += rows

    def close(self) -> list[Line]:
        """Write table.json and let others in."""
        lines = table(self.rows)
        _write(self.path / "table.json", [asdict(line) for line in lines])
        self.lock.release()
        return lines


def rows_of(path: Path) -> list[Row]:
    """Of a folder as it is. Raises ValueError where there are none."""
    rows = read(path / "rows.jsonl") if there(path / "rows.jsonl") else []
    if not rows:
        raise ValueError(f"{path} has no rows: no folder of a run, or an empty one")
    return rows


def lines(path: Path) -> list[Line]:
    return table(rows_of(path))


def _write(path: Path, told: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new.replace(path)
