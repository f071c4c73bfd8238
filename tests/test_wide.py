"""Triton's kernel for rows of more than 256 channels (`ops/gpu/_wide.py`): latents, whose values are their keys, and
wide heads."""

from dataclasses import replace

import pytest
import torch

import calidrop
from calidrop import ops
from calidrop.attention import attend
from calidrop.ops import gpu
from calidrop.tokens import Tokens
from helpers import check_heard, kernels, live, random_qkv, run
from test_mla import made
from test_triton import DEVICE, LIMIT, LITTLE, check, dispatched, gpu_refuses, poison, queries, tokens, weights
from tiny import batch, generate, worst

assert dispatched  # a fixture


def latents(t: Tokens) -> Tokens:
    """The same, without values of their own; poisoned where nobody may look."""
    t.v = t.v[..., :0]
    return t


def said(sets: list[Tokens]) -> list[Tokens]:
    """As the oracle wants them."""
    return [replace(t, v=t.values) for t in sets]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("D", [264, 288, 320, 576])
def test_exact_latents(D, dtype):
    t = latents(tokens(2, 1, 75, D, dtype))
    check(queries(2, 5, 1, D, dtype=dtype), [ops.piece(t)], said([t]), LIMIT[dtype])


@pytest.mark.parametrize("D", [272, 512])
def test_exact_heads(D):
    """With values of their own."""
    t = tokens(2, 2, 50, D)
    check(queries(2, 6, 1, D), [ops.piece(t)], [t], 2e-5)


@pytest.mark.parametrize(
    ("group", "T", "N"), [(1, 1, 1), (3, 8, 64), pytest.param(70, 1, 33, marks=pytest.mark.slow), (5, 7, 17)]
)
def test_queries_and_lengths(group, T, N):
    """More rows of queries than one program takes; less tokens than it takes at a time."""
    t = latents(tokens(2, 1, N, 288, torch.bfloat16))
    check(queries(2, group, T, 288, dtype=torch.bfloat16), [ops.piece(t)], said([t]), 2e-2)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_several_sets_empty_slots_and_answers(softcap):
    D = 320
    qs = queries(3, 6, 1, D, softcap)
    a, b, c = (latents(tokens(3, 1, n, D, empty=empty)) for n, empty in ((70, 0.0), (33, 0.4), (41, 0.0)))
    b.pos[1, 0] = -1  # a row with nothing
    other = attend(qs, c.k, c.values, c.pos)
    check(qs, [ops.piece(a), other, ops.piece(b)], said([a, b, c]), 2e-5)
    nothing = latents(tokens(3, 1, 5, D, empty=1.1))
    check(qs, [ops.piece(nothing)], said([nothing]), 2e-5)


def test_bias():
    qs, t = queries(2, 4, 1, 288, dtype=torch.bfloat16), latents(tokens(2, 1, 40, 288))  # as summaries are
    bias = torch.randn(2, 1, 45, device=DEVICE)[:, :, :40]
    o, lse = LITTLE(qs, [ops.piece(t, bias)])
    want, total = attend(qs, t.k, t.values, t.pos, bias)
    assert (o - want).abs().max() < 2e-5
    assert (lse - total).abs().max() < 2e-5


CODED = ["int8(residual=5)", "int4(residual=5)", "int4(rotate=False, residual=5)", "fp8(residual=5)",
         "adakv(budget=90, recent=9)+int4", "adakv(budget=90, recent=9)+fp8", "adakv(budget=90, recent=9)"]  # fmt: skip


def held(recipe: str, D: int, same: bool, dtype: torch.dtype):
    q, k, v = (x.to(dtype).to(DEVICE) for x in random_qkv(2, 1 if same else 2, 3, 151, D))
    return run(recipe, (q, k, v[..., :0] if same else v), pads=[0, 27])


@pytest.mark.parametrize(
    ("D", "same", "dtype"), [(576, True, torch.float32), (320, True, torch.bfloat16), (512, False, torch.float32)]
)
@pytest.mark.parametrize("recipe", CODED)
def test_codes(recipe, D, same, dtype):
    kv, qs = held(recipe, D, same, dtype), queries(2, 3 if same else 6, 1, D, dtype=dtype)
    store = kv.state.store
    for part in (store.kept,) if hasattr(store, "kept") else ():
        poison(part.held)
    parts = store.attend(qs)
    exact = dtype == torch.float32
    check(qs, [*parts, ops.piece(kv.state.window.tokens())], said(live(kv)), 2e-4 if exact else 2e-2)
    if exact:
        check_heard(LITTLE, weights, qs, store, 1e-3)


@pytest.mark.slow
def test_several_queries_of_codes():
    kv, qs = held("int4(residual=5)", 320, True, torch.float32), queries(2, 7, 3, 320)
    parts = [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())]
    check(qs, parts, said(live(kv)), 2e-4)
    assert len(parts) == 2 and all(p.rotate == (p.kind != "exact") for p in parts)
    o, lse = LITTLE(qs, parts[:1])  # nothing but what is behind a rotation
    want, total = attend(qs, *(getattr(said(kv.state.store.tokens())[0], n) for n in ("k", "v", "pos")))
    assert (o - want).abs().max() < 2e-4 and (lse - total).abs().max() < 2e-4


def test_thin_keys_of_wide_ones():
    """Are narrow, as long as their values are."""
    qs, own, t = queries(1, 4, 1, 288), queries(1, 4, 1, 64), tokens(1, 2, 20, 64)
    part = replace(ops.piece(t), q=own.q)
    assert not gpu_refuses(qs, [part])
    o, lse = LITTLE(qs, [part])
    want, total = attend(replace(own, scale=qs.scale), t.k, t.v, t.pos)
    assert (o - want).abs().max() < 2e-5 and (lse - total).abs().max() < 2e-5


def test_what_it_does_not_take():
    qs, t = queries(1, 4, 1, 320), tokens(1, 2, 20, 320, Dv=64)
    assert "320 and 64 channels" in gpu.unread(ops.piece(t), qs)
    assert "640 and 640 channels" in gpu.unread(ops.piece(tokens(1, 2, 20, 640)), queries(1, 4, 1, 640))
    kivi = held("kivi(bits=4, residual=5)", 320, False, torch.float32).state.store.attend(queries(2, 6, 1, 320))
    assert gpu_refuses(queries(2, 6, 1, 320), kivi) == ["320 channels, per channel, the kernel takes 256"]


@pytest.mark.parametrize(
    "recipe", ["int4(residual=8)", "h2o(budget=20, every=2)+int8", "snapkv(budget=24, recent=8)+calidrop(late=1)"]
)
def test_a_model_of_latents_decodes_as_it_does_in_torch(recipe, dispatched, monkeypatch):
    model, inputs = (
        made(num_hidden_layers=1, mlp_layer_types=["dense"], kv_lora_rank=256, qk_rope_head_dim=32, head_dim=32).to(
            DEVICE
        ),
        batch(length=36),
    )
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    cache = calidrop.KVCache(model, recipe)
    got, logits = generate(model, inputs, cache, new=5)
    assert "decode by the Triton kernel" in cache.describe()
    assert "torch" not in cache.describe().replace("asked again by torch", "")
    with kernels(monkeypatch, "torch"):
        want, expected = generate(model, inputs, calidrop.KVCache(model, recipe), new=5)
    assert torch.equal(got, want)
    assert worst(logits, expected) < 2e-3
