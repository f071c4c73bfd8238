"""Training passes see what generation saw: the invariant (h5) of G-KV's post-training, for any evictor."""

import pytest
import torch

import calidrop
from calidrop.train._sparse import SparseCache, Trace, held, under
from helpers import feed, layer_of, positions, random_qkv
from tiny import batch, generate, tiny, worst

PROMPT, NEW = 61, 24
RECIPES = [
    "g_kv(budget=20, every=5, recent=4)",
    "g_kv(budget=0.4, every=5, recent=4, history='mean', pairs=True)",
    "r_kv(budget=20, every=7, recent=4)",
    "h2o(budget=0.3, every=1)",  # a fraction of the prompt, statistics of every query
    "adakv(budget=24, recent=8, every=6)",  # heads of unequal length
    "snapkv(budget=24, recent=8)",  # the prompt alone
]


def rolled(model, recipe, rows=3):
    """The sequence that a recipe generates, as arguments of a pass; its logits; and what was held when."""
    inputs = batch(rows, PROMPT, (0, 13, 50))
    cache = calidrop.KVCache(model, recipe)
    trace = Trace(cache)
    tokens, logits = generate(model, inputs, cache, new=NEW, logits_processor=[trace])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    call = {
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    return call, logits, trace.live(PROMPT + NEW)


def forced(model, recipe, call, live):
    with under(model, SparseCache(model, recipe, PROMPT, live)):
        return model(**call).logits[:, PROMPT - 1 : -1]


@pytest.mark.parametrize(
    ("family", "recipe"), [("llama", r) for r in RECIPES] + [(f, RECIPES[0]) for f in ("gemma2", "gpt_oss", "qwen3")]
)
@torch.no_grad()
def test_a_training_pass_gives_the_logits_of_generation(family, recipe):
    """(h5) Left pads, GQA, sliding layers, soft-capping and sinks included; noted while generating or found again."""
    model = tiny(family)
    call, logits, live = rolled(model, recipe)
    assert worst(forced(model, recipe, call, live), logits) < 2e-4
    assert worst(forced(model, recipe, call, None), logits) < 2e-4
    full = model(**call).logits[:, PROMPT - 1 : -1]
    assert worst(full, logits) > 0.05  # evicting matters here
    with under(model, SparseCache(model, recipe, PROMPT, live)):
        pass
    assert worst(model(**call).logits[:, PROMPT - 1 : -1], full) == 0  # and is over afterwards


@torch.no_grad()
def test_a_snapshot_before_the_compression_is_another_mask():
    """The lag of the published code: what the rows after a compression see is noted before it."""
    model, recipe = tiny(), RECIPES[0]
    call, logits, live = rolled(model, recipe, rows=2)
    late = live.clone()
    for f in range(1, live.shape[1]):  # the set before, and what came since
        late[:, f] = live[:, f - 1]
        late[:, f, ..., PROMPT + 5 * (f - 1) : PROMPT + 5 * f] = True
    assert ((late & live) == live).all()
    assert (late.sum(-1) > live.sum(-1))[:, 1:].all()
    assert worst(forced(model, recipe, call, late)[:, 6:], logits[:, 6:]) > 0.05


@torch.no_grad()
def test_what_a_layer_holds():
    qkv = random_qkv(2, 2, 3, 50, 6)
    kv = layer_of("adakv(budget=19, recent=6, every=5)", qkv)
    feed(kv, qkv, [40] + [1] * 10, [0, 21])
    marks = held(kv)
    assert [[head.nonzero().flatten().tolist() for head in row] for row in marks] == positions(kv)


def test_gradients_are_those_of_full_attention_where_nothing_is_evicted():
    model, inputs = tiny(), batch(2, PROMPT, (0, 13))
    call = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), "use_cache": False}
    real = inputs["attention_mask"].bool()

    def gradient(**kwargs):
        model.zero_grad()
        model(**call, **kwargs).logits[real].square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    model.set_attn_implementation("sdpa")
    plain = gradient()
    with under(model, SparseCache(model, "g_kv(budget=99, every=5, recent=4)", 40)):
        ours = gradient()
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with under(model, SparseCache(model, "g_kv(budget=20, every=5, recent=4)", 40)):
        sparse = gradient()
    assert all(g.isfinite().all() for g in sparse)
    assert worst(sparse[-2], plain[-2]) > 1e-6


def test_wrong_use_is_refused():
    model = tiny()
    for recipe in ("full", "int4", "g_kv+int4", "g_kv+calidrop"):
        with pytest.raises(ValueError, match="only says which tokens stay"):
            SparseCache(model, recipe, 10)
    with pytest.raises(ValueError, match="90 columns, got 61"), under(model, SparseCache(model, RECIPES[0], 90)):
        model(**batch())
