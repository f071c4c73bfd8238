"""Stores: tokens go in, queries are answered. Leaves hold a format; `Split` routes by score.

Contract of a store, tested for every method:

1. `attend` answers as plain attention over `tokens()` would;
2. no token is in it twice;
3. no token is lost, unless `drops` says so;
4. its bytes are the bytes of the tensors it holds (`state.held_bytes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries
from calidrop.holding import Holding, positions
from calidrop.observe import Observation
from calidrop.ops.piece import Piece, values_of
from calidrop.state import Ragged, State
from calidrop.tokens import Tokens

Budget = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(score [B,H,N], pos int [B,H,N], context int [B]) -> bool [B,H,N]: which tokens stay. No empty slot (pos -1) does."""


class Score(State, ABC):
    """Ranks tokens: larger is more worth keeping. Sees tokens and an Observation, nothing else.

    What it wants to know of a token the next time it puts into a column of `t.stats`, which travels with the token."""

    tracks = False
    """Whether `stats` must be called at every step (per-token statistics)."""
    sums = False
    """Whether `stats` asks for `total_weights` of a prompt: its attention may find them on the way."""

    @abstractmethod
    def __call__(self, t: Tokens, obs: Observation) -> Float[Tensor, "B H N"]:
        """fp32; the values of empty slots do not matter."""

    def stats(self, t: Tokens, step: Observation) -> dict[str, Tensor]:
        """The new per-token columns after the queries of one step (all of them at a prompt)."""
        raise NotImplementedError

    def observe(self, step: Observation) -> None:
        """Called at every step with its queries, before any flush."""

    def flushed(self) -> None:
        """Called after the score was used."""


@runtime_checkable
class Late(Protocol):
    """What goes on between steps. wanted: bool [B,Hq], whom it wants to do something for, on the device; None: none."""

    @property
    def wanted(self) -> Tensor | None: ...

    def serve(self, wanted: bool) -> bool:
        """wanted: whether it wants anything. -> whether what the next step sees changed."""
        ...


class Store(State, ABC):
    """Tokens added, queries answered."""

    @abstractmethod
    def add(self, t: Tokens, obs: Observation) -> None:
        """Take tokens in. Empty slots (pos -1) are left out."""

    @abstractmethod
    def attend(self, qs: Queries) -> list[Partial | Piece]:
        """Answers over disjoint sets, or what `ops.joined` gets them from. All of it is older than the queries."""

    def lying(self, like: Tensor) -> list[Piece]:
        """All tokens with their positions, as they are stored or decoded. like: queries [B,Hq,T,D], of which only the
        shape counts."""
        return [with_positions(t) for t in self.tokens()]

    @abstractmethod
    def tokens(self) -> list[Tokens]:
        """What is stored, decoded: the oracle answers from these."""

    @abstractmethod
    def holdings(self) -> list[Holding]:
        """In what form it has every token it took in, read off what is stored; nothing is decoded or changed."""

    @property
    def drops(self) -> bool:
        """Whether tokens that were added may be gone from `tokens()`."""
        return False

    def open(self) -> list[Tokens]:
        """Tokens that may be ranked again; taking them removes them from the store."""
        return []

    def told(self, heard: ops.Heard | None) -> list[Tokens]:
        """`tokens`, for who wants to know what a query says to them. Where attention left that (`Tokens.logits`), keys
        and values may have no channels: they need not be decoded."""
        return self.tokens()

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]], heard: ops.Heard | None) -> None:
        """Replace the per-token columns of everything `open` would give by `fn` of the tokens, as `told` has them."""

    def observe(self, step: Observation) -> None:
        """Per-step statistics; most stores keep none."""

    @property
    def listens(self) -> bool:
        """Whether `observe` wants to know what every step paid each token."""
        return bool(self.trackers())

    def moving(self) -> list[Store]:
        """Those of its parts that change as they answer a generated token, and not otherwise before a flush."""
        return []

    @property
    def one_by_one(self) -> bool:
        """Whether `observe` must be told of a generated token before the next is asked."""
        return self.listens

    @property
    def unit(self) -> int:
        """How many consecutive tokens can leave (`leave`) and be answered for elsewhere (`reader`); 0: none can."""
        return 0

    def leave(self) -> Ragged | None:
        """Take out all whole units as they are stored, a slot per unit; what is not part of one stays."""
        raise NotImplementedError

    def reader(self, units: Ragged | None) -> Store:
        """A store of these units alone, which reads them by what this one knows."""
        raise NotImplementedError

    def trackers(self) -> list[Score]:
        """Scores that want `stats` called on the tokens in front of this store too."""
        return []

    def late(self) -> list[Late]:
        """What is to be served before each step."""
        return []

    @property
    def unsteady(self) -> str:
        """Why a step cannot be recorded (`steady.py`); "" where nothing is known to stand in the way."""
        return ""

    def recomputed(self) -> tuple[int, int]:
        """How many (step, row, query head) went back to evicted tokens, and out of how many that have any."""
        return 0, 0

    @abstractmethod
    def describe(self) -> str:
        """One short line: format and how many tokens."""


class Exact(Store):
    """Tokens as they came, packed: a head that holds less takes less memory."""

    def __init__(self) -> None:
        self.held: Ragged | None = None

    def add(self, t: Tokens, obs: Observation) -> None:
        if self.held is None:
            self.held = Ragged(t.columns(), t.valid)
        else:
            self.held = self.held.append(t.columns(), t.valid)

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        return [*self._pieces("k", "v")]

    def lying(self, like: Tensor) -> list[Piece]:
        return self._pieces("k", "v", "pos")

    def _pieces(self, *columns: str) -> list[Piece]:
        if self.held is None or self.held.longest == 0:
            return []
        return [Piece.held(self.held, columns, lambda qs: ops.attend(qs, self.tokens()[0]), kind="exact")]

    def tokens(self) -> list[Tokens]:
        if self.held is None or self.held.longest == 0:
            return []
        return [Tokens.from_columns(*self.held.padded())]

    def holdings(self) -> list[Holding]:
        return [Holding("exact", "as it came", positions(self.held))] if self.held is not None else []

    def open(self) -> list[Tokens]:
        held = self.tokens()
        self.held = None
        return held

    @property
    def unit(self) -> int:
        return 1

    def leave(self) -> Ragged | None:
        held, self.held = self.held, None
        return held

    def reader(self, units: Ragged | None) -> Store:
        new = Exact()
        new.held = units
        return new

    def told(self, heard: ops.Heard | None) -> list[Tokens]:
        return unseen(self.held, heard) or self.tokens()

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]], heard: ops.Heard | None) -> None:
        for t in self.told(heard):
            columns = {f"stat:{name}": value for name, value in fn(t).items()}
            assert self.held is not None
            self.held = self.held.replace(columns)

    def describe(self) -> str:
        return f"exact {count(self.held)}"


class Discard(Store):
    """Where evicted tokens go when nothing remembers them."""

    def add(self, t: Tokens, obs: Observation) -> None:
        pass

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        return []

    def tokens(self) -> list[Tokens]:
        return []

    def holdings(self) -> list[Holding]:
        return [Holding("gone", "dropped", None)]

    @property
    def drops(self) -> bool:
        return True

    def describe(self) -> str:
        return "dropped"


class Split(Store):
    """Rank by `score`, keep what `budget` marks in one store, pass the rest to another. Nests.

    growing: the budget is told how long the sequence is by now instead of how long its prompt was."""

    def __init__(self, score: Score, budget: Budget, kept: Store, rest: Store, growing: bool = False):
        self.score, self.budget, self.kept, self.rest, self.growing = score, budget, kept, rest, growing

    def add(self, t: Tokens, obs: Observation) -> None:
        t = Tokens.cat([*self.kept.open(), t])
        if not t.dense:  # a score may look at neighbours, so no empty slot may lie between two tokens
            t = t.select(t.valid)
        if not len(t):  # only pads are older than the recent tokens
            return
        keep = self.budget(self.score(t, obs), t.pos, obs.length if self.growing else obs.context)
        self.kept.add(t.select(keep), obs)
        evicted = t.select(~keep)
        if len(evicted):
            evicted.stats = {}  # nothing ranks them again
            self.rest.add(evicted, obs)
        self.score.flushed()

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        return self.kept.attend(qs) + self.rest.attend(qs)

    def tokens(self) -> list[Tokens]:
        return self.kept.tokens() + self.rest.tokens()

    def holdings(self) -> list[Holding]:
        return self.kept.holdings() + self.rest.holdings()

    @property
    def drops(self) -> bool:
        return self.kept.drops or self.rest.drops

    def told(self, heard: ops.Heard | None) -> list[Tokens]:
        return self.kept.told(heard) + self.rest.told(heard)

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]], heard: ops.Heard | None) -> None:
        self.kept.restat(fn, heard)

    def observe(self, step: Observation) -> None:
        self.score.observe(step)
        if self.score.tracks:
            self.kept.restat(lambda t: self.score.stats(t, step), step.heard)
        self.kept.observe(step)
        self.rest.observe(step)

    def trackers(self) -> list[Score]:
        own = [self.score] if self.score.tracks else []
        return own + self.kept.trackers() + self.rest.trackers()

    def moving(self) -> list[Store]:
        return self.kept.moving() + self.rest.moving()

    @property
    def one_by_one(self) -> bool:
        return self.listens or self.kept.one_by_one or self.rest.one_by_one

    def late(self) -> list[Late]:
        return self.kept.late() + self.rest.late()

    @property
    def unsteady(self) -> str:
        return self.kept.unsteady or self.rest.unsteady

    def recomputed(self) -> tuple[int, int]:
        kept, rest = self.kept.recomputed(), self.rest.recomputed()
        return kept[0] + rest[0], kept[1] + rest[1]

    def describe(self) -> str:
        return f"kept: {self.kept.describe()}; rest: {self.rest.describe()}"


def unseen(held: Ragged | None, heard: ops.Heard | None, group: int = 1) -> list[Tokens]:
    """Stored tokens without keys and values, where attention left logits of them; a slot has `group` of them."""
    if held is None or heard is None:
        return []
    logits = heard.of(values_of(held.data), held.longest * group)
    if logits is None:
        return []
    own = held.only(*(n for n in held.data if n == "pos" or n.startswith("stat:")))
    if own.data["pos"].dim() > (3 if own.uniform else 1):
        own = own.opened()
    data, valid = own.padded()
    none = logits.new_empty(*data["pos"].shape, 0)
    t = Tokens.from_columns({"k": none, "v": none, **data}, valid)
    t.logits = logits
    return [t]


def with_positions(t: Tokens) -> Piece:
    """Tokens as `ops.piece` has them, and where they stand."""
    found = ops.piece(t)
    found.columns["pos"] = t.pos
    return found


def count(held: Ragged | None) -> str:
    """How many tokens per head, as a range when heads differ."""
    if held is None:
        return "0"
    low, high = int(held.lens.min()), int(held.lens.max())
    return str(low) if low == high else f"{low}-{high}"


def real(score: Float[Tensor, "B H N"], valid: Bool[Tensor, "B H N"]) -> Float[Tensor, "B H N"]:
    """Scores with empty slots below everything."""
    return score.float().masked_fill(~valid, float("-inf"))
