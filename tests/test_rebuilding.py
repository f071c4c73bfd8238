"""The kernel for CPUs that asks latents (ops/cpp/latents.cpp) against attention over what they stand for."""

from dataclasses import replace

import pytest
import torch

from calidrop import ops
from calidrop.attention import Queries, attend
from calidrop.methods._latents import Basis
from calidrop.methods._per_token import PerToken
from calidrop.methods.recalkv import Latents
from calidrop.observe import Observation
from calidrop.ops import cpu, rebuilding
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.recipe import parse
from calidrop.rope import Rope
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens
from test_kernel import VARIANTS, use

pytestmark = pytest.mark.skipif(cpu.kernel().reason.startswith("no C++ compiler"), reason=cpu.kernel().reason)


def basis(heads: int, D: int, Dv: int, size: int, rank: int, values: int) -> Basis:
    """rank: of a group of `size` heads."""
    keys = torch.randn(heads // size, size * D, rank) / rank**0.5
    order = torch.randperm(heads).tolist()
    values_of = torch.randn(heads * Dv, values) / values**0.5
    return Basis(order, keys, values_of, torch.randn(heads * D), torch.randn(heads * Dv))


def filled(
    inner: str | Store, of: Basis, rope: Rope, rows: int, N: int, dtype=torch.float32, pads: tuple[int, ...] = (0, 7)
) -> Latents:
    """A store of random latents. pads: of each row in turn, which has so many tokens fewer."""
    layer = Layer(0, 1, 1, 1, of.key_rank, None, HeadGroup(), of.value_rank)
    inner = parse(inner).plan(layer).store if isinstance(inner, str) and inner else inner or Exact()
    store = Latents(inner, of, rope, 1.25)
    starts = torch.tensor([pads[b % len(pads)] for b in range(rows)])
    pos = torch.arange(N, dtype=torch.int32).expand(rows, 1, N)
    pos = pos.masked_fill(pos < starts[:, None, None], -1)
    z = Tokens(torch.randn(rows, 1, N, of.key_rank).to(dtype), torch.randn(rows, 1, N, of.value_rank).to(dtype), pos)
    asked = Queries(torch.zeros(rows, 1, 1, 1), torch.full((rows, 1), N), 1.0)
    told = Observation(asked, torch.zeros(rows, 1, 1), starts, starts)
    store.start, store.dtype = starts, torch.float32
    store.inner.add(z, told)
    return store


def check(store: Latents, qs: Queries, tolerance: float) -> None:
    """Against fp32 keys and values of what the store holds, decoded."""
    of, asked = store.basis, []
    parts = [(z, z.pos.expand(-1, of.heads, -1)) for z in store.inner.tokens()]
    k = torch.cat([store.rope.rotate(of.keys_of(z.k[:, 0]), pos - store.start[:, None, None]) for z, pos in parts], 2)
    v, pos = torch.cat([of.values_of(z.v[:, 0]) for z, _ in parts], 2), torch.cat([pos for _, pos in parts], 2)
    want, total = attend(replace(qs, q=qs.q.float()), k * store.scaling, v, pos)
    with pytest.MonkeyPatch.context() as patch:
        kernel = cpu.kernel().latents
        patch.setattr(cpu.kernel(), "latents", lambda *given: asked.append(1) or kernel(*given))
        [(o, lse)] = store.attend(qs)
    assert asked
    torch.testing.assert_close(o, want, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse, total, atol=tolerance, rtol=0)


def queries(rows: int, Hq: int, T: int, D: int, dtype=torch.float32, softcap: float | None = None) -> Queries:
    return Queries(torch.randn(rows, Hq, T, D).to(dtype), torch.full((rows, T), 10_000), D**-0.5, softcap)


STORED = (
    *("", "int8", "int4", "int4(rotate=False)", "fp8", "kivi(bits=4, group=16)", "kivi(bits=2, group=8)"),
    *("kivi(bits=8, group=16)", "ott(bits=4, block=80, pool=3, spill=2, skip=0)", "decoquant"),  # the last is decoded
)


@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("recipe", STORED)
@pytest.mark.parametrize("flags", VARIANTS)
def test_latents(flags, recipe, T, monkeypatch):
    use(flags, monkeypatch)
    of = basis(4, 64, 64, 2, 48, 80)
    store = filled(recipe, of, Rope(1e4 ** -(torch.arange(32) / 32)), 3, 611)
    check(store, queries(3, 12, T, 64), 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "G", "D", "Dv", "size", "rank", "values", "half"),
    [
        (3, 3, 64, 64, 3, 64, 128, 32),
        (3, 1, 64, 64, 1, 21, 40, 32),  # neither fills vectors
        (2, 7, 80, 96, 1, 40, 96, 16),  # rotated in part, and a head dim that 16 divides
        (2, 2, 24, 8, 2, 7, 9, 12),
        (8, 4, 128, 128, 4, 256, 512, 64),
        (6, 2, 16, 20, 3, 16, 300, 8),
        (1, 5, 256, 256, 1, 96, 72, 128),
    ],
)
def test_shapes(heads, G, D, Dv, size, rank, values, half, dtype):
    of, rope = basis(heads, D, Dv, size, rank, values), Rope(1e5 ** -(torch.arange(half) / half))
    store = filled("", of, rope, 2, 150, dtype)
    check(store, queries(2, heads * G, 1, D, dtype), 1e-4)
    check(store, queries(2, heads * G, 1, D, softcap=3.0), 1e-4)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_codes_that_do_not_fill_vectors(recipe):
    store = filled(recipe, basis(3, 64, 64, 1, 21, 40), Rope(1e4 ** -(torch.arange(32) / 32)), 2, 150)
    check(store, queries(2, 9, 1, 64), 1e-4)


@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_lengths_and_threads(N, threads):
    of, before = basis(3, 64, 64, 3, 64, 128), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(filled("", of, Rope(1e4 ** -(torch.arange(32) / 32)), 2, N, pads=(0,)), queries(2, 9, 1, 64), 5e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first", [8_000, 130_000, 1_000_000, 16_000_000])
def test_angles_of_far_positions(first):
    """As torch turns keys, whose angles in fp32 have lost their last digits by then."""
    of = basis(2, 64, 64, 2, 64, 64)
    store = filled("", of, Rope(torch.linspace(1.0, 1e-3, 32)), 1, 200, pads=(0,))
    held = store.inner.held
    store.inner.held = held.replace({"pos": held.data["pos"] + first})
    check(store, replace(queries(1, 4, 1, 64), pos=torch.full((1, 1), first + 10_000)), 5e-5)


def test_symmetric_codes():
    """Codes without zeros of their own."""
    of = basis(3, 64, 64, 3, 64, 128)
    for bits in (8, 4, 2):
        store = filled(PerToken(bits, False), of, Rope(1e4 ** -(torch.arange(32) / 32)), 2, 70, pads=(0,))
        held = store.inner.held
        steps = {f"{n}_scale": torch.full_like(held.data[f"{n}_scale"], 2**-5) for n in ("k", "v")}
        zeros = {f"{n}_zero": steps[f"{n}_scale"] * -float(2 ** (bits - 1) - 1) for n in ("k", "v")}
        store.inner.held = held.replace({**steps, **zeros})
        qs = queries(2, 9, 1, 64)
        [(want, total)] = store.attend(qs)
        plain = store.inner.held
        store.inner.held = plain.only(*(n for n in plain.data if not n.endswith("_zero")))
        [(o, lse)] = store.attend(qs)
        torch.testing.assert_close(o, want, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse, total, atol=1e-6, rtol=1e-6)


def test_empty_rows_and_stores():
    of = basis(3, 64, 64, 3, 64, 128)
    store = filled("", of, Rope(1e4 ** -(torch.arange(32) / 32)), 3, 40, pads=(0, 40, 13))  # the second has none
    qs = queries(3, 9, 1, 64)
    check(store, qs, 5e-5)
    [(o, lse)] = store.attend(qs)
    assert (o[1] == 0).all() and (lse[1] == float("-inf")).all()
    store.inner = Exact()
    assert store.attend(qs) == []


def test_numbers_that_are_none_stay_so():
    of = basis(3, 64, 64, 3, 64, 128)
    store = filled("", of, Rope(1e4 ** -(torch.arange(32) / 32)), 2, 100, pads=(0,))
    store.inner.held.data["k"][1, 0, 50, 3] = float("nan")
    [(o, lse)] = store.attend(queries(2, 9, 1, 64))
    assert o[0].isfinite().all() and lse[0].isfinite().all()
    assert lse[1].isnan().all() and o[1].isnan().all()


def test_what_it_leaves_to_torch(monkeypatch):
    of = basis(3, 64, 64, 3, 64, 128)
    store = filled("", of, Rope(1e4 ** -(torch.arange(32) / 32)), 2, 100)
    kernel, asked = cpu.kernel().latents, []
    monkeypatch.setattr(cpu.kernel(), "latents", lambda *given: asked.append(1) or kernel(*given))
    learning = queries(2, 9, 1, 64)
    learning.q.requires_grad_()
    masked = replace(queries(2, 9, 1, 64), visible=lambda q, k: (k <= q[:, :1, None])[:, :, None].expand(-1, -1, 1, -1))
    for qs, reason in (
        (queries(2, 9, ops.MOST_QUERIES + 1, 64), "queries at once"),
        (queries(2, 9, 1, 64, torch.float64), "float64"),
        (learning, "gradients"),
        (masked, "mask"),
    ):
        assert reason in rebuilding.refusal(qs)
    store.attend(queries(2, 9, ops.MOST_QUERIES + 1, 64))
    [(o, _)] = store.attend(learning)
    o.sum().backward()
    assert learning.q.grad.abs().sum() > 0
    assert not asked
