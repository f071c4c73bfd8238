"""What recipes are made of: parts, each a method with its arguments, and what they are told and answer.

A method is a builder function (`snapkv(budget=512)`) that returns a part. This is all a method's file needs from here:
the kinds of parts, `Layer`, the decorator `method`, and checks that say what was got and what was expected.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calidrop.budgets import Amount, top_k
from calidrop.parallel import HeadGroup
from calidrop.rope import Rope
from calidrop.store import Budget, Discard, Score, Split, Store

if TYPE_CHECKING:
    from calidrop.recipe import Recipe

MOST = 2**31 - 1  # of whole numbers: positions are int32


@dataclass(frozen=True)
class Layer:
    """What a method may know about the layer it is built for. `index` counts the compressed layers only; heads are
    those of all processes. head_dim is that of keys; value_dim is the same unless given, and 0 where values are the
    keys themselves (`Tokens`). model_type and sample, a few of the layer's key weights if it has any to itself, tell
    models apart: what was trained on one fits no other.
    rope: how it rotates keys; None where nobody asked, or it does so as `Rope` cannot.
    asking: how many layers of the model ask this one's tokens, itself included; query_heads are those of one."""

    index: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    heads: HeadGroup
    value_dim: int = -1
    model_type: str = ""
    sample: Tensor | None = None
    asking: int = 1

    def __post_init__(self) -> None:
        if self.value_dim < 0:
            object.__setattr__(self, "value_dim", self.head_dim)


@dataclass(frozen=True)
class Part:
    """One method with its arguments. `text` is its canonical recipe string. latents: whether it takes tokens whose
    values are the keys themselves (`Tokens`). rotations: whether it has to know how layers rotate keys."""

    name: str = dataclasses.field(default="", init=False)
    text: str = dataclasses.field(default="", init=False)

    role = "nothing"
    latents = True
    rotations = False

    def __add__(self, other: Part | Recipe | str) -> Recipe:
        from calidrop.recipe import Recipe

        return Recipe((self,)) + other

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Full(Part):
    """Keeps everything exact."""

    role = "everything exact"


@dataclass(frozen=True, kw_only=True)
class Selector(Part, ABC):
    """Which tokens stay. recent: the last tokens, always kept exact in the window and counted in the budget. every:
    compress again each so many generated tokens (None: only prompts are compressed). observe: the number of last
    queries it looks at. per_head: whether heads may keep different tokens. prompts: whether a prompt is compressed as
    soon as it is complete, not only with the tokens generated after it. soft: embeddings [n,hidden] of soft tokens that
    look at every prompt too (`Observation.soft`)."""

    recent: int
    every: int | None
    observe: int = 1
    per_head: bool = True
    prompts: bool = True
    soft: Tensor | None = None
    rotations: bool = False

    role = "which tokens stay"

    @abstractmethod
    def store(self, layer: Layer, kept: Callable[[], Store], rest: Store | None, stand: Deputies | None) -> Store:
        """The store of a layer. kept: builds one for the tokens that stay. rest: where the others go, if anywhere."""


@dataclass(frozen=True, kw_only=True)
class Evictor(Selector):
    """Ranks tokens and keeps the best. amount: how many per kv head besides the recent ones. keep: marks so many.
    growing: amount is asked with the tokens there are so far instead of those of the prompt."""

    score: Callable[[Layer], Score]
    amount: Amount
    growing: bool = False
    keep: Callable[[Layer, Amount], Budget] = lambda layer, n: top_k(n)

    def store(self, layer: Layer, kept: Callable[[], Store], rest: Store | None, stand: Deputies | None) -> Store:
        budget = stand.keep(layer, self) if stand else self.keep(layer, self.amount)
        return Split(self.score(layer), budget, kept(), rest or Discard(), self.growing)


@dataclass(frozen=True)
class Deputies(Part):
    """Gives a part of an evictor's budget to tokens that stand for the others."""

    keep: Callable[[Layer, Evictor], Budget]

    role = "who stands for the evicted"


@dataclass(frozen=True)
class Storage(Part):
    """How kept tokens are stored. recent: the last tokens that stay exact when no evictor says so; `chose_recent`
    tells whether the user asked for that number. weighs: whether it compares queries with the keys it is given."""

    make: Callable[[Layer], Store]
    recent: int
    every: int
    chose_recent: bool = False
    weighs: bool = False
    latents: bool = False

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
    latents: bool = False
    rotations: bool = False

    role = "which channels of kept tokens stay"


@dataclass(frozen=True)
class Rest(Part):
    """What becomes of evicted tokens."""

    make: Callable[[Layer], Store]
    observe: int = 1
    latents: bool = False

    role = "what becomes of the rest"


@dataclass(frozen=True)
class Plan:
    """How one layer is run."""

    store: Store | None
    recent: int
    every: int | None
    observe: int
    prompts: bool = True
    soft: Tensor | None = None


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


def role_of(build: Callable[..., Part]) -> str:
    """Of what a method builds."""
    return inspect.signature(build, eval_str=True).return_annotation.role


def _arguments(signature: inspect.Signature) -> str:
    return (
        "("
        + ", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in signature.parameters.items())
        + ")"
    )


def check_budget(name: str, budget: int | float, recent: int, called: str = "recent") -> None:
    """A budget is a whole number of tokens above `recent`, or a fraction of the prompt in (0, 1). called: the name
    that `recent` has as an argument."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise ValueError(f"{name}: budget must be tokens per kv head (int > 0) or a fraction in (0, 1), got {budget!r}")
    if budget > MOST:
        raise ValueError(f"{name}: budget must be at most {MOST} tokens, got {budget!r}")
    if isinstance(budget, float) and budget >= 1:
        raise ValueError(
            f"{name}: a float budget is a fraction of the prompt in (0, 1), got {budget!r}; for tokens write an int"
        )
    check_int(f"{name}: {called}", recent, 0)
    if isinstance(budget, int) and recent >= budget:
        raise ValueError(f"{name}: {called} must be smaller than budget, got {called}={recent} and budget={budget}")


def check_int(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be a whole number >= {least}, got {value!r}")
    if value > MOST:
        raise ValueError(f"{what} must be a whole number <= {MOST}, got {value!r}")


def check_every(name: str, every: Any) -> None:
    if every is not None:
        check_int(f"{name}: every", every, 1)


def check_number(what: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN compares false
        raise ValueError(f"{what} must be a number in [{low:g}, {high:g}], got {value!r}")


def check_choice(what: str, value: Any, choices: tuple) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):  # 4.0 and True are no ints
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {value!r}")
