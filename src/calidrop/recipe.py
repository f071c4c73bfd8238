"""Recipes: one string, or the same Python call, says what a cache does.

Parts are joined by `+`; each fills one role. The string form is parsed into the calls of the builder functions, so
there is one source of names, defaults and errors.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from calidrop.parts import Deputies, Evictor, Full, Layer, Part, Plan, Rest, Selector, Shrink, Storage
from calidrop.store import Exact, Store


@dataclass(frozen=True)
class Recipe:
    """Parts with at most one for each role. Raises ValueError when they do not fit together."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for i, part in enumerate(self.parts):
            for other in self.parts[:i]:
                if part.role == other.role:
                    raise ValueError(f"{other} and {part} fill the same role ({part.role}): a recipe takes one of them")
                if isinstance(part, Full) or isinstance(other, Full):
                    raise ValueError(f"{other} and {part} cannot be joined: full keeps everything exact")
        storage, select = self.part(Storage), self.part(Selector)
        if storage and storage.chose_recent and select:
            raise ValueError(f"{select} and {storage} both say how many recent tokens stay exact: drop the latter's")
        for kind in (Deputies, Rest):
            if self.part(kind) and select and not isinstance(select, Evictor):
                raise ValueError(f"{select} and {self.part(kind)} cannot be joined: {select.name} evicts nothing")
        self._check_shrink(self.part(Shrink), select, storage)

    def _check_shrink(self, shrink: Shrink | None, evict: Selector | None, storage: Storage | None) -> None:
        if shrink is None:
            return
        if shrink.joint and evict and evict.per_head:
            raise ValueError(
                f"{evict} and {shrink} cannot be joined: {shrink.name} stores all heads of a token as one, but "
                f"{evict.name} keeps other tokens in each head (streaming_llm and tova keep the same in all)"
            )
        if storage and storage.weighs:
            raise ValueError(
                f"{shrink} and {storage} cannot be joined: {storage.name} compares queries with the keys it stores, "
                f"but {shrink.name} hands it something else"
            )

    def part(self, kind: type) -> Any:
        return next((p for p in self.parts if isinstance(p, kind)), None)

    @property
    def alone(self) -> bool:
        """Whether it changes how a prompt is run, so that no other recipe can share the pass (`tee`)."""
        select = self.part(Selector)
        return select is not None and select.soft is not None

    @property
    def rotations(self) -> bool:
        """Whether a part has to know how layers rotate keys."""
        return any(part.rotations for part in self.parts)

    def __add__(self, other: Part | Recipe | str) -> Recipe:
        return Recipe((*self.parts, *_read(other).parts))

    def __str__(self) -> str:
        return "+".join(p.text for p in self.parts)

    def plan(self, layer: Layer) -> Plan:
        kinds = (Selector, Storage, Rest, Shrink, Deputies)
        select, storage, rest, shrink, stand = (self.part(kind) for kind in kinds)
        for part in self.parts:
            if layer.value_dim == 0 and not part.latents:
                raise ValueError(f"{part} does not work on latents (multi-head latent attention), which are no keys")

        def kept() -> Store:
            inner = storage.make if storage else lambda narrow: Exact()
            return shrink.make(layer, inner) if shrink else inner(layer)

        observe = max([1, *(p.observe for p in (select, rest, shrink) if p)])
        lead = select or storage or shrink  # says which tokens are compressed when
        if lead is None:
            return Plan(None, 0, None, 1)
        if select is None:
            return Plan(kept(), lead.recent, lead.every, observe)
        store = select.store(layer, kept, rest.make(layer) if rest else None, stand)
        return Plan(store, select.recent, select.every, observe, select.prompts, select.soft)


def parse(recipe: str | Part | Recipe) -> Recipe:
    """The recipe a string means. Raises ValueError naming what is wrong and what would be valid."""
    whole = _read(recipe)
    for kind in (Rest, Deputies):
        if whole.part(kind) and not whole.part(Selector):
            raise ValueError(f"{whole.part(kind)} needs a part that says which tokens stay, like snapkv(budget=512)")
    return whole


def _read(recipe: str | Part | Recipe) -> Recipe:
    """`parse` for a sum that may still be incomplete."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Part):
        return Recipe((recipe,))
    if not isinstance(recipe, str):
        raise ValueError(f"expected a recipe string or parts joined by +, got {type(recipe).__name__}")
    try:
        calls = _calls(recipe)
    except SyntaxError:
        raise ValueError(
            f"cannot read the recipe {_shown(recipe)}; write it like 'snapkv(budget=512)+calidrop'"
        ) from None
    return Recipe(tuple(_part(call, recipe) for call in calls))


def outline(recipe: str) -> list[tuple[str, str]]:
    """(method, text) of each part, as written: nothing is built or checked. Empty for what is no recipe."""
    try:
        calls = _calls(recipe)
    except SyntaxError:
        return []
    names = [call.func if isinstance(call, ast.Call) else call for call in calls]
    return [(n.id, ast.unparse(c)) for n, c in zip(names, calls, strict=True) if isinstance(n, ast.Name)]


def _calls(recipe: str) -> list[ast.expr]:
    """What is joined by +. Raises SyntaxError, also for what is nested too deeply for Python."""
    try:
        left, calls = [ast.parse(recipe.strip(), mode="eval").body], []
        while left:
            node = left.pop()
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                left += [node.right, node.left]
            else:
                ast.unparse(node)  # goes deeper than whatever reads it later
                calls.append(node)
    except (RecursionError, MemoryError) as error:
        raise SyntaxError("nested too deeply") from error
    return calls


def _shown(recipe: str) -> str:
    """In quotes, as much of it as fits a message."""
    return repr(recipe) if len(recipe) <= 200 else f"{recipe[:200]!r}... ({len(recipe)} characters)"


def _part(node: ast.expr, recipe: str) -> Part:
    from calidrop.methods import METHODS

    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in the recipe {_shown(recipe)}; write it like 'snapkv(budget=512)'"
        )
    if name.id not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ValueError(f"unknown method {name.id!r} in the recipe {_shown(recipe)}; known: {known}")
    try:
        args = [ast.literal_eval(a) for a in call.args] if call else []
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
        once = call is None or len(kwargs) == len(call.keywords)
    except (ValueError, TypeError):
        once = False
    if not once:
        raise ValueError(
            f"the arguments of {ast.unparse(node)!r} must be plain numbers, words in quotes or True/False, each once"
        )
    return METHODS[name.id](*args, **kwargs)
