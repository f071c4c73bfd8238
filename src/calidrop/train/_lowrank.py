"""Bases, ranks and groups of heads: the arithmetic of ReCalKV's training, on second moments alone.

With layer inputs X and A = W S, S S' = X'X, the whitened SVD A = U Σ V' gives the factors of W that lose least of X W',
and their product is U_r U_r' W for every root S. U are the eigenvectors of A A' = W X'X W', the second moments of the
outputs, so neither X'X nor a root of it is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def basis(moments: Tensor, rank: int) -> Tensor:
    """moments: fp64 [D,D] of outputs. -> orthonormal [D,rank], fp64, the directions with most of them first."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :rank]


def alternate(old: Tensor, moments: Tensor) -> Tensor:
    """One step of alternating least squares on other inputs: L <- argmin |X (W - L R)'|, then R <- L⁺ W.

    With R = old' W, L is C old (old' C old)^-1 for the moments C of outputs on those inputs, and L L⁺ depends on its
    span alone. -> orthonormal [D,rank]."""
    return torch.linalg.qr(moments @ old).Q


def lost(moments: Tensor, basis: Tensor) -> float:
    """The fraction of the outputs' squares that a basis misses."""
    return max(0.0, 1.0 - float((basis * (moments @ basis)).sum() / moments.trace()))


def similarity(covariance: Tensor, heads: int) -> Tensor:
    """Linear CKA of every two heads' keys. covariance: [H*D,H*D], centred. -> [H,H]."""
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).transpose(1, 2)  # [H,H,D,D]
    square = blocks.square().sum((-1, -2))
    own = square.diagonal().sqrt()
    return square / (own[:, None] * own).clamp(min=1e-300)


def group_size(heads: int, most: int) -> int:
    """The largest number up to `most` that divides the heads evenly."""
    return max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)


def grouped_order(cka: Tensor, size: int) -> list[int]:
    """Heads group by group, most similar pairs first until the groups are full."""
    heads = len(cka)
    groups: list[list[int]] = []
    pairs = [(float(cka[i, j]), i, j) for i in range(heads) for j in range(i)]
    for _, i, j in sorted(pairs, reverse=True):
        of = {head: group for group in groups for head in group}
        if i not in of and j not in of and size > 1 and len(groups) < heads // size:
            groups.append([j, i])
        elif (i in of) != (j in of):
            inside, outside = (i, j) if i in of else (j, i)
            if len(of[inside]) < size:
                of[inside].append(outside)
    left = [head for head in range(heads) if not any(head in group for group in groups)]
    groups += [[] for _ in range(heads // size - len(groups))]
    for group in groups:  # heads like no other
        while len(group) < size:
            group.append(left.pop(0))
    return [head for group in sorted(map(sorted, groups)) for head in group]


def group_bases(moments: Tensor, order: list[int], size: int, rank: int) -> Tensor:
    """A basis for each group of heads. -> [groups, size*D, rank/groups]."""
    heads = len(order)
    blocks = moments.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))[order][:, :, order]
    groups = [blocks[i : i + size, :, i : i + size].flatten(2).flatten(0, 1) for i in range(0, heads, size)]
    return torch.stack([basis(group, rank // len(groups)) for group in groups])


def allocate(fisher: list[float], full: int, keep: float, steps: list[int]) -> list[int]:
    """Ranks in proportion to `fisher`, each a multiple of its step or `full`, at least a step, `keep` of all in sum.

    What rounding and the bounds leave is dealt out in turn, the largest first; what they exceed is taken from the
    smallest."""
    budget = int(keep * full * len(fisher) + 1e-9)
    least = [min(step, full) for step in steps]
    if sum(least) > budget:
        raise ValueError(
            f"keep={keep} is too little: {len(fisher)} ranks of at least {steps[0]} need more than {budget}"
        )
    share = [budget * f / math.fsum(fisher) for f in fisher]
    ranks = [min(full, max(low, int(s) // low * low)) for s, low in zip(share, least, strict=True)]
    by_size = sorted(range(len(fisher)), key=lambda i: -fisher[i])
    while sum(ranks) > budget:
        for i in reversed(by_size):
            if sum(ranks) > budget and ranks[i] > least[i]:
                ranks[i] = (ranks[i] - 1) // least[i] * least[i]
    grew = True
    while grew:
        grew = False
        for i in by_size:
            more = min(least[i], full - ranks[i])
            if more and sum(ranks) + more <= budget:
                ranks[i], grew = ranks[i] + more, True
    return ranks
