"""One file per task (RULER's by kind). A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calidrop.eval.kit import Make
from calidrop.eval.tasks import (
    fidelity,
    generation,
    gsm8k,
    lines,
    needle,
    passkey,
    qa,
    ruler_cwe,
    ruler_fwe,
    ruler_niah,
    ruler_qa,
    ruler_vt,
)


@dataclass(frozen=True)
class Task:
    make: Make
    group: str
    about: str


def _ruler(makers: dict[str, Make], about: str) -> dict[str, Task]:
    return {name: Task(make, "ruler", about) for name, make in makers.items()}


TASKS: dict[str, Task] = {
    "needle": Task(needle.make, "needle", "a number hidden in a book, at five depths"),
    "passkey": Task(passkey.make, "passkey", "a pass key among sentences that repeat, at five depths"),
    "lines": Task(lines.make, "longeval", "the number a named line holds, among lines like it"),
    **_ruler(ruler_niah.MAKERS, "needles by name: one or more, among text, noise or needles"),
    **_ruler({"vt": ruler_vt.make}, "all variables of a chain of assignments"),
    **_ruler({"cwe": ruler_cwe.make}, "the ten common words of a list"),
    **_ruler({"fwe": ruler_fwe.make}, "the three most frequent made-up words"),
    **_ruler(ruler_qa.MAKERS, "a fact from one or two of many documents"),
    "qa": Task(qa.make, "qa", "a fact from a paragraph hidden in a book; nll of the answer"),
    "fidelity": Task(fidelity.make, "fidelity", "a page of a book predicted: KL, agreement, nll"),
    "generation": Task(generation.make, "generation", "a book continued at length: how long it stays the same"),
    "gsm8k": Task(gsm8k.make, "gsm8k", "grade school mathematics after solved examples"),
}


def named(names: Sequence[str]) -> list[str]:
    """Tasks by their names, their groups' names, or "all". Raises ValueError for unknown ones."""
    out: dict[str, None] = {}
    for name in names:
        found = [t for t in TASKS if name in (t, TASKS[t].group, "all")]
        if not found:
            raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}, and the groups ruler and all")
        out |= dict.fromkeys(found)
    return list(out)
