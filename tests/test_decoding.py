"""What evictors that work while decoding hold after many more tokens than their budget."""

import pytest
import torch

import calidrop
from calidrop.plugin import using
from calidrop.state import held_bytes
from helpers import live
from tiny import tiny

BUDGET, EVERY, STEPS = 24, 8, 96
RECIPES = [
    f"streaming_llm(budget={BUDGET}, every={EVERY})",
    f"h2o(budget={BUDGET}, every={EVERY})",
    f"tova(budget={BUDGET}, every={EVERY})",
    f"snapkv(budget={BUDGET}, recent=8, every={EVERY})",
    f"lazy_eviction(budget={BUDGET}, window={EVERY}, alpha=0.05)",
    f"lazy_eviction(budget={BUDGET}, window={EVERY}, alpha=0.05)+int4+calidrop(offload=False, summary=2)",
]


@pytest.fixture(scope="module")
def llama():
    return tiny(num_hidden_layers=2)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_budget_is_held_for_ever(llama, recipe):
    """At no step does a head hold more than budget + interval - 1, and nothing in the cache grows: no statistics, no
    buffer, no ring of queries. Once the budget is reached every interval holds the bytes of the first."""
    cache, size = calidrop.KVCache(llama, recipe, eager=True), []
    ids = torch.randint(3, 97, (2, 12 + STEPS), generator=torch.Generator().manual_seed(0))
    llama(ids[:, :12], **using(cache))
    summary = 2 if "summary" in recipe else 0
    for i in range(12, 12 + STEPS):
        llama(ids[:, i : i + 1], **using(cache))
        size.append(held_bytes([layer.state for layer in cache.layers]))
        for layer in cache.layers:
            most = max(sum(t.valid.sum(-1) for t in live(layer)).flatten().tolist())
            assert most == i + 1 if i < BUDGET else most <= BUDGET + summary + EVERY - 1
    assert cache.get_seq_length() == 12 + STEPS
    reached = BUDGET - 12 + EVERY
    assert max(size[reached:]) <= max(size[reached : reached + 2 * EVERY])
