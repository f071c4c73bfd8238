"""KVCrush: which tokens stand for the evicted, and what it never does."""

import pytest
import torch

from calidrop.budgets import top_k
from calidrop.methods.kvcrush import ANCHORS, behaviour, representatives
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.recipe import parse
from helpers import positions, random_qkv, run

B, H, N = 2, 4, 61


def budget_of(recipe: str, heads: int = H):
    return parse(recipe).plan(Layer(0, 1, heads, heads, 8, None, HeadGroup())).store.budget


def scores(seed: int = 0) -> torch.Tensor:
    return torch.rand(B, H, N, generator=torch.Generator().manual_seed(seed))


def test_what_is_kept_by_hand():
    """Two heads, eight tokens, 4 for each: 2 important, 2 representatives.

    At the whole budget of 4, head 0 would keep 0 1 2 3 and head 1 0 1 4 5. At the budget of the important, both keep
    0 and 1 and are left with 2..7, whose bits (head 0, head 1) are 10 10 01 01 00 00."""
    score = torch.tensor([[9.0, 8, 7, 6, 1, 2, 0, 3], [9, 8, 1, 2, 7, 6, 0, 3]])[None]
    pos, context = torch.arange(8).expand(1, 2, 8), torch.tensor([9])
    kept = budget_of("snapkv(budget=5, recent=1)+kvcrush(share=0.5)", 2)(score, pos, context)
    # the majority is 00, as 2 of 6 are less than half: distances 1 1 1 1 0 0, order 6 7 2 3 4 5, stride 3: 6 and 3
    assert [row.nonzero().flatten().tolist() for row in kept[0]] == [[0, 1, 3, 6], [0, 1, 3, 6]]
    kept = budget_of("snapkv(budget=5, recent=1)+kvcrush(0.5, 'alternate')", 2)(score, pos, context)
    # anchor 10: distances 0 0 2 2 1 1, order 2 3 6 7 4 5, stride 3: 2 and 7
    assert [row.nonzero().flatten().tolist() for row in kept[0]] == [[0, 1, 2, 7], [0, 1, 2, 7]]


def test_the_vector_of_the_public_code():
    anchor = torch.tensor([1, 0, 1, 0], dtype=torch.bool)
    bits = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    assert (bits != anchor).sum(-1).tolist() == [0, 4, 2]
    every = torch.ones(1, 1, 4, dtype=torch.bool)
    marks = representatives(torch.tensor([[[0, 1, 2, 3]]]), every, torch.tensor([2]))
    assert marks.tolist() == [[[True, False, True, False]]]


def test_equal_bits_are_a_stride_over_positions():
    distance = torch.full((1, 1, 20), 3)
    candidates = torch.arange(20)[None, None] >= 5
    for n, want in ((3, [5, 10, 15]), (4, [5, 8, 12, 16]), (15, list(range(5, 20))), (99, list(range(5, 20))), (0, [])):
        assert representatives(distance, candidates, torch.tensor([n]))[0, 0].nonzero().flatten().tolist() == want


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_representatives_are_new_and_as_many_as_promised(anchor, share):
    score, pos = scores(), torch.arange(N).expand(B, H, N).clone()
    pos[1, :, :9] = -1
    context = torch.tensor([N + 2, N - 7])
    total, crush = 24, int(24 * share)
    kept = budget_of(f"snapkv(budget=26, recent=2)+kvcrush(share={share}, anchor={anchor!r})")(score, pos, context)
    important = top_k(lambda c: torch.full_like(c, total - crush))(score, pos, context)
    assert kept.sum(-1).unique().tolist() == [total]
    assert not (kept & (pos < 0)).any()
    assert (kept & important).equal(important)
    assert (kept & ~important).sum(-1).unique().tolist() == [crush]


def test_nothing_for_representatives_is_the_evictor_alone():
    qkv = random_qkv(2, 2, 3, 59, 8)
    for base in ("snapkv(budget=19, recent=6, every=5)", "adakv(budget=19, recent=6)", "h2o(budget=0.4)"):
        assert positions(run(f"{base}+kvcrush(share=0.0)", qkv, 41)) == positions(run(base, qkv, 41))
        assert positions(run(f"{base}+kvcrush", qkv, 41)) != positions(run(base, qkv, 41))


def test_a_seed_is_a_choice():
    qkv = random_qkv(1, 8, 1, 80, 8)
    runs = [positions(run(f"snapkv(budget=19, recent=6)+kvcrush(0.5, 'random', {seed})", qkv)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_bits_follow_tokens_where_heads_hold_different_ones():
    pos = torch.tensor([[[0, 3, 7, -1], [3, 5, 7, 9]]])
    marks = torch.tensor([[[True, False, True, False], [True, True, False, False]]])
    bits = behaviour(marks, pos, HeadGroup())
    assert bits[0, 0].int().tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]
    assert bits[0, 1].int().tolist() == [[0, 1], [0, 1], [1, 0], [0, 0]]


def test_a_head_that_would_keep_what_others_evict_counts():
    """A token that only other heads want differs from one that none wants, so both kinds are represented."""
    score = torch.zeros(1, 2, 40)
    score[0, 0, :10], score[0, 1, 30:] = 1.0, 1.0
    pos, context = torch.arange(40).expand(1, 2, 40), torch.tensor([41])
    kept = budget_of("snapkv(budget=11, recent=1)+kvcrush(share=0.2)", 2)(score, pos, context)
    extra = kept[0, 0].nonzero().flatten()[8:].tolist()
    assert len(extra) == 2
    assert max(extra) >= 8


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("kvcrush", "needs a part that says which tokens stay"),
        ("kvcrush+int4", "needs a part that says which tokens stay"),
        ("snapkv(budget=64)+kvcrush(share=1.5)", "number in"),
        ("snapkv(budget=64)+kvcrush(anchor='median')", "one of"),
        ("snapkv(budget=64)+kvcrush(seed=-1)", "whole number"),
        ("snapkv(budget=64)+kvcrush+kvcrush", "same role"),
    ],
)
def test_wrong_use_is_refused(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        parse(recipe)


def test_any_evictor_takes_it():
    from test_methods import EVICTORS

    qkv = random_qkv(2, 2, 2, 50, 8)
    for recipe in (r for r in EVICTORS.values() if "kvcrush" not in r):
        base = recipe.format(17, 4)
        counts = [[len(h) for row in positions(run(r, qkv, 41)) for h in row] for r in (base, base + "+kvcrush")]
        assert sum(counts[0]) == sum(counts[1])
