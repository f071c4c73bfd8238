"""CaliDrop: when it is exact, what it costs, and that nothing leaks between heads and rows."""

import pytest
import torch

from calidrop import ops
from calidrop.attention import Queries, attend, merge
from calidrop.masks import PositionMask
from calidrop.methods._summary import Summary
from calidrop.methods.calidrop import Answer, Calibrated
from calidrop.observe import Observation
from calidrop.offload import HostLog
from calidrop.ops import cpu
from calidrop.parallel import HeadGroup
from calidrop.tokens import Tokens
from helpers import feed, layer_of, random_qkv

BASES = ["snapkv(budget=13, recent=5)", "adakv(budget=13, recent=5)", "h2o(budget=12, every=4)"]
D = 16


def outputs(recipe, qkv, prompt, pads=None):
    kv = layer_of(recipe, qkv)
    N = qkv[0].shape[2]
    return kv, feed(kv, qkv, [prompt] + [1] * (N - prompt), pads)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("order", "D"), [(0, D), (1, D), (1, 64)])
@torch.no_grad()
def test_always_recomputing_is_full_attention(base, order, D):
    qkv = random_qkv(2, 2, 3, 60, D)
    _, full = outputs("full", qkv, 41, [0, 6])
    kv, out = outputs(f"{base}+calidrop(order={order}, recompute=2)", qkv, 41, [0, 6])
    torch.testing.assert_close(out, full, atol=2e-5, rtol=1e-4)
    asked, steps = kv.state.store.recomputed()
    assert asked == steps > 0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("order", [0, 1])
@torch.no_grad()
def test_never_recomputing_nor_applying_is_the_evictor_bit_for_bit(base, order):
    qkv = random_qkv(2, 2, 3, 60, D)
    _, evict = outputs(base, qkv, 41, [0, 6])
    kv, out = outputs(f"{base}+calidrop(order={order}, recompute=-2, apply=2)", qkv, 41, [0, 6])
    assert torch.equal(out, evict)
    assert kv.state.store.recomputed()[0] == 0


@pytest.mark.parametrize("decide", ["head", "layer"])
@torch.no_grad()
def test_each_head_does_what_its_cosine_says(decide):
    """Recomputed heads are exact, abstaining heads are the evictor, and only the others are approximate."""
    qkv = random_qkv(2, 2, 3, 70, D, seed=4)
    recipe = f"snapkv(budget=13, recent=5)+calidrop(recompute=0.0, apply=0.2, decide='{decide}')"
    kv = layer_of(recipe, qkv)
    full, evict = layer_of("full", qkv), layer_of("snapkv(budget=13, recent=5)", qkv)
    for layer in (kv, full, evict):
        feed(layer, [x[:, :, :41] for x in qkv])
        layer.settle()
    seen = {"recompute": 0, "abstain": 0, "apply": 0}
    for i in range(41, 70):
        step = [x[:, :, i : i + 1] for x in qkv]
        near = torch.cosine_similarity(step[0][:, :, 0], kv.state.store.rest.memories[0].q, -1)
        if decide == "layer":
            near = near.mean(1, keepdim=True).expand_as(near)
        out, exact, base = (feed(layer, step)[:, :, 0] for layer in (kv, full, evict))
        asked, applied = near < 0.0, near >= 0.2
        torch.testing.assert_close(out[asked], exact[asked], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[~asked & ~applied], base[~asked & ~applied], atol=2e-5, rtol=1e-4)
        seen["recompute"] += int(asked.sum())
        seen["abstain"] += int((~asked & ~applied).sum())
        seen["apply"] += int(applied.sum())
    assert min(seen.values()) > 10, seen
    assert kv.state.store.recomputed() == (seen["recompute"], 29 * 2 * 6)


@pytest.mark.parametrize("order", [0, 1])
@torch.no_grad()
def test_the_same_query_again_is_answered_exactly(order):
    q, k, v = random_qkv(2, 2, 3, 42, D)
    q[:, :, -1] = q[:, :, -2]
    recipe = f"snapkv(budget=13, recent=5)+calidrop(order={order}, recompute=0.99)"
    kv, out = outputs(recipe, (q, k, v), 41)
    _, full = outputs("full", (q, k, v), 41)
    torch.testing.assert_close(out, full, atol=2e-5, rtol=1e-4)
    assert kv.state.store.recomputed()[0] == 0


@torch.no_grad()
def test_rows_never_touch_each_other():
    qkv = random_qkv(3, 2, 3, 70, D)
    recipe = "h2o(budget=12, every=4)+calidrop(recompute=0.1)"
    _, out = outputs(recipe, qkv, 41)
    order = torch.tensor([2, 0, 1])
    _, permuted = outputs(recipe, [x[order] for x in qkv], 41)
    torch.testing.assert_close(permuted, out[order], atol=1e-6, rtol=1e-5)
    for b in range(3):
        _, alone = outputs(recipe, [x[b : b + 1] for x in qkv], 41)
        torch.testing.assert_close(alone, out[b : b + 1], atol=1e-6, rtol=1e-5)


def observed(q, lse=None, seen=100):
    B, Hq, T, _ = q.shape
    pos = torch.arange(seen, seen + T).expand(B, T)
    context = torch.full((B,), seen)
    lse = torch.zeros(B, Hq, T) if lse is None else lse
    return Observation(Queries(q, pos, D**-0.5), lse, context, torch.zeros_like(context))


def some_tokens(B, H, N, seed=0, valid=None):
    draw = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, N, D, generator=draw)
    pos = torch.arange(N, dtype=torch.int32).expand(B, H, N)
    return Tokens(k, v, pos if valid is None else pos.masked_fill(~valid, -1))


@torch.no_grad()
def test_tokens_evicted_while_decoding_join_exactly():
    store = Calibrated(1, 0.7, 0.7, "head", True, 0, HeadGroup())
    obs = observed(torch.randn(2, 6, 3, D))
    first, second = some_tokens(2, 2, 21), some_tokens(2, 2, 9, seed=1)
    store.add(first, obs)
    anchor = store.memories[0].q.clone()
    later = observed(torch.randn(2, 6, 1, D))
    store.add(second, later)  # same context: evicted while decoding
    assert torch.equal(store.memories[0].q, anchor)
    want = Answer.of(obs.queries.last(1), Tokens.cat([first, second]))
    for name in ("o", "lse", "mean_k"):
        torch.testing.assert_close(getattr(store.memories[0].answer, name), getattr(want, name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_slope_is_the_derivative_of_lse(softcap):
    t = some_tokens(1, 2, 33)
    q = (3 * torch.randn(1, 6, 1, D)).double().requires_grad_()
    t = Tokens(t.k.double(), t.v.double(), t.pos)
    qs = Queries(q, torch.full((1, 1), 50), D**-0.5, softcap)
    _, lse = attend(qs, t.k, t.v, t.pos)
    (slope,) = torch.autograd.grad(lse.sum(), q)
    answer = Answer.of(qs, t)
    torch.testing.assert_close(D**-0.5 * answer.mean_k, slope[:, :, 0].float(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_first_order_is_better_nearby_and_never_too_heavy():
    """lse is convex in the query, so its tangent lies below it; order 0 misses by the whole slope."""
    t, q = some_tokens(1, 2, 200), 2 * torch.randn(1, 6, 1, D)
    obs = observed(q)
    for spread in (0.1, 0.3):
        drifted = obs.queries.q + spread * torch.randn(1, 6, 1, D)
        qs = Queries(drifted, obs.queries.pos, D**-0.5)
        truth = attend(qs, t.k, t.v, t.pos)[1]
        miss = {}
        for order in (0, 1):
            store = Calibrated(order, -2, -2, "head", True, 0, HeadGroup())
            store.add(t, obs)
            ((_, lse),) = store.attend(qs)
            miss[order] = (lse - truth).abs().mean()
            if order == 1:
                assert bool((lse <= truth + 1e-5).all())
        assert miss[1] < 0.6 * miss[0]


@torch.no_grad()
def test_only_the_heads_that_ask_are_fetched(monkeypatch):
    monkeypatch.setattr(cpu, "recalls", lambda k, v: False)  # which reads them where they lie
    read = []
    inner = HostLog._read

    def spy(self, segment, pairs, start, stop):
        read.append((pairs.tolist(), stop - start))
        return inner(self, segment, pairs, start, stop)

    monkeypatch.setattr(HostLog, "_read", spy)
    store = Calibrated(1, 0.5, 0.5, "head", True, 0, HeadGroup())
    obs = observed(torch.randn(3, 8, 1, D))
    store.add(some_tokens(3, 4, 50), obs)
    read.clear()
    q = obs.queries.q.clone()
    q[1, 5] *= -1  # row 1, kv head 2
    q[2, 0] *= -1  # row 2, kv head 0
    before = store.memories[0].q.clone()
    store.attend(Queries(q, obs.queries.pos + 1, D**-0.5))
    assert read == [([1 * 4 + 2, 2 * 4 + 0], 50)]
    changed = (store.memories[0].q != before).any(-1)
    assert changed.nonzero().tolist() == [[1, 5], [2, 0]]
    assert store.recomputed() == (2, 24)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (24, torch.float32)])
@torch.no_grad()
def test_a_kernel_asks_the_host_where_the_tokens_lie(base, D, dtype, monkeypatch):
    if cpu.kernel().reason:
        pytest.skip(cpu.kernel().reason)
    qkv = [x.to(dtype) for x in random_qkv(2, 2, 3, 90, D)]
    store = outputs(f"{base}+calidrop", qkv, 41, [0, 6])[0].state.store.rest
    assert len(store.log.segments) > ("h2o" in base)
    qs = Queries(torch.randn(2, 6, 1, D).to(dtype), torch.full((2, 1), 90), 0.125)
    asked = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1]], dtype=torch.bool)
    monkeypatch.setattr(HostLog, "fetch", None)  # nothing is gathered
    got = store._recall(qs, asked)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "recalls", lambda k, v: False)
    want = store._recall(qs, asked)
    assert torch.equal(got.pairs, want.pairs)
    for name in ("o", "lse", "mean_k"):
        torch.testing.assert_close(getattr(got.answer, name), getattr(want.answer, name), atol=2e-5, rtol=1e-4)
    assert store.recalled_by == "torch"
    monkeypatch.undo()
    other = outputs(f"{base}+calidrop(refresh='host')", qkv, 41, [0, 6])[0].state.store.rest
    assert torch.equal(other._recall(qs, asked).answer.o, got.answer.o)  # on a CPU there is nothing else
    assert "asked again by the host's kernel" in other.describe()


def test_recompute_streams_in_chunks(monkeypatch):
    t, q = some_tokens(2, 2, 301), torch.randn(2, 6, 1, D)
    whole = Answer.of(Queries(q, torch.full((2, 1), 500), D**-0.5), t)
    monkeypatch.setattr("calidrop.offload.CHUNK_BYTES", 4096)
    store = Calibrated(1, 2, 2, "head", True, 0, HeadGroup())
    store.add(t, observed(torch.randn(2, 6, 1, D)))
    pieces = list(store.log.fetch(torch.ones(2, 2, dtype=torch.bool)))
    assert len(pieces) > 10
    assert max(p.data["k"].nbytes + p.data["v"].nbytes for p in pieces) <= 4096
    store.attend(Queries(q, torch.full((2, 1), 500), D**-0.5))
    torch.testing.assert_close(store.memories[0].answer.o, whole.o, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(store.memories[0].answer.lse, whole.lse, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_where_the_bytes_are():
    qkv = random_qkv(2, 2, 3, 200, D)
    from calidrop.state import held_bytes

    token = 2 * D * 4 + 4  # k, v, position
    for offload, summary in [(True, 0), (False, 0), (True, 4), (False, 4)]:
        kv, _ = outputs(f"snapkv(budget=24, recent=8)+calidrop(offload={offload}, summary={summary})", qkv, 180)
        kv.settle()
        evicted = 180 - 24
        host = held_bytes(kv.state.store, host=True)
        if offload:
            assert host == 2 * 2 * (evicted * token + 8)  # and a length per head
        else:
            assert host == 0
        rest = held_bytes(kv.state.store.rest)
        remembered = 2 * 6 * (3 * D + 1) * 4 + 2 * 8 if offload or not summary else 0
        remembered += 2 * 2 * 8 if offload else 0  # who was asked again, per row
        assert rest == remembered + (2 * 2 * summary * (2 * D + 1) * 4 if summary else 0)


@torch.no_grad()
def test_a_summary_with_room_for_every_token_is_exact():
    valid = torch.ones(2, 2, 23, dtype=torch.bool)
    valid[1, :, :5] = False
    t = some_tokens(2, 2, 23, valid=valid)
    summary = Summary(23)
    summary.add(t, observed(torch.randn(2, 6, 32, D)))
    qs = Queries(torch.randn(2, 6, 4, D), torch.full((2, 4), 500), D**-0.5)
    for got, want in zip(ops.joined(qs, [summary.piece()]), attend(qs, t.k, t.v, t.pos), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_more_summary_tokens_answer_better_and_any_beats_none():
    qkv = random_qkv(1, 2, 3, 400, D, seed=2)
    q = 0.5 * qkv[0] + qkv[0][:, :, 300:301]  # queries with something in common, as real ones have
    qkv = (q, *qkv[1:])
    _, full = outputs("full", qkv, 380)
    error = {}
    for c in (0, 4, 32):
        rest = f"+calidrop(offload=False, summary={c})" if c else ""
        _, out = outputs(f"snapkv(budget=40, recent=32){rest}", qkv, 380)
        error[c] = (out - full)[:, :, 380:].norm().item()
    assert error[32] < error[4] < error[0]


@torch.no_grad()
def test_summary_follows_decode_time_eviction():
    """What a decode-time evictor drops is folded in: the total weight of the evicted set stays right."""
    qkv = random_qkv(2, 2, 3, 140, D, seed=3)
    q = 0.3 * qkv[0] + qkv[0][:, :, 100:101]
    kv, _ = outputs("h2o(budget=40, every=4)+calidrop(offload=False, summary=8)", (q, *qkv[1:]), 60)
    twin, _ = outputs("h2o(budget=40, every=4)+calidrop(recompute=2)", (q, *qkv[1:]), 60)
    qs = Queries(q[:, :, -1:], torch.full((2, 1), 500), D**-0.5)
    _, lse = ops.joined(qs, kv.state.store.rest.attend(qs))
    _, want = merge([attend(qs, t.k, t.v, t.pos) for t in twin.state.store.rest.tokens()])
    assert (lse - want).abs().mean() < 0.35


@torch.no_grad()
def test_both_together_summary_answers_where_the_remembered_answer_is_far():
    qkv = random_qkv(1, 2, 3, 70, D, seed=4)
    recipe = "snapkv(budget=13, recent=5)+calidrop(recompute=-2, apply=2, summary=6)"
    _, both = outputs(recipe, qkv, 41)
    _, summary = outputs("snapkv(budget=13, recent=5)+calidrop(offload=False, summary=6)", qkv, 41)
    torch.testing.assert_close(both, summary, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["", "(late=1)", "(decide='layer')"])
@torch.no_grad()
def test_a_prompt_of_one_token_is_a_prompt(how):
    """A second prompt in chunks, one of them a single token, answers and leaves what it does in one piece: exact from
    the host, though its queries are near to the remembered ones."""
    q, k, v = random_qkv(2, 2, 3, 180, 32)
    qkv = q[:, :, :1] + 0.2 * q, k, v

    def chunks(sizes):
        kv, out = layer_of(f"snapkv(budget=24, recent=8)+calidrop{how}", qkv), []
        feed(kv, tuple(x[:, :, :101] for x in qkv), [100, 1])
        for size in sizes:
            at = kv.state.seen
            kv.update(k[:, :, at : at + size], v[:, :, at : at + size])
            out.append(kv.attend(qkv[0][:, :, at : at + size], PositionMask(prompt=True), 32**-0.5, None, None))
        kv.settle()
        return torch.cat([*out, feed(kv, tuple(x[:, :, 141:] for x in qkv), [1] * 39)], 2)

    torch.testing.assert_close(chunks([20, 1, 19]), chunks([40]), rtol=1e-4, atol=1e-4)
