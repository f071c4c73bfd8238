"""The benchmark of long generation: recipes in one batch are what they are alone, and a run can be stopped."""

import numpy as np
import pytest
import torch
from benchmarks import lockstep
from benchmarks.snapkv_once import snapkv_once

from calidrop import KVCache
from calidrop.abreast import Abreast
from calidrop.plugin import using
from helpers import feed, layer_of, positions, random_qkv
from tiny import batch, generate, tiny, worst

RECIPES = [
    "lazy_eviction(budget=20, window=8, alpha=0.05)",
    "snapkv(budget=24, recent=8, every=8)+int4",
    "h2o(budget=20)",
]


@pytest.fixture(scope="module")
def llama():
    return tiny(num_hidden_layers=2)


@torch.no_grad()
def test_side_by_side_is_alone(llama):
    inputs, n = batch(), 20
    alone = [generate(llama, inputs, KVCache(llama, recipe), new=n) for recipe in RECIPES]
    caches = [KVCache(llama, recipe, eager=True) for recipe in RECIPES]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, n, dtype=torch.long)], 1).repeat(3, 1)
    ids, abreast = inputs["input_ids"].repeat(3, 1), Abreast(caches)
    place, tokens = (mask.cumsum(1) - 1).clamp(min=0), torch.cat([tokens for tokens, _ in alone])
    for i in range(n):
        now = slice(abreast.get_seq_length(), 61 + i)
        logits = llama(ids, attention_mask=mask[:, : now.stop], position_ids=place[:, now], **using(abreast)).logits
        assert worst(logits[:, -1], torch.cat([logits[:, i] for _, logits in alone])) < 2e-4
        ids = tokens[:, i : i + 1]
    assert all(seconds > 0 for seconds in abreast.seconds())


def test_a_stopped_run_goes_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(lockstep, "SAVE", 16)
    inputs, saved = batch(2, 30), tmp_path / "run.saved"
    whole = lockstep.Run(llama, RECIPES, inputs, 40, saved)([0], None)
    assert not saved.exists()
    run = lockstep.Run(llama, RECIPES, inputs, 40, saved)

    def stop(target, measure=run._measure):
        measure(target)
        if len(run.state["tokens"]) == 37:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run([0], None)
    assert saved.exists()
    again, ran = lockstep.Run(llama, RECIPES, inputs, 40, saved), []
    monkeypatch.setattr(again, "_forward", lambda ids, now, go=again._forward: ran.append(now) or go(ids, now))
    tokens, found = again([0], None)
    assert len(ran) == 40 - 32
    assert torch.equal(tokens, whole[0])
    for now, before in zip(found, whole[1], strict=True):
        assert now["kl"].mean() > 1e-4
        assert all(np.array_equal(now[name], before[name]) for name in now if name != "ms")


def test_snapkv_once_keeps_half_for_good_and_slides():
    kv = layer_of(snapkv_once(32, recent=4, every=4), qkv := random_qkv(1, 2, 3, 120, 6))
    feed(kv, tuple(x[:, :, :12] for x in qkv))
    kv.settle()
    seen = []
    for i in range(12, 120):
        feed(kv, tuple(x[:, :, i : i + 1] for x in qkv))
        seen.append(positions(kv)[0])
        assert all(len(head) <= 32 + 3 for head in seen[-1])
    assert seen[19] == [list(range(32))] * 2  # not exceeded yet
    for first, last in zip(seen[23], seen[-1], strict=True):
        assert len(set(first) & set(last)) == 16  # of 36 tokens
        assert set(range(104, 120)) <= set(last)
    assert seen[-1][0][:16] != seen[-1][1][:16]
