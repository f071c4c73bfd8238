"""Tokens that may be taken back (speculative decoding) are answered together, and leave what single steps leave."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import calidrop
import test_half
from calidrop import ops
from calidrop.attention import attend, merge
from calidrop.layer import LayerKV
from calidrop.masks import within
from calidrop.plugin import using
from calidrop.state import Ragged, held_bytes, tensors
from calidrop.store import Exact
from calidrop.tokens import Tokens
from calidrop.window import Window
from helpers import QKV, feed, kernels, layer_of, live, random_qkv
from test_kernel import queries, tokens
from tiny import batch, tiny

ROUNDS = [(5, 3), (11, 1), (3, 3), (12, 12), (1, 1), (9, 4), (4, 1), (10, 8)]  # proposed, of which so many stay


def verified(kv: LayerKV, qkv: QKV, pads: list[int]) -> Tensor:
    """Feeds all tokens, in blocks behind which follow others that are taken back."""
    draw = random_qkv(2, 2, 3, 30, 32, seed=5)
    out, start = [], 0
    kv.activate_past_recording()
    while start < qkv[0].shape[2]:
        n, kept = ROUNDS[len(out) % len(ROUNDS)]
        kept = min(kept, qkv[0].shape[2] - start)
        pairs = zip(qkv, draw, strict=True)
        block = [torch.cat([x[:, :, start : start + kept], y[:, :, : n - kept].to(x)], 2) for x, y in pairs]
        out.append(feed(kv, (block[0], block[1], block[2]), None, pads)[:, :, :kept])
        kv.crop(kept - n)
        start += kept
    return torch.cat(out, 2)


@torch.no_grad()
def check_verified(recipe: str, steps: int, device: str = "cpu") -> None:
    """Every kept token's answer, and what is held in the end, as after single steps."""
    qkv, pads = random_qkv(2, 2, 3, 90 + steps, 32), [0, 9]
    q, k, v = (x.to(device) for x in qkv)
    plain, ours = layer_of(recipe, (q, k, v)), layer_of(recipe, (q, k, v))
    for kv in (plain, ours):
        feed(kv, (q[:, :, :90], k[:, :, :90], v[:, :, :90]), None, pads)
    rest = q[:, :, 90:], k[:, :, 90:], v[:, :, 90:]
    want, got = feed(plain, rest, [1] * steps, pads), verified(ours, rest, pads)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(live(ours), live(plain), strict=True):
        assert torch.equal(mine.pos, theirs.pos)
        torch.testing.assert_close(mine.k, theirs.k, rtol=1e-3, atol=1e-3)
    states = ours.state, plain.state
    assert len({(s.seen, s.steps, s.age, s.store and s.store.recomputed()) for s in states}) == 1
    assert len({held_bytes((s.store, s.obs)) for s in states}) == 1
    for mine, theirs in zip(*(tensors((s.store, s.obs)) for s in states), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert abs(states[0].window.room - states[1].window.room) < ops.MOST_QUERIES  # of one that was empty


@pytest.mark.parametrize("recipe", test_half.RECIPES)
def test_answers_and_what_is_held(recipe):
    check_verified(recipe, 70)


@pytest.mark.parametrize(
    ("recipe", "calls"),
    [("full", 2), ("snapkv(budget=24, recent=8)+int4", 2), ("snapkv(budget=24, recent=8, every=4)", 3),
     ("snapkv(budget=24, recent=8)+calidrop", 2), ("h2o(budget=24)", 10)],
)  # fmt: skip
@torch.no_grad()
def test_what_is_stored_is_read_once(recipe, calls, monkeypatch):
    """Up to eight tokens and a flush; but where what each was paid is counted."""
    qkv, asked, step = random_qkv(1, 2, 3, 100, 32), [], ops.step
    monkeypatch.setattr(ops, "step", lambda qs, *rest: asked.append(len(qs)) or step(qs, *rest))
    kv = layer_of(recipe, qkv)
    feed(kv, tuple(x[:, :, :90] for x in qkv))
    kv.activate_past_recording()
    feed(kv, tuple(x[:, :, 90:] for x in qkv))
    assert len(asked) == calls and sum(asked) == 10


@torch.no_grad()
def check_turns(mask: str, T: int, dtype: torch.dtype, softcap: float | None, by: str | None) -> None:
    """Several queries in turn, beside stored tokens of heads of unequal length, in a window with pads that grows out of
    its memory. by: who answers, None: not asked."""
    old, first = tokens(2, 3, 200, 24, dtype, empty=0.5), tokens(2, 3, 150, 24, dtype)
    first.pos += 200
    first.pos[1, :, :7], first.dense = -1, False
    store, window, whole = Exact(), Window(), first
    store.held = Ragged(old.columns(), old.valid)
    window.append(first)
    last = 20 if mask == "window" else None  # and nothing is stored then
    for start in range(350, 350 + 6 * T, T):
        new = tokens(2, 3, T, 24, dtype)
        new.pos += start
        qs, pos = queries(2, 6, T, 24, softcap), torch.arange(start, start + T).expand(2, T)
        visible = None if mask == "all" else within(20 if mask == "window" else 180).visible
        qs = replace(qs, q=qs.q.to(dtype), pos=pos, visible=visible, window=last)
        (o, lse), who = ops.step(qs, new, window, [] if last else store.attend(qs), None, last, dtype)
        assert who == by or by is None
        whole = Tokens.cat([whole, new])
        assert all(torch.equal(getattr(window.tokens(), x), getattr(whole, x)) for x in ("k", "v", "pos"))
        want, total = merge([attend(qs, x.k, x.v, x.pos) for x in ([whole] if last else [old, whole])])
        torch.testing.assert_close(o.float(), want, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(lse, total, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("mask", ["all", "window", "another"])
@pytest.mark.parametrize("T", [2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kernel", ["", "off"])
def test_a_query_sees_no_token_behind_its_own(mask, T, dtype, softcap, kernel, monkeypatch):
    with kernels(monkeypatch, kernel):
        check_turns(mask, T, dtype, softcap, ops.CPU.name if not kernel and mask != "another" else None)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_sliding_layers(family):
    """Whose window is cut on the way, and which have sinks or bend logits."""
    model, ids = tiny(family), batch(1, 140, (0,))["input_ids"]
    plain, ours = (calidrop.KVCache(model, "snapkv(budget=24, recent=8, every=16)") for _ in range(2))
    for cache in (plain, ours):
        model(ids[:, :60], **using(cache))
    want = torch.cat([model(ids[:, i : i + 1], **using(plain)).logits for i in range(60, 140)], 1)
    ours.activate_past_recording()
    start, got = 60, []
    while start < 140:
        n, kept = ROUNDS[len(got) % len(ROUNDS)]
        kept = min(kept, 140 - start)
        block = torch.cat([ids[:, start : start + kept], ids[:, : n - kept]], 1)
        got.append(model(block, **using(ours)).logits[:, :kept])
        ours.crop(kept - n)
        start += kept
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-3, atol=1e-3)
