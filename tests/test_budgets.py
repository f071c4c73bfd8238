"""How a budget is shared: by layers, by heads, and what ties do."""

import itertools

import pytest
import torch

from calidrop.state import held_bytes
from helpers import layer_of, positions, random_qkv, run


def test_ties_keep_the_older_token():
    store = layer_of("snapkv(budget=13, recent=6)", random_qkv(1, 2, 1, 1, 2)).plan.store
    score = torch.ones(1, 2, 60)
    score[0, :, 20:24], score[0, :, 1] = 5.0, 0.0
    kept = store.budget(score, torch.arange(60).expand(1, 2, 60), torch.tensor([66]))
    assert kept[0].nonzero()[:, 1].view(2, -1).tolist() == [[0, 2, 3, 20, 21, 22, 23]] * 2


@pytest.mark.parametrize("layers", [2, 7, 32])
@pytest.mark.parametrize("budget", [64, 100, 256, 1024])
@pytest.mark.parametrize("length", [1100, 3001])
def test_pyramid_budgets(budget, layers, length):
    counts = []
    for i in range(layers):
        layer = layer_of(f"pyramidkv(budget={budget})", random_qkv(1, 1, 1, 1, 2), i, layers)
        score = torch.rand(1, 1, length - 32)  # the window is not in the store
        marks = layer.plan.store.budget(score, torch.arange(length - 32)[None, None], torch.tensor([length]))
        counts.append(int(marks.sum()) + 32)
    assert all(a > b for a, b in itertools.pairwise(counts))
    assert abs(sum(counts) - layers * budget) <= layers
    assert counts[0] <= length
    assert counts[-1] >= 32


def test_adakv_heads_share_and_short_ones_are_free():
    B, H, N, D, budget, recent, floor = 2, 4, 151, 8, 40, 6, 0.25
    q, k, v = random_qkv(B, H, 2, N, D)
    k *= torch.tensor([0.1, 1, 2, 4]).view(1, H, 1, 1)  # flat to peaked attention
    kv = run(f"adakv(budget={budget}, recent={recent}, floor={floor})", (q, k, v))
    counts = torch.tensor([[len(head) for head in row] for row in positions(kv)])
    assert (counts.sum(1) == budget * H).all()
    assert all(len(set(row)) > 1 for row in counts.tolist())
    assert (counts >= recent + int(floor * (budget - recent))).all()
    per_token = 4 * (D + D) + 4  # fp32 key and value, int32 position
    held = int((counts - recent).sum()) * per_token + 8 * B * H  # and the int64 lengths
    assert held_bytes(kv.state.store) == held


def test_adakv_floor_of_one_is_snapkv():
    qkv = random_qkv(2, 2, 3, 59, 6)
    ada, snap = (run(f"{m}(budget=19, recent=6{more})", qkv) for m, more in (("adakv", ", floor=1"), ("snapkv", "")))
    assert positions(ada) == positions(snap)
