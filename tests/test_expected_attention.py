"""Expected attention against its definition with explicit rotation matrices, and against sampling."""

import numpy as np
import pytest
import torch

from calidrop.attention import Queries
from calidrop.methods.expected_attention import ExpectedAttention
from calidrop.observe import Observation
from calidrop.rope import Rope
from calidrop.tokens import Tokens
from helpers import feed, layer_of, positions, random_qkv, run

FREQ = [1.0, 0.3, 0.05]


def rotation(p, D):
    """The matrix that turns a key or query at position p; dims behind the rotated ones pass through."""
    R, half = np.eye(D), len(FREQ)
    for i, freq in enumerate(FREQ):
        c, s = np.cos(p * freq), np.sin(p * freq)
        R[np.ix_([i, i + half], [i, i + half])] = [[c, -s], [s, c]]
    return R


def score(q, k, v, scale, pads=0, future=1, sinks=0):
    """The score of keys [B,H,N,D] once queries [B,Hq,T,D], the first `pads` of them pads, were seen; all rotated."""
    B, Hq, T, _ = q.shape
    pos = torch.arange(T, dtype=torch.int32).expand(B, T)
    pos = pos.masked_fill(pos < pads, -1)
    start = torch.full((B,), pads)
    step = Observation(Queries(q, pos, scale), torch.zeros(B, Hq, T), T - start, start)
    method = ExpectedAttention(Rope(torch.tensor(FREQ)), future, sinks, decoding=True)
    for i in range(0, T, 1000):  # moments add up over steps
        method.observe(step.slice(i, i + 1000))
    places = pos[:, None, : k.shape[2]].expand(k.shape[:3])
    return method(Tokens(k, v, places), step.last(1))


def definition(q, k, v, scale, future, sinks, group):
    """Eq. 5-7 for one row: q [Hq,T,D], k and v [H,N,D] in float64."""
    (Hq, T, D), N = q.shape, k.shape[1]
    mean_turn = np.mean([rotation(p, D) for p in range(T, T + future)], 0)
    weights = np.zeros((Hq, N))
    for h in range(Hq):
        raw = np.stack([rotation(-p, D) @ q[h, p] for p in range(sinks, T)])
        mean = mean_turn @ raw.mean(0)
        cov = mean_turn @ np.cov(raw.T, bias=True) @ mean_turn.T
        keys = k[h // group, sinks:]
        e = np.exp([key @ mean * scale + key @ cov @ key * scale**2 / 2 for key in keys])
        weights[h, sinks:] = e / e.sum()
    weights = weights.reshape(-1, group, N).mean(1) * np.linalg.norm(v, axis=-1)
    weights[:, :sinks] = np.inf
    return weights


@pytest.mark.parametrize(("D", "H", "G"), [(6, 2, 3), (9, 3, 1)])
def test_score_is_its_definition(D, H, G):
    q, k, v = random_qkv(2, H, G, 37, D)
    got = score(q, k[:, :, :30], v[:, :, :30], 0.4, future=7, sinks=2)
    for b in range(2):
        want = definition(*(x[b].double().numpy() for x in (q, k[:, :, :30], v[:, :, :30])), 0.4, 7, 2, G)
        torch.testing.assert_close(got[b], torch.tensor(want).float(), rtol=1e-4, atol=1e-6)


def test_keeps_sinks_and_window_and_the_best_of_the_definition():
    q, k, v = random_qkv(1, 2, 3, 43, 6)
    kv = layer_of(
        "expected_attention(budget=17, recent=5, future=9, sinks=3)", (q, k, v), rope=Rope(torch.tensor(FREQ))
    )
    feed(kv, (q, k, v))
    kv.settle()
    want = definition(*(x[0].double().numpy() for x in (q, k, v)), 6**-0.5, 9, 3, 3)
    # the softmax runs over the tokens that may be dropped, which changes no order
    for h, head in enumerate(positions(kv)[0]):
        best = sorted(range(3, 38), key=lambda j: -want[h, j])[:9]
        assert head == sorted([0, 1, 2, *best, *range(38, 43)])


def test_logit_is_the_log_of_the_mean_exponential_over_sampled_queries():
    """Gaussian queries, turned to the one position they will have, asked many times."""
    D, T, scale, draw = 6, 6000, 0.4, np.random.default_rng(0)
    mean, mix = draw.normal(size=D), draw.normal(size=(D, D)) * 0.7
    past = np.stack([rotation(p, D) @ (mean + mix @ draw.normal(size=D)) for p in range(T)])
    keys = np.stack([rotation(p, D) @ draw.normal(size=D) for p in range(11)])
    unit = torch.zeros(1, 1, 11, D)
    unit[..., 0] = 1
    got = score(torch.tensor(past[None, None]).float(), torch.tensor(keys[None, None]).float(), unit, scale)[0, 0]
    future = (mean + draw.normal(size=(400_000, D)) @ mix.T) @ rotation(T, D).T
    want = np.exp(future @ keys.T * scale).mean(0)
    np.testing.assert_allclose(got.log().numpy(), np.log(want / want.sum()), atol=0.08)


def test_left_pads_change_nothing():
    """A padded row is rotated by its own count of tokens, and columns count pads."""
    q, k, v = random_qkv(1, 2, 2, 29, 6)
    turn = torch.tensor(np.stack([rotation(p, 6) for p in range(29)])).float()
    q, k = (torch.einsum("nij,bhnj->bhni", turn, x) for x in (q, k))
    alone = score(q, k, v, 0.4, future=5, sinks=3)
    junk = 50 * torch.ones(1, 4, 13, 6)
    padded = [torch.cat([junk[:, : x.shape[1]], x], 2) for x in (q, k, v)]
    torch.testing.assert_close(score(*padded, 0.4, pads=13, future=5, sinks=3)[..., 13:], alone, rtol=1e-4, atol=1e-6)


def test_generated_tokens_are_ranked_by_the_queries_since_the_last_compression():
    q, k, v = random_qkv(1, 2, 2, 60, 6)
    past, lately = q.clone(), q.clone()
    past[:, :, :50], lately[:, :, 50:] = torch.randn(1, 4, 50, 6), torch.randn(1, 4, 10, 6)
    # 55: the prompt of 50 stays whole, the compression 10 steps later drops 5
    a, b, c = (positions(run("expected_attention(budget=55, every=10)", (x, k, v), 50)) for x in (q, past, lately))
    assert [len(head) for head in a[0]] == [55, 55]
    assert a == b
    assert a != c


@pytest.mark.parametrize("every", [None, 16])
def test_moments_are_held_only_where_they_will_be_asked(every):
    """Once a prompt is compressed, and nothing generated ever is, there is no use for them."""
    qkv = random_qkv(1, 2, 2, 60, 16)
    kv = run(f"expected_attention(budget=20, every={every})", qkv, prompt=50)
    score = kv.state.store.score
    assert (score.outer is None) == (every is None)
    assert kv.state.steps == 10
