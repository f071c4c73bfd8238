"""LazyEviction against a bookkeeping of TS and MRI in the paper's own terms, and its invariants."""

import math

import numpy as np
import pytest
import torch

import calidrop
from calidrop.masks import PositionMask
from calidrop.methods import lazy_eviction
from calidrop.state import held_bytes
from helpers import feed, layer_of, live, positions, random_qkv, run
from tiny import batch, generate, tiny, worst

PROMPT, N, BUDGET, WINDOW, ALPHA = 23, 90, 17, 6, 0.15
RECIPE = f"lazy_eviction(budget={BUDGET}, window={WINDOW}, alpha={ALPHA})"


def importance(t, ts, mri):
    """The official code's formula."""
    sigma = lambda x: 1 / (1 + math.exp(-x)) if x > -500 else 0.0  # noqa: E731
    return 2 * sigma(-(1 + (t - ts) / (mri + 1e-5))) + (mri != 0) * 2 * sigma(-(mri - 1))


def bookkeeping(qkv, b, prompt, birth=True):
    """Yields after each generated token what each kv head holds: {token: (TS, MRI)}, oldest first."""
    q, k, _ = (x[b].double().numpy() for x in qkv)
    H, length, D = k.shape
    held = [dict.fromkeys(range(prompt), (0, 0)) for _ in range(H)]
    for t in range(1, length - prompt + 1):
        now = prompt + t - 1
        for h, group in enumerate(np.split(q, H)):
            held[h][now] = (t - 1, 0)
            e = np.exp(group[:, now] @ k[h, list(held[h])].T / D**0.5)
            weight = (e / e.sum(1, keepdims=True)).max(0)  # active if any query head of the group attends
            for w, (j, (ts, mri)) in zip(weight, list(held[h].items()), strict=True):
                if j == now and not birth:
                    held[h][j] = (t, 0)
                elif w >= ALPHA:
                    held[h][j] = (t, max(mri, t - ts))
            if len(held[h]) > BUDGET and t % WINDOW == 0:
                old = sorted(list(held[h])[:-WINDOW], key=lambda j: -importance(t, *held[h][j]))
                stay = {*old[: BUDGET - WINDOW], *list(held[h])[-WINDOW:]}
                held[h] = {j: x for j, x in held[h].items() if j in stay}
        yield held


def told(kv, b, h, steps):
    """{token: (TS, MRI)} of what a layer holds."""
    return {
        j: (steps - silent, longest)
        for t in live(kv)
        for j, silent, longest in zip(
            *(x[b, h].tolist() for x in (t.pos, t.stats["silent"], t.stats["longest"])), strict=True
        )
        if j >= 0
    }


@pytest.mark.parametrize("birth", [True, False])
@pytest.mark.parametrize(("H", "G"), [(2, 3), (3, 1)], ids=["gqa", "mha"])
def test_what_is_held_and_its_statistics_after_every_step(H, G, birth):
    """Positions, TS and MRI of each token: counters follow their tokens, evictions come each window steps and never
    between, the last tokens stay."""
    q, k, v = random_qkv(2, H, G, N, 6)
    v[..., 0] = torch.arange(N)  # tags
    qkv = q, k, v
    kv = layer_of(f"{RECIPE[:-1]}, birth={birth})", qkv)
    feed(kv, tuple(x[:, :, :PROMPT] for x in qkv))
    wanted, evictions = [bookkeeping(qkv, b, PROMPT, birth) for b in range(2)], 0
    lasting = 0
    for t in range(1, N - PROMPT + 1):
        now, before = PROMPT + t - 1, positions(kv)
        feed(kv, tuple(x[:, :, now : now + 1] for x in qkv))
        for b in range(2):
            for h, want in enumerate(next(wanted[b])):
                assert told(kv, b, h, t) == want
                assert set(want) >= set(range(now - WINDOW + 1, now + 1))
                assert len(want) == BUDGET + t % WINDOW if t >= WINDOW else len(want) == PROMPT + t
                assert all(0 <= mri <= t and 0 <= ts <= t for ts, mri in want.values())
                assert all(ts >= 1 for ts, mri in want.values() if mri)
                if t % WINDOW:
                    assert set(want) == {*before[b][h], now}
                lasting += sum(j < now - 3 * WINDOW for j in want)
        evictions += positions(kv) != before and t % WINDOW == 0
        for x in live(kv):
            assert torch.equal(x.v[..., 0][x.valid], x.pos[x.valid].float())
    assert evictions == (N - PROMPT) // WINDOW
    assert lasting > N  # it is no sliding window


def looked_at(sets, D=8, strength=200.0):
    """q, k, v [1,1,N,D] in which token n attends to `sets[n]` in equal parts, to nothing else."""
    k = torch.eye(D)[: len(sets)]
    q = torch.stack([strength * k[sorted(s)].sum(0) for s in sets])
    return q[None, None], k[None, None], torch.randn(1, 1, len(sets), D)


# a prompt of 3 tokens, then one token a step: 3 attends to 0 and itself, 4 to 1, 5 to itself, 6 to 0 and 1
ATTENDED = [{0}, {0}, {0}, {0, 3}, {1}, {5}, {0, 1}]


@pytest.mark.parametrize(("birth", "kept"), [(True, [1, 3, 5, 6]), (False, [0, 1, 5, 6])])
def test_an_example_by_hand(birth, kept):
    """Step 2 evicts: token 0 was active at once and is silent for a step (MRI 1): 2σ(-2) + 2σ(0) = 1.2384; token 1 is
    active now after 2 (MRI 2): 2σ(-1) + 2σ(-1) = 1.0758; token 2 never was: 0. It goes.
    Step 4 evicts: token 0 came back after 3: 2σ(-1) + 2σ(-2) = .7763; token 1 after 2: 1.0758; token 4 never was: 0;
    token 3, which nothing but itself ever looked at, has 2σ(-4) + 2σ(0) = 1.0360 from its birth, and token 0 goes for
    it. Where the birth does not count it has 0, and goes itself."""
    qkv = looked_at(ATTENDED)
    kv = layer_of(f"lazy_eviction(budget=4, window=2, alpha=0.1, birth={birth})", qkv)
    score, seen = kv.state.store.score, []
    ask = type(score).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(score), "__call__", lambda self, t, obs: seen.append(ask(self, t, obs)) or seen[-1])
        feed(kv, tuple(x[:, :, :5] for x in qkv), [3, 1, 1])
        assert positions(kv) == [[[0, 1, 3, 4]]]
        feed(kv, tuple(x[:, :, 5:] for x in qkv), [1, 1])
        assert positions(kv) == [[kept]]
    want = [[1.2384, 1.0758, 0.0], [0.7763, 1.0758, 1.0360 if birth else 0.0, 0.0]]
    for got, expected in zip(seen, want, strict=True):
        torch.testing.assert_close(got[0, 0], torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("silent", "longest", "want"),
    [(2_000_001, 0, 0.0), (2_000_001, 2_000_001, 0.238406), (0, 2_000_001, 0.537883), (2_000_001, 1, 1.0)],
)
def test_score_of_long_silences(silent, longest, want):
    """Two million steps over 1e-5 overflow an exponential; no half precision counts to them."""
    kv = run("lazy_eviction(budget=4, window=2, alpha=0.1)", looked_at(ATTENDED), 3)
    t, told = live(kv)[0], (silent, longest)
    assert all(x.dtype == torch.int32 for x in t.stats.values())
    t.stats = {name: torch.full_like(t.pos, x) for name, x in zip(("silent", "longest"), told, strict=True)}
    assert kv.state.store.score(t, kv.state.obs)[0, 0, 0].item() == pytest.approx(want, abs=1e-5)


@torch.no_grad()
def test_budget_of_the_final_length_is_full_attention():
    model, inputs = tiny(), batch()
    full, whole, half = (
        generate(model, inputs, calidrop.KVCache(model, recipe))[1]
        for recipe in ("full", "lazy_eviction(budget=85, window=4)", "lazy_eviction(budget=40, window=4)")
    )
    assert worst(full, whole) < 2e-4 < worst(full, half)


def test_a_prompt_stays_whole_until_the_window_is_full():
    """However it is fed, and whoever asks for the size."""
    kv = layer_of(RECIPE, qkv := random_qkv(1, 2, 3, 60, 6))
    kv.eager = True
    feed(kv, tuple(x[:, :, : 55 + WINDOW - 1] for x in qkv), [30, 25] + [1] * (WINDOW - 1))
    kv.settle()
    assert positions(kv) == [[list(range(55 + WINDOW - 1))] * 2]


def test_short_turns_are_evicted_too():
    """Steps are counted on through all turns; a prompt in between is no step, and no token ages by it."""
    turns = [[7, *[1] * 4]] * 12
    kv = layer_of(RECIPE, qkv := random_qkv(1, 2, 3, 12 * 11, 6))
    steps = fed = 0
    for sizes in turns:
        for size in sizes:
            before = told(kv, 0, 0, 0) if fed else {}
            feed(kv, tuple(x[:, :, fed : fed + size] for x in qkv))
            steps, fed = steps + (size == 1), fed + size
            if size == 7:
                assert told(kv, 0, 0, 0) == before | dict.fromkeys(range(fed - 7, fed), (0, 0))
            if size == 1 and steps % WINDOW == 0:
                assert {len(head) for head in positions(kv)[0]} == {BUDGET}
            # a window waits while another comes, and so do the prompts between its tokens
            assert max(len(head) for head in positions(kv)[0]) <= BUDGET + WINDOW - 1 + 2 * 7
    assert held_bytes(kv.state) < 2 * 80 * (2 * 6 * 4 + 4 + 8)


def test_a_fraction_is_of_each_rows_prompt():
    """And a row whose share is below the window keeps the window."""
    kv = run(f"lazy_eviction(budget=0.5, window={WINDOW}, alpha={ALPHA})", random_qkv(3, 2, 3, 60, 6), 48, [0, 20, 40])
    assert [{len(head) for head in row} for row in positions(kv)] == [{24}, {14}, {6}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"budget": 64, "window": 64}, "window must be smaller than budget, got window=64 and budget=64"),
        ({"budget": 64, "window": 65}, "got window=65 and budget=64"),
        ({"budget": 60}, "got window=64 and budget=60"),
        ({"budget": 64, "window": 0}, "window must be a whole number >= 1, got 0"),
        ({"budget": 64, "window": 8.0}, "window must be a whole number >= 1, got 8.0"),
        ({"budget": 300, "alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"budget": 300, "birth": 1}, "birth must be one of True, False, got 1"),
        ({"budget": 1.0}, "got 1.0"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=f"lazy_eviction: .*{says}"):
        lazy_eviction(**arguments)


def test_a_generated_pad_looks_at_nothing():
    """Rows that are finished may go on with masked tokens; neither what is kept nor the window is active by them."""
    qkv = q, k, v = random_qkv(2, 2, 3, 40, 6)
    kv = run(RECIPE, tuple(x[:, :, :-1] for x in qkv), 25)
    before = [told(kv, b, 0, 14) for b in range(2)]
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, -1] = False
    kv.update(k[:, :, -1:], v[:, :, -1:])
    kv.attend(q[:, :, -1:], PositionMask(real, new_pads=True), 6**-0.5, None, None)
    assert told(kv, 1, 0, 15) == before[1]
    assert told(kv, 0, 0, 15) != before[0] | {39: told(kv, 0, 0, 15)[39]}
