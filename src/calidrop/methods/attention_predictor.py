from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop import budgets, ops
from calidrop.attention import Partial, Queries, logits, merge
from calidrop.budgets import Amount, best
from calidrop.coded import whole_units
from calidrop.holding import Holding
from calidrop.methods._predictor import Average, Expectation, load
from calidrop.methods._rows import Rows, pooled_rows
from calidrop.observe import Observation
from calidrop.offload import Arrival, HostLog
from calidrop.ops import predicting
from calidrop.ops.piece import Piece
from calidrop.parts import Deputies, Layer, Selector, check_budget, check_choice, check_int, method
from calidrop.state import Ragged
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens


@dataclass(frozen=True)
class Sizes:
    """In tokens: budget, sinks, recent, block (pooled into one number), span (fetched as one). dense: steps."""

    budget: Amount
    sinks: int
    recent: int
    block: int
    span: int
    dense: int


@dataclass
class Coming:
    """Columns [B,H,m,...] for some slots [B,H,m] of what is held; those that are not `real` stay as they are.
    ids: [B,H,n], what is in every slot then, -1: nothing any more."""

    slot: Tensor
    real: Tensor
    columns: dict[str, Tensor]
    ids: Tensor

    def put(self, held: Ragged) -> Ragged:
        data = {}
        for name, x in held.padded()[0].items():
            tail = [1] * (x.dim() - 3)
            if x.shape[2] < self.ids.shape[2]:
                x = F.pad(x, (*[0, 0] * len(tail), 0, self.ids.shape[2] - x.shape[2]))
            at = self.slot.view(*self.slot.shape, *tail).expand(*self.slot.shape, *x.shape[3:])
            real = self.real.view(*self.real.shape, *tail)
            data[name] = x.scatter(2, at, torch.where(real, self.columns[name], x.gather(2, at)))
        return Ragged(data, self.ids >= 0, own=True)


class Predicted(Store):
    """All tokens on the host in spans, of which the device holds those that the next query is expected to attend to.

    On the device: sinks and what does not fill a span yet, exact; what was fetched (`held`, a slot per span; `ids`
    int64 [B,H,n] says which they are, -1: none), some of it perhaps still `coming`; and `rows` of pooled attention to
    what is on the host. whole: the next step asks the host for everything. spans, free: of each row, how many are on
    the host, and how many tokens of them the device had room for at the last flush; all_here: whether it has all of
    them. asked: between `attend` and `observe`, who answered for what was fetched."""

    def __init__(self, codec: Store, sizes: Sizes, rows: Rows):
        self.codec, self.sizes, self.rows = codec, sizes, rows
        self.first, self.waiting, self.log = Exact(), Exact(), HostLog()
        self.whole = True
        self.ids: Tensor | None = None
        self.held: Ragged | None = None
        self.coming: Coming | None = None
        self.arrival = Arrival()
        self.context: Tensor | None = None
        self.spans: list[int] = []
        self.free: list[int] = []
        self.all_here = False
        self.asked: list[Store] = []
        self.steps, self.since = 0, 0  # generated tokens since the last prompt, since the last flush

    # ---- taking tokens in

    def add(self, t: Tokens, obs: Observation) -> None:
        prompt = self.context is None or not torch.equal(self.context, obs.context)
        self.context, self.since = obs.context, 0
        self.rows.begin(t)
        t = self._after_sinks(Tokens(t.k, t.v, t.pos, {}, t.dense), obs)
        t, full = whole_units(self.waiting, t, self.sizes.span, obs)
        new = full.shape[2]
        if new:
            before = self._spans()
            self.rows.join(t, full, before, obs)
            self.codec.add(t, obs)
            units = self.codec.leave()
            assert units is not None
            data = {n: x.unflatten(2, (new, -1)) for n, x in units.padded()[0].items()}
            self.log.append(data, full)
            if self.whole or prompt:
                self.all_here = False
            else:  # what the window gave up is attended until the next prediction
                ids = (before[:, None, None] + torch.arange(new, device=full.device)).masked_fill(~full, -1)
                self._arrived()
                if self.held is None or self.ids is None:
                    self._hold(ids, Ragged(data, full))
                else:
                    self._hold(torch.cat([self.ids, ids], 2), self.held.append(data, full))
        size, waiting = self.sizes, self.waiting.held.lens[:, 0].tolist() if self.waiting.held is not None else None
        room = size.budget(self.context).tolist()
        self.free = [
            n - size.sinks - size.recent - 1 - m for n, m in zip(room, waiting or [0] * len(room), strict=True)
        ]
        self.spans = self._spans().tolist()
        if prompt:
            self.steps = 0
            self._look_ahead()

    def _after_sinks(self, t: Tokens, obs: Observation) -> Tokens:
        """t without the first tokens of each row, which are kept."""
        there = self.first.held.lens if self.first.held is not None else t.pos.new_zeros(t.pos.shape[:2])
        if bool((there == self.sizes.sinks).all()):
            return t
        sink = t.valid & (there[..., None] + t.valid.cumsum(-1) <= self.sizes.sinks)
        self.first.add(t.select(sink), obs)
        return t.select(~sink)

    def _spans(self) -> Tensor:
        """int64 [B]: how many are on the host; all heads have the same."""
        assert self.context is not None
        return self.log.lens[:, 0].to(self.context.device) if self.log.segments else torch.zeros_like(self.context)

    # ---- looking ahead

    def _look_ahead(self) -> None:
        """Predict what the next query attends to and fetch it, unless that step asks for everything anyway."""
        dense = (self.steps + 1) % self.sizes.dense == 0
        self.whole = dense and not self.all_here  # what is here needs no asking
        if self.sizes.dense == 1:
            return
        row = self.rows.next_row()  # even if it is not used, as it follows the rows
        if not dense:
            self._fetch(row)

    def _fetch(self, row: Tensor) -> None:
        """row: [B,H,blocks]. Brings the spans of the best blocks there is room for, but for those that are here."""
        self._arrived()
        room = [max(0, (n - self.since) // self.sizes.span) for n in self.free]
        everything = all(n >= m for n, m in zip(room, self.spans, strict=True))
        if everything and self.all_here:
            return
        self.all_here = everything
        if self._exchanged(row, room):
            return
        marks = self._chosen(row, room)
        n = int(marks.sum(-1).max()) if marks.numel() else 0
        if n and self.held is not None and self.ids is not None:
            self._exchange(self.ids, marks, n)
            return
        self.ids = self.held = None
        if n:
            order = first(marks, n)
            ids = order.masked_fill(~marks.gather(2, order), -1)
            held, self.arrival = self.log.take(ids)
            self._hold(ids, held)

    def _exchanged(self, row: Tensor, room: list[int]) -> bool:
        """`_chosen` and `_exchange` in one call, where all heads shall have as many spans. -> whether it was made."""
        w = min(room[0], self.spans[0])
        if self.held is None or self.ids is None or not self.held.uniform or w == 0:
            return False
        names, old = list(self.held.data), list(self.held.data.values())
        if any(min(n, m) != w for n, m in zip(room, self.spans, strict=True)) or not predicting.exchanges(row, old):
            return False
        per = self.sizes.span // self.sizes.block
        found = predicting.exchange(row, per, self.spans, self.ids, w, old, self.log.flat(*names))
        if found is not None:
            self.ids, self.held = found[0], self.held.of_all(dict(zip(names, found[1], strict=True)))
        return True

    def _exchange(self, ids: Tensor, marks: Tensor, n: int) -> None:
        """Bring what is marked and not here to where what is here and not marked is given up. n: the most marks."""
        ids = F.pad(ids, (0, max(0, n - ids.shape[2])), value=-1)
        here, spans = ids >= 0, marks.shape[2]
        stay = here & marks.gather(2, ids.clamp(min=0))
        new = F.pad(marks, (0, 1)).scatter(2, ids.masked_fill(~here, spans), False)[..., :-1]
        m = int(new.sum(-1).max())
        if m == 0 and bool((stay == here).all()):
            return
        slot, want = first(~stay, m), first(new, m)
        real, kept = new.gather(2, want), ids.masked_fill(~stay, -1)
        ids = kept.scatter(2, slot, torch.where(real, want, kept.gather(2, slot)))
        columns, self.arrival = self.log.read(want.masked_fill(~real, -1))
        self.coming, self.ids = Coming(slot, real, columns, ids), packed(ids)
        if self.arrival.there:  # at once, so that it is not held twice
            self._arrived()

    def _chosen(self, row: Tensor, room: list[int]) -> Tensor:
        """bool [B,H,spans]. room: spans of each batch row."""
        B, H, blocks = row.shape
        per, there = self.sizes.span // self.sizes.block, self.rows.there
        score = row if per == 1 else row.view(B, H, blocks // per, per).amax(-1)
        if there is not None:
            score = score.masked_fill(~there[:, None, ::per], float("-inf"))
        marks = best(score.flatten(0, 1), torch.tensor(room, device=row.device).repeat_interleave(H)).view_as(score)
        return marks if there is None else marks & there[:, None, ::per]

    def _hold(self, ids: Tensor, held: Ragged) -> None:
        """held: what is at `ids`, in the same order, without those that are -1."""
        self.ids, self.held = packed(ids), held

    # ---- answering

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        parts = [part for store in (self.first, self.waiting, self.codec) for part in store.attend(qs)]
        if not self.log.segments:
            return parts
        if len(qs) == 1 and not self.whole and not qs.prompt:
            self.asked = self._fetched()
            return parts + [part for store in self.asked for part in store.attend(qs)]
        self.whole = True
        return [*parts, self._ask_all(qs)]

    def _arrived(self) -> None:
        """Before what was fetched is read: a copy may be under way."""
        if self.held is None:
            return
        if self.coming is None:
            self.arrival.wait(self.held)
        else:
            self.arrival.wait(self.coming)
            self.held, self.coming = self.coming.put(self.held), None

    def take_rows(self, rows: Tensor) -> None:
        self._arrived()
        if self.free:
            self.spans, self.free = ([of[i] for i in rows.tolist()] for of in (self.spans, self.free))
        super().take_rows(rows)
        if self.held is not None and self.ids is not None:
            self.ids = self.ids[..., : self.held.longest].contiguous()  # the row that had the most may be gone
            if not self.held.longest:
                self.ids = self.held = None

    def _fetched(self) -> list[Store]:
        if self.held is None:
            return []
        self._arrived()
        return [self.codec.reader(self.held.opened())]

    def _ask_all(self, qs: Queries) -> Partial:
        """Exact, chunk by chunk."""
        last, found = qs.last(self.rows.size), []
        for chunk in self.log.chunks():
            store = self.codec.reader(Ragged(chunk.data, chunk.keep, own=True).opened())  # only to be read
            parts, heard = store.attend(qs), ops.Heard()
            found.append(ops.pick(qs, parts).decode(qs, parts, heard))
            (t,) = store.told(heard)
            ids = chunk.first[..., None] + torch.arange(chunk.keep.shape[2], device=t.pos.device)
            said = logits(last, t.k, t.pos) if t.logits is None else t.logits[:, :, :, None]
            self.rows.peak(said, ids.masked_fill(~chunk.keep, -1))
        return merge(found)

    def observe(self, step: Observation) -> None:
        self.codec.observe(step)
        fetched, self.asked = self.asked, []
        if self.context is None:  # the first prompt
            return
        last = step.last(self.rows.size)
        if self.whole:
            self.rows.push_peaks(last)
        else:
            found = [t for store in fetched for t in store.told(step.heard)]
            self.rows.push(last, pooled_rows(last, found[0], self.sizes.block) if found else None, self.ids)
        if len(step.queries) == 1 and not step.prompt:
            self.steps, self.since = self.steps + 1, self.since + 1
            self._look_ahead()

    @property
    def listens(self) -> bool:
        return not self.whole

    @property
    def one_by_one(self) -> bool:
        return True

    # ---- the rest of a store

    def tokens(self) -> list[Tokens]:
        out = [t for store in (self.first, self.waiting, self.codec) for t in store.tokens()]
        for chunk in self.log.chunks(whole=True):
            out += self.codec.reader(Ragged(chunk.data, chunk.keep).opened()).tokens()
        return out

    def holdings(self) -> list[Holding]:
        out = [h for s in (self.first, self.waiting, self.codec, *self._fetched()) for h in s.holdings()]
        if self.log.segments:
            out.append(Holding("host", "fetched when it is expected to matter", self.log.positions()))
        return out

    def describe(self) -> str:
        spans = sum(s.longest for s in self.log.segments)
        held = self.held.longest if self.held is not None else 0
        of = f"{spans} spans of {self.sizes.span} on the host, {held} of them fetched"
        return f"{self.first.describe()} first, {self.waiting.describe()} waiting; {of}: {self.codec.describe()}"


def first(marks: Tensor, n: int) -> Tensor:
    """Where the first n marks of each head are, and behind them what is not marked: bool [B,H,N] -> int64 [B,H,n]."""
    return (~marks).to(torch.int8).argsort(dim=-1, stable=True)[..., :n]


def packed(ids: Tensor) -> Tensor:
    """As `Ragged` packs what is at them: those that are -1 last, as few as can be."""
    there = ids >= 0
    return ids.gather(2, first(there, int(there.sum(-1).max())))


@dataclass(frozen=True, kw_only=True)
class Fetch(Selector):
    """Evicts nothing: what is not selected waits on the host. skip: layers that keep everything on the device."""

    sizes: Sizes
    skip: int
    net: Callable[[torch.device], Expectation]

    def store(self, layer: Layer, kept: Callable[[], Store], rest: Store | None, stand: Deputies | None) -> Store:
        codec = kept()
        if layer.index < self.skip:
            return codec
        if layer.asking > 1:
            raise ValueError(f"{self}: cannot look ahead for {layer.asking} layers that share their keys and values")
        if not codec.unit:
            raise ValueError(f"{self}: cannot fetch parts of what is stored like this: {codec.describe()}")
        sizes = replace(self.sizes, span=math.lcm(self.sizes.block, codec.unit))
        return Predicted(codec, sizes, Rows(self.observe, sizes.block, self.net))


@method("AttentionPredictor, arXiv 2502.04077")
def attention_predictor(
    budget: int | float = 1024,
    sinks: int = 64,
    recent: int = 64,
    block: int = 16,
    history: int = 64,
    dense: int = 5,
    skip: int = 2,
    network: bool = True,
    file: str | None = None,
) -> Selector:
    """AttentionPredictor (Yang et al., arXiv 2502.04077, sec. 4): everything stays, on the host, and a small network
    says which blocks the next query will attend to; only those are brought to the device.

    budget: the most tokens a query attends to, per kv head; sinks, recent tokens and what waits to fill a block are
    attended to even where they are more. sinks: first tokens, always on the device, a multiple of
    block. recent: the least number of last tokens that are. block: tokens pooled into one number (their largest
    weight); counted from each row's first real token. history: rows of these numbers that the network sees. dense:
    every so many generated tokens the host is asked for everything (exact), which keeps the history true. skip: so many
    first layers keep everything on the device. network: False expects the mean of the rows (of fourth roots, newer ones
    weigh more) instead of asking the network: not in the paper, and cheaper (LOG.md). file: the network, from `calidrop
    train attention-predictor`; None: the one that comes with the package.

    A storage says how blocks are kept on the host and fetched; where its units are longer than a block, blocks are
    fetched together. Bytes per token and kv head on the device: 4 * history / block, plus budget tokens.

    Deviations: selection is per kv head, whose rows are the mean of its query heads'. Blocks that are not full are
    always attended, and count: up to two blocks less than the paper's are predicted, and no token is out of reach. The
    network in the package sees fourth roots of the weights and averages over time with more weight on newer rows; the
    paper's form, with neither, finds less than the last row does here (LOG.md). A block of queries (a second prompt) is
    answered exactly from the host.
    """
    name = "attention_predictor"
    for what, value, least in (
        ("sinks", sinks, 0), ("recent", recent, 0), ("block", block, 1), ("history", history, 1), ("dense", dense, 1),
        ("skip", skip, 0),
    ):  # fmt: skip
        check_int(f"{name}: {what}", value, least)
    check_budget(name, budget, sinks + recent)
    if sinks % block:
        raise ValueError(f"{name}: sinks must be a multiple of block, got sinks={sinks} and block={block}")
    if file is not None and not isinstance(file, str):
        raise ValueError(f"{name}: file must be a path in quotes, got {file!r}")
    check_choice(f"{name}: network", network, (True, False))
    if not network and file is not None:
        raise ValueError(f"{name}: network=False takes no file, got file={file!r}")
    expects, meta = load(file) if network else (Average(), {"block": block, "history": history})
    for what, value in (("block", block), ("history", history)):
        if meta[what] != value:
            raise ValueError(
                f"{name}: {file or 'the network in the package'} was trained with {what}={meta[what]!r}, got {value!r}"
            )

    sizes = Sizes(budgets.amount(budget, 0), sinks, recent, block, block, dense)
    return Fetch(recent=recent, every=block, observe=history, sizes=sizes, skip=skip, net=functools.cache(expects.on))
