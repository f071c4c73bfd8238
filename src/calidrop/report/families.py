"""What a recipe is made of, as far as its string tells: nothing is built, as that may need files that are elsewhere."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from calidrop.methods import METHODS
from calidrop.parts import Full, Rest, Selector, Shrink, Storage, role_of
from calidrop.recipe import outline

OTHER = "another library"
FAMILIES = ("uncompressed", "storage", "eviction", "eviction + storage", "evicted still answer", OTHER)
"""By which points are coloured."""


@dataclass(frozen=True)
class About:
    """One part of a recipe: its text, role, paper, and what its docstring says first."""

    text: str
    role: str
    paper: str
    says: str


def parts(recipe: str) -> list[About]:
    """None for another library's cache; methods that are not known here are left out."""
    told = [(METHODS[name], text) for name, text in outline(recipe) if name in METHODS]
    return [About(text, role_of(build), build.paper, _first(build)) for build, text in told]


def family(recipe: str) -> str:
    roles = {part.role for part in parts(recipe)}
    if Full.role in roles:
        return "uncompressed"
    if Rest.role in roles:
        return "evicted still answer"
    stored, chosen = bool(roles & {Storage.role, Shrink.role}), Selector.role in roles
    return "eviction + storage" if stored and chosen else "eviction" if chosen else "storage" if stored else OTHER


def _first(build: object) -> str:
    return " ".join((inspect.getdoc(build) or "").partition("\n\n")[0].split())
