"""The four properties of every store, for every method and many compositions, on random tensors.

1. it answers as plain attention over its own `tokens()` would; 2. no token is in it twice; 3. none is lost, unless it
says that it drops; 4. the bytes it reports are the bytes of the tensors that are really alive; and where it says that
its tokens are, they are.
"""

import gc

import pytest
import torch

from calidrop.attention import Queries, attend, merge
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.recipe import parse
from calidrop.rope import Rope
from calidrop.state import held_bytes
from helpers import check_holdings, kernels, predictor
from tiny import soft

EVICTORS = [
    "streaming_llm(budget=12, every=4)",
    "h2o(budget=12, every=4)",
    "tova(budget=12, every=3)",
    "snapkv(budget=13, recent=5, every=4)",
    "snapkv(budget=0.3, recent=5, every=4)",
    "expected_attention(budget=12, every=4)",
    "pyramidkv(budget=13, recent=5, every=4)",
    "adakv(budget=13, recent=5, every=4)",
    "judge_q(budget=12, file=SOFT)",
    "judge_q(budget=13, recent=5, file=SOFT)+kvcrush",
    "lazy_eviction(budget=12, window=4, alpha=0.1)",
    "g_kv(budget=13, recent=5, every=4)",
    "g_kv(budget=0.3, recent=5, every=4, history='mean', pairs=True)",
    "r_kv(budget=13, recent=5, every=4)",
    "h2o(budget=12, every=4)+kvcrush(share=0.4)",
    "adakv(budget=13, recent=5, every=4)+kvcrush(anchor='alternate')",
]
STORAGES = [
    "kivi(bits=2, group=8)",
    "kivi(bits=8, group=16)",
    "int8",
    "int4",
    "fp8",
    "ott(bits=4, block=8, pool=2, spill=5, skip=0)",
    "mixkvq(block=16, group=8)",
    "decoquant(bits=4)",
    "think(keep=0.6)",
    "think(keep=0.5, values=0.5)+kivi(bits=2, group=8)",
    "think+int4",
]
ALONE = [
    "kivi(bits=2, group=8, residual=9)",
    "kivi(bits=4, group=16, residual=4)",
    "int8(residual=0)",
    "int4(residual=3)",
    "int4(rotate=False)",
    "fp8(residual=5)",
    "ott(bits=2, block=8, pool=2, spill=5, skip=0, residual=3)",
    "mixkvq(block=16, group=8, quota=(1, 2, 13), residual=5)",
    "decoquant(bits=2, residual=3)",
    "think(keep=0.6, recent=4)",
]
# recompute=2 asks the host at every step, so that calidrop too must answer as its tokens do
RESTS = ["calidrop(recompute=2)", "mikv(bits=2)", "mikv(bits=3, balancer=False)"]
PREDICTORS = [predictor(24, dense=1), predictor(999)]
RECIPES = [
    *ALONE,
    *EVICTORS,
    *(f"{e}+{s}" for e in EVICTORS[2:4] + EVICTORS[10:12] + EVICTORS[-1:] for s in STORAGES),
    *(f"{e}+{r}" for e in EVICTORS for r in RESTS[:2]),
    *(f"h2o(budget=12, every=4)+{s}+{r}" for s in STORAGES for r in RESTS),
    # asks the host at every step, or selects everything
    *(p + s for p in PREDICTORS for s in ("", *(f"+{s}" for s in STORAGES))),
]


def steps(prompts):
    """Lengths of consecutive blocks: a prompt, generated tokens, a second prompt, and so on."""
    for length in prompts:
        yield length
        yield from [1] * 11


@pytest.fixture(autouse=True, scope="module")
def in_torch():
    """To the last digits: how much kernels round is in test_kernel."""
    with pytest.MonkeyPatch.context() as patch, kernels(patch, "torch"):
        yield


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("rows", "heads", "group"), [(1, 3, 1), (2, 2, 3)], ids=["MHA", "GQA padded"])
@torch.no_grad()
def test_four_properties(recipe, rows, heads, group):
    D = 16
    torch.manual_seed(rows)
    rope = Rope(10000 ** (-torch.arange(0, D // 2) / (D // 2)))
    plan = parse(recipe.replace("SOFT", repr(soft(layers=3, kv_heads=heads, head_dim=D, model_type="", hidden=8))))
    layer = LayerKV(lambda: plan.plan(Layer(1, 3, heads * group, heads, D, rope, HeadGroup())))
    pads = torch.ones(rows, 200, dtype=torch.bool)
    if rows > 1:
        pads[1, :10] = False
    seen = 0
    for T in steps((37, 23)):
        layer.soft_columns = len(layer.plan.soft) if layer.plan.soft is not None and layer.prompt_part(T, False) else 0
        k, v = torch.randn(2, rows, heads, T + layer.soft_columns, D)
        q = torch.randn(rows, heads * group, T + layer.soft_columns, D)
        if T == 1:
            layer.settle()
        before = (layer.state.store.tokens(), [layer.state.window.tokens()] if len(layer.state.window) else [])
        mask = PositionMask(pads, new_pads=seen == 0 and rows > 1)
        layer.update(k, v)
        out = layer.attend(q, mask, D**-0.5, None, None)
        out, q, k, v = (x[:, :, :T] for x in (out, q, k, v))
        pos, _ = mask.positions(rows, 1, seen, T, k.device)
        qs = Queries(q, pos, D**-0.5)
        sets = [(t.k, t.v, t.pos) for part in before for t in part] + [(k, v, pos[:, None].expand(rows, heads, T))]
        want, _ = merge([attend(qs, *s) for s in sets])
        real = (pos >= 0)[:, None, :, None]
        torch.testing.assert_close(out * real, want * real, atol=2e-5, rtol=1e-4)
        seen += T
        check_tokens(layer, pads[:, :seen])
        check_bytes(layer)
        check_holdings(layer, pads[:, :seen])


def check_tokens(layer, real):
    stored = layer.state.store.tokens() + ([layer.state.window.tokens()] if len(layer.state.window) else [])
    for b in range(real.shape[0]):
        everything = real[b].nonzero().flatten().tolist()
        for h in range(stored[-1].pos.shape[1]):
            held = sorted(p for t in stored for p in t.pos[b, h].tolist() if p >= 0)
            assert len(held) == len(set(held)), "a token is there twice"
            assert set(held) <= set(everything)
            if not layer.state.store.drops:
                assert held == everything, "a token is lost"


def check_bytes(layer):
    """Every storage reachable from the layer's state through the garbage collector, against what it reports."""
    found, queue, known = {}, [layer.state], set()
    while queue:
        item = queue.pop()
        if id(item) in known or isinstance(item, type) or (callable(item) and not hasattr(item, "__dict__")):
            continue
        known.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif not callable(item) or hasattr(item, "observe"):
            queue.extend(x for x in gc.get_referents(item) if not isinstance(x, (type, str, int, float)))
    found.pop(0, None)
    rope = 8 * 4  # the model's own frequencies, reachable through expected_attention's score
    reported = held_bytes(layer.state) + held_bytes(layer.state, host=True)
    assert sum(found.values()) - reported in (0, rope), (sum(found.values()), reported)


def test_positions_are_those_asked_for():
    """A mask remembers what it said last."""
    mask = PositionMask(torch.tensor([[False, True, True, True], [True] * 4]), new_pads=True)
    for seen, new, want in ((0, 2, [[-1, 1], [0, 1]]), (2, 2, [[2, 3], [2, 3]]), (0, 1, [[-1], [0]])):
        for heads in (1, 3, 3):
            pos, of_heads = mask.positions(2, heads, seen, new, torch.device("cpu"))
            assert pos.tolist() == want
            assert of_heads.tolist() == [[row] * heads for row in want]


def test_a_compression_sees_the_query_of_its_own_step():
    """Of a single query, those of the steps between are not kept."""
    kv = LayerKV(lambda: parse("tova(budget=6, every=3)").plan(Layer(0, 1, 2, 1, 8, None, HeadGroup())))
    kv.eager, seen = True, []
    assert kv.state.store is not None
    add = kv.state.store.add
    kv.state.store.add = lambda t, obs: (seen.append(obs.queries.q), add(t, obs))
    q, k, v = torch.randn(1, 2, 20, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)
    for at in (slice(0, 8), *(slice(i, i + 1) for i in range(8, 20))):
        kv.update(k[:, :, at], v[:, :, at])
        kv.attend(q[:, :, at], PositionMask(), 8**-0.5, None, None)
    assert torch.equal(torch.cat(seen, 2), q[:, :, [7, 10, 13, 16, 19]])
