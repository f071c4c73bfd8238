import pytest
import torch

from calidrop import ops
from calidrop.cache import KVCache
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.state import tensors
from calidrop.tee import prefill
from tiny import batch, soft, tiny, worst

RECIPES = [
    "full",
    "snapkv(budget=24, recent=8)",
    "snapkv(budget=24, recent=8, every=4)+calidrop(summary=4)",
    "snapkv(budget=24, recent=8)+calidrop(recompute=0.9)+int4",
    "adakv(budget=24, recent=8)+calidrop",
    "pyramidkv(budget=24, recent=8)+kvcrush",
    "h2o(budget=0.4)+mikv(bits=4)",
    "expected_attention(budget=24, recent=8)",
    "streaming_llm(budget=24)",
    "tova(budget=24)",
    "kivi(bits=4, group=16, residual=16)",
    "mixkvq(block=16, group=8, residual=16)",
    "ott(bits=4, block=8, pool=2, spill=5, skip=0)",
    "think(keep=0.5)+int8",
]


@torch.inference_mode()
def steps(model, cache, ids, mask):
    """The logits after each of some decoded tokens."""
    out = []
    for i in range(ids.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out.append(model(ids[:, i : i + 1], attention_mask=mask, **using(cache)).logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("family", "pads"), [("llama", (0, 0)), ("llama", (0, 13)), ("gemma2", (0, 13)), ("gpt_oss", (0, 13))]
)
def test_every_cache_is_its_own_prefill(family, pads):
    model, inputs = tiny(family), batch(pads=pads)
    then = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    caches = [KVCache(model, recipe) for recipe in RECIPES]
    logits = prefill(model, caches, **inputs).logits
    for cache in caches:
        own = KVCache(model, cache.recipe, eager=True)
        with torch.inference_mode():
            assert worst(model(**inputs, **using(own)).logits[:, -1], logits) < 1e-5
        for mine, theirs in zip(own.layers_here, cache.layers_here, strict=True):
            for a, b in zip(tensors(mine.state), tensors(theirs.state), strict=True):
                assert a.shape == b.shape
        assert (cache.nbytes, cache.host_nbytes, cache.full_nbytes) == (own.nbytes, own.host_nbytes, own.full_nbytes)
        mask = inputs["attention_mask"]
        assert worst(steps(model, own, then, mask), steps(model, cache, then, mask)) < 1e-5, str(cache.recipe)
        assert cache.recompute_rate == own.recompute_rate


def test_attends_once(monkeypatch):
    """One exact pass for all, and no cache but "full" keeps the prompt."""
    model, inputs, calls = tiny(), batch(), []
    real = ops.prompt
    monkeypatch.setattr("calidrop.ops.prompt", lambda *args: calls.append(1) or real(*args))
    caches = [KVCache(model, recipe) for recipe in ("full", "snapkv(budget=24, recent=8)", "tova(budget=24)")]
    filled = prefill(model, caches, **inputs)
    assert len(calls) == len(model.model.layers)
    assert caches[1].nbytes < caches[0].nbytes / 1.3
    assert all(seconds > 0 for seconds in filled.seconds)
    assert isinstance(filled.logits, torch.Tensor)


def test_errors(monkeypatch):
    model, inputs = tiny(), batch(1)
    used = KVCache(model)
    with torch.inference_mode():
        model(**inputs, **using(used))
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match="not empty: it holds 61 tokens"):
        prefill(model, [KVCache(model, "tova(budget=24)"), used], **inputs)
    with pytest.raises(ValueError, match="different models"):
        prefill(model, [KVCache(model), KVCache(tiny())], **inputs)
    with pytest.raises(ValueError, match="no caches"):
        prefill(model, [], **inputs)
    alone = f"judge_q(budget=24, file={soft(model)!r})+int4"
    assert parse(alone).alone
    with pytest.raises(ValueError, match="cannot share a prefill"):
        prefill(model, [KVCache(model, alone)], **inputs)
