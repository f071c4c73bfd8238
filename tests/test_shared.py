"""Layers whose keys and values other layers ask, too: Gemma 3n, Gemma 4 E."""

import re
import weakref

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache

import calidrop
import seam
from calidrop.attention import Queries, attend, merge
from calidrop.cache import layers_of
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.planning import plan
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.rope import Rope
from calidrop.shared import SharedKV
from calidrop.state import held_bytes
from calidrop.support import HYBRIDS, layer_kinds, sharing
from helpers import check_holdings, kernels
from test_properties import ALONE, EVICTORS, RESTS, STORAGES, check_bytes, check_tokens, steps
from tiny import COMMON, batch, generate, tiny, worst

if tuple(map(int, transformers.__version__.split(".")[:2])) < HYBRIDS:
    pytest.skip("an older transformers", allow_module_level=True)

SHARING = {
    "num_hidden_layers": 8, "num_kv_shared_layers": 5, "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 24, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
}  # fmt: skip
FAMILIES = {
    "gemma3n_text": {"laurel_rank": 4, "altup_num_inputs": 2, "altup_active_idx": 0, "intermediate_size": [64] * 8,
                     "activation_sparsity_pattern": [0.0] * 8},
    "gemma4_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
}  # fmt: skip
RECIPES = [
    "snapkv(budget=24, recent=8, every=8)",
    "adakv(budget=24, recent=8)+calidrop(recompute=0.3)",
    "kivi(bits=4, group=8, residual=16)",
    "h2o(budget=20)+int8",
]
ALL = [
    *(e for e in EVICTORS if "judge_q" not in e),
    *ALONE,
    *(f"snapkv(budget=13, recent=5, every=4)+{s}" for s in STORAGES),
    *(f"h2o(budget=12, every=4)+{r}" for r in (*RESTS, "calidrop(recompute=0.3)", "calidrop(summary=3)")),
    "tova(budget=12, every=3)+calidrop(offload=False, summary=3)",
]


def shared(family: str = "gemma3n_text", **changes) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **SHARING, **FAMILIES[family], **changes})
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return shared()


def test_every_family_is_there():
    assert set(FAMILIES) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_equals_dynamic_cache(family):
    model, inputs = shared(family), batch()
    model.set_attn_implementation("sdpa")
    tokens, logits = generate(model, inputs, DynamicCache(config=model.config))
    cache = calidrop.KVCache(model)
    ours, our_logits = generate(model, inputs, cache)
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, ours)
    plain, plain_logits = generate(model, inputs, DynamicCache(config=model.config))  # under our attention
    assert worst(logits, plain_logits) < 2e-4 and torch.equal(tokens, plain)
    assert len(cache.layers) == 3 and [x.asking for x in cache.layers if isinstance(x, SharedKV)] == [4, 3]


@pytest.mark.parametrize("every", [8, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_layer_drops_answers_all_that_ask(family, every):
    model, inputs = shared(family), batch()
    cache = calidrop.KVCache(model, f"snapkv(budget=24, recent=8, every={every})+calidrop(recompute=2)")
    tokens, logits = generate(model, inputs, cache)
    want, full_logits = generate(model, inputs, calidrop.KVCache(model))
    assert torch.equal(tokens, want) and worst(logits, full_logits) < 2e-4  # recomputing always is full attention
    assert cache.recompute_rate == 1
    never = calidrop.KVCache(model, f"snapkv(budget=24, recent=8, every={every})+calidrop(recompute=-2, order=0)")
    _, other = generate(model, inputs, never)
    assert worst(other, full_logits) > 1e-2 and never.recompute_rate == 0


def asked(*recipes, asking=3, group=2, heads=2, D=16):
    """A layer that three ask of the first recipe, and layers of their own of the others."""
    rope = Rope(10000 ** (-torch.arange(0, D // 2) / (D // 2)))
    found = []
    for i, recipe in enumerate(recipes):
        how, told = parse(recipe), Layer(1, 3, heads * group, heads, D, rope, HeadGroup(), asking=1 if i else asking)

        def make(how=how, told=told):
            return how.plan(told)

        found.append(LayerKV(make) if i else SharedKV(asking, make))
    return found


def blocks(rows, heads=2, group=2, asking=3, D=16):
    """Prompts and steps: queries of each layer, keys, values and the mask."""
    pads = torch.ones(rows, 200, dtype=torch.bool)
    pads[1:, :10] = False
    seen = 0
    for T in steps((37, 23)):
        k, v = torch.randn(2, rows, heads, T, D)
        mask = PositionMask(pads[:, : seen + T], new_pads=seen == 0 and rows > 1)
        yield torch.randn(asking, rows, heads * group, T, D), k, v, mask
        seen += T


@pytest.mark.parametrize("end", [False, True], ids=["whole prompts", "only their end"])
@pytest.mark.parametrize("recipe", ALL)
@torch.no_grad()
def test_all_layers_are_answered_what_is_there(recipe, end, monkeypatch):
    """Three layers that ask in turn, prompts and steps: what is held is what the first would hold by itself, and each
    is answered as plain attention over it would, whether or not the others ask for whole prompts."""
    torch.manual_seed(3)
    ours, alone = asked(recipe, recipe)
    sure = "calidrop" not in recipe or "recompute=2" in recipe
    with kernels(monkeypatch, "torch"):
        for q, k, v, mask in blocks(2):
            T = q.shape[3]
            n = min(T, 3) if end else T
            if T == 1:
                ours.settle()
            before = ours.state.store.tokens() + ([ours.state.window.tokens()] if len(ours.state.window) else [])
            for layer in (ours, alone):
                layer.update(k, v)
            own = ours.attend(q[0], mask, 0.25, None, None)
            torch.testing.assert_close(own, alone.attend(q[0], mask, 0.25, None, None), atol=2e-5, rtol=1e-4)
            pos, _ = mask.positions(2, 1, ours.state.seen, T, k.device)
            for asks in q[1:, :, :, T - n :]:
                got = ours.attend(asks, mask, 0.25, None, None)
                qs = Queries(asks, pos[:, T - n :], 0.25)
                sets = [(t.k, t.v, t.pos) for t in before] + [(k, v, pos[:, None].expand(2, 2, T))]
                want, _ = merge([attend(qs, *x) for x in sets])
                real = (qs.pos >= 0)[:, None, :, None]
                assert not sure or worst(got * real, want * real) < 2e-5
            check_tokens(ours, mask.pads)
            check_bytes(ours)
            check_holdings(ours, mask.pads)
            assert (ours.state.seen, ours.state.age, ours.state.steps) == (
                alone.state.seen, alone.state.age, alone.state.steps
            )  # fmt: skip
            for x, y in zip(ours.state.store.tokens(), alone.state.store.tokens(), strict=True):
                assert torch.equal(x.pos, y.pos) and torch.equal(x.k, y.k) and torch.equal(x.v, y.v)


@pytest.mark.parametrize(
    "rest",
    ["recompute=0.3", "order=0, recompute=-2", "recompute=0.1, apply=0.2, decide='layer'", "recompute=0, late=1"],
)
@pytest.mark.parametrize("wish", ["torch", ""])
@torch.no_grad()
def test_each_layer_is_remembered_by_its_own_queries(rest, wish, monkeypatch):
    """What is kept does not depend on queries here, so each layer could have a cache of its own."""
    torch.manual_seed(4)
    recipe = f"streaming_llm(budget=12, every=4)+calidrop({rest})"
    ours, *alone = asked(*[recipe] * 4)
    with kernels(monkeypatch, wish):
        for q, k, v, mask in blocks(2):
            ours.update(k, v)
            for layer, asks in zip(alone, q, strict=True):
                layer.update(k, v)
                want = layer.attend(asks, mask, 0.25, None, None)
                torch.testing.assert_close(ours.attend(asks, mask, 0.25, None, None), want, atol=2e-5, rtol=1e-4)
    counts = [x.state.store.recomputed() for x in alone]
    assert ours.state.store.recomputed() == tuple(map(sum, zip(*counts, strict=True)))
    assert held_bytes(ours.state, host=True) < 1.5 * held_bytes(alone[0].state, host=True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_row_equals_row_alone(family, recipe, monkeypatch):
    seam.padded_rows_are_as_alone(shared(family), recipe, 2e-4, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_kernel_answers_as_torch_does(model, recipe, monkeypatch):
    inputs, found = batch(), []
    for wish in ("torch", ""):
        with kernels(monkeypatch, wish):
            cache = calidrop.KVCache(model, recipe)
            found.append(generate(model, inputs, cache)[1])
    assert 0 < worst(*found) < (5e-2 if "int8" in recipe or "kivi" in recipe else 1e-3)  # codes may flip
    assert [cache.layers[i].by for i in (0, 2)] == ["the kernel for CPUs"] * 2  # in windows


@pytest.mark.parametrize("recipe", RECIPES)
def test_beams_score_as_the_same_tokens_one_by_one(model, recipe):
    seam.beams_score_as_their_tokens(model, recipe)


@pytest.mark.parametrize("recipe", ["full", *RECIPES])
def test_chunks_and_a_second_turn(model, recipe):
    seam.chunks_are_as_one_prompt(model, recipe, 5e-3)


@pytest.mark.parametrize("recipe", RECIPES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_repeated_chosen_and_forgotten(family, recipe):
    seam.rows_are_repeated_chosen_and_forgotten(shared(family), recipe)


@pytest.mark.parametrize(
    "recipe", ["full", RECIPES[0], "h2o(budget=20)", "adakv(budget=24, recent=8)+calidrop(late=1)"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps(family, recipe, monkeypatch):
    """The window of 24 tokens is cut on the way, and its tensors stay where they are."""
    seam.recorded_steps_are_those_from_python(shared(family), recipe, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, as the compiler is imported
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps(family):
    few = {"num_hidden_layers": 5, "num_kv_shared_layers": 3, "layer_types": SHARING["layer_types"][:5]}
    if family == "gemma3n_text":
        few |= {"intermediate_size": [64] * 5, "activation_sparsity_pattern": [0.0] * 5}
    seam.compiled_steps_are_those_from_python(shared(family, **few), RECIPES[:2])


@torch.no_grad()
def test_a_prompt_is_compressed_when_the_last_layer_has_asked(model):
    """eager, at the end of `generate`'s prompt, or when the next token comes; and what was held until then is gone."""
    inputs = batch(1, 61, (0,))
    eager, later = (calidrop.KVCache(model, RECIPES[0], eager=x) for x in (True, False))
    for cache in (eager, later):
        model(**inputs, **using(cache))
    assert [held_bytes(x.state) for x in eager.layers] < [held_bytes(x.state) for x in later.layers]
    assert all(x.own is None for cache in (eager, later) for x in cache.layers if isinstance(x, SharedKV))
    beside = later.layers[1].state.obs.beside
    assert len(beside) == 3  # one query each of those that ask what sees all, and nothing of the prompt's others
    assert [(held_bytes(x.q), held_bytes(x.pos)) for x in beside] == [(6 * 16 * 4, 4)] * 3
    later.compress()
    assert [held_bytes(x.state) for x in eager.layers] == [held_bytes(x.state) for x in later.layers]
    by_generate = calidrop.KVCache(model, RECIPES[0])
    generate(model, inputs, by_generate, new=1)
    assert held_bytes(by_generate.layers[1].state) == held_bytes(eager.layers[1].state)


@torch.no_grad()
def test_nothing_of_a_prompt_stays_beside_what_is_counted():
    (layer,) = asked("snapkv(budget=24, recent=8)")
    layer.update(*torch.randn(2, 1, 2, 61, 16))
    queries = [torch.randn(1, 4, 61, 16) for _ in range(3)]
    known = [weakref.ref(q) for q in queries]
    for q in queries:
        layer.attend(q, PositionMask(), 0.25, None, None)
    del q, queries
    assert [ref() is None for ref in known] == [True] * 3 and layer.state.obs is not None


@torch.no_grad()
def test_a_pass_that_broke_off_does_not_stand_in_the_way(model):
    """What was asked counts; layers behind it have not."""
    inputs, cache = batch(1, 61, (0,)), calidrop.KVCache(model, "snapkv(budget=24, recent=8)")
    decoder = model.model.layers[6]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    hook = decoder.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, **using(cache))
    hook.remove()
    assert cache.nbytes > 0 and [layer.state.seen for layer in cache.layers] == [61] * 3
    assert cache.layers[1].state.store.kept.held.longest == 24 - 8
    out = model(inputs["input_ids"][:, :1], **using(cache))
    assert out.logits.isfinite().all() and cache.get_seq_length() == 62
    again = calidrop.KVCache(model, "snapkv(budget=24, recent=8)")
    hook = decoder.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, **using(again))
    hook.remove()
    same = model(inputs["input_ids"][:, :1], **using(again))  # without a look at its bytes before
    assert [layer.state.seen for layer in again.layers] == [62] * 3 and torch.equal(same.logits, out.logits)
    layer = cache.layers[1]
    with pytest.raises(RuntimeError, match="4 layers share keys and values, and more have asked"):
        layer.attend(torch.randn(1, 6, 1, 16), PositionMask(), 1.0, None, None)
    k, v = torch.randn(2, 1, 2, 1, 16)
    layer.update(k, v)
    layer.attend(torch.randn(1, 6, 1, 16), PositionMask(), 1.0, None, None)
    with pytest.raises(ValueError, match=r"must ask alike.*scale 0.5"):
        layer.attend(torch.randn(1, 6, 1, 16), PositionMask(), 0.5, None, None)


def test_what_needs_keys_of_its_own_says_so(model):
    said = re.escape("needs layers with keys and values of their own; 5 layers of Gemma3nForCausalLM")
    seam.what_needs_plain_layers_says_so(model, said)
    with pytest.raises(ValueError, match="cannot look ahead for 4 layers"):
        calidrop.KVCache(model, "attention_predictor(budget=256, skip=0)")
    inputs = batch(1, 61, (0,))
    cache = calidrop.KVCache(model, RECIPES[0])
    with pytest.raises(ValueError, match="no assisted decoding"):
        generate(model, inputs, cache, prompt_lookup_num_tokens=4, output_logits=False)
    model = shared("gemma4_text", num_kv_shared_layers=8)
    with pytest.raises(ValueError, match="none of its layers has keys and values of its own"):
        calidrop.KVCache(model)


def test_masks_are_cut_to_the_last_queries_alone():
    mask = PositionMask()
    assert mask[:, :, slice(-3, None), :] is mask
    for index in ((slice(None), slice(None), slice(None), slice(0, 5)), (slice(None),) * 3,
                  (slice(None), slice(None), slice(0, 3), slice(None))):  # fmt: skip
        with pytest.raises(TypeError, match="can be cut to the last queries"):
            mask[index]


def test_which_layers_ask_which():
    config = transformers.AutoConfig.for_model("gemma3n_text")
    asked = sharing(config)
    assert asked == {18: 13, 19: 4} and list(layer_kinds(config)) == list(range(20))
    assert sharing(tiny().config) == {}
    model = shared()
    assert [(layer.index, layer.layers, layer.asking, reach) for layer, reach in layers_of(model)] == [
        (-1, 1, 1, 24), (0, 1, 4, None), (-1, 1, 3, 24)
    ]  # fmt: skip


def test_a_plan_and_an_evaluation(model):
    recipes = ["full", "snapkv(budget=64)+int4", "snapkv(budget=64)+calidrop", "h2o(budget=64)"]
    advice = plan(model, context=512, memory="1GiB", recipes=recipes)
    seam.plans_are_what_is_held(model, advice)
    for name in ("snapkv(budget=24, recent=8)+calidrop", "full"):
        seam.an_evaluation_goes_back(model, name)


def test_gradients_are_refused(model):
    """Also those of a first prompt: layers that share ask what another has stored."""
    out = model(**batch(pads=(0, 0)), **using(calidrop.KVCache(model))).logits
    with pytest.raises(RuntimeError, match="no gradients go through"):
        out.sum().backward()
