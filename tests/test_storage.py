"""The encoded formats: exact where they promise it, the bytes their formula says, and what each one is for."""

import pytest
import torch

import calidrop
from calidrop.hadamard import hadamard
from calidrop.methods.decoquant import Split16
from calidrop.plugin import using
from calidrop.quant import pack, unpack
from calidrop.state import held_bytes
from helpers import feed, kernels, layer_of, live, positions, random_qkv, run
from tiny import batch, generate, tiny, worst

D = 64
POS = 4  # bytes of a position
FORMULAS = {  # bytes per encoded token and head at fp32 elements, D = 64
    "int8(residual=32)": lambda: 2 * (D + 4),
    "int4(residual=32)": lambda: 2 * (D / 2 + 4),
    "fp8(residual=32)": lambda: 2 * (D + 2),
    "kivi(bits=2, residual=32)": lambda: 2 * (D * 2 / 8 + 4 * D / 32),
    "ott(bits=2, block=128, residual=32, skip=2)": lambda: D * 2 / 4 + 4 * D / 128 + 4,
    "mixkvq(quota=(2, 6, 56), residual=32)": lambda: (
        2 * 4 + 6 / 2 + 56 / 4 + 4 * 62 / 32 + D / 4 + 4 * D / 32 + D / 128
    ),
    "decoquant(bits=4, residual=32)": lambda: 2 * (D / 2 + 2),
    "think(keep=0.5, recent=32)": lambda: 4 * (D / 2 + D),
    "think(keep=0.5, recent=32)+int4": lambda: D / 4 + 4 + D / 2 + 4,
}


@pytest.mark.parametrize("recipe", FORMULAS)
@pytest.mark.parametrize("tokens", [1024, 4096, 8192])
@torch.no_grad()
def test_bytes_are_what_the_formula_says(recipe, tokens):
    """Codes really packed, and per-token cost exact: what is not per token is the same at every length."""
    kv = run(recipe, random_qkv(1, 2, 1, tokens + 32, D))
    store = kv.state.store
    coded = store.inner if hasattr(store, "inner") else store
    per_token = 2 * tokens * (FORMULAS[recipe]() + POS)
    fixed = {"decoquant": 4 * 16 * 16 * 4, "think": 2 * (D // 2) * 8}.get(recipe.split("(")[0], 0)
    ragged = coded.held.lens.nbytes
    assert held_bytes(store) == per_token + fixed + ragged
    assert positions(kv) == [[list(range(tokens + 32))] * 2]


EXACT = [
    "think(keep=1.0)",
    "decoquant(bits=16)",
    "mixkvq(quota=(16, 0, 0), values=16, block=16, group=8)",
    "kivi(group=16, residual=500)",
    "ott(block=512)",
]


@pytest.mark.parametrize("recipe", EXACT)
def test_nothing_taken_away_is_the_full_cache(recipe):
    model, inputs = tiny(), batch()
    tokens, logits = generate(model, inputs, calidrop.KVCache(model))
    ours, our_logits = generate(model, inputs, calidrop.KVCache(model, recipe))
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, ours)


SOME = ["int8", "int4", "fp8", "ott(block=16, skip=0)", "mixkvq(block=16, group=8)", "think", "decoquant"]


@pytest.mark.parametrize("recipe", [*SOME, "h2o(budget=20)+mikv(bits=4)"])
def test_padded_row_equals_row_alone(recipe):
    from tiny import row

    model, inputs = tiny(), batch(2, 61, (0, 13))
    tokens, logits = generate(model, inputs, calidrop.KVCache(model, recipe))
    for i in range(2):
        alone, alone_logits = generate(model, row(inputs, i), calidrop.KVCache(model, recipe))
        assert worst(logits[i : i + 1], alone_logits) < 5e-3  # the last bit may move a code
        assert torch.equal(tokens[i : i + 1], alone)


def error(recipe, qkv):
    """Mean relative error of the last 8 outputs."""
    full, out = (feed(layer_of(r, qkv), qkv, [qkv[0].shape[2] - 8] + [1] * 8)[:, :, -8:] for r in ("full", recipe))
    return ((out - full).norm(dim=-1) / full.norm(dim=-1)).mean().item()


def with_outlier_channels(n=2, size=12.0, **kwargs):
    q, k, v = random_qkv(1, 2, 2, 264, D, **kwargs)
    k[..., :n] *= size
    q[..., :n] /= size
    return q, k, v


@pytest.mark.parametrize("dim", [16, 48, 80, 128])
def test_hadamard_is_its_own_inverse_and_keeps_products(dim):
    x, y = torch.randn(2, 5, 7, dim)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=1e-4)
    block = dim & -dim
    one = torch.zeros(dim).index_fill(0, torch.tensor([3]), 1.0)
    assert int((hadamard(one) != 0).sum()) == block  # an outlier is spread over its block


@torch.no_grad()
def test_rotation_helps_where_channels_stick_out():
    q, k, v = random_qkv(1, 2, 2, 264, D)
    k[..., 3] *= 20
    assert error("int4(residual=4)", (q, k, v)) < 0.7 * error("int4(rotate=False, residual=4)", (q, k, v))


@torch.no_grad()
def test_int8_and_fp8_are_close_to_exact():
    qkv = random_qkv(1, 2, 2, 264, D)
    assert error("int8(residual=4)", qkv) < 0.02
    assert error("fp8(residual=4)", qkv) < 0.08


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8", "mikv"])
@torch.no_grad()
def test_constants_zeros_and_large_values_stay_finite(recipe):
    q, k, v = random_qkv(1, 2, 2, 120, D)
    k[:, 0], v[:, 0] = 0.0, 3.0
    k[:, 1, 5], v[:, 1, 7] = 1e4, -1e4  # rotated, beyond the range of fp16
    kv = layer_of("h2o(budget=20)+mikv(bits=2)" if recipe == "mikv" else f"{recipe}(residual=4)", (q, k, v))
    assert bool(torch.isfinite(feed(kv, (q, k, v), [100] + [1] * 20)).all())
    for t in live(kv):
        assert bool(torch.isfinite(t.k).all())
        torch.testing.assert_close(t.v[:, 0], torch.full_like(t.v[:, 0], 3.0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("n", [8, 24, 64, 120])
def test_three_bit_codes_are_packed(n):
    codes = torch.randint(0, 8, (3, 5, n), dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.shape == (3, 5, n * 3 // 8)
    assert torch.equal(unpack(packed, 3), codes)


class TestOtt:
    def tokens(self, seed=0):
        q, k, v = random_qkv(2, 2, 1, 420, 16, seed)
        k[..., 2] += 30.0  # a channel that nearly all tokens share
        for p in (3, 100, 101, 255, 256, 399):
            k[:, :, p] *= 0.02
        return q, k, v

    @torch.no_grad()
    def test_pool_holds_the_smallest_keys_of_all(self):
        qkv = self.tokens()
        kv = run("ott(bits=2, block=32, pool=3, spill=64, skip=0, residual=4)", qkv, prompt=300)
        store = kv.state.store
        flushed = 32 * store.held.longest
        norm = qkv[1][:, :, :flushed].abs().sum(-1)
        for b in range(2):
            for h in range(2):
                want = set(norm[b, h].argsort()[:3].tolist())
                assert set(store.pool.tokens()[0].pos[b, h].tolist()) == want

    @torch.no_grad()
    def test_a_full_spill_stops_tracing(self):
        q, k, v = random_qkv(1, 1, 1, 300, 16)
        k = torch.sign(k) * torch.linspace(2, 0.1, 300)[:, None]  # every block brings smaller keys
        kv = run("ott(bits=2, block=32, pool=3, spill=5, skip=0, residual=4)", (q, k, v))
        store = kv.state.store
        assert int(store.spill.held.lens) == 6  # the block that filled it was still traced
        pooled = store.pool.tokens()[0].pos.flatten().tolist()
        assert max(pooled) == 95  # the third block's smallest: 3 pushed out by the second, 3 by the third

    @torch.no_grad()
    def test_it_is_worth_its_bytes_with_outliers_and_is_kivi_without_a_pool(self):
        qkv = self.tokens()
        traced = error("ott(bits=2, block=32, skip=0, residual=4)", qkv)
        assert traced < 0.9 * error("ott(bits=2, block=32, pool=0, residual=4)", qkv)
        same = [run(r, qkv).state.store for r in ("ott(bits=2, block=16, pool=0, residual=4)",
                                                   "kivi(bits=2, group=16, residual=4)")]  # fmt: skip
        for name in ("k", "k_scale", "v", "v_scale"):
            assert torch.equal(*(s.held.data[name].flatten() for s in same))

    @torch.no_grad()
    def test_first_layers_have_no_pool(self):
        qkv = self.tokens()
        for index, pool in [(0, 0), (1, 0), (2, 3)]:
            assert run("ott(block=32)", qkv, index=index, layers=4).state.store.size == pool


class TestMixKvq:
    @torch.no_grad()
    def test_quota_goes_to_the_largest_product_of_query_and_range(self):
        q, k, v = random_qkv(1, 1, 2, 160, 16)
        k[..., 3] *= 50  # large range, and queries that look
        k[..., 5] *= 50  # large range that no query looks at
        q[..., 5] = 0
        q[..., 7] *= 50  # queries that look, usual range
        kv = run("mixkvq(quota=(2, 1, 13), block=64, group=32, residual=32)", (q, k, v))
        order = kv.state.store.held.data["order"]
        for unit in range(order.shape[2]):
            assert set(order[0, 0, unit, :2].tolist()) == {3, 7}
            assert order[0, 0, unit, -1] == 5

    @torch.no_grad()
    def test_better_than_two_bits_for_all_channels(self):
        q, k, v = random_qkv(1, 2, 2, 264, 64)
        k[..., 3] *= 15
        mixed = error("mixkvq(values=8, residual=4, block=32)", (q, k, v))
        plain = error("mixkvq(values=8, quota=(0, 0, 64), residual=4, block=32)", (q, k, v))
        assert mixed < 0.75 * plain


class TestMiKv:
    @torch.no_grad()
    def test_balancer_makes_query_and_key_equally_large(self):
        q, k, v = with_outlier_channels()
        kv = run("h2o(budget=40)+mikv(bits=2)", (q, k, v))
        store = kv.state.store.rest
        balance = store.balance[:, :, 0, 0]
        q_max = q.view(1, 2, 2, -1, D).abs().amax((2, 3))
        demoted = store.tokens()[0].pos[0, 0].long()
        k_max = k[:, :, demoted].abs().amax(2)
        torch.testing.assert_close((balance * k_max)[0, 0], (q_max / balance)[0, 0], atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_demoted_tokens_never_come_back(self):
        qkv = random_qkv(1, 2, 2, 160, D)
        kv = layer_of("h2o(budget=30, every=4)+mikv(bits=2)", qkv)
        low: set[int] = set()
        for start, stop in [(0, 100)] + [(i, i + 1) for i in range(100, 160)]:
            feed(kv, [x[:, :, start:stop] for x in qkv])
            kv.settle()
            now = set(kv.state.store.rest.tokens()[0].pos[0, 0].tolist())
            assert low <= now
            low = now
        assert positions(kv) == [[list(range(160))] * 2]

    @torch.no_grad()
    def test_balancer_and_demotion_beat_their_absence(self):
        qkv = with_outlier_channels(size=20.0)
        balanced = error("h2o(budget=40)+mikv(bits=2)", qkv)
        assert balanced < error("h2o(budget=40)+mikv(bits=2, balancer=False)", qkv)
        assert balanced < error("h2o(budget=40)", qkv)


class TestThink:
    @torch.no_grad()
    def test_keeps_the_channels_of_largest_product_and_their_exact_scores(self):
        q, k, v = random_qkv(2, 2, 3, 100, 16)
        kv = run("think(keep=0.5, recent=20)", (q, k, v))
        store, old = kv.state.store, 80
        group = q[:, :, -32:].view(2, 2, 3, 32, 16)
        score = group.square().sum((2, 3)) * k[:, :, :old].square().sum(2)
        want = score.topk(8, -1).indices.sort(-1).values
        assert torch.equal(store.of_keys.index, want)
        held = store.tokens()[0]
        mask = torch.zeros(2, 2, 1, 16).scatter(3, want[:, :, None], 1.0)
        torch.testing.assert_close(held.k, k[:, :, :old] * mask)
        torch.testing.assert_close(held.v, v[:, :, :old])
        torch.testing.assert_close(kv.state.window.tokens().k, k[:, :, old:])

    @pytest.mark.parametrize("fraction", ["keep=0.01", "keep=0.5, values=0.01"])
    @torch.no_grad()
    def test_at_least_one_step_of_channels_stays(self, fraction):
        qkv = random_qkv(1, 2, 2, 60, 16)
        kv = run(f"think({fraction}, recent=4)+int8", qkv, prompt=50)
        assert "2 channels of keys" in kv.describe() or "and 2 of values" in kv.describe()

    @torch.no_grad()
    def test_torch_answers_tokens_in_turn(self, monkeypatch):
        model, ids = tiny(), batch(rows=1, length=60)["input_ids"]
        logits = []
        for wish in ("torch", "native"):
            with kernels(monkeypatch, wish):
                cache = calidrop.KVCache(model, "snapkv(budget=12, recent=4)+think+calidrop")
                model(ids[:, :40], **using(cache)), model(ids[:, 40:41], **using(cache))
                cache.activate_past_recording()
                logits.append(model(ids[:, 41:44], **using(cache)).logits)
        torch.testing.assert_close(*logits, atol=2e-4, rtol=0)

    @torch.no_grad()
    def test_rows_that_come_later_choose_their_own_channels(self):
        q, k, v = (x[:1].repeat(2, 1, 1, 1) for x in random_qkv(1, 2, 2, 160, 16))
        q[..., :8] *= 3
        k[..., :8] *= 3
        kv = layer_of("think(keep=0.5, values=0.5)", (q, k, v))
        feed(kv, (q, k, v), [100, *[1] * 60], [0, 80])  # what the second row has of the prompt stays exact
        store = kv.state.store
        assert store.of_keys.index.tolist() == [[list(range(8))] * 2] * 2
        first = run("think(keep=0.5, values=0.5)", [x[:, :, :100] for x in (q, k, v)])
        for now, was in ((store.of_keys, first.state.store.of_keys), (store.of_values, first.state.store.of_values)):
            assert torch.equal(now.index[0], was.index[0])

    @torch.no_grad()
    def test_channels_stay_those_of_the_first_compression(self):
        qkv = random_qkv(1, 2, 2, 160, 16)
        kv = run("think(keep=0.5)", qkv, prompt=100)
        first = run("think(keep=0.5)", [x[:, :, :100] for x in qkv]).state.store.of_keys.index
        assert torch.equal(kv.state.store.of_keys.index, first)


class TestDecoQuant:
    @pytest.mark.parametrize(("pads", "short"), [((0, 0), 1), ((0, 52), 53)])
    @torch.no_grad()
    def test_factors_of_one_token_serve_those_that_follow(self, pads, short):
        """A row with one token to compress: it has 4 directions of 16."""
        qkv = random_qkv(2, 2, 2, 200, 64)
        want = feed(layer_of("full", qkv), qkv, [200], pads)[:, :, 60:]
        errors = []
        for prompt in (short, 120):
            kv = layer_of("decoquant(bits=8, residual=0)", qkv)
            out = feed(kv, qkv, [prompt, *[1] * (200 - prompt)], pads)[:, :, 60:]
            errors.append((out - want).square().mean((1, 2, 3)).sqrt())
        assert bool((errors[0] < 3 * errors[1]).all()), errors  # it was 100 times as much

    def test_factors_multiply_back_and_fold_into_queries(self):
        x, q = torch.randn(2, 3, 50, 32) @ torch.randn(32, 32), torch.randn(2, 3, 7, 32)
        rows = x.unflatten(-1, (-1, 16)).flatten(1, 3)
        split = Split16((rows.transpose(-1, -2) @ rows).double())
        large = split.large(x)
        torch.testing.assert_close(split.whole(large), x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            split.fold(q) @ large.transpose(-1, -2), q @ x.transpose(-1, -2), atol=1e-2, rtol=1e-3
        )
        # balanced: the squared norms of the large factor's columns are the singular values
        columns = large.unflatten(-1, (-1, 16)).flatten(1, 3).square().sum(1)
        torch.testing.assert_close(
            columns.sort(-1).values, torch.linalg.svdvals(rows).sort(-1).values, atol=0.1, rtol=1e-3
        )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mixkvq(quota=(1, 2, 3))", "quota must sum up to head_dim, got .1, 2, 3. and head_dim=16"),
        ("mixkvq(quota=(8, 8))", "quota must be three numbers"),
        ("mixkvq(block=48)", "group must divide block"),
        ("mixkvq(values=3)", "values must be one of"),
        ("ott(pool=128)", "pool must be smaller than block"),
        ("ott(bits=3)", "bits must be one of"),
        ("mikv", "needs a part that says which tokens stay"),
        ("h2o(budget=9)+mikv(bits=8)", "bits must be one of 2, 3, 4"),
        ("h2o(budget=9)+mikv+calidrop", "fill the same role"),
        ("int4+fp8", "fill the same role"),
        ("think(keep=0)", "must be above 0"),
        ("think(keep=1.5)", r"must be a number in \[0, 1\]"),
        ("decoquant(bits=3)", "bits must be one of"),
        ("snapkv(budget=64)+int8(residual=3)", "both say how many recent tokens stay exact"),
        ("think(keep=0.5)+kivi(bits=2, group=32)", "group must divide head_dim"),
        ("think(keep=0.5)+mixkvq", "compares queries with the keys it stores"),
    ],
)
def test_bad_recipes_say_what_is_wrong(recipe, message):
    with pytest.raises(ValueError, match=message):
        calidrop.KVCache(tiny(), recipe)


@pytest.mark.parametrize(
    "storage", ["think(keep=0.5, values=0.5)", "think(keep=0.5)+int8", "decoquant", "mixkvq", "ott"]
)
@torch.no_grad()
def test_what_is_kept_at_first_may_be_nothing(storage):
    qkv = random_qkv(2, 4, 2, 90, 64)
    kv = layer_of(f"lazy_eviction(budget=0.4, window=4)+{storage}+calidrop(recompute=2)", qkv)
    want = feed(layer_of("full", qkv), qkv)
    out = feed(kv, qkv, [7, *[1] * 83])
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :, :10], want[:, :, :10], atol=1e-4, rtol=0)  # before anything is rounded


EXTREMES = {
    "zeros": (0.0, 0.0),
    "tiny": (1e-6, 1e-6),  # below the steps of fp16 scales
    "denormal": (1e-41, 1e-41),
    "huge": (1e15, 1e30),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(
    "recipe",
    [
        "int8",
        "int4",
        "fp8",
        "kivi(bits=4, group=16)",
        "ott(block=16, pool=2)",
        "mixkvq(block=32)",
        "decoquant(bits=8)",
        "think(keep=0.5)+int8",
        "h2o(budget=20)+mikv(bits=4)",
    ],
)
@torch.no_grad()
def test_extreme_numbers_stay_numbers(recipe, extreme):
    q, k, v = random_qkv(2, 2, 2, 120, 32)
    of_keys, of_values = EXTREMES[extreme]
    k, v = k * of_keys, v * of_values
    q = q / of_keys if of_keys > 1 else q
    want = feed(layer_of("full", (q, k, v)), (q, k, v), None, [0, 11])
    out = feed(layer_of(recipe, (q, k, v)), (q, k, v), [60, *[1] * 60], [0, 11])
    assert want.isfinite().all() and out.isfinite().all()
    if of_values < 1:
        assert (out - want).abs().max() <= of_values
