"""Drives one layer of a cache by hand: random queries, keys and values in, what it holds out."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Queries, logits, merge
from calidrop.holding import places
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.methods import _predictor
from calidrop.ops import cpu, gpu
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.recipe import parse
from calidrop.rope import Rope
from calidrop.store import Store
from calidrop.tokens import Tokens

QKV = tuple[Tensor, Tensor, Tensor]
ALICE = resources.files("calidrop") / "data" / "alice.txt"  # no default was chosen on it


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, wish: str) -> Iterator[None]:
    """Under CALIDROP_KERNEL, whichever kernels were looked for before."""
    looked_for = (gpu.reason, cpu.kernel, ops._interpreted)
    with monkeypatch.context() as patch:
        patch.setenv("CALIDROP_KERNEL", wish)
        for found in looked_for:
            found.cache_clear()
        try:
            yield
        finally:
            for found in looked_for:
                found.cache_clear()


@functools.cache
def untrained(block: int = 4, history: int = 8) -> str:
    """A file for attention_predictor with small blocks, so that short inputs have many."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder) / f"{block}-{history}.safetensors"
    _predictor.save(file, _predictor.Predictor.fresh(), {"block": block, "history": history})
    return str(file)


def predictor(budget: int | float, **changes: Any) -> str:
    """A recipe of it."""
    sizes = {"sinks": 4, "recent": 4, "block": 4, "history": 8, "skip": 0, **changes}
    given = ", ".join(f"{n}={x!r}" for n, x in sizes.items())
    return f"attention_predictor({budget}, {given}, file={untrained(sizes['block'], sizes['history'])!r})"


def random_qkv(B: int, H: int, G: int, N: int, D: int, seed: int = 0) -> QKV:
    """q [B,H*G,N,D], k and v [B,H,N,D]; logits spread enough that attention differs from token to token."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, N, D, generator=draw) for h in (H * G, H, H))
    return 2 * q, k, v


def layer_of(recipe: str, qkv: QKV, index: int = 0, layers: int = 1, rope: Rope | None = None) -> LayerKV:
    """An empty layer of the right shape. Positions rotate by 1, 1/10, ... unless `rope` is given."""
    q, k, _ = qkv
    rope = rope or Rope(0.1 ** torch.arange(k.shape[-1] // 2))
    layer = Layer(index, layers, q.shape[1], k.shape[1], k.shape[-1], rope, HeadGroup())
    return LayerKV(make=lambda: parse(recipe).plan(layer))


def feed(kv: LayerKV, qkv: QKV, sizes: list[int] | None = None, pads: list[int] | None = None) -> Tensor:
    """Attend blocks of `sizes` tokens (None: all at once), the first `pads[b]` columns of row b being pads. -> outputs
    [B,Hq,N,D]. Goes on where the layer is."""
    q, k, v = qkv
    N = q.shape[2]
    mask = None
    if pads is not None:
        mask = torch.arange(kv.state.seen + N) >= torch.tensor(pads)[:, None]
    outputs, start = [], 0
    for size in sizes or [N]:
        at, seen = slice(start, start + size), kv.state.seen
        kv.update(k[:, :, at], v[:, :, at])
        new_pads = mask is not None and not bool(mask[:, seen : seen + size].all())
        outputs.append(kv.attend(q[:, :, at], PositionMask(mask, new_pads), k.shape[-1] ** -0.5, None, None))
        start += size
    assert start == N, "sizes do not add up"
    return torch.cat(outputs, 2)


def run(
    recipe: str, qkv: QKV, prompt: int | None = None, pads: list[int] | None = None, index: int = 0, layers: int = 1
) -> LayerKV:
    """A prompt of `prompt` tokens (None: all), the rest one by one; compressed at the end."""
    kv, N = layer_of(recipe, qkv, index, layers), qkv[0].shape[2]
    prompt = prompt or N
    feed(kv, qkv, [prompt] + [1] * (N - prompt), pads)
    kv.settle()
    return kv


def live(kv: LayerKV) -> list[Tokens]:
    """Every token a query is answered from, decoded."""
    window = [kv.state.window.tokens()] if len(kv.state.window) else []
    return (kv.state.store.tokens() if kv.state.store else []) + window


def positions(kv: LayerKV) -> list[list[list[int]]]:
    """[row][kv head] -> the columns of its live tokens, in order; fails if one is there twice."""
    B, H = live(kv)[-1].pos.shape[:2]
    out = [[sorted(p for t in live(kv) for p in t.pos[b, h].tolist() if p >= 0) for h in range(H)] for b in range(B)]
    assert all(len(set(head)) == len(head) for row in out for head in row)
    return out


def check_holdings(kv: LayerKV, real: Tensor) -> None:
    """`holdings` against `tokens`: what is there is so in a form that says it, the rest in one that says that. real:
    bool [B,columns]."""
    stored = live(kv)
    (B, heads), end = stored[-1].pos.shape[:2], real.shape[1]
    there = torch.zeros(B, heads, end + 1, dtype=torch.bool)
    for t in stored:
        there.scatter_(2, t.pos.long().masked_fill(t.pos < 0, end), True)
    holdings = kv.holdings()
    at = places(holdings, real, heads)
    absent = [i for i, h in enumerate(holdings) if h.pos is None]
    assert {holdings[i].form for i in absent} <= {"gone", "summary", "blind"}
    assert bool(absent) == bool(kv.reach or (kv.state.store and kv.state.store.drops))
    assert all(h.form in ("exact", "coded", "host") for h in holdings if h.pos is not None)
    assert torch.equal(at >= 0, real[:, None].expand_as(at)), "a pad has a form, or a token none"
    assert torch.equal(torch.isin(at, torch.tensor(absent)), real[:, None] & ~there[..., :end])


def check_heard(decode: Any, weights: Any, qs: Queries, store: Store, limit: float) -> None:
    """What a kernel's attention leaves of one query is what it said to the tokens, and `weights(qs, lse, t, group)` are
    found from that alone."""
    parts, heard = store.attend(qs), ops.Heard()
    o, lse = decode(qs, parts, heard)
    for got, want in zip((o, lse), merge([p.answer(qs) for p in parts]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=limit)
    assert len(heard.found) == len(parts)
    told = store.told(heard)
    for t, want in zip(told, store.tokens(), strict=True):
        assert t.logits is not None and t.k.shape[-1] == t.v.shape[-1] == 0
        assert torch.equal(t.pos, want.pos)
        s = logits(qs, want.k, want.pos)[:, :, :, 0]
        assert torch.equal(t.logits.isinf(), s.isinf())
        error = (t.logits - s).nan_to_num(0.0, 0.0, 0.0).abs()
        assert error.max() < limit and error.mean() < limit / 10  # of single logits, which no sum evens out
        for group in ("mean", "max"):
            got = weights(qs, lse, t, group)
            torch.testing.assert_close(got, ops.weights_in_torch(qs, lse, want, group), rtol=2 * limit, atol=1e-6)


def check_steps_heard(recipe: str, monkeypatch: pytest.MonkeyPatch, steps: int = 20) -> None:
    """What is tracked is the same where tokens are asked (and decoded) once more for it."""
    qkv = random_qkv(2, 2, 2, 70 + steps, 64)
    found = []
    for heard in (True, False):
        if not heard:
            monkeypatch.setattr(ops.Heard, "of", lambda self, values, slots: None)
        kv = layer_of(recipe, qkv)
        out = feed(kv, qkv, [70] + [1] * steps, [0, 9])
        found.append((out, [(t.pos, t.stats) for t in live(kv)]))
    (out, tokens), (want_out, want) = found
    torch.testing.assert_close(out, want_out, rtol=1e-4, atol=1e-4)
    for (pos, stats), (want_pos, want_stats) in zip(tokens, want, strict=True):
        assert torch.equal(pos, want_pos)
        torch.testing.assert_close(stats, want_stats, rtol=1e-3, atol=1e-4)
