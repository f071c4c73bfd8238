"""Caches of models in bf16 and fp16 hold and answer what those of the same numbers in fp32 do, but for rounding."""

import copy

import pytest
import torch
from transformers import DynamicCache

from calidrop import KVCache
from calidrop.plugin import using
from calidrop.state import held_bytes
from helpers import feed, layer_of, positions, predictor, random_qkv
from tiny import batch, soft, tiny

EVICTORS = [
    "streaming_llm(budget=24, every=4)",
    "h2o(budget=24, every=4)",
    "tova(budget=24, every=4)",
    "snapkv(budget=24, recent=8, every=4)",
    "adakv(budget=24, recent=8)",
    "pyramidkv(budget=24, recent=8)",
    "expected_attention(budget=24, every=4)",
    "lazy_eviction(budget=24, window=4, alpha=0.1)",
    "g_kv(budget=24, recent=8, every=4)",
    "r_kv(budget=24, recent=8, every=4)",
]
STORAGES = [
    "int8",
    "int4",
    "fp8",
    "kivi(bits=4, group=16)",
    "ott(bits=4, block=16, pool=2, spill=5, skip=0)",
    "mixkvq(block=32, group=16)",
    "decoquant(bits=4)",
    "think(keep=0.6)",
    "think(keep=0.5)+int4",
]
RECIPES = [
    "full",
    *EVICTORS,
    *STORAGES,
    *(f"h2o(budget=40, every=4)+{s}" for s in STORAGES),
    *(f"{e}+calidrop" for e in EVICTORS),
    "snapkv(budget=24, recent=8)+calidrop(order=0, apply=0.85)",
    "snapkv(budget=24, recent=8)+calidrop(late=1)",
    "snapkv(budget=24, recent=8)+calidrop(offload=False, summary=3)",
    "snapkv(budget=24, recent=8)+kvcrush+calidrop",
    "h2o(budget=24, every=4)+mikv(bits=4)",
    "h2o(budget=24, every=4)+mikv(bits=3)",
    *(predictor(32) + s for s in ("", "+int4", "+kivi(bits=4, group=16)")),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_layer(recipe, dtype):
    half = tuple(x.to(dtype) for x in random_qkv(2, 2, 3, 120, 32))
    whole = tuple(x.float() for x in half)
    found = []
    for qkv in (half, whole):
        kv = layer_of(recipe, qkv)
        out = feed(kv, qkv, [90] + [1] * 30, [0, 9])
        kv.settle()
        found.append((kv, out))
    (kv, out), (want_kv, want) = found
    assert out.dtype == dtype
    assert positions(kv) == positions(want_kv)
    error, eps = (out.float() - want).abs(), torch.finfo(dtype).eps
    if "h2o" in recipe and any(f"+{s}" in recipe for s in ("kivi", "ott", "mixkvq")):
        # tokens that stay are coded again in other units, from what they were decoded to in half precision: a number
        # between two codes may get the other one
        assert error.mean() < 2 * eps
        return
    assert error.mean() < eps / 2
    assert error.max() < 8 * eps
    if recipe in ("full", EVICTORS[0]):
        sizes = [held_bytes([x.state.window, x.state.store]) for x in (kv, want_kv)]
        assert sizes[0] < 0.6 * sizes[1]


def forced(model, cache, tokens, mask, prompt):
    """Logits [B,N,vocab], fp32, of a padded prompt and of given tokens behind it, one by one."""
    out, N = [], tokens.shape[1]
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, N))]:
        at = mask[:, :stop].cumsum(1)[:, start:] - 1
        found = model(
            tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=at.clamp(min=0), **using(cache)
        )
        out.append(found.logits)
    return torch.cat(out, 1).float() * mask[..., None]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_model(family, dtype):
    """As near to the model in fp32 as with the cache of transformers; and with what evicts, to the same in fp32."""
    model = tiny(family).to(dtype)
    whole = copy.deepcopy(model).float()
    made = batch(length=85)
    given = made["input_ids"], made["attention_mask"], 61

    def error(recipe=None):
        model.set_attn_implementation("eager")
        whole.set_attn_implementation("eager")
        caches = [KVCache(m, recipe, eager=True) if recipe else DynamicCache(config=m.config) for m in (model, whole)]
        half, full = (forced(m, c, *given) for m, c in zip((model, whole), caches, strict=True))
        return ((half - full).abs().mean() / full.abs().mean()).item()

    plain = error()
    evicting = "snapkv(budget=30, recent=8)+calidrop", f"judge_q(budget=30, file={soft(model)!r})"
    for recipe, most in {"full": 1.1, "int8": 1.5, evicting[0]: 1.1, evicting[1]: 1.6}.items():
        assert error(recipe) < most * plain, recipe
