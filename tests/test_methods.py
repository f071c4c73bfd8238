"""What each method keeps, against few-line definitions in numpy that share no code with the library."""

import numpy as np
import pytest
import torch

from helpers import feed, layer_of, live, positions, random_qkv, run

PROMPT, N, EVERY = 41, 59, 5
SHAPES = {"gqa": (2, 3), "mha": (3, 1)}  # kv heads, query heads per kv head


def bookkeeping(qkv, b, prompt, every, choose):
    """Row `b`, one softmax at a time. choose(live, rows) -> the tokens that stay, per kv head.

    live[h]: tokens, oldest first. rows[t][h]: {token: weight query t pays it, mean over the query group}."""
    q, k, _ = (x[b].double().numpy() for x in qkv)
    H, length, D = k.shape
    held, rows = [list(range(prompt)) for _ in range(H)], []
    for t in range(length):
        row = []
        for h, group in enumerate(np.split(q, H)):
            if t >= prompt:
                held[h].append(t)
            seen = [j for j in held[h] if j <= t]
            e = np.exp(group[:, t] @ k[h, seen].T / D**0.5)
            row.append(dict(zip(seen, (e / e.sum(1, keepdims=True)).mean(0), strict=True)))
        rows.append(row)
        steps = t + 1 - prompt
        if steps == 0 or (steps > 0 and every and steps % every == 0):
            held = choose(held, rows)
    return held, rows


def top(tokens, score, n):
    return sorted(sorted(tokens, key=lambda j: -score[j])[:n])


def streaming_llm(held, rows):
    return [x[:3] + x[-14:] for x in held]


def mass(rows, h, j):
    return sum(row[h].get(j, 0.0) for row in rows)


def h2o(held, rows):
    return [top(x[:-7], {j: mass(rows, h, j) for j in x}, 11) + x[-7:] for h, x in enumerate(held)]


def tova(held, rows):
    mean = {j: np.mean([head[j] for head in rows[-1]]) for j in held[0]}
    return [top(x[:-1], mean, 16) + x[-1:] for x in held]


def pooled(held, rows):
    """SnapKV's scores: a window of 6, pooled 3 wide over neighbours that are still there."""
    scores = []
    for h, tokens in enumerate(held):
        old = tokens[:-6]
        mean = np.array([np.mean([row[h].get(j, 0.0) for row in rows[-6:]]) for j in old])
        edged = np.pad(mean, 1)
        scores.append(dict(zip(old, (edged[:-2] + mean + edged[2:]) / 3, strict=True)))
    return scores


def snapkv(held, rows, n=13):
    return [top(score, score, n) + x[-6:] for x, score in zip(held, pooled(held, rows), strict=True)]


def pyramidkv(held, rows):
    return snapkv(held, rows, 19)  # layer 1 of 5: from 26 - 13/20 down to 13/20 in 4 steps of 6.175: 25, 19, 13, 7, 1


def adakv(held, rows):
    scores = pooled(held, rows)
    sure = [top(score, score, 3) for score in scores]  # int(13 * 0.3)
    others = [(-s, h, j) for h, score in enumerate(scores) for j, s in score.items() if j not in sure[h]]
    for _, h, j in sorted(others)[: 13 * len(held) - sum(map(len, sure))]:
        sure[h].append(j)
    return [sorted(kept) + x[-6:] for kept, x in zip(sure, held, strict=True)]


# recipe, without and with compression while decoding -> its definition above
DEFINED = {
    f"streaming_llm(budget=17, sinks=3, recent=2, every={EVERY})": streaming_llm,
    f"h2o(budget=18, recent=0.4, every={EVERY})": h2o,
    f"tova(budget=17, every={EVERY})": tova,
    "snapkv(budget=19, recent=6, kernel=3)": snapkv,
    f"snapkv(budget=19, recent=6, kernel=3, every={EVERY})": snapkv,
    f"pyramidkv(budget=19, recent=6, kernel=3, every={EVERY})": pyramidkv,
    f"adakv(budget=19, recent=6, kernel=3, floor=0.3, every={EVERY})": adakv,
}
# every evictor; {0} is a budget, {1} how often generated tokens are compressed
EVICTORS = {
    "streaming_llm": "streaming_llm(budget={0}, recent=2, every={1})",
    "h2o": "h2o(budget={0}, every={1})",
    "tova": "tova(budget={0}, every={1})",
    "snapkv": "snapkv(budget={0}, recent=6, every={1})",
    "expected_attention": "expected_attention(budget={0}, recent=3, every={1})",
    "pyramidkv": "pyramidkv(budget={0}, recent=6, every={1})",
    "adakv": "adakv(budget={0}, recent=6, every={1})",
    "g_kv": "g_kv(budget={0}, recent=6, every={1})",
    "r_kv": "r_kv(budget={0}, recent=6, every={1})",
    "kvcrush": "snapkv(budget={0}, recent=6, every={1})+kvcrush",
    "lazy_eviction": "lazy_eviction(budget={0}, window={1}, alpha=0.15)",
}
every_evictor = pytest.mark.parametrize("name", EVICTORS)
of_prompts = pytest.mark.parametrize("name", [name for name in EVICTORS if name != "lazy_eviction"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", DEFINED)
def test_keeps_what_its_definition_says(recipe, shape):
    qkv = random_qkv(2, *SHAPES[shape], N, 6)
    kv = run(recipe, qkv, PROMPT, **({"index": 1, "layers": 5} if "pyramid" in recipe else {}))
    for b in range(2):
        want, _ = bookkeeping(qkv, b, PROMPT, EVERY if "every" in recipe else None, DEFINED[recipe])
        assert positions(kv)[b] == want


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv(budget=11, recent=6, every=5)",
        "tova(budget=2, every=5)",
        "g_kv(budget=7, recent=6, every=5)",
        "r_kv(budget=13, recent=6, every=5, mix=1)",
    ],
)
@pytest.mark.parametrize("needle", [0, 17, PROMPT - 8])
def test_needle_stays(recipe, needle):
    """At a budget of the window and the tokens over which pooling spreads the needle."""
    q, k, v = random_qkv(2, 2, 3, N, 6)
    q[:, :, PROMPT - 6 :] = torch.tensor([4.0, 0, 0, 0, 0, 0])  # what the last queries look for
    k[..., 0] = k[..., 0].clamp(max=1)
    k[:, :, needle, 0] = 9
    kv = run(recipe, (q, k, v), PROMPT)
    assert all(needle in head for row in positions(kv) for head in row)


@every_evictor
def test_keys_values_positions_and_statistics_travel_together(name):
    """After four compressions every live token is the one its position says, statistics included."""
    q, k, v = random_qkv(2, 2, 3, N, 6)
    tag = torch.arange(N) + 1000 * torch.arange(2)[:, None] + 10000 * torch.arange(2)[:, None, None]
    v[..., 0] = tag
    kv = run(EVICTORS[name].format(18, EVERY), (q, k, v), PROMPT)
    for b in range(2):
        _, rows = bookkeeping((q, k, v), b, PROMPT, EVERY, h2o_half) if name == "h2o" else (None, None)
        for t in live(kv):
            for h in range(2):
                real = t.valid[b, h]
                at = t.pos[b, h, real].long()
                assert torch.equal(t.v[b, h, real][:, 0], tag[b, h, at].float())
                assert torch.equal(t.k[b, h, real], k[b, h, at])
                assert torch.equal(t.v[b, h, real], v[b, h, at])
                if name == "h2o":
                    want = torch.tensor([mass(rows, h, j) for j in at.tolist()], dtype=torch.float32)
                    torch.testing.assert_close(t.stats["mass"][b, h, real], want)


def h2o_half(held, rows):
    """Half of 18 tokens are the last."""
    return [top(x[:-9], {j: mass(rows, h, j) for j in x}, 9) + x[-9:] for h, x in enumerate(held)]


def test_h2o_mass_is_the_column_sum_of_the_attention_matrix():
    q, k, v = random_qkv(2, 2, 3, N, 6)
    kv = run(f"h2o(budget=500, every={EVERY})", (q, k, v), PROMPT)
    s = torch.einsum("bhgtd,bhnd->bhgtn", q.view(2, 2, 3, N, 6), k) * 6**-0.5
    matrix = s.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1).mean(2)  # [B,H,T,N]
    held = torch.cat([t.stats["mass"] for t in live(kv)], 2)
    assert held.shape == (2, 2, N)  # nothing was evicted, so it is in order
    torch.testing.assert_close(held, matrix.sum(2))


@of_prompts
def test_float_budget_is_a_fraction_of_the_real_tokens_of_each_row(name):
    pads = [0, 17, 30]
    kv = run(EVICTORS[name].format(0.37, 16), random_qkv(3, 2, 3, N, 6), pads=pads)
    for row, pad in zip(positions(kv), pads, strict=True):
        assert sum(map(len, row)) == 2 * int(0.37 * (N - pad))
        assert min(map(min, row)) >= pad


@of_prompts
@pytest.mark.parametrize("budget", [PROMPT, 10 * N])
def test_budget_of_the_length_keeps_everything(name, budget):
    kv = run(EVICTORS[name].format(budget, None), random_qkv(2, 2, 3, N, 6), PROMPT, index=2, layers=3)
    assert positions(kv) == [[list(range(N))] * 2] * 2


@every_evictor
@pytest.mark.parametrize("every", [1, 16])
def test_live_tokens_never_exceed_budget_and_interval(name, every):
    qkv = random_qkv(1, 2, 3, 80, 6)
    kv = layer_of(EVICTORS[name].format(18, every), qkv)
    feed(kv, tuple(x[:, :, :PROMPT] for x in qkv))
    for step in range(1, 80 - PROMPT + 1):
        feed(kv, tuple(x[:, :, PROMPT + step - 1 : PROMPT + step] for x in qkv))
        held = positions(kv)[0]
        whole = name == "lazy_eviction" and step < every  # it begins with the first tokens generated
        assert sum(map(len, held)) == 2 * (PROMPT + step if whole else 18 + step % every)
        if name != "adakv":
            assert len(held[0]) == len(held[1])


@every_evictor
def test_left_padded_row_keeps_what_it_keeps_alone(name):
    """Also where that row holds less than the budget for a while and others more."""
    for pad in (11, 29):
        qkv = random_qkv(2, 2, 3, N, 6)
        together = run(EVICTORS[name].format(18, EVERY), qkv, PROMPT, pads=[0, pad])
        alone = run(EVICTORS[name].format(18, EVERY), tuple(x[1:, :, pad:] for x in qkv), PROMPT - pad)
        assert positions(together)[1] == [[p + pad for p in head] for head in positions(alone)[0]]


@every_evictor
def test_prompt_in_chunks_keeps_what_the_whole_prompt_keeps(name):
    """The first chunk of the second row is all pads."""
    qkv = random_qkv(2, 2, 3, N, 6)
    recipe = EVICTORS[name].format(18, EVERY)
    whole, chunked = run(recipe, qkv, PROMPT, pads=[0, 13]), layer_of(recipe, qkv)
    feed(chunked, qkv, [11, 25, 5] + [1] * (N - PROMPT), pads=[0, 13])
    assert positions(whole) == positions(chunked)


@every_evictor
def test_duplicated_query_heads_change_nothing(name):
    q, k, v = random_qkv(2, 2, 3, N, 6)
    recipe = EVICTORS[name].format(18, EVERY)
    once, twice = run(recipe, (q, k, v), PROMPT), run(recipe, (q.repeat_interleave(2, 1), k, v), PROMPT)
    assert positions(once) == positions(twice)


@every_evictor
def test_permuted_heads_permute_what_is_kept(name):
    q, k, v = random_qkv(2, 3, 2, N, 6)
    order = [2, 0, 1]
    moved = (q.view(2, 3, 2, N, 6)[:, order].flatten(1, 2), k[:, order], v[:, order])
    recipe = EVICTORS[name].format(18, EVERY)
    before, after = positions(run(recipe, (q, k, v), PROMPT)), positions(run(recipe, moved, PROMPT))
    assert after == [[row[h] for h in order] for row in before]
    if name not in ("streaming_llm", "tova"):
        assert before[0][0] != before[0][1]
