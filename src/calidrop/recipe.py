"""Recipes: one string, or the same Python call, says what a cache does.

A method is a builder function (`snapkv(budget=512)`) that returns a part. Parts are joined by `+`; each fills one role.
The string form is parsed into the same calls, so there is one source of names, defaults and errors.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calidrop.parallel import HeadGroup
from calidrop.rope import Rope
from calidrop.store import Budget, Discard, Exact, Score, Split, Store


@dataclass(frozen=True)
class Layer:
    """What a method may know about the layer it is built for. `index` counts the compressed layers only; heads are
    those of all processes. head_dim is that of keys; value_dim is the same unless given. model_type and sample, a few
    of the layer's key weights if it has any to itself, tell models apart: what was trained on one fits no other."""

    index: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    heads: HeadGroup
    value_dim: int = 0
    model_type: str = ""
    sample: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)


@dataclass(frozen=True)
class Part:
    """One method with its arguments. `text` is its canonical recipe string."""

    name: str = dataclasses.field(default="", init=False)
    text: str = dataclasses.field(default="", init=False)

    role = "nothing"

    def __add__(self, other: Part | Recipe | str) -> Recipe:
        return Recipe((self,)) + other

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Full(Part):
    """Keeps everything exact."""

    role = "everything exact"


@dataclass(frozen=True)
class Evictor(Part):
    """Which tokens stay. recent: the last tokens, always kept exact in the window and counted in the budget.
    every: compress again each so many generated tokens (None: only prompts are compressed). observe: the number of
    last queries the score looks at. per_head: whether heads may keep different tokens."""

    score: Callable[[Layer], Score]
    keep: Callable[[Layer], Budget]
    recent: int
    every: int | None
    observe: int = 1
    per_head: bool = True

    role = "which tokens stay"


@dataclass(frozen=True)
class Storage(Part):
    """How kept tokens are stored. recent: the last tokens that stay exact when no evictor says so; `chose_recent`
    tells whether the user asked for that number. weighs: whether it compares queries with the keys it is given."""

    make: Callable[[Layer], Store]
    recent: int
    every: int
    chose_recent: bool = False
    weighs: bool = False

    role = "how kept tokens are stored"


@dataclass(frozen=True)
class Shrink(Part):
    """Which part of a kept token is stored; nests in front of a storage, which it builds for the narrower tokens.
    joint: it stores all kv heads of a token as one, so none can be missing in some heads, and what it hands on has no
    products with queries."""

    make: Callable[[Layer, Callable[[Layer], Store]], Store]
    recent: int
    every: int
    observe: int = 1
    joint: bool = False

    role = "which channels of kept tokens stay"


@dataclass(frozen=True)
class Rest(Part):
    """What becomes of evicted tokens."""

    make: Callable[[Layer], Store]
    observe: int = 1

    role = "what becomes of the rest"


@dataclass(frozen=True)
class Plan:
    """How one layer is run."""

    store: Store | None
    recent: int
    every: int | None
    observe: int


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
        storage = self.part(Storage)
        if storage and storage.chose_recent and self.part(Evictor):
            raise ValueError(
                f"{self.part(Evictor)} and {storage} both say how many recent tokens stay exact: drop the latter's"
            )
        self._check_shrink(self.part(Shrink), self.part(Evictor), storage)

    def _check_shrink(self, shrink: Shrink | None, evict: Evictor | None, storage: Storage | None) -> None:
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

    def __add__(self, other: Part | Recipe | str) -> Recipe:
        return Recipe((*self.parts, *_read(other).parts))

    def __str__(self) -> str:
        return "+".join(p.text for p in self.parts)

    def plan(self, layer: Layer) -> Plan:
        evict, storage, rest, shrink = (self.part(kind) for kind in (Evictor, Storage, Rest, Shrink))
        inner = storage.make if storage else lambda narrow: Exact()
        kept = shrink.make(layer, inner) if shrink else inner(layer)
        observe = max([1, *(p.observe for p in (evict, rest, shrink) if p)])
        lead = evict or storage or shrink  # says which tokens are compressed when
        if lead is None:
            return Plan(None, 0, None, 1)
        if evict is None:
            return Plan(kept, lead.recent, lead.every, observe)
        store = Split(evict.score(layer), evict.keep(layer), kept, rest.make(layer) if rest else Discard())
        return Plan(store, evict.recent, evict.every, observe)


def method(paper: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a builder function as a method. `paper` names the source, for the table of methods."""

    def mark(build: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(build)

        @functools.wraps(build)
        def builder(*args: Any, **kwargs: Any) -> Part:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as e:
                raise ValueError(f"{build.__name__}: {e}; it takes {build.__name__}{_arguments(signature)}") from None
            part = build(*args, **kwargs)
            given = ", ".join(f"{n}={v!r}" for n, v in bound.arguments.items())
            object.__setattr__(part, "name", build.__name__)
            object.__setattr__(part, "text", f"{build.__name__}({given})" if given else build.__name__)
            return part

        builder.paper = paper  # type: ignore[attr-defined]
        return builder

    return mark


def _arguments(signature: inspect.Signature) -> str:
    return (
        "("
        + ", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in signature.parameters.items())
        + ")"
    )


def parse(recipe: str | Part | Recipe) -> Recipe:
    """The recipe a string means. Raises ValueError naming what is wrong and what would be valid."""
    whole = _read(recipe)
    if whole.part(Rest) and not whole.part(Evictor):
        raise ValueError(f"{whole.part(Rest)} needs a part that says which tokens stay, like snapkv(budget=512)")
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
        tree = ast.parse(recipe.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"cannot read the recipe {recipe!r}; write it like 'snapkv(budget=512)+calidrop'") from None
    return Recipe(tuple(_parts(tree, recipe)))


def _parts(node: ast.expr, recipe: str) -> list[Part]:
    from calidrop.methods import METHODS

    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left, recipe) + _parts(node.right, recipe)
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in the recipe {recipe!r}; write it like 'snapkv(budget=512)'"
        )
    if name.id not in METHODS:
        raise ValueError(f"unknown method {name.id!r} in the recipe {recipe!r}; known: {', '.join(sorted(METHODS))}")
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
    return [METHODS[name.id](*args, **kwargs)]


def check_budget(name: str, budget: int | float, recent: int) -> None:
    """A budget is a whole number of tokens above `recent`, or a fraction of the prompt in (0, 1)."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"{name}: budget must be tokens per kv head (int > 0) or a fraction in (0, 1), got {budget!r}")
    if isinstance(budget, float) and budget >= 1:
        raise ValueError(
            f"{name}: a float budget is a fraction of the prompt in (0, 1), got {budget!r}; for tokens write an int"
        )
    check_int(f"{name}: recent", recent, 0)
    if isinstance(budget, int) and recent >= budget:
        raise ValueError(f"{name}: recent must be smaller than budget, got recent={recent} and budget={budget}")


def check_int(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be a whole number >= {least}, got {value!r}")


def check_every(name: str, every: Any) -> None:
    if every is not None:
        check_int(f"{name}: every", every, 1)


def check_number(what: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN compares false
        raise ValueError(f"{what} must be a number in [{low:g}, {high:g}], got {value!r}")


def check_choice(what: str, value: Any, choices: tuple) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):  # 4.0 and True are no ints
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {value!r}")
