"""The results: one row per sample and recipe, appended to RUN/rows.jsonl, never changed.

To be handed on, the file may be packed (`xz rows.jsonl`): it is read just as well, and unpacked by a run that goes on.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calidrop.eval.sample import Sample

FORMAT = 1  # part of every key: raise it when a row comes to mean something else


@dataclass
class Row:
    """key: hash of everything that makes the result: model, recipe, sample, question, settings. question: "seen",
    "later", or None where there is none. score: 0 to 1, named by `metric`. nll: nats of the whole gold answer,
    teacher-forced, summed over its `answer_tokens`; divide for nats per token. kl, kl_p95: KL(full || recipe) in nats,
    mean and 95th percentile over the predictions along the gold answer that come from the compressed cache; agreement:
    the share of them with the same likeliest token. prediction: generated greedily. Bytes: what the cache held at the
    end, on the device and on the host, and what an uncompressed one holds. prefill_s: attending and compressing the
    prompt (a shared pass counts in full for each). decode_ms_per_token: the median step of the generation, the first
    left out; None for less than two, and where several recipes answered in one batch. recompute_rate: how often a head
    went back to evicted tokens. seconds: all that was spent on the row (its part of a batch), without a shared prefill.
    error: why the row has no results; it is tried again.
    """

    key: str
    model: str
    recipe: str
    task: str
    group: str
    length: int
    depth: float | None
    question: str | None
    sample: int
    metric: str
    gold: str
    score: float | None = None
    nll: float | None = None
    answer_tokens: int | None = None
    kl: float | None = None
    kl_p95: float | None = None
    agreement: float | None = None
    prediction: str | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    full_bytes: int | None = None
    prefill_s: float | None = None
    decode_ms_per_token: float | None = None
    recompute_rate: float | None = None
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    time: str = ""


def key_of(sample: Sample, model: str, recipe: str, question: str | None, settings: Mapping[str, Any]) -> str:
    content = [FORMAT, asdict(sample), model, recipe, question, dict(settings)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def empty(sample: Sample, model: str, recipe: str, question: str | None, key: str) -> Row:
    """A row that still lacks its results."""
    told = {name: getattr(sample, name) for name in ("task", "group", "length", "depth", "metric", "gold")}
    return Row(key, model, recipe, question=question, sample=sample.index, **told)


def packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.xz")


def there(path: Path) -> bool:
    return path.is_file() or packed(path).is_file()


def unpack(path: Path) -> None:
    """Nothing where there are rows already, or none packed."""
    if not path.is_file() and packed(path).is_file():
        path.write_text(_text(path), "utf-8")


def _text(path: Path) -> str:
    if path.is_file():
        return path.read_text("utf-8")
    try:
        return lzma.decompress(packed(path).read_bytes()).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{packed(path)} cannot be unpacked: {error}") from None


def read(path: Path) -> list[Row]:
    """Raises ValueError, with the line, for what is no row. A last line that was cut off while written is no error."""
    rows = []
    *lines, _ = _text(path).split("\n")
    for n, line in enumerate(lines, 1):
        try:
            rows.append(_checked(Row(**json.loads(line))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {n} is no row: {error}") from None
    return rows


KINDS = {"str": str, "int": int, "float": (int, float), "None": type(None), "dict[str, str]": dict}


def _checked(row: Row) -> Row:
    for name, one in Row.__dataclass_fields__.items():
        value, kinds = getattr(row, name), str(one.type).split(" | ")
        if not any(isinstance(value, KINDS[kind]) for kind in kinds):
            raise ValueError(f"{name} must be {one.type}, got {value!r}")
    return row


def append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end."""
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def latest(rows: Iterable[Row]) -> dict[str, Row]:
    """One row per key: the last that has results, else the last."""
    out: dict[str, Row] = {}
    for row in rows:
        if row.key not in out or row.error is None or out[row.key].error is not None:
            out[row.key] = row
    return out
