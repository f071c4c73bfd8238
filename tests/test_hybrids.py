"""Models some layers of which have no keys and values: linear attention, convolutions, experts alone."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

import calidrop
import seam
from calidrop import steady, support
from calidrop.eval.subject import fill, together
from calidrop.planning import plan
from calidrop.plugin import using
from calidrop.state import held_bytes
from calidrop.stateful import state_of
from calidrop.support import HYBRIDS, layer_kinds, others, plain, states
from helpers import kernels
from tape import tape
from tiny import COMMON, batch, generate, tiny, worst

if tuple(map(int, transformers.__version__.split(".")[:2])) < HYBRIDS:
    pytest.skip("an older transformers", allow_module_level=True)

KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": KINDS, "num_hidden_layers": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3_next": DELTA | EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA | {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, "head_dim": 8},
    "granitemoehybrid": MAMBA | {"layer_types": KINDS, "shared_intermediate_size": 64, "num_local_experts": 2},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "jamba": EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_hidden_layers": 4, "head_dim": 8,
       "use_mamba_kernels": False},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_d_ssm": 64, "head_dim": 8},
    "zamba2": MAMBA | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
                       "n_mamba_heads": 4, "chunk_size": 16, "use_mem_rope": True, "use_mamba_kernels": False},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "full_attention"],
        "num_hidden_layers": 5, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
        "chunk_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32, "use_mamba_kernels": False,
    },
}  # fmt: skip
RECIPES = [
    "snapkv(budget=24, recent=8, every=8)",
    "adakv(budget=24, recent=8)+calidrop(recompute=0.3)",
    "kivi(bits=4, group=8, residual=16)",
    "h2o(budget=20)+int8",
]


def limit(recipe: str) -> float:
    """Where a linear layer's chunks begin changes its rounding, which may flip a code behind it."""
    return 5e-3 if "int8" in recipe or "kivi" in recipe else 5e-4


def hybrid(family: str, **changes) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return hybrid("qwen3_next")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_equals_dynamic_cache(family):
    model, inputs = hybrid(family), batch()
    model.set_attn_implementation("sdpa")
    tokens, logits = generate(model, inputs, DynamicCache(config=model.config))
    ours, our_logits = generate(model, inputs, calidrop.KVCache(model))
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, ours)
    plain, plain_logits = generate(model, inputs, DynamicCache(config=model.config))  # under our attention
    assert worst(logits, plain_logits) < 2e-4 and torch.equal(tokens, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_keys_are_compressed_and_bytes_are_all_there(family):
    model, inputs = hybrid(family), batch()
    always = calidrop.KVCache(model, "snapkv(budget=24, recent=8)+calidrop(recompute=2)")
    full = calidrop.KVCache(model)
    tokens, logits = generate(model, inputs, always)
    want, full_logits = generate(model, inputs, full)
    assert torch.equal(tokens, want) and worst(logits, full_logits) < 2e-4  # recomputing always is full attention
    plain = DynamicCache(config=model.config)
    generate(model, inputs, plain)
    assert [type(plain.layers[i]) for i in always.others] == [type(x) for x in always.others.values()]
    states = held_bytes([state_of(layer) for layer in plain.layers])
    assert states > 0
    assert full.full_nbytes == always.full_nbytes == held_bytes([vars(layer) for layer in plain.layers])
    keys = held_bytes([(layer.state, layer.told) for layer in always.layers_here])  # pads: one mask for all layers
    assert always.nbytes == states + keys < full.nbytes
    assert sorted([*always.others, *(i for i, x in enumerate(always.layers) if x in always.layers_here)]) == [
        *range(model.config.num_hidden_layers)
    ]
    lines = always.describe().splitlines()[1:]
    assert len(lines) == model.config.num_hidden_layers
    assert ["no keys and values" in line for line in lines] == [i in always.others for i in range(len(lines))]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "nemotron_h"])
def test_padded_row_equals_row_alone(family, recipe, monkeypatch):
    seam.padded_rows_are_as_alone(hybrid(family), recipe, limit(recipe), monkeypatch)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_beams_score_as_the_same_tokens_one_by_one(family, recipe):
    seam.beams_score_as_their_tokens(hybrid(family), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks_and_a_second_turn(model, recipe):
    seam.chunks_are_as_one_prompt(model, recipe, limit(recipe))


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1"])
def test_rows_are_repeated_chosen_and_forgotten(family):
    seam.rows_are_repeated_chosen_and_forgotten(hybrid(family), RECIPES[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps(family, monkeypatch):
    seam.recorded_steps_are_those_from_python(hybrid(family), RECIPES[0], monkeypatch)


@pytest.mark.parametrize("moves", ["states", "rows"])
@torch.no_grad()
def test_recorded_steps_follow_states_elsewhere(model, moves, monkeypatch):
    """What was recorded writes where they were."""
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    inputs, found = batch(), []
    with kernels(monkeypatch, "torch"):
        for graph in (False, True):
            cache = calidrop.KVCache(model, RECIPES[0], graph=graph)
            told = [model(**inputs, **using(cache)).logits[:, -1:]]
            for i in range(12):
                told.append(model(told[-1].argmax(-1), **using(cache)).logits)
                if i == 5 and moves == "states":
                    cache.put_states(cache.states())
                elif i == 5:
                    cache.reorder_cache(torch.tensor([1, 0]))
            found.append(torch.stack(told))
    assert worst(*found) < 1e-4 and cache.steps.steady.recorded == 2


@torch.no_grad()
def test_a_step_that_turns_out_not_to_repeat_is_run_once(model, monkeypatch):
    """Its states go back to where they were before it is run from Python."""

    def once(fn):
        with monkeypatch.context() as patch:
            patch.setattr(steady.Steady, "_put_back", lambda *_: "no shape today")
            return fn(), None

    monkeypatch.setitem(steady.RECORDERS, "cpu", once)
    inputs, found = batch(), []
    for graph in (False, True):
        cache = calidrop.KVCache(model, RECIPES[0], graph=graph)
        found.append(generate(model, inputs, cache, 12)[1])
    assert worst(*found) < 1e-4 and "no shape today" in cache.describe()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, as the compiler is imported
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_compiled_steps(family):
    seam.compiled_steps_are_those_from_python(hybrid(family), RECIPES[:2])


def test_full_goes_on_as_a_dynamic_cache_does(model):
    inputs, plain, ours = batch(1, 61, (0,)), DynamicCache(config=model.config), calidrop.KVCache(model)
    for cache in (plain, ours):
        generate(model, inputs, cache, new=5)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7, 8, 9, 10, 11]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (a, x), (b, y) = (generate(model, turn, cache, new=8) for cache in (plain, ours))
    assert torch.equal(a, b) and worst(x, y) < 2e-4


def test_layers_are_counted_among_those_with_keys(model):
    cache = calidrop.KVCache(model, "pyramidkv(budget=24, recent=8, beta=4)")
    generate(model, batch(1, 61, (0,)), cache, new=2)
    held = [layer.state.store.kept.held.longest for layer in cache.layers_here]
    assert len(held) == 2 and held[0] > held[1]


def test_speculation_is_transformers_business():
    """Convolutions can go back; a recurrent state cannot, and transformers says so."""
    motif = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(1, 5)
    inputs, recipe = {"input_ids": motif, "attention_mask": torch.ones_like(motif)}, RECIPES[0]
    model = hybrid("lfm2")
    plain, _ = generate(model, inputs, calidrop.KVCache(model, recipe), new=32)
    got, _ = generate(
        model, inputs, calidrop.KVCache(model, recipe), new=32, prompt_lookup_num_tokens=4, output_logits=False
    )
    assert torch.equal(plain, got)
    model = hybrid("qwen3_next")
    with pytest.raises(ValueError, match="stateful"):
        generate(model, inputs, calidrop.KVCache(model, recipe), prompt_lookup_num_tokens=4, output_logits=False)


def test_what_needs_keys_in_every_layer_says_so(model):
    said = r"qwen3_next\) has layers of kind linear_attention"
    seam.what_needs_plain_layers_says_so(model, said)
    assert not others(tiny().config)


def test_a_plan_says_what_it_does_not_count(model):
    advice = plan(model.config, context=512, memory="1GiB", recipes=["full", "snapkv(budget=64)+int4"])
    assert any("2 layers keep no keys and values" in note for note in advice.notes)
    full = next(x for x in advice.options if x.recipe == "full")
    assert full.device_bytes > 2 * 512 * 2 * 2 * 16 * 2


def test_what_layers_of_each_kind_hold():
    config = SimpleNamespace(layer_types=["hybrid_sliding", "conv", "hybrid", "sliding_attention"], sliding_window=8)
    assert layer_kinds(config) == {0: 8, 2: None, 3: 8}
    assert states(config) == {0: 1, 2: 1} and not plain(config)


def test_older_versions_of_transformers_are_refused(model, monkeypatch):
    monkeypatch.setattr(support.transformers, "__version__", "5.16.1")  # there may be several modules of that name
    with pytest.raises(ValueError, match=r"need transformers 5\.17, got 5\.16\.1"):
        calidrop.KVCache(model)
    calidrop.KVCache(tiny())


def test_models_without_any_keys_are_refused():
    config = transformers.AutoConfig.for_model("bamba", **{**COMMON, **FAMILIES["bamba"], "attn_layer_indices": []})
    with pytest.raises(ValueError, match=r"bamba.*none of its layers has keys and values"):
        calidrop.KVCache(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_a_cache_under_examination_goes_back(family):
    """As `calidrop eval` asks it: the same tokens twice, from what was saved."""
    model, ids = hybrid(family), batch(1, 61, (0,))["input_ids"][0]
    for name in ("full", RECIPES[0]):
        (subject,) = fill(model, [name], ids)
        saved = subject.saved()
        with torch.no_grad():
            once = subject.feed(ids[:9])
            for _ in range(2):
                subject.restore(saved)
                assert torch.equal(once, subject.feed(ids[:9]))
            if name == "full":
                plain = DynamicCache(config=model.config)
                model(ids[None], **using(plain))
                want = torch.cat([model(x.view(1, 1), **using(plain)).logits[:, -1] for x in ids[:9]])
                assert worst(once, want) < 2e-4
    assert together(model, 8) == 1 and together(tiny(), 8) == 8
