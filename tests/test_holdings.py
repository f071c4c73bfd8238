"""What a cache says it holds, against the memory it takes. (Against `tokens()`: test_properties.py, all recipes.)"""

import pytest
import torch

from calidrop.cache import KVCache
from calidrop.holding import FORMS, places
from calidrop.plugin import using
from calidrop.state import held_bytes
from helpers import check_holdings, positions, predictor, random_qkv, run
from tiny import batch, tiny

D = 16
EXACT = 2 * 4 * D + 4  # fp32 keys and values, int32 position
INT4 = 2 * (D // 2 + 4) + 4
PADS = (0, 13)


def counts(layer, real):
    """How many (row, head, token) a layer has in each form."""
    holdings = layer.holdings()
    at = places(holdings, real, 2)
    return {form: sum(int((at == i).sum()) for i, h in enumerate(holdings) if h.form == form) for form in FORMS}


def layer_of(recipe, prompt=61, new=8):
    layer = run(recipe, random_qkv(2, 2, 3, prompt + new, D), prompt, PADS)
    real = torch.arange(prompt + new) >= torch.tensor(PADS)[:, None]
    return layer, counts(layer, real), int(real.sum()) * 2


LENS = 2 * 2 * 8  # int64 [B,H] of packed columns


@pytest.mark.parametrize("recipe", ["snapkv(budget=24, recent=8)", "adakv(budget=24, recent=8)", "tova(budget=20)"])
def test_exact_and_gone(recipe):
    layer, n, total = layer_of(recipe)
    assert n["gone"] + n["exact"] == total == sum(n.values())
    assert n["exact"] == sum(len(head) for row in positions(layer) for head in row) < total
    window = int((layer.state.window.tokens().pos >= 0).sum())
    kept = layer.state.store.kept
    assert held_bytes(kept) == (n["exact"] - window) * EXACT + LENS


def test_coded_bytes():
    layer, n, total = layer_of("snapkv(budget=24, recent=8)+int4")
    assert n["coded"] == 2 * 2 * 16
    assert n["coded"] + n["exact"] + n["gone"] == total
    assert held_bytes(layer.state.store.kept) == n["coded"] * INT4 + LENS


def test_host_bytes():
    layer, n, total = layer_of("snapkv(budget=24, recent=8)+int4+calidrop")
    assert n["coded"] + n["exact"] + n["host"] == total
    assert held_bytes(layer.state, host=True) == n["host"] * EXACT + LENS
    assert n["host"] == total - n["coded"] - 2 * 2 * 16  # the rest is in the window, 8 of the prompt and 8 new


def test_two_codes_at_once():
    layer, n, total = layer_of("h2o(budget=20, every=4)+int4+mikv(bits=2)")
    assert n["coded"] + n["exact"] == total
    how = {h.how for h in layer.holdings() if h.form == "coded"}
    assert how == {"4-bit per token, rotated", "2-bit balanced"}


@pytest.mark.parametrize("summary", [0, 3])
def test_what_stands_for_many(summary):
    layer, n, total = layer_of(f"snapkv(budget=24, recent=8)+calidrop(offload=False, summary={summary})")
    assert n["summary"] + n["exact"] == total
    assert n["summary"] == total - 2 * 2 * 32
    assert held_bytes(layer.state, host=True) == 0


def test_units_wait_and_outliers_stay_exact():
    layer, n, _ = layer_of("ott(bits=2, block=8, pool=2, spill=5, skip=0, residual=3)")
    store = layer.state.store
    beside = sum(int(x.held.lens.sum()) for x in (*store.beside, store.waiting) if x.held is not None)
    assert n["exact"] == beside + int((layer.state.window.tokens().pos >= 0).sum())
    assert n["coded"] > 0


def test_narrow_tokens_are_not_exact():
    layer, n, total = layer_of("think(keep=0.5, recent=4)+int8")
    assert n["coded"] + n["exact"] == total
    assert {h.how for h in layer.holdings() if h.form == "coded"} == {"8 channels of keys; 8-bit per token"}


def test_fetched_is_on_the_device_and_its_original_on_the_host():
    """Bytes of the host count every token there, also those that a copy of is on the device."""
    layer, n, total = layer_of(predictor(24, dense=999), new=9)
    assert n["exact"] + n["host"] == total
    log = [h for h in layer.holdings() if h.form == "host"]
    assert len(log) == 1
    there = int((log[0].pos >= 0).sum())
    assert there > n["host"] > 0
    assert (
        there * EXACT
        <= held_bytes(layer.state, host=True)
        <= there * EXACT + LENS * len(layer.state.store.log.segments)
    )


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_layer_that_looks_back_some_way(family):
    model, inputs = tiny(family), batch()
    cache = KVCache(model, "streaming_llm(budget=20)")
    with torch.inference_mode():
        model(**inputs, **using(cache))
    real = inputs["attention_mask"].bool()
    every = int(real.sum()) * 2
    for layer, holdings in zip(cache.layers, cache.holdings(), strict=True):
        n = counts(layer, real)
        check_holdings(layer, real)
        assert [h.form for h in holdings] == [h.form for h in layer.holdings()]
        if layer.reach:
            assert n["exact"] == 2 * 2 * 24
            assert n["blind"] == every - n["exact"]
        else:
            assert n["exact"] == 2 * 2 * 20
            assert n["gone"] == every - n["exact"]


def test_asking_changes_nothing():
    qkv = random_qkv(2, 2, 3, 70, D)
    for recipe in ("h2o(budget=20)+int4+calidrop(summary=3)", predictor(24, dense=3), "kivi(bits=2, group=8)"):
        layer = run(recipe, qkv, 61, PADS)
        before = held_bytes(layer.state), held_bytes(layer.state, host=True), layer.describe()
        layer.holdings()
        assert (held_bytes(layer.state), held_bytes(layer.state, host=True), layer.describe()) == before


def test_rows_move_with_the_batch():
    layer, _, _ = layer_of("adakv(budget=24, recent=8)+calidrop")
    before = [h.pos for h in layer.holdings()]
    layer.reorder_cache(torch.tensor([1, 0]))
    for old, new in zip(before, layer.holdings(), strict=True):
        want = [[sorted(x for x in head if x >= 0) for head in row] for row in old[[1, 0]].tolist()]
        assert [[sorted(x for x in head if x >= 0) for head in row] for row in new.pos.tolist()] == want


def test_nothing_yet():
    cache = KVCache(tiny(), "snapkv(budget=24, recent=8)")
    assert not any(cache.holdings())
