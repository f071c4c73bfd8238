"""Multi-head latent attention: DeepSeek, GLM-4.7-Flash, Mistral 4, and their kin."""

import copy
import pickle
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, DynamicCache

import calidrop
import seam
from calidrop import mla, ops
from calidrop.attention import Queries, attend
from calidrop.cache import layers_of
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.mla import LatentKV, Up, latent_modules
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.planning import plan
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.state import held_bytes
from calidrop.support import HYBRIDS
from calidrop.tokens import Tokens
from helpers import check_holdings, kernels, predictor
from test_properties import EVICTORS, check_bytes, check_tokens, steps
from tiny import COMMON, batch, generate, worst

if tuple(map(int, transformers.__version__.split(".")[:2])) < HYBRIDS:
    pytest.skip("an older transformers", allow_module_level=True)

LATENTS = {
    "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 6, "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 3, "mlp_layer_types": ["dense"] * 3,
}  # fmt: skip
HYBRID = {"num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 4, "first_k_dense_replace": 4,
          "layer_types": ["linear_attention", "full_attention"] * 2,
          "linear_num_heads": 3, "linear_head_dim": 8}  # fmt: skip
FAMILIES = {
    "deepseek_v2": EXPERTS,
    "deepseek_v3": EXPERTS,
    "glm4_moe_lite": EXPERTS,
    "youtu": {},
    "minicpm3": {},
    "longcat_flash": {"n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 0, "expert_ffn_hidden_size": 32,
                      "ffn_hidden_size": 32, "num_layers": 2},
    "axk1": EXPERTS,
    "mistral4": EXPERTS,
    "kimi_linear": EXPERTS | HYBRID,
    "bailing_hybrid": EXPERTS | HYBRID,
}  # fmt: skip
HERE = [name for name in FAMILIES if name in CONFIG_MAPPING]  # some are younger than others
RECIPES = [
    "snapkv(budget=24, recent=8, every=8)",
    "adakv(budget=24, recent=8)+calidrop(recompute=0.3)",
    "int8(residual=16)",
    "h2o(budget=20)+int4",
]
ALL = [
    *(e for e in EVICTORS if "judge_q" not in e and "expected_attention" not in e),
    *("int8", "int4", "int4(rotate=False, residual=3)", "fp8(residual=5)"),
    *(f"snapkv(budget=13, recent=5, every=4)+{s}" for s in ("int8", "int4", "fp8")),
    *(f"h2o(budget=12, every=4)+{s}+calidrop(recompute=0.3)" for s in ("int8", "fp8")),
    *(f"h2o(budget=12, every=4)+calidrop({r})" for r in ("recompute=2", "recompute=0.3, late=1", "summary=3")),
    "tova(budget=12, every=3)+calidrop(offload=False, summary=3)",
    *(predictor(n) + s for n in (24, 999) for s in ("", "+int8")),
]


def made(family: str = "deepseek_v3", **changes) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **LATENTS, **FAMILIES[family], **changes})
    torch.manual_seed(1)
    if family == "mistral4":  # which no auto class makes by itself
        return transformers.Mistral4ForCausalLM(config).float().eval()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return made()


def test_enough_families_are_there():
    assert {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"} <= set(HERE)


@pytest.mark.parametrize("family", HERE)
def test_full_equals_dynamic_cache(family):
    model, inputs = made(family), batch()
    model.set_attn_implementation("sdpa")
    theirs, ours = DynamicCache(config=model.config), calidrop.KVCache(model)
    tokens, logits = generate(model, inputs, theirs)
    got, our_logits = generate(model, inputs, ours)
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, got)
    plain, plain_logits = generate(model, inputs, DynamicCache(config=model.config))  # under our attention
    assert worst(logits, plain_logits) < 2e-4 and torch.equal(tokens, plain)
    assert all(isinstance(layer, LatentKV) for layer in ours.layers_here)
    assert ours.full_nbytes == held_bytes([vars(layer) for layer in theirs.layers])
    rows = sum(held_bytes(layer.state.window.k) for layer in ours.layers_here)
    assert (
        rows
        >= sum(layer.state.window.k.value.nbytes for layer in ours.layers_here)
        == len(ours.layers_here)
        * (
            2 * 84 * 32 * 4  # a latent of 24 and a key of 8 per token, and no values
        )
    )
    assert sum(held_bytes(layer.state.window.v) for layer in ours.layers_here) == 0


@pytest.mark.parametrize("every", [8, 128])
@pytest.mark.parametrize("family", HERE)
def test_whatever_is_dropped_answers_when_it_is_asked(family, every):
    model, inputs = made(family), batch()
    cache = calidrop.KVCache(model, f"snapkv(budget=24, recent=8, every={every})+calidrop(recompute=2)")
    tokens, logits = generate(model, inputs, cache)
    want, full_logits = generate(model, inputs, calidrop.KVCache(model))
    assert torch.equal(tokens, want) and worst(logits, full_logits) < 2e-4  # recomputing always is full attention
    assert cache.recompute_rate == 1
    latents = sum(layer.state.store.rest.log.segments[0].data["k"].nbytes for layer in cache.layers_here)
    assert latents <= cache.host_nbytes < 1.2 * latents or every == 8
    never = calidrop.KVCache(model, f"snapkv(budget=24, recent=8, every={every})+calidrop(recompute=-2, order=0)")
    _, other = generate(model, inputs, never)
    assert worst(other, full_logits) > 1e-2 and never.recompute_rate == 0


def pair(recipe: str, group: int = 6, D: int = 32):
    """A layer whose values are its keys, and one that is given them twice."""
    how = parse(recipe)
    return [LayerKV(lambda n=n: how.plan(Layer(1, 3, group, 1, D, None, HeadGroup(), n))) for n in (0, -1)]


@pytest.mark.parametrize("wish", ["torch", ""])
@pytest.mark.parametrize("recipe", ALL)
@torch.no_grad()
def test_values_that_are_keys_are_as_values_of_their_own(recipe, wish, monkeypatch):
    """Prompts and steps: the same answers and the same tokens, in half the bytes."""
    torch.manual_seed(2)
    ours, twice = pair(recipe)
    pads = torch.ones(2, 200, dtype=torch.bool)
    pads[1, :10] = False
    seen = 0
    with kernels(monkeypatch, wish):
        for T in steps((37, 23)):
            k, q = torch.randn(2, 1, T, 32), torch.randn(2, 6, T, 32)
            mask = PositionMask(pads[:, : seen + T], new_pads=seen == 0)
            ours.update(k, k[..., :0])
            twice.update(k, k.clone())
            got, want = (layer.attend(q, mask, 0.2, None, None) for layer in (ours, twice))
            assert got.shape == q.shape
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            seen += T
            check_tokens(ours, mask.pads)
            check_bytes(ours)
            check_holdings(ours, mask.pads)
            for x, y in zip(ours.state.store.tokens(), twice.state.store.tokens(), strict=True):
                assert torch.equal(x.pos, y.pos) and torch.equal(x.k, y.k) and torch.equal(x.values, y.v)
                assert x.v.shape[-1] == 0
    assert ours.state.store.recomputed() == twice.state.store.recomputed()
    if "summary" not in recipe and "calidrop" in recipe:
        (m,), (n,) = ours.state.store.rest.memories, twice.state.store.rest.memories
        assert m.answer.o is m.answer.mean_k and n.answer.o is not n.answer.mean_k
        ours.state.take_rows(torch.tensor([1, 0]))
        assert m.answer.o is m.answer.mean_k
    k, v = twice.state.window.k, twice.state.window.v
    assert held_bytes(k) == held_bytes(v)
    spared = sum(held_bytes(x.state, host) for host in (False, True) for x in (twice,)) - sum(
        held_bytes(ours.state, host) for host in (False, True)
    )
    assert spared >= held_bytes(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("D", "group"), [(576, 16), (576, 128), (288, 40), (560, 3)])
@torch.no_grad()
def test_the_kernel_reads_latents_of_real_sizes(D, group, T, dtype):
    torch.manual_seed(5)
    k = torch.randn(2, 1, 301, D).to(dtype)
    q = torch.randn(2, group, T, D).to(dtype)
    pos = torch.arange(301, dtype=torch.int32).expand(2, 1, 301).clone()
    pos[1, :, :7] = -1
    qs = Queries(q, torch.full((2, T), 400), D**-0.5)
    part = ops.piece(Tokens(k, k[..., :0], pos))
    backend = ops.pick(qs, [part])
    assert backend.name == "the kernel for CPUs" and part.value_dim == D
    for x, y in zip(backend.decode(qs, [part]), attend(qs, k, k, pos), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "kimi_linear"])
def test_padded_row_equals_row_alone(family, recipe, monkeypatch):
    if family not in HERE:
        pytest.skip("a transformers without it")
    seam.padded_rows_are_as_alone(made(family), recipe, 5e-3 if "int" in recipe else 5e-4, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_kernel_answers_as_torch_does(model, recipe, monkeypatch):
    inputs, found = batch(), []
    for wish in ("torch", ""):
        with kernels(monkeypatch, wish):
            cache = calidrop.KVCache(model, recipe)
            found.append(generate(model, inputs, cache)[1])
            assert ("torch" in cache.describe().splitlines()[1]) == bool(wish)
    assert 0 < worst(*found) < (5e-2 if "int" in recipe else 1e-3)  # codes may flip


@torch.no_grad()
def test_column_sums_are_those_of_all_heads(monkeypatch):
    """Where a kernel finds them beside a prompt's answers, and where they are found afterwards."""
    model, found = made(qk_nope_head_dim=24, v_head_dim=32), []
    inputs = batch(2, 61, (0, 13))
    for wish in ("torch", ""):
        told, both = [], ops.prompt_with_mass
        with kernels(monkeypatch, wish), monkeypatch.context() as patch:
            patch.setattr(ops, "prompt_with_mass", lambda *x, both=both, told=told: told.append(both(*x)) or told[-1])
            cache = calidrop.KVCache(model, "h2o(budget=20)", eager=True)
            model(**inputs, **using(cache))
        assert len(told) == 3 and all((mass is None) == bool(wish) for _, mass in told)
        found.append([layer.state.store.kept.tokens()[0] for layer in cache.layers])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x.pos, y.pos) and x.stats.keys() == y.stats.keys() != set()
        for name, value in x.stats.items():
            torch.testing.assert_close(value, y.stats[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_beams_score_as_the_same_tokens_one_by_one(model, recipe):
    seam.beams_score_as_their_tokens(model, recipe)


@pytest.mark.parametrize("recipe", ["full", *RECIPES])
def test_chunks_and_a_second_turn(model, recipe):
    seam.chunks_are_as_one_prompt(model, recipe, 5e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_speculation_gives_what_plain_decoding_gives(model, recipe):
    seam.speculation_is_plain_decoding(model, recipe)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("deepseek_v3", r) for r in ("full", RECIPES[0], RECIPES[3], "snapkv(budget=24, recent=8)+calidrop(late=1)")]
    + [("kimi_linear", RECIPES[0]), ("minicpm3", "snapkv(budget=24, recent=8)+calidrop(late=1)")],
)
def test_recorded_steps(family, recipe, monkeypatch):
    if family not in HERE:
        pytest.skip("a transformers without it")
    seam.recorded_steps_are_those_from_python(made(family), recipe, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, as the compiler is imported
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_compiled_steps(family):
    if family not in HERE:
        pytest.skip("a transformers without it")
    seam.compiled_steps_are_those_from_python(made(family), RECIPES[:2])


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_rows_are_repeated_chosen_and_forgotten(model, recipe):
    seam.rows_are_repeated_chosen_and_forgotten(model, recipe)


def test_what_does_not_work_on_latents_says_so(model):
    for part in ("kivi(bits=4, group=8)", "think", "mixkvq", "decoquant", "ott"):
        with pytest.raises(ValueError, match=f"{part[:4]}.* does not work on latents"):
            calidrop.KVCache(model, part)
    with pytest.raises(ValueError, match=r"mikv.* does not work on latents"):
        calidrop.KVCache(model, "h2o(budget=20)+mikv(bits=2)")
    with pytest.raises(ValueError, match="expected_attention"):
        calidrop.KVCache(model, "expected_attention(budget=20)")
    said = re.escape("DeepseekV3ForCausalLM (deepseek_v3) caches latents")
    seam.what_needs_plain_layers_says_so(model, said)


def test_attention_that_is_made_otherwise_is_refused():
    model = made()
    module = model.model.layers[1].self_attn

    class Other(type(module)):
        def expand_kv(self, kv_nope, k_rot):
            k, v = super().expand_kv(kv_nope, k_rot)
            return k, v * 1.1

    module.__class__ = Other
    with pytest.raises(ValueError, match="something else than kv_b_proj makes of latents"):
        calidrop.KVCache(model)
    model = made()
    proj = model.model.layers[1].self_attn.kv_b_proj
    proj.bias = nn.Parameter(torch.zeros(proj.out_features))
    with pytest.raises(ValueError, match="kv_b_proj has a bias"):
        calidrop.KVCache(model)
    model = made()
    model.model.layers[2].self_attn.kv_b_proj = nn.Sequential(model.model.layers[2].self_attn.kv_b_proj)
    with pytest.raises(ValueError, match="kv_b_proj is a Sequential without plain weights"):
        calidrop.KVCache(model)
    if "deepseek_v32" in CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model("deepseek_v32", **{**COMMON, **LATENTS, **EXPERTS})
        with pytest.raises(ValueError, match="an indexer of its own"):
            calidrop.KVCache(transformers.AutoModelForCausalLM.from_config(config))


def test_other_attention_and_a_lost_model_are_no_silent_mistakes():
    model, inputs = made(), batch(1, 20, (0,))
    cache = calidrop.KVCache(model)
    generate(model, inputs, cache, new=2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="needs the attention implementation 'calidrop'"):
        model(inputs["input_ids"], **using(cache))
    layer = cache.layers[0]
    layer.update(torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 8))
    proj = model.model.layers[0].self_attn.kv_b_proj
    proj.weight = nn.Parameter(proj.weight.to("meta"))
    with pytest.raises(RuntimeError, match="kv_b_proj are not in memory"):
        layer.attend(torch.randn(1, 6, 1, 24), PositionMask(), 0.2, None, None)
    layer.update(torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 8))
    del model
    with pytest.raises(RuntimeError, match="the model of this cache is gone"):
        layer.attend(torch.randn(1, 6, 1, 24), PositionMask(), 0.2, None, None)


def test_models_can_be_copied_and_kept(model):
    """Nothing of a cache hangs on a module."""
    inputs = batch(1, 30, (0,))
    want, _ = generate(model, inputs, calidrop.KVCache(model), new=4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for module in latent_modules(other).values():
                module.kv_b_proj.weight.mul_(1.5)
        changed, logits = generate(other, inputs, calidrop.KVCache(other), new=4)
        theirs, their_logits = generate(other, inputs, DynamicCache(config=other.config), new=4)
        assert torch.equal(changed, theirs) and worst(logits, their_logits) < 2e-4
    again, _ = generate(model, inputs, calidrop.KVCache(model), new=4)
    assert torch.equal(want, again)
    kind = type(next(iter(latent_modules(model).values())))
    mla.let_through(kind)
    assert not hasattr(kind.expand_kv.original, "original")


def test_queries_that_ask_latents_have_the_products_they_had_with_keys(model):
    module = model.model.layers[0].self_attn
    up, q = Up(module), torch.randn(2, 6, 5, 24)
    z, p = torch.randn(2, 1, 9, 24), torch.randn(2, 1, 9, 8)
    k, v = module.expand_kv(z, p)
    torch.testing.assert_close(
        up.absorbed(q) @ torch.cat([z, p], -1).transpose(-1, -2), q @ k.transpose(-1, -2), atol=1e-4, rtol=1e-4
    )
    w = torch.rand(2, 6, 5, 9)
    torch.testing.assert_close(up.valued(w @ torch.cat([z, p], -1)), w @ v, atol=1e-4, rtol=1e-4)


def test_a_plan_and_an_evaluation(model):
    (layer, reach), *_ = layers_of(model)
    assert (layer.query_heads, layer.kv_heads, layer.head_dim, layer.value_dim, layer.rope, reach) == (
        6, 1, 32, 0, None, None
    )  # fmt: skip
    recipes = ["full", "snapkv(budget=64)+int4", "snapkv(budget=64)+calidrop", "h2o(budget=64)"]
    advice = plan(model, context=512, memory="1GiB", recipes=recipes)
    seam.plans_are_what_is_held(model, advice)
    assert advice.full_bytes == calidrop.planning._full(layers_of(model), 512, 1, torch.float32) == 3 * 512 * 32 * 4
    assert {o.recipe for o in plan(model.config, context=4096, memory="1GiB").options} > {"full", "int4"}
    seam.an_evaluation_goes_back(model, "snapkv(budget=24, recent=8)+calidrop")


def test_gradients_of_a_first_prompt_are_those_without_a_cache():
    model, inputs, grads = made("deepseek_v3"), batch(pads=(0, 0)), []
    for given in ({"use_cache": False}, using(calidrop.KVCache(model))):
        model.zero_grad()
        model(**inputs, **given).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, want in grads[0].items():
        torch.testing.assert_close(grads[1][n], want, rtol=1e-3, atol=1e-4)
