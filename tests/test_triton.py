"""The Triton kernels (ops/gpu) against their oracles, interpreted where there is no GPU."""

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

import calidrop
from calidrop import ops
from calidrop.attention import Queries, attend, merge
from calidrop.methods._latents import Basis
from calidrop.methods.calidrop import Calibrated
from calidrop.methods.recalkv import Latents
from calidrop.observe import Observation
from calidrop.ops import gpu
from calidrop.ops.gpu import latents
from calidrop.parallel import HeadGroup
from calidrop.quant import pack, quantize
from calidrop.rope import Rope
from calidrop.state import Ragged, tensors
from calidrop.store import Exact
from calidrop.tokens import Tokens
from calidrop.window import Window
from helpers import check_heard, check_steps_heard, kernels, layer_of, live, random_qkv, run
from test_proposals import check_verified
from tiny import batch, generate, tiny, worst

if sys.platform != "linux":
    pytest.skip("there is no triton", allow_module_level=True)
import triton

if (
    not torch.cuda.is_available()
    and Version(triton.__version__) < Version("3.9")
    and Version(np.__version__) >= Version("2.4")
):
    pytest.skip("the interpreter of triton before 3.9 needs numpy before 2.4", allow_module_level=True)

import interpreted
from calidrop.ops.gpu import _shared
from calidrop.ops.gpu.attention import decode

assert interpreted  # in less time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


LITTLE = functools.partial(decode, least=16)  # tokens per program, so that there are many


def weights(qs: Queries, lse: torch.Tensor, t: Tokens, group: str) -> torch.Tensor:
    return gpu.weights(qs, lse, t.logits, group == "max")


def queries(B: int, Hq: int, T: int, D: int, softcap: float | None = None, dtype=torch.float32) -> Queries:
    q = torch.randn(B, Hq, T, D, device=DEVICE).to(dtype)
    return Queries(q, torch.full((B, T), 10_000, device=DEVICE), D**-0.5, softcap)


def tokens(B: int, H: int, N: int, D: int, dtype=torch.float32, empty: float = 0.0, Dv: int = 0) -> Tokens:
    """A view of larger memory, NaN behind the tokens."""
    room = torch.full((B, H, N + 5, D), NAN, dtype=dtype, device=DEVICE)
    pos = torch.full((B, H, N + 5), 2**30, dtype=torch.int32, device=DEVICE)
    pos[:, :, :N] = torch.arange(N)
    pos[torch.rand(B, H, N + 5, device=DEVICE) < empty] = -1
    v = room[..., : Dv or D].clone()
    room[:, :, :N], v[:, :, :N] = (torch.randn(x[:, :, :N].shape, device=DEVICE).to(dtype) for x in (room, v))
    return Tokens(room[:, :, :N], v[:, :, :N], pos[:, :, :N], dense=empty == 0.0)


def check(qs: Queries, parts: list, sets: list[Tokens], limit: float) -> None:
    assert not gpu_refuses(qs, parts)
    o, lse = LITTLE(qs, parts)
    want, total = merge([attend(qs, t.k, t.v, t.pos) for t in sets])
    assert o.isfinite().all()
    assert torch.equal(lse.isinf(), total.isinf())
    assert (lse - total).nan_to_num(0.0, 0.0, 0.0).abs().max() < limit
    assert (o - want).abs().max() < limit


def gpu_refuses(qs: Queries, parts: list) -> list[str]:
    return [why for p in parts if not isinstance(p, tuple) and (why := gpu.unread(p, qs))]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("D", "Dv"), [(16, 16), (64, 64), (80, 80), (40, 128), (256, 256)])
def test_exact(D, Dv, dtype):
    t = tokens(1, 2, 75, D, dtype, Dv=Dv)
    check(queries(1, 6, 1, D, dtype=dtype), [ops.piece(t)], [t], LIMIT[dtype])


@pytest.mark.parametrize(("group", "T", "N"), [(1, 1, 1), (1, 8, 64), (7, 1, 65), (5, 4, 17)])
def test_queries_and_lengths(group, T, N):
    t = tokens(2, 1, N, 32)
    check(queries(2, group, T, 32), [ops.piece(t)], [t], 2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_several_sets_empty_slots_and_answers(softcap):
    D, qs = 32, queries(3, 6, 1, 32, softcap)
    a, b, c = tokens(3, 2, 70, D), tokens(3, 2, 33, D, empty=0.4), tokens(3, 2, 41, D)
    b.pos[1, 1] = -1  # a head with nothing
    check(qs, [ops.piece(a), attend(qs, c.k, c.v, c.pos), ops.piece(b)], [a, b, c], 2e-5)
    few = [tokens(3, 2, n, D) for n in range(1, 8)]  # more than a launch has room for
    check(qs, [ops.piece(t) for t in few], few, 2e-5)
    nothing = tokens(3, 2, 5, D, empty=1.1)
    check(qs, [ops.piece(nothing)], [nothing], 2e-5)


def test_bias():
    qs, t = queries(2, 4, 1, 32, dtype=torch.bfloat16), tokens(2, 2, 40, 32)  # summaries are fp32 beside a bf16 model
    bias = torch.randn(2, 2, 45, device=DEVICE)[:, :, :40]  # lies as the tokens do
    o, lse = LITTLE(qs, [ops.piece(t, bias)])
    want, total = attend(qs, t.k, t.v, t.pos, bias)
    assert (o - want).abs().max() < 2e-5
    assert (lse - total).abs().max() < 2e-5


def test_heads_of_unequal_length():
    qs, t = queries(2, 6, 1, 64), tokens(2, 3, 200, 64, empty=0.5)
    t.pos[0, 1, 20:] = -1
    t.pos[1, 0] = -1
    store = Exact()
    store.held = Ragged(t.columns(), t.valid)
    assert not store.held.uniform
    poison(store.held)
    check(qs, store.attend(qs), [t], 2e-5)
    for softcap in (None, 2.0):
        check_heard(LITTLE, weights, replace(qs, softcap=softcap), store, 2e-5)


def poison(held: Ragged) -> None:
    """NaN (255 in codes) behind flat columns."""
    if not held.uniform:
        tails = {n: x.new_full((9, *x.shape[1:]), NAN if x.is_floating_point() else 255) for n, x in held.data.items()}
        held.data = {n: torch.cat([x, tails[n]])[: len(x)] for n, x in held.data.items()}


CODED = [
    "int8(residual=5)",
    "int4(residual=5)",
    "int4(rotate=False, residual=5)",
    "fp8(residual=5)",
    *(f"kivi(bits={bits}, group={group}, residual=7)" for bits, group in ((2, 32), (4, 8), (4, 64), (8, 16))),
    "ott(bits=2, block=64, pool=3, spill=5, skip=0, residual=5)",
    "adakv(budget=90, recent=9)+int4",
    "adakv(budget=90, recent=9)+fp8",
    "adakv(budget=90, recent=9)+kivi(bits=2)",
    *(f"think(keep=0.55, recent=5){more}" for more in ("", "+int4", "+fp8", "+kivi(bits=4, group=32)")),
    *(f"h2o(budget=60)+mikv(bits={bits})" for bits in (2, 3, 4)),
    *(f"decoquant(bits={bits}, residual=5)" for bits in (2, 4, 8)),
    "adakv(budget=90, recent=9)+decoquant",
    "mixkvq(block=64, residual=5)",
    "mixkvq(quota=(3, 13, 48), values=4, group=8, block=64, residual=5)",
    "mixkvq(quota=(0, 64, 0), values=8, group=64, block=64, residual=5)",
    "mixkvq(quota=(0, 0, 64), group=16, residual=5)",
    "adakv(budget=90, recent=9)+mixkvq(block=64)",
]


def coded(recipe: str, D: int, dtype=torch.float32):
    """A layer that holds something, and a query."""
    N = 151
    qkv = tuple(x.to(dtype).to(DEVICE) for x in random_qkv(2, 2, 3, N, D))
    return run(recipe, qkv, pads=[0, 27]), queries(2, 6, 1, D, dtype=dtype)


@pytest.mark.parametrize("recipe", CODED)
def test_codes(recipe):
    kv, qs = coded(recipe, 64)
    if kv.state.store.__class__.__name__ == "Split":
        poison(kv.state.store.kept.held)
    parts = kv.state.store.attend(qs)
    assert not any(isinstance(p, tuple) for p in parts)
    check(qs, [*parts, ops.piece(kv.state.window.tokens())], live(kv), 2e-4)
    check_heard(LITTLE, weights, qs, kv.state.store, 1e-3)


@pytest.mark.parametrize(
    "recipe",
    ["int4(residual=5)", "int8(residual=5)", "kivi(bits=4, group=16, residual=7)", "decoquant(residual=5)"],
)
@pytest.mark.parametrize("D", [80, 96])
def test_head_dims_that_are_no_power_of_two(recipe, D):
    kv, qs = coded(recipe, D)
    check(qs, [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())], live(kv), 2e-4)


HALF = [
    *("int8(residual=5)", "int4(residual=5)", "fp8(residual=5)", "decoquant(residual=5)"),
    *(f"kivi(bits={b}, residual=7)" for b in (2, 4, 8)),
    *(f"h2o(budget=60)+mikv(bits={b})" for b in (2, 3, 4)),
    *(f"mixkvq(values={b}, residual=5)" for b in (2, 4)),
]


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("recipe", HALF)
def test_half_precision_rounds_weights_once(recipe, D):
    kv, qs = coded(recipe, D, torch.bfloat16)
    check(qs, [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())], live(kv), 2e-2)


@pytest.mark.parametrize("recipe", ["int4(residual=5)", "fp8(residual=5)", "kivi(bits=4, residual=7)"])
def test_codes_leave_no_range_of_fp16(recipe):
    """Beside queries in bf16, codes are multiplied in fp16: with queries of any size, values whose scales differ by
    1e5, and weights that are small but many."""
    q, k, v = random_qkv(1, 2, 3, 200, 64)
    v *= torch.logspace(-3, 2, 200)[:, None]
    v[:, :, 100] *= 1e-4
    k[:, :, 100] *= 40 / k[:, :, 100].norm(dim=-1, keepdim=True)  # most of the weight, nearly nothing to say
    kv = run(recipe, tuple(x.to(torch.bfloat16).to(DEVICE) for x in (q, k, v)))  # type: ignore[arg-type]
    for size in (1e-7, 1e6):
        x = (k[:, :, 100:101].repeat_interleave(3, 1) * size).to(torch.bfloat16).to(DEVICE)
        qs = Queries(x, torch.full((1, 1), 10_000, device=DEVICE), 10 / 1600 / size)
        o, lse = LITTLE(qs, [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())])
        want, total = merge([attend(qs, t.k, t.v, t.pos) for t in live(kv)])
        assert (lse - total).abs().max() < 2e-2
        assert (o - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(("W", "softcap"), [(1, None), (90, None), (90, 5.0)])
def test_mass(W, softcap):
    """Left pads, empty slots, more queries than a block; the oracle holds the matrix."""
    B, H, G, D, N = 2, 2, 3, 32, 90
    t = tokens(B, H, N, D, empty=0.2)
    pos = torch.arange(N - W, N, device=DEVICE).expand(B, W).clone()
    pos[1, : W // 3], t.pos[1, :, : W // 3] = -1, -1
    qs = Queries(torch.randn(B, H * G, W, D, device=DEVICE), pos, D**-0.5, softcap)
    lse = attend(qs, t.k, t.v, t.pos)[1]
    got = gpu.mass(qs, lse, t)
    start = torch.zeros(B, device=DEVICE, dtype=torch.long)
    assert (got - Observation(qs, lse, start + N, start).weights(t).sum(2)).abs().max() < 1e-5
    assert (got[~t.valid] == 0).all()


@pytest.mark.parametrize(("group", "block"), [("mean", 1), ("max", 1), ("max", 16), ("mean", 64), ("mean", 8)])
def test_weights_from_logits(group, block):
    """A row that is a pad, heads with nothing, a query that heard nothing, more tokens than a program takes."""
    B, H, G, N = 3, 2, 3, 1024 + 192
    s = 3 * torch.randn(B, H, G, N, device=DEVICE)
    s[torch.rand(B, H, G, N, device=DEVICE) < 0.2] = float("-inf")
    s[0, 1] = float("-inf")
    lse = s.logsumexp(-1).view(B, H * G, 1)
    qs = queries(B, H * G, 1, 16)
    qs.pos[2] = -1
    t = tokens(B, H, N, 16)
    t.logits = s
    assert gpu.pools(t, block) and not gpu.pools(t, 24) and not gpu.pools(t, 256) and not gpu.pools(t.slice(0, 9), 16)
    want = ops.weights_in_torch(qs, lse, t, group, block)
    got = gpu.weights(qs, lse, s, group == "max", block)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert (got[2] == 0).all() and (got[0, 1] == 0).all() and got[0, 0].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", LIMIT)
def test_rounding_is_the_same_bit_by_bit(bits, dtype):
    room = torch.full((2, 3, 41, 80), NAN, device=DEVICE)
    room[:, :, :32] = (
        torch.randn(2, 3, 32, 80, device=DEVICE) * torch.tensor([1e-6, 3.0, 3e4], device=DEVICE)[:, None, None]
    )
    room[0, 0, :9], room[0, 1, 3, :40], room[1, 0, 0, 0] = 0.0, 0.25, 1e9  # constant; out of fp16's range
    room[0, 2, :, :16] = torch.arange(16.0, device=DEVICE) * 0.5  # ties
    x = room[:, :, :32].to(dtype)
    units = x.unflatten(2, (2, 16))
    for groups in (x, x.unflatten(-1, (-1, 16)), units.transpose(-1, -2), units.unflatten(-1, (-1, 8)), x[..., :8]):
        codes, scale, zero = quantize(groups, bits)
        got = gpu.rounded(groups, bits)
        for a, b in zip(got, (pack(codes, bits), scale, zero), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(("half", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (12, torch.float32)])
def test_keys_from_latents(half, dtype):
    """Two groups of two heads in a mixed order, a rank that is no power of two, partial rotary."""
    B, H, N, D, rank = 2, 4, 70, 32, 21
    basis = Basis([2, 0, 3, 1], *(torch.randn(s, device=DEVICE) for s in ((2, 2 * D, rank), (H * D, 8), H * D, H * D)))
    rope = Rope(10_000.0 ** -(torch.arange(half, device=DEVICE) / half))
    pos = torch.arange(1000, 1000 + N, device=DEVICE, dtype=torch.int32).expand(B, 1, N)
    z = torch.randn(B, 1, N + 3, 2 * rank, device=DEVICE)[:, :, :N].to(dtype)
    store = Latents(Exact(), basis, rope, 1.5)
    store.start, store.dtype = torch.tensor([0, 13], device=DEVICE), dtype
    want = store._keys(Tokens(z, z, pos))
    gap = torch.where(torch.tensor(dtype == torch.float32), 2e-4, want.float().abs().max() * 2**-7)
    at = (pos - store.start[:, None, None])[:, 0]
    got = gpu.keys(z[:, 0], at, basis.keys, basis.key_bias, basis.at, rope.inv_freq, 1.5)
    assert got.dtype == want.dtype
    assert (got.float() - want.float()).abs().max() < gap


@pytest.mark.parametrize("softcap", [None, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("half", "dtype", "group", "T"),
    [
        (16, torch.float32, 1, 1),
        (16, torch.bfloat16, 3, 2),
        (12, torch.float32, 2, 1),
        pytest.param(12, torch.bfloat16, 7, 3, marks=pytest.mark.slow),
    ],
)
def test_latents_asked_where_keys_are_made(half, dtype, group, T, softcap, dispatched):
    """As `test_keys_from_latents`; left pads, no numbers in empty slots, a row with nothing, one split and several."""
    B, H, N, D, rank, values = 3, 4, 70, 32, 21, 37
    sizes = (2, 2 * D, rank), (H * D, values), H * D, H * D
    basis = Basis([2, 0, 3, 1], *(torch.randn(s, device=DEVICE) for s in sizes))
    rope = Rope(10_000.0 ** -(torch.arange(half, device=DEVICE) / half))
    pos = torch.arange(1000, 1000 + N, device=DEVICE, dtype=torch.int32).repeat(B, 1, 1)
    pos[1, :, :20], pos[2] = -1, -1
    room = [torch.randn(B, 1, N + 9, n, device=DEVICE).to(dtype) for n in (2 * rank, values)]
    for x in room:
        x[:, :, :N].masked_fill_((pos < 0)[..., None], float("nan"))
        x[:, :, N:] = float("nan")
    z, v = (x[:, :, :N] for x in room)
    qs = queries(B, H * group, T, D, softcap)
    qs = Queries(0.3 * qs.q.to(dtype), qs.pos, qs.scale, softcap)
    store = Latents(Exact(), basis, rope, 1.5)
    store.start, store.dtype = torch.tensor([0, 1013, 0], device=DEVICE), dtype
    assert gpu.takes_latents(qs, H, values)
    clean = Tokens(z.nan_to_num(), v.nan_to_num(), pos)
    keys = (rope.rotate(basis.keys_of(clean.k[:, 0]), pos - store.start[:, None, None]) * 1.5).to(dtype)
    want, norm = attend(qs, keys, clean.v.expand(-1, H, -1, -1), pos.expand(-1, H, -1))
    at = (z[:, 0], v[:, 0], pos[:, 0], store.start, basis.keys, basis.key_bias, basis.slots, rope.inv_freq, 1.5)
    for least in (256, 16):
        o, lse = latents.attend(qs, *at, least=least)
        limit = 2e-4 if dtype == torch.float32 else 0.06  # keys are rounded, which the interpreter does downwards
        assert torch.equal(lse.isinf(), norm.isinf()) and lse[2].isinf().all()
        assert (lse - norm).nan_to_num(0.0, 0.0, 0.0).abs().max() < limit
        assert (o - want)[:2].abs().max() < limit and (o[2] == 0).all()


@pytest.fixture
def dispatched(monkeypatch):
    """Triton where the library would take its kernels for CPUs."""
    with kernels(monkeypatch, "triton"):
        yield


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (40, 24)])
def test_a_token_goes_to_its_slot(D, Dv, dtype, dispatched):
    """In a window that others are older than, whose tokens are counted."""
    t = tokens(2, 3, 12, D, dtype, Dv=Dv)
    t.stats["mass"] = torch.rand(2, 3, 12, device=DEVICE)
    own, want = Window(), Window()
    for window in (own, want):
        window.append(t)
        window.stats = t.stats
    own, want = own.fixed(20, 112), want.fixed(20, 112)
    for x in (own, want):
        x.stats = {"mass": x.stats["mass"] + 1}  # what is counted of empty slots is forgotten
    for i in range(112, 117):
        k, v = (torch.randn(2, 1, 3, d, device=DEVICE).to(dtype).transpose(1, 2) for d in (D, Dv))
        column = torch.tensor([i], dtype=torch.int32, device=DEVICE)
        new = Tokens(k, v, column.expand(2, 3, 1), dense=True)
        assert gpu.puts(new, own)
        gpu.put(new, own)
        own.written(new)
        want.append(new)
        assert len(own) == len(want) == i - 99
        for x, y in zip(tensors(own), tensors(want), strict=True):
            assert torch.equal(x, y)
    assert own.tokens().pos[1, 2].tolist() == [*range(12), *range(112, 117), -1, -1, -1]
    for other in (
        replace(new, k=torch.randn(2, 3, 1, 2 * D, device=DEVICE)[..., ::2]),
        tokens(2, 3, 2, D, dtype, Dv=Dv),
    ):
        assert not gpu.puts(other, own)
    assert not gpu.puts(new, own.loose())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("late", "offload"), [(0, True), (1, True), (3, True), (0, False)])
@pytest.mark.parametrize(("order", "apply"), [(0, 0.5), (1, 0.85)])
@pytest.mark.parametrize(
    ("H", "G", "D", "dtype"), [(2, 3, 64, torch.float32), (5, 1, 24, torch.bfloat16), (1, 4, 128, torch.float16)]
)
def test_what_heads_remember(H, G, D, dtype, order, apply, late, offload, softcap, dispatched, monkeypatch):
    """Steps of CaliDrop in one launch: queries near and far, a head that lost nothing, and a row."""
    B, Hq = 3, H * G
    heads = HeadGroup()
    store = Calibrated(order, 0.5, apply, "head", offload, 0, heads, late, "device")
    lost = tokens(B, H, 40, D, dtype)
    lost.pos[0, 0], lost.pos[2], lost.dense = -1, -1, False
    context, none = torch.full((B,), 500, device=DEVICE), torch.zeros(B, Hq, 1, device=DEVICE)
    near = queries(B, Hq, 1, D, softcap, dtype)
    store.add(lost, Observation(near, none, context, context * 0))
    asked = 0
    for i in range(4):
        drift = torch.randn(B, Hq, 1, D, device=DEVICE) * torch.linspace(0.0, 1.5, Hq, device=DEVICE)[:, None, None]
        qs = replace(near, q=(near.q + i * drift).to(dtype))
        other = store.fork()
        assert store._in_triton(store.memories[0], qs)
        ((o, lse),) = store.attend(qs)
        with monkeypatch.context() as patch:
            patch.setattr(Calibrated, "_in_triton", lambda self, m, qs: False)
            ((want, total),) = other.attend(qs)
        assert torch.equal(lse.isinf(), total.isinf()) and lse[2].isinf().all()
        torch.testing.assert_close(lse, total, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(o, want, atol=2e-5, rtol=1e-4)
        for x, y in zip(tensors(store), tensors(other), strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)
        assert store.recomputed() == other.recomputed()
        if late:
            m = store.memories[0]
            assert m.asking is not None and m.asking.q is not qs.q and torch.equal(m.asking.q, qs.q)
            per_row = m.wanted.view(B, H, G).any(-1).sum(-1)
            assert per_row.max() <= late
            asked += int(per_row.sum())
            store.serve(m, bool(m.wanted.any()))
            store.serve(m, False)
    assert (asked > 0) == bool(late) and (store.recomputed()[0] > 0) == offload


RECIPES = [
    "h2o(budget=20, every=2)",
    "snapkv(budget=24, recent=8)+int4",
    "snapkv(budget=24, recent=8, every=2)+calidrop(summary=4)",
    "snapkv(budget=24, recent=8)+calidrop(late=1)",
    "snapkv(budget=24, recent=8)+calidrop(summary=4, offload=False)",
    "think(keep=0.5)+kivi(bits=4, group=8, residual=5)",
    "adakv(budget=24, recent=8)+fp8",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_decodes_as_it_does_in_torch(recipe, dispatched, monkeypatch):
    model, inputs = tiny(num_hidden_layers=1).to(DEVICE), batch(length=36)
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    cache = calidrop.KVCache(model, recipe)
    got, logits = generate(model, inputs, cache, new=5)
    assert "decode by the Triton kernel" in cache.describe()
    assert "torch" not in cache.describe().replace("asked again by torch", "")  # on the host, whose kernel is off
    with kernels(monkeypatch, "torch"):
        want, expected = generate(model, inputs, calidrop.KVCache(model, recipe), new=5)
    assert torch.equal(got, want)
    assert worst(logits, expected) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["snapkv(budget=24, recent=8)+int4", "adakv(budget=24, recent=8)+calidrop"])
def test_proposals_are_answered_together(recipe, dispatched):
    check_verified(recipe, 9, DEVICE)


@pytest.mark.parametrize("recipe", ["h2o(budget=24, every=4)+int4", "lazy_eviction(budget=40, window=4)+fp8"])
def test_steps_heard_on_the_way(recipe, dispatched, monkeypatch):
    """Keys are asked once."""
    asked: list[int] = []  # how many queries; 0 where their logits are there
    own = ops.weights
    monkeypatch.setattr(ops, "mass", lambda qs, lse, t: asked.append(len(qs)) or gpu.mass(qs, lse, t))
    monkeypatch.setattr(ops, "weights", lambda qs, lse, t, *of: asked.append(t.logits is None) or own(qs, lse, t, *of))
    run(recipe, random_qkv(2, 2, 2, 75, 64), 70)
    assert 0 in asked and 1 not in asked
    check_steps_heard(recipe, monkeypatch, steps=5)
    assert 1 in asked


def test_what_it_does_not_take_is_answered_by_torch_and_said(dispatched):
    qs, t, odd = queries(1, 4, 1, 48), tokens(1, 2, 20, 48), tokens(1, 2, 30, 48)
    assert ops.pick(qs, [ops.piece(t)]) is ops.GPU
    odd.v = odd.v.expand(1, 2, 30, 48)[:, :1].expand(1, 2, 30, 48)  # heads share their values
    both = ops.pick(qs, [ops.piece(t), ops.piece(odd)])
    assert "side by side" in both.name and "torch" in both.name
    for parts, sets in (([ops.piece(t), ops.piece(odd)], [t, odd]), ([ops.piece(odd)], [odd])):
        o, lse = ops.joined(qs, parts)
        want, total = merge([attend(qs, x.k, x.v, x.pos) for x in sets])
        assert (o - want).abs().max() < 2e-5
        assert (lse - total).abs().max() < 2e-5
    assert ops.pick(queries(1, 4, 9, 48), [ops.piece(t)]).name == "torch (9 queries at once, a kernel takes 8)"
    assert "groups of 24" in gpu.unread(layer_piece("kivi(group=24)", 48), qs)
    assert "units of 32" in gpu.unread(layer_piece("mixkvq(block=32, group=16)", 48), qs)
    assert "values are exact" in gpu.unread(layer_piece("mixkvq(values=16, block=64, group=16)", 48), qs)
    assert "units of 96" in gpu.unread(layer_piece("mixkvq(block=96, group=16)", 48), qs)


def layer_piece(recipe: str, D: int):
    qkv = random_qkv(1, 2, 2, 200, D)
    return run(recipe, qkv).state.store.attend(Queries(qkv[0][:, :, :1], torch.full((1, 1), 999), 1.0))[-1]


def test_off_switch(monkeypatch):
    with kernels(monkeypatch, "torch"):
        assert gpu.reason(torch.device("cuda", 0)) == "CALIDROP_KERNEL=torch"
    assert layer_of("full", random_qkv(1, 1, 1, 1, 8)).by == ""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path):
    """To machine code, with no GPU, and without spilling more than a register or two (MixKVQ: a few; leaving logits:
    twice that; latents: a table for sines)."""
    worker = Path(__file__).with_name("triton_worker.py")
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, worker, str(capability)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    names = {"_split", "_wide", "_join", "_mass", "_weights", "_round", "_keys", "_asked", "_put", "_remember"}
    assert {k["name"] for k in kernels} == names
    for k in kernels:
        most = 64 if k["name"] in ("_keys", "_asked") else 32 if "mixkvq" in k["recipe"] else 16
        if k["name"] == "_split" and "heard" in k["recipe"]:
            most *= 2
        assert k["STACK"] <= most, k
        assert k["SHARED"] <= 99 * 1024, k  # of smaller GPUs


def _templates() -> list[str]:
    """The assembler in `_shared.code` (e4m3, then integers), which only a GPU runs."""
    source = inspect.getsource(_shared.code.fn)
    return re.findall(r'f"""(.*?)"""', source, re.DOTALL)


def _run(template: str, words: np.ndarray, **names: int) -> np.ndarray:
    """What the few instructions in it make of registers of two words each: fp16 [n,2]."""
    text = eval(f'f"""{template}"""', names)
    lines = [x.strip() for x in re.sub(r"\.reg[^;]*;", "", text.strip().strip("{}")).split(";") if x.strip()]
    held: dict[str, np.ndarray] = {"$1": words.astype(np.uint64)}

    def value(x: str) -> np.ndarray:
        return held[x] if x in held else np.full_like(words, int(x, 0), dtype=np.uint64)

    def halves(x: np.ndarray) -> np.ndarray:
        return x.astype(np.uint32).view(np.float16).reshape(-1, 2).astype(np.float64)

    for line in lines:
        name, *rest = re.findall(r"[^\s,{}]+", line)
        match name:
            case "shr.b32":
                held[rest[0]] = value(rest[1]) >> value(rest[2])
            case "lop3.b32":
                a, b, c = map(value, rest[1:4])
                assert int(rest[4], 0) == (0xF0 & 0xCC) | 0xAA  # the table of (a & b) | c
                held[rest[0]] = (a & b) | c
            case "prmt.b32":
                source, pick = value(rest[1]) | value(rest[2]) << 32, int(rest[3], 0)
                chosen = [(source >> (8 * (pick >> 4 * i & 7))) & 255 for i in range(4)]
                assert pick < 1 << 16 and not pick & 0x8888
                held[rest[0]] = sum(byte << 8 * i for i, byte in enumerate(chosen))
            case "mov.b32" if len(rest) == 3:  # into two halves
                held[rest[0]], held[rest[1]] = value(rest[2]) & 0xFFFF, value(rest[2]) >> 16
            case "mov.b32":
                held[rest[0]] = value(rest[1])
            case "fma.rn.f16x2":
                a, b, c = (halves(value(x)) for x in rest[1:])
                return (a * b + c).astype(np.float16)
            case "cvt.rn.f16x2.e4m3x2":
                codes = torch.from_numpy(value(rest[1]).astype(np.uint16).view(np.uint8).reshape(-1, 2).copy())
                return codes.view(torch.float8_e4m3fn).to(torch.float16).numpy()
            case _:
                pytest.fail(f"unknown: {line}")
    pytest.fail("no result")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_assembler_decodes_every_word(bits):
    """Run here, as no GPU is needed for it: all 65536 words beside one another's mirror."""
    low = np.arange(1 << 16, dtype=np.uint64)
    both = np.stack([low, low[::-1]], 1)
    for i in range(16 // bits):
        for half in (0, 2 ** (bits - 1)):
            got = _run(_templates()[1], low | low[::-1] << 16, I=i, BITS=bits, HALF=half, at=i * bits % 8)
            assert np.array_equal(got, ((both >> (i * bits)) & (2**bits - 1)).astype(np.float64) - half)


def test_the_assembler_decodes_every_float():
    low = np.arange(1 << 16, dtype=np.uint64)
    for i in range(2):
        got = _run(_templates()[0], low | low[::-1] << 16, I=i)
        want = torch.from_numpy(np.stack([low, low[::-1]], 1) >> 8 * i & 255).to(torch.uint8)
        assert np.array_equal(got, want.view(torch.float8_e4m3fn).to(torch.float16).numpy(), equal_nan=True)
