"""G-KV and R-KV: what they keep, by hand and against a definition in numpy, and the invariants of their scores."""

import numpy as np
import pytest
import torch

import calidrop
from calidrop.compare import compare
from calidrop.methods._redundancy import redundancy
from calidrop.recipe import parse
from calidrop.state import held_bytes
from calidrop.tokens import Tokens
from helpers import ALICE, feed, layer_of, live, positions, random_qkv, run
from tiny import batch, generate, tiny, worst

METHODS = ("g_kv", "r_kv")
PROMPT, N, EVERY, RECENT = 41, 59, 5, 6


def weighted(rows: list[list[list[float]]], keys: list[int]) -> tuple:
    """q, k, v of one kv head: token j has the unit vector keys[j] as key, and rows[t][g] are the softmax weights that
    query t of head g pays the tokens so far."""
    n = len(keys)
    k = torch.eye(n)[keys].view(1, 1, n, n)
    q = torch.zeros(1, len(rows[-1]), n, n)
    for t, heads in enumerate(rows):
        for g, weights in enumerate(heads):
            q[0, g, t, : len(weights)] = torch.tensor(weights).log() * n**0.5
    return q, k, k.clone()


def test_what_g_kv_keeps_by_hand():
    """Two query heads, a window of 2, 2 others stay. Before, the first 4 tokens compete.

    Queries 4 and 5 pay (.5 .1 .1 .5) and (.3 .1 .4 .2), the larger of the two heads each; their mean is
    (.4 .1 .25 .35), divided by the largest (1 .25 .625 .875): 0 and 3 stay. Then 0 3 4 5 compete. Queries 6 and 7 pay
    (.05 .05 .2 .09): (.25 .25 1 .45). With half of what was, (.5 .4375 1 .45): 0 stays for its past, with 4."""
    one = [[[1.0]] * 2] + [[[1 / t] * t] * 2 for t in range(2, 5)]
    rows = [
        *one,
        [[0.5, 0.1, 0.1, 0.1, 0.2], [0.1, 0.1, 0.1, 0.5, 0.2]],
        [[0.3, 0.1, 0.2, 0.2, 0.1, 0.1], [0.1, 0.1, 0.4, 0.1, 0.2, 0.1]],
        [[0.05, 1e-9, 1e-9, 0.05, 0.2, 0.09, 0.61]] * 2,  # what was evicted is not there to be paid
        [[0.05, 1e-9, 1e-9, 0.05, 0.2, 0.09, 0.1, 0.51]] * 2,
    ]
    qkv = weighted(rows, list(range(8)))
    base = "g_kv(budget=4, every=2, recent=2, decay={}, mix=1)"
    assert positions(run(base.format(0.5), tuple(x[:, :, :6] for x in qkv))) == [[[0, 3, 4, 5]]]
    kv = run(base.format(0.5), qkv, 6)
    assert positions(kv) == [[[0, 4, 6, 7]]]
    torch.testing.assert_close(live(kv)[0].stats["attended"], torch.tensor([[[0.5, 1.0]]]))
    assert positions(run(base.format(0.0), qkv, 6)) == [[[4, 5, 6, 7]]]  # without a past


def test_what_r_kv_keeps_by_hand():
    """Keys 0 1 2 are the same, 3 is another. Links count but those to the last one similar: 0-1, 1-0, 2-0. Their sums
    per column are 2 1 0 0, so R is the softmax of (.5 .25 0 0) = (.334 .260 .203 .203). The window pays the three .3
    each and .1 to 3, so .1 I - .9 R = (-.271 -.204 -.152 -.172): 2 and 3 stay."""
    rows = [[[1 / t] * t] for t in range(1, 5)]
    rows += [[[0.24, 1e-9, 1e-9, 0.08, 0.2]], [[0.24, 1e-9, 1e-9, 0.08, 0.2, 0.1]]]  # by key 0, 3, 4, 5
    qkv = weighted(rows, [0, 0, 0, 3, 4, 5])
    assert positions(run("r_kv(budget=4, recent=2, kernel=1)", qkv)) == [[[2, 3, 4, 5]]]
    assert positions(run("r_kv(budget=4, recent=2, kernel=1, mix=1)", qkv)) == [[[0, 1, 4, 5]]]


def similar(keys: list[int], pairs: bool) -> list[float]:
    k = torch.eye(8)[keys][None, None]
    t = Tokens(k, k, torch.arange(len(keys))[None, None])
    mean = redundancy(t, pairs)[0, 0].log()
    return ((mean - mean.min()) * len(keys)).round(decimals=3).abs().tolist()  # softmax forgets a constant


def test_which_links_between_similar_keys_count():
    assert similar([0, 0, 0, 3], False) == [2, 1, 0, 0]
    assert similar([0, 0, 2, 3], False) == [0, 0, 0, 0]  # a lone pair: as published, neither is redundant
    assert similar([0, 0, 2, 3], True) == [1, 0, 0, 0]
    assert similar([0, 0, 0, 3], True) == [2, 2, 0, 0]
    assert similar([1, 2, 3, 4], False) == [0, 0, 0, 0]  # the first is not favoured where nothing is similar


def test_redundancy_in_blocks_and_with_empty_slots(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(2, 3, 40, 4, generator=draw)
    pos = torch.arange(40).expand(2, 3, 40).clone()
    pos[1, 0, ::3] = -1
    whole = redundancy(Tokens(k, k, pos), False)
    monkeypatch.setattr("calidrop.ops.alike.SCORE_BYTES", 4 * 2 * 3 * 40 * 7)
    torch.testing.assert_close(redundancy(Tokens(k, k, pos), False), whole)
    real = pos[1, 0] >= 0
    alone = redundancy(Tokens(k[1:, :1, real], k[1:, :1, real], pos[1:, :1, real]), False)
    torch.testing.assert_close(whole[1, 0, real], alone[0, 0])
    assert (whole[1, 0, ~real] == 0).all()


def defined(qkv, b, n, rkv=False, history="max", decay=0.8, mix=0.5, kernel=1, pairs=False):
    """The tokens row `b` holds in the end, per kv head, one softmax at a time."""
    q, k, _ = (x[b].double().numpy() for x in qkv)
    H, length, D = k.shape
    held, past = [list(range(PROMPT)) for _ in range(H)], [{} for _ in range(H)]
    paid = [[{} for _ in range(H)] for _ in range(length)]  # (logits, weights) of the query group, per token
    for t in range(length):
        for h, group in enumerate(np.split(q, H)):
            if t >= PROMPT:
                held[h].append(t)
            seen = [j for j in held[h] if j <= t]
            e = group[:, t] @ k[h, seen].T / D**0.5
            w = np.exp(e) / np.exp(e).sum(1, keepdims=True)
            paid[t][h] = {j: (e[:, i].max(), w[:, i].max()) for i, j in enumerate(seen)}
        if t == PROMPT - 1 or (t >= PROMPT and (t + 1 - PROMPT) % EVERY == 0):
            for h in range(H):
                old, window = held[h][:-RECENT], paid[t + 1 - RECENT : t + 1]
                if rkv:
                    e = np.array([[row[h][j][0] for j in old] for row in window])
                    score = (np.exp(e) / np.exp(e).sum(1, keepdims=True)).mean(0)
                else:
                    score = np.array([np.mean([row[h][j][1] for row in window]) for j in old])
                    score = score / score.max()
                    for i, j in enumerate(old):
                        f = past[h].get(j)
                        if f is not None or history == "sum":
                            f = f or 0.0
                            join = {"max": max(decay * f, score[i]), "sum": decay * f + score[i]}
                            score[i] = join.get(history, decay * f + (1 - decay) * score[i])
                    past[h] = dict(zip(old, score, strict=True))
                half = kernel // 2
                score = np.array([score[max(0, i - half) : i + half + 1].max() for i in range(len(old))])
                if mix < 1:
                    other = redundant(k[h, old], pairs)
                    score = mix * score - (1 - mix) * (other if rkv else other / other.max())
                best = sorted(range(len(old)), key=lambda i: -score[i])[:n]
                held[h] = [old[i] for i in sorted(best)] + held[h][-RECENT:]
    return held


def redundant(k, pairs):
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    c = k @ k.T - np.eye(len(k))
    out = c.copy()
    for i, row in enumerate(c):
        alike = [j for j, x in enumerate(row) if x > 0.5 and (j > i or not pairs)]
        if alike:
            out[i, alike[-1]] = 0
    e = np.exp(out.mean(0))
    return e / e.sum()


SWITCHES = [
    {},
    {"mix": 1.0},
    {"history": "mean"},
    {"history": "sum", "decay": 1.0, "mix": 1.0},
    {"pairs": True, "mix": 0.2},
    {"rkv": True, "mix": 0.1, "kernel": 7},
    {"rkv": True, "mix": 0.6, "kernel": 3, "pairs": True},
]


@pytest.mark.parametrize("heads", [(2, 3), (3, 1)], ids=["gqa", "mha"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_keeps_what_its_definition_says(switches, heads):
    """After the prompt and three compressions while decoding."""
    given = {n: x for n, x in switches.items() if n != "rkv"}
    name = "r_kv" if switches.get("rkv") else "g_kv"
    qkv = random_qkv(2, *heads, N, 6)
    words = ", ".join(f"{n}={x!r}" for n, x in given.items())
    kv = run(f"{name}(budget=19, every={EVERY}, recent={RECENT}, {words})", qkv, PROMPT)
    for b in range(2):
        assert positions(kv)[b] == defined(qkv, b, 13, **switches)


def test_without_past_and_redundancy_it_is_a_window_of_attention():
    """(h2) With one query head per kv head, where max and mean over the group are the same."""
    qkv = random_qkv(2, 3, 1, N, 6)
    names = ("g_kv(decay=0, mix=1", "snapkv(kernel=1")
    runs = [run(f"{name}, budget=19, recent=6, every=5)", qkv, PROMPT) for name in names]
    assert positions(runs[0]) == positions(runs[1])


@pytest.mark.parametrize("times", [1, 4])
def test_what_is_never_attended_again_fades(times):
    """(h3) Its score is decay^k of what it was after k compressions."""
    q, k, v = random_qkv(1, 1, 2, PROMPT + 5 * times, 4)
    k[..., :2], q[..., :2] = 0.0, 0.0
    k[:, :, 7, 0], q[:, :, PROMPT - 6 : PROMPT, 0] = 12.0, 12.0  # the end of the prompt looks at token 7
    k[:, :, 9, 1], q[:, :, PROMPT - 6 :, 1] = 12.0, 11.9  # and a little less at token 9; later at that one alone
    kv = run("g_kv(budget=36, every=5, recent=5, decay=0.7, mix=1)", (q, k, v), PROMPT)
    held = live(kv)[0]
    score = held.stats["attended"][0, 0]
    torch.testing.assert_close(score[held.pos[0, 0] == 7], torch.tensor([0.7**times]))
    assert len(score) == 31
    assert score[held.pos[0, 0] == 9] == 1


def test_the_past_begins_when_something_has_to_go():
    """Per row: the prompt of one is longer than the budget, that of the other is not yet."""
    qkv = random_qkv(2, 2, 3, 50, 6)
    kv = layer_of("g_kv(budget=30, every=5, recent=4)", qkv)
    feed(kv, tuple(x[:, :, :PROMPT] for x in qkv), pads=[0, 18])
    kv.settle()
    past = kv.state.store.tokens()[0]
    assert ((past.stats["attended"] > 0) == torch.tensor([True, False])[:, None, None])[past.valid].all()
    feed(kv, tuple(x[:, :, PROMPT:] for x in qkv), [1] * 9, [0, 18])
    past = kv.state.store.tokens()[0]
    assert ((past.stats["attended"] > 0) == torch.tensor([True, False])[:, None, None])[past.valid].all()
    more = random_qkv(2, 2, 3, 1, 6)
    feed(kv, more, pads=[0, 18])  # 51 - 18 = 33 tokens
    assert (kv.state.store.tokens()[0].stats["attended"] > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_held_after_each_compression(name):
    """(h4) budget tokens, the window among them, in order; the peak is budget + every."""
    qkv = random_qkv(2, 2, 3, 80, 6)
    kv = layer_of(f"{name}(budget=18, every=7, recent=6)", qkv)
    feed(kv, tuple(x[:, :, :PROMPT] for x in qkv))
    for step in range(1, 80 - PROMPT + 1):
        at = PROMPT + step - 1
        before = positions(kv) if step > 1 else None
        feed(kv, tuple(x[:, :, at : at + 1] for x in qkv))
        for b, row in enumerate(positions(kv)):
            for h, head in enumerate(row):
                assert len(head) == 18 + step % 7
                assert head[-6:] == list(range(at - 5, at + 1))
                assert before is None or set(head) <= {*before[b][h], at}
        stored = kv.state.store.tokens()[0].pos
        assert (stored.diff(dim=-1) > 0).all()


def test_a_fraction_is_of_the_tokens_so_far():
    qkv = random_qkv(3, 2, 3, 80, 6)
    pads = [0, 17, 38]
    for name in ("g_kv", "r_kv"):
        kv = run(f"{name}(budget=0.37, every=3, recent=4)", qkv, PROMPT, pads)
        for row, pad in zip(positions(kv), pads, strict=True):
            assert [len(head) for head in row] == [int(0.37 * (80 - pad))] * 2
        kv = run(f"{name}(budget=0.37, every=3, recent=4, least=20)", qkv, PROMPT, pads)
        assert [len(row[0]) for row in positions(kv)] == [29, 23, 20]


def test_the_past_costs_four_bytes_a_token():
    qkv = random_qkv(1, 2, 3, PROMPT, 6)
    held = [held_bytes(run(f"{name}(budget=21, recent=6)", qkv).state.store) for name in METHODS]
    assert held[0] - held[1] == 4 * 2 * 15


@pytest.mark.parametrize("name", METHODS)
def test_whole_budget_gives_the_logits_of_the_full_cache(name):
    """(h1)"""
    model, inputs = tiny(), batch()
    tokens, logits = generate(model, inputs, calidrop.KVCache(model, f"{name}(budget=100, every=4, recent=4)"))
    full, full_logits = generate(model, inputs, calidrop.KVCache(model))
    assert torch.equal(tokens, full)
    assert worst(logits, full_logits) < 2e-4


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("g_kv(recent=0)", "recent must be a whole number >= 1"),
        ("g_kv(budget=16)", "recent must be smaller"),
        ("g_kv(decay=1.5)", "decay must be a number in"),
        ("g_kv(mix=-0.1)", "mix must be a number in"),
        ("g_kv(history='min')", "history must be one of"),
        ("g_kv(pairs=1)", "pairs must be one of"),
        ("g_kv(least=30)", "least goes with a budget that is a fraction"),
        ("g_kv(every=0)", "every must be a whole number"),
        ("r_kv(kernel=4)", "kernel must be odd"),
        ("r_kv(budget=1.5)", "fraction"),
    ],
)
def test_wrong_use_is_refused(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        parse(recipe)


@pytest.mark.slow
def test_on_prose_attention_is_worth_more_than_recency(smollm2):
    """And the bytes are freed."""
    text = ALICE.read_text()
    recipes = ["g_kv(budget=96, every=32, mix=1)", "streaming_llm(budget=96, every=32)"]
    ours, recent = compare(*smollm2, text, recipes, context=256, continuation=128)[-2:]
    assert ours.kl < 0.8 * recent.kl, (ours.kl, recent.kl)
    assert ours.device_bytes < 0.4 * ours.full_bytes
