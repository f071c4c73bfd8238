from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries, finite, logits, merge
from calidrop.holding import Holding
from calidrop.methods._summary import Summary
from calidrop.observe import Observation
from calidrop.offload import Arrival, Chunk, HostLog
from calidrop.ops import cpu, gpu
from calidrop.ops.piece import Piece
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer, Rest, check_choice, check_int, check_number, method
from calidrop.state import Host, State
from calidrop.store import Late, Store
from calidrop.tokens import Tokens


class Answer(State):
    """What a set of tokens said to one query per query head: o [...,D], lse [...], and mean_k [...,D], the slope of lse
    in the query divided by the scale (the attention-weighted mean key; bent where logits are soft-capped). All fp32."""

    def __init__(self, o: Tensor, lse: Tensor, mean_k: Tensor):
        self.o, self.lse, self.mean_k = o, lse, mean_k

    @staticmethod
    def of(qs: Queries, t: Tokens) -> Answer:
        """One query per head: qs.q [B,Hq,1,D]. Exact."""
        s = logits(qs, t.k, t.pos)  # [B,H,G,1,N]
        lse = s.logsumexp(-1, keepdim=True)
        p = torch.exp(s - finite(lse))
        slope = p if qs.softcap is None else p * (1 - (s.masked_fill(p == 0, 0.0) / qs.softcap).square())
        B, Hq = qs.q.shape[:2]
        o, mean_k = (w[..., 0, :] @ x.float() for w, x in ((p, t.v), (slope, t.k)))
        return Answer(o.view(B, Hq, -1), lse.view(B, Hq), mean_k.view(B, Hq, -1))

    def joined(self, other: Answer) -> Answer:
        """The answer of the union of both sets to the same query. Exact."""
        lse = torch.logaddexp(self.lse, other.lse)
        a, b = (torch.exp(x.lse - finite(lse))[..., None] for x in (self, other))
        return Answer(a * self.o + b * other.o, lse, a * self.mean_k + b * other.mean_k)


class Coming(Host):
    """A new answer to some heads, perhaps still on its way. asking: all heads' queries [B,Hq,1,D]; asked: bool [B,Hq],
    those it is for; pairs: int64 [P], which (row, kv head) they are of; answer: [P,G,...]."""

    def __init__(self, asking: Queries, asked: Tensor, pairs: Tensor, answer: Answer):
        self.asking, self.asked, self.pairs, self.answer = asking, asked, pairs, answer
        self.arrival = Arrival()


class Calibrated(Store):
    """Evicted tokens: on the host if at all, and remembered by what they said to a query per query head.

    The device holds q, o and mean_k [B,Hq,D] and lse [B,Hq], and with `summary` a few tokens per kv head. late: heads
    that are asked again answer anew from a later step on; `wanted` (bool [B,Hq]) are those that want to be, with the
    queries `asking` [B,Hq,1,D]."""

    counts = frozenset({"recalled_by"})

    def __init__(
        self,
        order: int,
        recompute: float,
        apply: float,
        decide: str,
        offload: bool,
        summary: int,
        heads: HeadGroup,
        late: int = 0,
        refresh: str = "device",
    ):
        self.order, self.recompute, self.apply, self.decide, self.heads = order, recompute, apply, decide, heads
        self.late_heads, self.where = late, refresh
        self.recalled_by = ""
        self.log = HostLog() if offload else None
        self.summary = Summary(summary) if summary else None
        self.q: Tensor | None = None
        self.answer: Answer | None = None
        self.context: Tensor | None = None
        self.value_dim = 0
        self.counted: Tensor | None = None  # int64 [B,2]: query heads that were asked again, and that could have been
        self.wanted: Tensor | None = None
        self.asking: Queries | None = None
        self.coming: Coming | None = None

    # ---- taking tokens in

    def add(self, t: Tokens, obs: Observation) -> None:
        self.value_dim = t.v.shape[-1]
        if self.log is not None:
            self.log.append({"k": t.k, "v": t.v, "pos": t.pos}, t.valid)
        if self.summary is not None:
            self.summary.add(t, obs)
            if self.log is None:
                return  # the summary answers alone
        fresh_prompt = self.context is None or not torch.equal(self.context, obs.context)
        self.context = obs.context
        if self.q is None or self.answer is None:
            self._anchor(obs, Answer.of(obs.queries.last(1), t))
        elif fresh_prompt and self.log is not None:
            self._anchor(obs, None)
        else:  # a few more tokens were evicted while decoding: what they say to the old query joins the old answer
            last = obs.queries.last(1)
            first = self.answer.lse == float("-inf")  # heads that had lost nothing so far
            self.q = torch.where(first[..., None], last.q[:, :, 0].float(), self.q)
            at = Queries(self.q[:, :, None].to(t.k.dtype), last.pos, last.scale, last.softcap)
            self.answer = self.answer.joined(Answer.of(at, t))

    def _anchor(self, obs: Observation, answer: Answer | None) -> None:
        self.wanted = self.coming = None
        last = obs.queries.last(1)
        self.q = last.q[:, :, 0].to(torch.float32, copy=True)  # a view would keep the whole window alive
        if answer is None:
            everyone = torch.ones(self.q.shape[:2], dtype=torch.bool, device=self.q.device)
            self._refresh(last, everyone)
        else:
            self.answer = answer

    # ---- answering

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        summarised = self.log is None and self.summary is not None
        exact = (len(qs) > 1 or qs.prompt) and self.log is not None
        step = self._step if self._in_kernel(qs) else self._launched if self._in_triton(qs) else None
        # whatever this process holds: the others may be waiting for its cosines
        near = None if summarised or exact or step else self._similarity(qs)
        if self.value_dim == 0:
            return []
        if self.summary is not None and summarised:
            return [self.summary.piece()]
        if self.log is not None and exact:
            return [merge([ops.attend(qs, _tokens(chunk)) for chunk in self.log.chunks()])]
        assert self.q is not None and self.answer is not None
        if step is not None:
            lse, applied = step(qs)
        else:
            assert near is not None
            applied = self._apply(qs, near)
            lse = self._moved(qs).masked_fill(~applied, float("-inf"))
        parts: list[Partial | Piece] = [(self.answer.o[:, :, None].expand(*applied.shape, -1), lse)]
        if self.summary is not None:
            o, lse = ops.joined(qs, [self.summary.piece()])
            parts.append((o, lse.masked_fill(applied, float("-inf"))))
        return parts

    def _apply(self, qs: Queries, near: Tensor) -> Tensor:
        """Whose remembered answer is used, bool [B,Hq,T]; those that ask again have a new one."""
        assert self.answer is not None
        applied = near >= self.apply
        if self.log is None:
            return applied
        remembers = self.answer.lse > float("-inf")
        asked = (near < self.recompute)[..., 0] & remembers
        if self.late_heads:
            asked = self._furthest(near[..., 0], asked)
            self.wanted, self.asking = asked, Queries(qs.q.clone(), qs.pos.clone(), qs.scale, qs.softcap)
        elif bool(asked.any()):
            self._refresh(qs, asked)
            applied = applied | asked[..., None]
        self._count(torch.stack([asked.sum(1), remembers.sum(1)], 1))
        return applied

    def _moved(self, qs: Queries) -> Tensor:
        """[B,Hq,T], the lse of what is remembered for these queries."""
        assert self.q is not None and self.answer is not None
        lse = self.answer.lse[..., None]
        if self.order == 1:
            drift = (qs.q.float() - self.q[:, :, None]) @ self.answer.mean_k[..., None]  # 0 where just refreshed
            lse = lse + qs.scale * drift[..., 0]
        return lse

    def _count(self, n: Tensor) -> None:
        self.counted = n if self.counted is None else self.counted + n

    def _in_kernel(self, qs: Queries) -> bool:
        """Whether `_step` can answer these queries."""
        alone = len(qs) == 1 and not qs.prompt and self.decide == "head" and not self.late_heads and qs.softcap is None
        if not alone or self.q is None or not cpu.remembers(qs.q):
            return False
        return self.log is None or all(cpu.recalls(s.data["k"], s.data["v"]) for s in self.log.segments)

    def _step(self, qs: Queries) -> tuple[Tensor, Tensor]:
        """All of it in one call. -> the lse of what answers and whether it does, [B,Hq,1]."""
        assert self.q is not None and self.answer is not None
        old, evicted = self.answer, self.log.segments if self.log is not None else []
        held = self.q, old.o, old.lse, old.mean_k
        new, lse, applied, counts = cpu.remembered(
            qs.q[:, :, 0], qs.scale, held, self.order, self.recompute, self.apply, evicted
        )
        if new is not None:
            self.q, self.answer, self.recalled_by = new[0], Answer(*new[1:]), "the host's kernel"
        if self.log is not None:
            self._count(counts)
        return lse[..., None], applied[..., None]

    def _in_triton(self, qs: Queries) -> bool:
        """Whether `_launched` can answer these queries."""
        return len(qs) == 1 and not qs.prompt and self.decide == "head" and self.q is not None and gpu.remembers(qs.q)

    def _launched(self, qs: Queries) -> tuple[Tensor, Tensor]:
        """`_apply` and `_moved` in one launch."""
        assert self.q is not None and self.answer is not None
        asks = self.log is not None
        said, applied, asked, counts, asking = gpu.remembered(
            qs, (self.q, self.answer.lse, self.answer.mean_k), self.order, self.apply, self.recompute if asks else None,
            self._kv_heads() if asks else 1, self.late_heads if asks else 0, self.counted,
        )  # fmt: skip
        if asked is None:
            return said, applied
        self.counted = counts
        if asking is not None:
            self.wanted, self.asking = asked, asking
        elif bool(asked.any()):
            self._refresh(qs, asked)
            said = torch.where(asked[..., None], self.answer.lse[..., None], said)
            applied = applied | asked[..., None]
        return said, applied

    def _similarity(self, qs: Queries) -> Tensor:
        """[B,Hq,T] cosines with the remembered queries. decide="layer": their mean over the heads of the layer, on
        whatever process, that have evicted anything."""
        near = there = qs.q.new_zeros(qs.q.shape[:3], dtype=torch.float32)
        if self.q is not None and self.answer is not None:
            near = torch.cosine_similarity(qs.q.float(), self.q[:, :, None], -1)
            there = (self.answer.lse > float("-inf")).float()[..., None].expand_as(near)
        if self.decide == "layer":
            total = self.heads.gather(torch.stack([near * there, there], -1)).sum(1, keepdim=True)  # [B,1,T,2]
            near = (total[..., 0] / total[..., 1].clamp(min=1)).expand_as(near)
        return near

    def _furthest(self, near: Tensor, asked: Tensor) -> Tensor:
        """Of the query heads that ask, those of the kv heads of a row that drifted furthest. near, asked: [B,Hq]."""
        B, H = len(near), self._kv_heads()
        drift = near.masked_fill(~asked, float("inf")).view(B, H, -1).amin(-1)
        most = drift.topk(min(self.late_heads, H), largest=False).indices
        chosen = torch.zeros_like(drift, dtype=torch.bool).scatter(1, most, True)
        return asked & chosen[..., None].expand(B, H, asked.shape[1] // H).reshape(asked.shape)

    def _refresh(self, qs: Queries, asked: Tensor) -> None:
        """Recompute exactly, for the query heads in `asked` (bool [B,Hq]) and no others."""
        self._place(self._recall(qs, asked))

    def _recall(self, qs: Queries, asked: Tensor) -> Coming:
        """Ask again: chunks of the kv heads come from the host and their partial answers are joined."""
        assert self.log is not None
        B, Hq = asked.shape
        H = self._kv_heads()
        there = asked.view(B, H, -1).any(-1)
        pairs = there.flatten().nonzero().flatten()
        q = qs.q.reshape(B * H, Hq // H, 1, -1)[pairs]  # [P,G,1,D]
        first = self.log.segments[0].data
        on_host = self.where == "host" or self.log.device.type == "cpu"
        if on_host and qs.softcap is None and cpu.recalls(first["k"], first["v"]):
            self.recalled_by = "the host's kernel"
            said = cpu.recall(q[:, :, 0].cpu(), qs.scale, self.log.lists(pairs.cpu(), "k", "v"))
            return Coming(qs, asked, pairs, Answer(*(x.to(q.device) for x in said)))
        self.recalled_by = "torch"
        sub = Queries(q, qs.pos[pairs // H], qs.scale, qs.softcap)
        answer = None
        for chunk in self.log.fetch(there):
            part = Answer.of(sub, _tokens(chunk))
            answer = part if answer is None else answer.joined(part)
        assert answer is not None
        return Coming(qs, asked, pairs, answer)

    def _place(self, new: Coming) -> None:
        """Remember it."""
        assert self.q is not None
        B, Hq, D = self.q.shape
        old = self.answer or Answer(
            self.q.new_zeros(B, Hq, self.value_dim, dtype=torch.float32),
            self.q.new_full((B, Hq), float("-inf"), dtype=torch.float32),
            self.q.new_zeros(B, Hq, D, dtype=torch.float32),
        )

        def put(before: Tensor, after: Tensor) -> Tensor:
            spread = before.reshape(-1, Hq // self._kv_heads(), *before.shape[2:]).index_copy(0, new.pairs, after)
            return torch.where(new.asked.view(B, Hq, *[1] * (before.dim() - 2)), spread.view_as(before), before)

        answer = new.answer
        self.answer = Answer(put(old.o, answer.o), put(old.lse, answer.lse), put(old.mean_k, answer.mean_k))
        self.q = torch.where(new.asked[..., None], new.asking.q[:, :, 0].float(), self.q)

    def moving(self) -> list[Store]:
        return [self] if self.log is not None else []

    # ---- answering late

    def late(self) -> list[Late]:
        return [self] if self.late_heads else []

    def serve(self, wanted: bool) -> bool:
        if self.coming is None and wanted:
            assert self.log is not None and self.asking is not None and self.wanted is not None
            # copies: the next step may write over them while they are read
            own = replace(self.asking, q=self.asking.q.clone(), pos=self.asking.pos.clone())
            asked = self.wanted.clone()
            with self.log.beside() as arrival:
                self.coming = self._recall(own, asked)
            self.coming.arrival = arrival
        if self.coming is None or not self.coming.arrival.there:
            return False
        self.coming.arrival.wait(self.coming.answer)
        self._place(self.coming)
        self.coming = None
        return True

    @property
    def unsteady(self) -> str:
        return "" if self.log is None or self.late_heads else "calidrop waits for the host in every step (late=0)"

    def take_rows(self, rows: Tensor) -> None:
        self.coming = None  # whose rows are the old ones
        super().take_rows(rows)

    def _kv_heads(self) -> int:
        assert self.log is not None
        return self.log.segments[0].lens.shape[1]

    # ---- the rest of a store

    def tokens(self) -> list[Tokens]:
        return [_tokens(chunk) for chunk in self.log.chunks(whole=True)] if self.log is not None else []

    def holdings(self) -> list[Holding]:
        by = f"{self.summary.size} virtual tokens per kv head" if self.summary is not None else ""
        if self.log is None:
            return [Holding("summary", by or "one remembered answer per query head", None)]
        how = "a remembered answer until then" + (f", and {by}" if by else "")
        return [Holding("host", how, self.log.positions())] if self.log.segments else []

    @property
    def drops(self) -> bool:
        return self.log is None

    def recomputed(self) -> tuple[int, int]:
        return (0, 0) if self.counted is None else tuple(self.counted.sum(0).tolist())

    def describe(self) -> str:
        n = sum(s.longest for s in self.log.segments) if self.log is not None else 0
        where = f"{n} on the host" if self.log is not None else "freed"
        summary = f", {self.summary.size} summary tokens" if self.summary is not None else ""
        by = f", asked again by {self.recalled_by}" if self.recalled_by else ""
        return f"remembered by order {self.order} ({where}{by}){summary}"


def _tokens(chunk: Chunk) -> Tokens:
    return Tokens.from_columns(chunk.data, chunk.valid)


@method("CaliDrop, arXiv 2507.19906")
def calidrop(
    order: int = 1,
    recompute: float = 0.7,
    apply: float | None = None,
    decide: str = "head",
    offload: bool = True,
    summary: int = 0,
    late: int = 0,
    refresh: str = "device",
) -> Rest:
    """CaliDrop (Su et al., arXiv 2507.19906, sec. 3): evicted tokens keep answering through what they told a nearby
    query; when the query drifts, they are asked again.

    order: 0 reuses (o, lse) as they were, the published form; 1 also moves lse along its exact slope, which makes the
    evicted set one virtual token (key mean_k, value o, a logit bias) and is exact to first order. recompute: below this
    cosine of the query with the remembered one the answer is recomputed from the host (2: always, -2: never).
    apply: from this cosine on the remembered answer is used; between the two a head abstains (or its summary answers).
    None: `recompute`, that is no such band; the paper's is 0.85. decide: "head" compares every query head, "layer" the
    mean over the heads of a layer that have evicted anything. offload: False frees evicted tokens for good. summary: so
    many clusters of evicted tokens per kv head stay on the device as biased tokens; without offload they answer alone.
    late: 0 recomputes within the step, which waits for the host. n: of each row and layer the n kv heads that drifted
    furthest are recomputed after the step and answer anew from the next one on; on a GPU beside the following steps,
    from the first on that finds the answer there: no step waits, and what a step sees depends on the speed of the bus.
    refresh: where evicted tokens are asked again: on the "device", which they are sent to, or on the "host", where they
    lie and only queries and answers cross the bus (where the kernel for CPUs can; `describe()` says who did).

    Deviations from the paper: order 1, summary, late and the host's answers are ours; cosines are of rotated queries
    (the paper does not say); tokens evicted while decoding join the remembered answer exactly; a block of queries (a
    second prompt) is answered exactly from the host.
    """
    check_choice("calidrop: order", order, (0, 1))
    check_number("calidrop: recompute", recompute, -2.0, 2.0)
    if apply is not None:
        check_number("calidrop: apply", apply, -2.0, 2.0)
    check_choice("calidrop: decide", decide, ("head", "layer"))
    check_choice("calidrop: offload", offload, (True, False))
    check_int("calidrop: summary", summary, 0)
    check_int("calidrop: late", late, 0)
    check_choice("calidrop: refresh", refresh, ("device", "host"))

    def make(layer: Layer) -> Store:
        return Calibrated(
            order,
            recompute,
            recompute if apply is None else apply,
            decide,
            offload,
            summary,
            layer.heads,
            late,
            refresh,
        )

    return Rest(make, observe=32 if summary else 1)
