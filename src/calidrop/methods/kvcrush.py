import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.parallel import HeadGroup
from calidrop.parts import Deputies, Evictor, Layer, check_choice, check_int, check_number, method
from calidrop.store import Budget

ANCHORS = ("mean", "random", "alternate")


def behaviour(marks: Tensor, pos: Tensor, heads: HeadGroup) -> Tensor:
    """marks: bool [B,H,N], what each head would keep; pos: [B,H,N]. -> bool [B,H,N,E], for every token of every head
    which of the E heads of the layer would keep that token. Heads may hold different tokens, in different slots."""
    longest = heads.longest(pos)
    marks, pos_all = (F.pad(x, (0, longest - x.shape[2]), value=v) for x, v in ((marks, False), (pos, -1)))
    marks, pos_all = heads.gather(marks), heads.gather(pos_all)  # [B,E,N']
    columns = int(pos_all.max()) + 2 if pos_all.numel() else 1  # the last one is for empty slots
    table = marks.new_zeros(*marks.shape[:2], columns)  # [B,E,columns]
    table.scatter_(2, torch.where(marks, pos_all, columns - 1).long(), True)
    table[..., -1] = False
    B, H, N = pos.shape
    at = torch.where(pos >= 0, pos, columns - 1).long().view(B, 1, H * N).expand(-1, table.shape[1], -1)
    return table.gather(2, at).view(B, -1, H, N).permute(0, 2, 3, 1)


def anchored(bits: Tensor, candidates: Tensor, anchor: str, seed: int) -> Tensor:
    """The bits everything is compared with, per kv head. -> bool [B,H,1,E]"""
    if anchor == "mean":  # the majority of the candidates, bit by bit
        n = candidates.sum(2)[..., None]
        return ((bits & candidates[..., None]).sum(2) * 2 >= n)[:, :, None]
    if anchor == "alternate":
        vector = torch.arange(bits.shape[-1], device="cpu") % 2 == 0
    else:
        draw = torch.Generator().manual_seed(seed)
        vector = torch.rand(bits.shape[-1], generator=draw, dtype=torch.float32, device="cpu") < 0.5
    return vector.to(bits.device).expand(*bits.shape[:2], 1, -1)


def representatives(distance: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """distance: int [B,H,N]; n: int [B]. Marks n candidates at even strides of their order by (distance, age)."""
    N = distance.shape[2]
    if N == 0:
        return candidates
    order = distance.masked_fill(~candidates, torch.iinfo(distance.dtype).max).argsort(dim=-1, stable=True)
    of = candidates.sum(-1, keepdim=True)  # [B,H,1]
    n = torch.minimum(n.view(-1, 1, 1), of)
    i = torch.arange(N, device=order.device).expand_as(order)
    picked = order.gather(2, (i * of // n.clamp(min=1)).clamp(max=N - 1))  # the i-th representative
    marks = torch.zeros_like(order).scatter_reduce(2, picked, (i < n).long(), "amax")
    return marks.bool()


@method("KVCrush, arXiv 2503.00022")
def kvcrush(share: float = 0.25, anchor: str = "mean", seed: int = 0) -> Deputies:
    """KVCrush (Jha et al., arXiv 2503.00022, sec. 3): tokens that stand for the evicted ones, picked by which heads
    would keep them.

    share: the part of the evictor's budget (its recent tokens aside) that goes to representatives. A token's bits say
    which kv heads of the layer would keep it at the whole budget; evicted tokens are ordered by the Hamming distance of
    their bits to an anchor and taken at even strides, older first among equals. anchor: "mean" (the majority of the
    evicted, bit by bit), "random" (drawn once from `seed`) or "alternate" (1010...).

    Goes with any evictor: `snapkv(budget=512)+kvcrush`. Representatives are inside the budget, and per kv head disjoint
    from what the evictor keeps with the rest of it. Deviations: bits are of kv heads, after their scores are averaged
    over the query group, so a model with few kv heads has few bits; the public codes take pages, here it is tokens; a
    random anchor is drawn once, not at every call. Where all heads keep the same tokens, bits are all alike, and what
    is left is a uniform stride over positions.
    """
    check_number("kvcrush: share", share, 0.0, 1.0)
    check_choice("kvcrush: anchor", anchor, ANCHORS)
    check_int("kvcrush: seed", seed, 0)

    def keep(layer: Layer, evict: Evictor) -> Budget:
        def some(context: Tensor) -> Tensor:
            return (evict.amount(context) * share).long()

        would = evict.keep(layer, evict.amount)
        important = evict.keep(layer, lambda context: evict.amount(context) - some(context))

        def budget(score: Tensor, pos: Tensor, context: Tensor) -> Tensor:
            kept = important(score, pos, context)
            candidates = (pos >= 0) & ~kept
            bits = behaviour(would(score, pos, context), pos, layer.heads)
            distance = (bits != anchored(bits, candidates, anchor, seed)).sum(-1)
            return kept | representatives(distance, candidates, some(context))

        return budget

    return Deputies(keep)
