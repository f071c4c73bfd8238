"""One layer of the cache: an exact window in front of one store.

Tokens flow one way, and only at a flush. What was generated is flushed every so many steps (if the recipe says so); a
prompt is flushed once it is known to be complete: at once under `generate`, else at the next single token, or when
someone asks for the size. Until then it may still grow, and compressing early would make chunks change the answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from calidrop import ops
from calidrop.attention import Partial, Queries, with_sink
from calidrop.holding import Holding
from calidrop.masks import REAL, PositionMask, Told
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.parts import Plan
from calidrop.plugin import Handle, asked, at_column
from calidrop.state import State
from calidrop.store import Store
from calidrop.tokens import Tokens
from calidrop.window import Window

QKV = tuple[Tensor, Tensor, Tensor]


class LayerState(State):
    """Everything a layer remembers; forked as a whole when a step may have to be undone."""

    counts = frozenset({"seen", "steps", "age"})

    def __init__(self, store: Store | None):
        self.store = store
        self.window = Window()
        self.obs: Observation | None = None
        self.context: Tensor | None = None  # int64 [B]: real tokens up to the end of the last prompt
        self.start: Tensor | None = None  # int64 [B]: left pads
        self.seen = 0  # columns, pads included
        self.steps = 0  # generated tokens since the last prompt
        self.age = 0  # generated tokens since the last compression, prompts between them or not
        self.due = False  # a prompt waits to be compressed

    def put_back(self, moving: list[State]) -> None:
        """moving: what those parts of the store (`Store.moving`) were."""
        assert self.store is not None
        for mine, was in zip(self.store.moving(), moving, strict=True):
            vars(mine).update(vars(was))


class LayerKV(CacheLayerMixin):
    """One layer. `update` stashes keys and values and returns a handle; the attention function brings it back with
    the queries (`attend`)."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, make: Callable[[], Plan], reach: int | None = None, eager: bool = False, replay: bool = False):
        """make: builds the plan (again at `reset`). reach: how far back this layer can see at all, when bounded; such a
        layer keeps just that, exact. eager: compress a prompt as soon as it was attended. replay: what comes after the
        first block of tokens was generated after it, though it may come in blocks, which end where a step would
        compress."""
        super().__init__()
        self.make, self.reach, self.eager, self.replay = make, reach, eager, replay
        self.config: weakref.ref | None = None
        self.reset()

    def reset(self) -> None:
        self.plan = self.make()
        self.state = LayerState(self.plan.store)
        self.pending: tuple[Tensor, Tensor] | None = None
        self.told: Told | None = REAL  # what masks said of the columns so far; None: not known
        self.soft_columns = 0  # how many of the next columns are soft tokens that look at a prompt (`soft.py`)
        self.record_past = False
        self.assisted = False  # while recording: whether assisted decoding asked for it
        self.seen_before = 0  # columns, when recording began
        self.prompt_end = 0  # while recording: the column where the prompt ends and proposals begin
        self.column_bytes = 0  # one token of one row, uncompressed
        self.undo: list[LayerState] = []  # states after 0, 1, 2, ... tokens of the step that may be rolled back
        self.beside: Sequence[Queries] = ()  # `Observation.beside`
        self.by = ""  # who answered last
        self.dtypes: tuple[torch.dtype, ...] | None = None  # of queries, keys and values as the first came
        self.midway = False  # between taking tokens and having counted them
        self.column: Tensor | None = (
            None  # int32 [1]: where the next token stands, while steps are recorded (`steady.py`)
        )
        self.is_initialized = False

    # ---- called by transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.pending = (key_states, value_states)
        handle = Handle(self)
        return handle, handle

    def answers(self, v: Tensor) -> int:
        """Channels of an answer. v: values as `update` takes them."""
        return v.shape[-1]

    def get_seq_length(self, *args: Any) -> int:
        return self.state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def activate_past_recording(self, prompt_end: int | None = None) -> None:
        """Assisted decoding: what comes after the prompt may be partly undone by `crop`."""
        self.loosen()
        self.prompt_end = self.state.seen if prompt_end is None else prompt_end
        self.record_past, self.assisted, self.seen_before = True, prompt_end is not None, self.state.seen

    def keep_recording(self, prompt: bool, assisted: bool) -> None:
        """Ends it where something else goes on with the cache: nothing tells when assisted decoding is over."""
        self.record_past = self.record_past and not prompt and (assisted or not self.assisted)
        if not self.record_past:
            self.undo = []

    def crop(self, tokens_to_remove: int) -> None:
        remove = -int(tokens_to_remove)  # some versions pass a 0-d tensor
        if remove < 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {int(tokens_to_remove)} "
                "(assisted decoding needs transformers >= 5.17)"
            )
        if self.record_past and self.state.context is None:
            return  # after a prompt nothing is only in a layer of another process (pipeline parallelism)
        if remove >= max(1, len(self.undo)):
            raise ValueError(
                f"cannot remove {remove} tokens: a compressed cache can undo at most its last step, and only after "
                "activate_past_recording() (assisted decoding needs transformers >= 5.17)"
            )
        if self.undo:
            self.state = self.undo[len(self.undo) - 1 - remove]
            self.undo = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.loosen()
        self.told = None
        self.state.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.loosen()
        self.told = None
        if self.state.context is not None:
            rows = torch.arange(len(self.state.context), device=self.state.context.device)
            self.state.take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.loosen()
        self.told = None
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.state.take_rows(rows)

    def offload(self) -> None:
        raise ValueError("Cache(offloading=True) does not apply here; calidrop() keeps evicted tokens on the host")

    def prefetch(self) -> None:
        self.offload()

    # ---- attention

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        """q: [B,Hq,T,D] -> [B,Hq,T,Dv]. sink: a learned logit per query head that has no value (gpt-oss), [Hq]."""
        assert self.pending is not None
        (k, v), self.pending = self.pending, None
        if self.column is not None:
            return self._answer(*at_column(q, k, v, self.column, mask, scale, softcap), sink)
        asks, (q, k, v) = q.dtype, self._as_first(q, k, v)
        self.loosen()
        T, soft = k.shape[2] - self.soft_columns, None
        self._check_turn(T, mask.start)
        if self.soft_columns:
            soft = (q[:, :, T:], k[:, :, T:], v[:, :, T:])
            q, k, v = q[:, :, :T], k[:, :, :T], v[:, :, :T]
        qs, new = asked(q, k, v, mask, self.state.seen, scale, softcap)
        self._expect(new)
        self.told = mask.agreed(self.told, self.state.seen, T)
        self.keep_recording(mask.prompt, mask.assisted)
        prompt, self.midway = self.prompt_part(T, mask.prompt), True
        if self.record_past:
            o = self._recorded(qs, new, sink, prompt, soft)
        elif prompt == 0:
            self.settle()
            o = self._step(qs, new, sink)
        else:
            o = self._prompt(qs, new, sink, soft)
            if self.eager or mask.ends:
                self.settle()
        self.midway = False
        return o.to(asks)

    def _as_first(self, *qkv: Tensor) -> Sequence[Tensor]:
        """In the dtypes of the first that came, should the model's have changed since."""
        now = tuple(x.dtype for x in qkv)
        if self.state.context is None or self.dtypes is None:
            self.dtypes = now
        return qkv if now == self.dtypes else [x.to(dtype) for x, dtype in zip(qkv, self.dtypes, strict=True)]

    def _check_turn(self, new: int, start: int | None) -> None:
        """Raises ValueError where an earlier pass ended by an exception between two layers, or within one; and where
        assisted decoding gives a cache again what it has: some versions of transformers do so with every cache that is
        not empty, and answer wrong. start: `PositionMask.start`."""
        if self.midway or (start is not None and start != self.state.seen):
            raise ValueError(
                f"a forward pass was interrupted between two layers, or in one: a layer has {self.state.seen} tokens "
                f"where this pass goes on behind {start}. The cache cannot: reset() it or use a new one"
            )
        first = self.record_past and self.assisted and self.state.seen == self.seen_before
        if first and self.state.seen and new >= self.prompt_end:
            raise ValueError(
                f"the cache has {self.state.seen} tokens, and assisted decoding in this transformers version gives it "
                f"all {self.prompt_end} of the conversation again: use an empty cache, or generate this turn without it"
            )

    def prompt_part(self, new: int, prompt: bool) -> int:
        """How many of the new columns are a prompt's; the others are generated. prompt: known to be one."""
        if self.record_past and not prompt:
            return min(max(0, self.prompt_end - self.state.seen), new)
        return 0 if new == 1 and self.state.seen and not prompt else new

    @property
    def sums(self) -> bool:
        """Whether something asks for the column sums of a prompt's attention."""
        return self.state.store is not None and any(score.sums for score in self.state.store.trackers())

    def learn(self, qs: Queries, new: Tokens, lse: Tensor, mass: Tensor | None, told: Told | None) -> None:
        """A first prompt that something else attended exactly (`tee`): what the layer would hold had it done so."""
        assert not self.state.seen
        self.told = told
        self._expect(new)
        self.state.window.append(new)
        self._prompted(replace(qs, prompt=True), lse, mass)
        self.settle()

    def _expect(self, new: Tokens) -> None:
        B = new.k.shape[0]
        if self.state.context is None:
            self.state.context = torch.zeros(B, dtype=torch.long, device=new.k.device)
            self.column_bytes = (new.k[:, :, :1].nbytes + new.v[:, :, :1].nbytes) // B
            self.is_initialized = True
        elif self.state.context.shape[0] != B:
            raise ValueError(f"this cache holds {len(self.state.context)} sequences, got a batch of {B}")

    def _recorded(self, qs: Queries, new: Tokens, sink: Tensor | None, prompt: int, soft: QKV | None) -> Tensor:
        """A step that `crop` may shorten. Every state on the way is what plain decoding would have had there: forks
        share their tensors, so keeping them all costs nothing."""
        out, extra = [], []
        if prompt:
            o = self._prompt(qs.slice(0, prompt), new.slice(0, prompt), sink, soft)
            out, extra = [o[:, :, :prompt]], [o[:, :, prompt:]]
        self.undo = [self.state.fork()]  # type: ignore[list-item]
        i = prompt
        while i < len(qs):
            self.settle()
            n = self._at_once(len(qs) - i)
            asked, came = qs.slice(i, i + n), new.slice(i, i + n)
            out.append(self._step(asked, came, sink) if n == 1 else self._steps(asked, came, sink))
            self.undo.append(self.state.fork())  # type: ignore[arg-type]
            i += n
        return torch.cat(out + extra, 2)

    def _at_once(self, most: int) -> int:
        """How many generated tokens, up to `most`, may be answered in one go: nothing jumps between them."""
        store, every = self.state.store, self.plan.every
        if store is not None and store.one_by_one:
            return 1
        return min(most, ops.MOST_QUERIES, every - self.state.age if every else most)

    def _steps(self, qs: Queries, new: Tokens, sink: Tensor | None) -> Tensor:
        """As many steps, for which what is stored is read once; the state after each but the last goes to `undo`."""
        s, moved = self.state, []
        one = [qs.slice(i, i + 1) for i in range(len(qs))]
        if s.store is None or not s.store.moving():
            parts = s.store.attend(qs) if s.store else []
        else:
            said = []
            for each in one:
                self._serve()
                said.append(s.store.attend(each))
                moved.append([x.fork() for x in s.store.moving()])
            parts = ops.in_turn(said)
        o, lse, _ = self._asked(qs, new, sink, parts)
        s.window.count(-len(qs))
        for i, each in enumerate(one):
            s.window.count()
            self._stepped(each, lse[:, :, i : i + 1])
            if i < len(qs) - 1:
                self.undo.append(s.fork())  # type: ignore[arg-type]
                if moved:  # what is asked last has answered already
                    self.undo[-1].put_back(moved[i])
        self._tidied()
        return o

    def _step(self, qs: Queries, new: Tokens, sink: Tensor | None) -> Tensor:
        self._serve()
        o = self._answer(qs, new, sink)
        self._tidied()
        return o

    def _serve(self) -> None:
        for x in self.state.store.late() if self.state.store else []:
            x.serve(x.wanted is not None and bool(x.wanted.any()))

    def _tidied(self) -> None:
        """After a step: what makes shapes jump, if it is time."""
        if self.state.age == self.plan.every:
            self.flush()
        self._trim()

    def _answer(self, qs: Queries, new: Tokens, sink: Tensor | None) -> Tensor:
        o, lse, heard = self._asked(qs, new, sink, self.state.store.attend(qs) if self.state.store else [])
        self._stepped(qs, lse, heard)
        return o

    def _asked(
        self, qs: Queries, new: Tokens, sink: Tensor | None, parts: list[Partial | Piece]
    ) -> tuple[Tensor, Tensor, ops.Heard | None]:
        """What generated tokens are answered, which are in the window then. parts: of what is stored."""
        s = self.state
        heard = ops.Heard() if s.store is not None and s.store.listens else None
        dtype = qs.q.dtype if sink is None else torch.float32
        answer, self.by = ops.step(qs, new, s.window, parts, heard, self._within(qs), dtype)
        return *with_sink(qs, answer, sink), heard

    def _within(self, qs: Queries) -> int | None:
        """How many of the window's last columns generated tokens see, where every column came and the mask says no
        more than that."""
        return qs.window if self.column is None and qs.window is not None and qs.window == self.reach else None

    def _stepped(self, qs: Queries, lse: Tensor, heard: ops.Heard | None = None) -> None:
        self.state.steps, self.state.age = self.state.steps + 1, self.state.age + 1
        self._saw(qs, lse, heard=heard)

    def _prompt(self, qs: Queries, new: Tokens, sink: Tensor | None, soft: QKV | None) -> Tensor:
        """The outputs of the prompt, and after them those of the soft tokens."""
        s = self.state
        qs = replace(qs, prompt=not (self.replay and s.seen))
        before = len(s.window)
        s.window.append(new)
        sums = not s.seen and sink is None and self.sums
        o, lse, mass = self._block(qs, new, before, sink, sums)
        self._prompted(qs, lse, mass)
        return o if soft is None else torch.cat([o, self._behind(qs, soft, sink)], 2)

    def _block(
        self, qs: Queries, new: Tokens, before: int, sink: Tensor | None, sums: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a prompt is answered whose tokens are in the window, behind `before` columns, and (`sums`, if a kernel
        finds them on the way) the column sums of its attention."""
        s, mass = self.state, None
        parts = s.store.attend(qs) if s.store else []
        if self.reach is not None and before:
            parts.append(ops.prompt(qs, s.window.tokens(), self.reach))
        else:
            if before:
                parts.append(ops.attend(qs, s.window.tokens().slice(0, before)))
            if sums:
                found, mass = ops.prompt_with_mass(qs, new)
            else:
                found = ops.prompt(qs, new, self.reach, sink is not None)
            parts.append(found)
        return *with_sink(qs, ops.joined(qs, parts), sink), mass

    def _prompted(self, qs: Queries, lse: Tensor, mass: Tensor | None) -> None:
        """Count what a prompt brought; its tokens are in the window already. mass: `Observation.mass`."""
        s = self.state
        assert s.context is not None
        real = qs.pos >= 0
        first = torch.where(real.any(1), real.int().argmax(1), len(qs))
        s.start = torch.where(s.context == 0, s.seen + first, s.start if s.start is not None else 0)
        if self.replay and s.seen:
            s.steps, s.age = s.steps + len(qs), s.age + len(qs)
            s.due = s.age == self.plan.every
        else:
            s.context = s.context + s.steps + real.sum(1)
            s.steps, s.due = 0, s.store is not None and self.plan.prompts
        self._saw(qs, lse, mass)
        self._trim(slack=0)

    def _behind(self, qs: Queries, soft: QKV, sink: Tensor | None) -> Tensor:
        """What the n soft tokens [B,heads,n,D] answer, which stand right after the prompt whose queries are
        `qs`, and see it and those before them. Of them, only what a scorer may see is kept, until the flush."""
        s, (q, k, v) = self.state, soft
        pos = torch.arange(s.seen, s.seen + self.soft_columns, dtype=torch.int32, device=q.device).expand(len(q), -1)
        own = Tokens(k, v, pos[:, None].expand(*k.shape[:3]), dense=True)
        behind = replace(qs, q=q, pos=pos)
        parts: list[Partial | Piece] = []
        if s.store is not None:
            aside: Store = s.store.fork()  # type: ignore[assignment]  what a store notes as it answers is not for them
            parts += aside.attend(behind)
        parts += [ops.attend(behind, s.window.tokens()), ops.prompt(behind, own, self.reach)]
        o, lse = with_sink(behind, ops.joined(behind, parts), sink)
        if s.obs is not None:
            assert s.context is not None and s.start is not None
            s.obs = replace(s.obs, soft=Observation(behind, lse, s.context, s.start).copied())
        return o

    def _saw(self, qs: Queries, lse: Tensor, mass: Tensor | None = None, heard: ops.Heard | None = None) -> None:
        s = self.state
        s.seen += len(qs)
        if s.store is not None:
            assert s.context is not None and s.start is not None
            step = Observation(qs, lse, s.context, s.start, mass=mass, heard=heard, beside=self.beside)
            s.store.observe(step)
            for score in s.store.trackers():
                t = s.window.tokens()
                t.logits = None if heard is None else heard.of(t.values, len(t))
                s.window.stats = {**s.window.stats, **score.stats(t, step)}
            if self.keeps_queries:
                width = self.plan.observe
                s.obs = s.obs.then(step, width) if s.obs is not None else step.last(width).copied()

    @property
    def keeps_queries(self) -> bool:
        """Whether a compression may ask for the queries of this step. One that asks for a single query asks for that of
        its own step (recorded steps are all alike, so they keep theirs always)."""
        every, width = self.plan.every, self.plan.observe
        return self.state.due or (bool(every) and (width > 1 or self.state.age == every or self.column is not None))

    def _trim(self, slack: int | None = None) -> None:
        """A bounded layer forgets what no later query can see; while decoding, only now and then (each cut copies)."""
        if self.reach is not None and len(self.state.window) > self.reach + (self.slack if slack is None else slack):
            self.state.window = self.state.window.tail(self.reach)

    @property
    def slack(self) -> int:
        return max(16, (self.reach or 0) // 32)

    # ---- steps that are recorded (`steady.py`)

    def fix(self, room: int) -> None:
        """Give the window a room that lasts until something makes shapes jump; `room` columns where nothing does."""
        n = len(self.state.window)
        if self.reach is not None:
            columns = max(n, self.reach + self.slack) + 1
        else:
            columns = max(n + 1, self.plan.recent + self.plan.every) if self.plan.every else n + room
        self.state.window = self.state.window.fixed(columns, self.state.seen)

    def loosen(self) -> None:
        if self.state.window.before is not None:
            self.state.window = self.state.window.loose()

    def stepped(self) -> None:
        """Count a step that was replayed."""
        s = self.state
        s.seen, s.steps, s.age = s.seen + 1, s.steps + 1, s.age + 1
        s.window.count()

    @property
    def full(self) -> bool:
        """Whether a fixed window has no room for another token."""
        return self.state.window.before is not None and len(self.state.window) >= self.state.window.room

    def between_steps(self, room: int) -> bool:
        """What makes shapes jump, if it is time. -> whether it was."""
        s = self.state
        cut = self.reach is not None and len(s.window) > self.reach + self.slack
        if s.age != self.plan.every and not cut:
            return False
        self.loosen()
        if s.age == self.plan.every:
            self.flush()
        self._trim()
        self.fix(room)
        return True

    # ---- compression

    def settle(self) -> None:
        """Compress the prompt that is waiting, if one is."""
        if self.state.due:
            self.flush()

    def flush(self) -> None:
        """Move everything older than the recent tokens into the store. The only place where shapes jump."""
        s = self.state
        s.due, s.age = False, 0
        n = len(s.window) - self.plan.recent
        if n > 0:
            assert s.store is not None and s.obs is not None
            moving = s.window.tokens().slice(0, n)
            s.window = s.window.tail(self.plan.recent)
            s.store.add(moving, s.obs)
        if not self.plan.every:
            s.obs = None

    def holdings(self) -> list[Holding]:
        """In what form this layer has every token it saw; nothing where it saw none."""
        s = self.state
        if not s.seen:
            return []
        out = [Holding("exact", "among the last tokens, as it came", s.window.pos.value)] if len(s.window) else []
        out += s.store.holdings() if s.store is not None else []
        if self.reach is not None:
            out.append(Holding("blind", f"behind the {self.reach} tokens that this layer looks back", None))
        return out

    def describe(self) -> str:
        s = self.state
        kind = f"sees only the last {self.reach} tokens, exact" if self.reach is not None else "exact window"
        store = f"; {s.store.describe()}" if s.store is not None else ""
        by = f"; last answered by {self.by}" if s.steps and "torch" in self.by else ""
        return f"{kind} {len(s.window)}{store}{by}"
