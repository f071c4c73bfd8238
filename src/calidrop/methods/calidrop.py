from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries, merge
from calidrop.holding import Holding
from calidrop.methods._remembered import Answer, Coming, Memory
from calidrop.methods._summary import Summary
from calidrop.observe import Observation
from calidrop.offload import Chunk, HostLog
from calidrop.ops import cpu, gpu
from calidrop.ops.piece import Piece
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer, Rest, check_choice, check_int, check_number, method
from calidrop.store import Late, Store
from calidrop.tokens import Tokens


class Calibrated(Store):
    """Evicted tokens: on the host if at all, and remembered by what they said to a query per query head of every layer
    that asks (`memories`; but for models whose layers share keys and values it is one). With `summary` a few tokens per
    kv head are on the device, too. late: heads that are asked again answer anew from a later step on."""

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
        asking: int = 1,
    ):
        self.order, self.recompute, self.apply, self.decide, self.heads = order, recompute, apply, decide, heads
        self.late_heads, self.where = late, refresh
        self.recalled_by = ""
        self.log = HostLog() if offload else None
        self.summary = Summary(summary) if summary else None
        self.memories = [Memory() for _ in range(asking)]
        self.context: Tensor | None = None
        self.value_dim = 0

    # ---- taking tokens in

    def add(self, t: Tokens, obs: Observation) -> None:
        self.value_dim = t.values.shape[-1]
        if self.log is not None:
            self.log.append({"k": t.k, "v": t.v, "pos": t.pos}, t.valid)
        if self.summary is not None:
            self.summary.add(t, obs)
            if self.log is None:
                return  # the summary answers alone
        fresh_prompt = self.context is None or not torch.equal(self.context, obs.context)
        self.context = obs.context
        for m, last in zip(self.memories, (obs.queries.last(1), *obs.beside), strict=True):
            m.alike = t.v.shape[-1] == 0 and last.softcap is None
            if m.answer is None:
                m.anchor(last)
                m.remember(Answer.of(last, t))
            elif fresh_prompt and self.log is not None:
                m.anchor(last)
                self._refresh(m, last, torch.ones(last.q.shape[:2], dtype=torch.bool, device=last.q.device))
            else:
                m.join(t, last)

    # ---- answering

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        m = self.memories[qs.asker]
        summarised = self.log is None and self.summary is not None
        exact = (len(qs) > 1 or qs.prompt) and self.log is not None
        step = self._step if self._in_kernel(m, qs) else self._launched if self._in_triton(m, qs) else None
        # whatever this process holds: the others may be waiting for its cosines
        near = None if summarised or exact or step else self._similarity(m, qs)
        if self.value_dim == 0:
            return []
        if self.summary is not None and summarised:
            return [self.summary.piece()]
        if self.log is not None and exact:
            return [merge([ops.attend(qs, _tokens(chunk)) for chunk in self.log.chunks()])]
        if step is not None:
            lse, applied = step(m, qs)
        else:
            assert near is not None
            applied = self._apply(m, qs, near)
            lse = m.moved(qs, self.order).masked_fill(~applied, float("-inf"))
        assert m.answer is not None
        parts: list[Partial | Piece] = [(m.answer.o[:, :, None].expand(*applied.shape, -1), lse)]
        if self.summary is not None:
            o, lse = ops.joined(qs, [self.summary.piece()])
            parts.append((o, lse.masked_fill(applied, float("-inf"))))
        return parts

    def _apply(self, m: Memory, qs: Queries, near: Tensor) -> Tensor:
        """Whose remembered answer is used, bool [B,Hq,T]; those that ask again have a new one."""
        assert m.answer is not None
        applied = near >= self.apply
        if self.log is None:
            return applied
        remembers = m.answer.lse > float("-inf")
        asked = (near < self.recompute)[..., 0] & remembers
        if self.late_heads:
            asked = self._furthest(near[..., 0], asked)
            m.wanted, m.asking = asked, Queries(qs.q.clone(), qs.pos.clone(), qs.scale, qs.softcap)
        elif bool(asked.any()):
            self._refresh(m, qs, asked)
            applied = applied | asked[..., None]
        m.count(torch.stack([asked.sum(1), remembers.sum(1)], 1))
        return applied

    def _in_kernel(self, m: Memory, qs: Queries) -> bool:
        """Whether `_step` can answer these queries."""
        alone = len(qs) == 1 and not qs.prompt and self.decide == "head" and not self.late_heads and qs.softcap is None
        if not alone or m.q is None or not cpu.remembers(qs.q):
            return False
        return self.log is None or all(cpu.recalls(s.data["k"], s.data["v"]) for s in self.log.segments)

    def _step(self, m: Memory, qs: Queries) -> tuple[Tensor, Tensor]:
        """All of it in one call. -> the lse of what answers and whether it does, [B,Hq,1]."""
        assert m.q is not None and m.answer is not None
        old, evicted = m.answer, self.log.segments if self.log is not None else []
        held = m.q, old.o, old.lse, old.mean_k
        new, lse, applied, counts = cpu.remembered(
            qs.q[:, :, 0], qs.scale, held, self.order, self.recompute, self.apply, evicted
        )
        if new is not None:
            m.q, self.recalled_by = new[0], "the host's kernel"
            m.remember(Answer(*new[1:]))
        if self.log is not None:
            m.count(counts)
        return lse[..., None], applied[..., None]

    def _in_triton(self, m: Memory, qs: Queries) -> bool:
        """Whether `_launched` can answer these queries."""
        return len(qs) == 1 and not qs.prompt and self.decide == "head" and m.q is not None and gpu.remembers(qs.q)

    def _launched(self, m: Memory, qs: Queries) -> tuple[Tensor, Tensor]:
        """`_apply` and `Memory.moved` in one launch."""
        assert m.q is not None and m.answer is not None
        asks = self.log is not None
        said, applied, asked, counts, asking = gpu.remembered(
            qs, (m.q, m.answer.lse, m.answer.mean_k), self.order, self.apply, self.recompute if asks else None,
            self._kv_heads() if asks else 1, self.late_heads if asks else 0, m.counted,
        )  # fmt: skip
        if asked is None:
            return said, applied
        m.counted = counts
        if asking is not None:
            m.wanted, m.asking = asked, asking
        elif bool(asked.any()):
            self._refresh(m, qs, asked)
            said = torch.where(asked[..., None], m.answer.lse[..., None], said)
            applied = applied | asked[..., None]
        return said, applied

    def _similarity(self, m: Memory, qs: Queries) -> Tensor:
        """[B,Hq,T] cosines with the remembered queries. decide="layer": their mean over the heads of the layer, on
        whatever process, that have evicted anything."""
        near = there = qs.q.new_zeros(qs.q.shape[:3], dtype=torch.float32)
        if m.q is not None and m.answer is not None:
            near = torch.cosine_similarity(qs.q.float(), m.q[:, :, None], -1)
            there = (m.answer.lse > float("-inf")).float()[..., None].expand_as(near)
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

    def _refresh(self, m: Memory, qs: Queries, asked: Tensor) -> None:
        """Recompute exactly, for the query heads in `asked` (bool [B,Hq]) and no others."""
        m.place(self._recall(qs, asked), self._kv_heads(), self.value_dim)

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

    def moving(self) -> list[Store]:
        return [self] if self.log is not None else []

    # ---- answering late

    def late(self) -> list[Late]:
        return [Later(self, m) for m in self.memories] if self.late_heads else []

    def serve(self, m: Memory, wanted: bool) -> bool:
        """`Late.serve` for one of its memories."""
        if m.coming is None and wanted:
            assert self.log is not None and m.asking is not None and m.wanted is not None
            # copies: the next step may write over them while they are read
            own = replace(m.asking, q=m.asking.q.clone(), pos=m.asking.pos.clone())
            asked = m.wanted.clone()
            with self.log.beside() as arrival:
                m.coming = self._recall(own, asked)
            m.coming.arrival = arrival
        if m.coming is None or not m.coming.arrival.there:
            return False
        m.coming.arrival.wait(m.coming.answer)
        m.place(m.coming, self._kv_heads(), self.value_dim)
        m.coming = None
        return True

    @property
    def unsteady(self) -> str:
        return "" if self.log is None or self.late_heads else "calidrop waits for the host in every step (late=0)"

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
        asked, steps = 0, 0
        for counted in (m.counted for m in self.memories if m.counted is not None):
            asked, steps = asked + int(counted[:, 0].sum()), steps + int(counted[:, 1].sum())
        return asked, steps

    def describe(self) -> str:
        n = sum(s.longest for s in self.log.segments) if self.log is not None else 0
        where = f"{n} on the host" if self.log is not None else "freed"
        summary = f", {self.summary.size} summary tokens" if self.summary is not None else ""
        by = f", asked again by {self.recalled_by}" if self.recalled_by else ""
        return f"remembered by order {self.order} ({where}{by}){summary}"


class Later(Late):
    """One of its memories, between steps."""

    def __init__(self, store: Calibrated, memory: Memory):
        self.store, self.memory = store, memory

    @property
    def wanted(self) -> Tensor | None:
        return self.memory.wanted

    def serve(self, wanted: bool) -> bool:
        return self.store.serve(self.memory, wanted)


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
            layer.asking,
        )

    return Rest(make, observe=32 if summary else 1, latents=True)
