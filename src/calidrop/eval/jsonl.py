"""Samples from and to JSON-lines files: the columns that RULER, LongBench and LooGLE are passed around in, and RULER's
own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.score import FIRST_LINE, KNOWN, MEASURED, METRICS, known

Kinds = tuple[type, ...]
REQUIRED: dict[str, Kinds] = {
    "context": (str,),
    "question": (str,),
    "answer_prefix": (str,),
    "answer": (str, int, list),
    "max_new_tokens": (int,),
    "task": (str,),
}
OPTIONAL: dict[str, Kinds] = {
    "answers": (list,),  # LongBench's name of `answer`
    "all_classes": (list, type(None)),
    "length": (int,),
    "depth": (int, float, type(None)),
    "index": (int,),
    "metric": (str,),
    "group": (str,),
    "gold": (str,),
    "stop": (list,),
    **dict.fromkeys(("_id", "id", "dataset", "language", "context_window", "token_position_answer"), (str, int)),
}
"""Those of the last line are not read."""
OWN = {"index": int, "input": str, "outputs": list, "length": int}
"""RULER's own files: the question is the end of `input`, the task is the name of the file."""


def load(path: Path) -> list[Sample]:
    """Raises ValueError with file and line for what is malformed, missing, unknown or of the wrong type."""
    try:
        *lines, rest = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    samples = []
    for n, line in enumerate([*lines, rest], 1):
        if not line.strip():
            continue
        try:
            samples.append(_sample(json.loads(line), path, len(samples)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {n} is no JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from None
    if not samples:
        raise ValueError(f"{path} has no samples")
    return samples


def _sample(row: Any, path: Path, index: int) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with columns, got {type(row).__name__}")
    row = _of_ruler(row, path) if set(OWN) <= set(row) else dict(row)
    if "answers" in row and "answer" not in row:
        row["answer"] = row.pop("answers")
    _check(row)
    raw = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    answers = tuple(str(a) for a in raw)
    group, metric = known(row["task"]) or ("jsonl", None)
    metric = row.get("metric", metric)
    if metric not in METRICS and metric not in MEASURED:
        raise ValueError(
            f"task {row['task']!r} has no known metric: add a column metric with one of {', '.join(METRICS)}"
        )
    if not answers and metric in METRICS:
        raise ValueError("answer is empty: expected at least one")
    several = metric == "string_match_all"  # else the answers are alternatives
    gold = row.get("gold", gold_of(answers if several else answers[:1], row["answer_prefix"]))
    stop = tuple(row.get("stop", ("\n",) if row["task"].removesuffix("_e") in FIRST_LINE else ()))
    return Sample(
        row["task"], row.get("group", group), metric, row["context"], row["question"], row["answer_prefix"], answers,
        gold, row["max_new_tokens"], row.get("length", 0), row.get("index", index), row.get("depth"), stop,
        tuple(row.get("all_classes") or ()),
    )  # fmt: skip


def _check(row: dict[str, Any]) -> None:
    columns = REQUIRED | OPTIONAL
    if missing := [name for name in REQUIRED if name not in row]:
        raise ValueError(f"missing column {', '.join(missing)}; expected {', '.join(REQUIRED)}")
    if unknown := [name for name in row if name not in columns]:
        raise ValueError(f"unknown column {', '.join(unknown)}; known: {', '.join(columns)}")
    for name, value in row.items():
        kinds = columns[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"column {name} must be {expected}, got {value!r:.60}")
    if not row["context"]:
        raise ValueError("column context is empty")
    if row["max_new_tokens"] < 1:
        raise ValueError(f"column max_new_tokens must be at least 1, got {row['max_new_tokens']}")


def _of_ruler(row: dict[str, Any], path: Path) -> dict[str, Any]:
    if unknown := set(row) - set(OWN) - {"answer_prefix", "token_position_answer"}:
        raise ValueError(f"unknown column {', '.join(sorted(unknown))} in a file of RULER's own format")
    named = [task for task, (group, _) in KNOWN.items() if group == "ruler" and path.stem.startswith(task)]
    if not named:
        raise ValueError(f"a file of RULER's own format must be named after its task, got {path.name}")
    return {
        "context": row["input"], "question": "", "answer_prefix": row.get("answer_prefix", ""),
        "answer": row["outputs"], "max_new_tokens": 128, "task": named[0], "length": row["length"],
        "index": row["index"],
    }  # fmt: skip


def dump(path: Path, samples: Iterable[Sample]) -> None:
    """What `load` reads back as the same samples."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = asdict(sample)
            for name, column in (("prefix", "answer_prefix"), ("answers", "answer"), ("classes", "all_classes")):
                row[column] = row.pop(name)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
