"""Whose rotary frequencies are taken, and how keys are rotated by them: against keys that models cached."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from calidrop import KVCache
from calidrop.plugin import using
from calidrop.rope import Rope
from calidrop.skeleton import skeleton
from calidrop.support import check_model, layer_kinds, ropes_of
from calidrop.train._run import Run
from helpers import feed, layer_of, positions
from tiny import COMMON, batch, generate, row, tiny

MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
NARROW = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}, "head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 3}
HALF_SPLIT = {
    "qwen2": {},
    "phi3": {"head_dim": 8},
    "phi": {},
    "gpt_neox": {},
    "gpt_oss": {**FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "qwen3_vl_text": MROPE,
    "qwen2_vl_text": NARROW,
}
INTERLEAVED = {
    "cohere": {},
    "glm": {},
    "glm4": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "glm4v_text": NARROW,
    "glm_ocr_text": MROPE,
    "helium": {"head_dim": 8},
}
BACKWARDS = {"nanochat": {}}
PARTLY = {  # with the layers that see all and do not rotate
    "smollm3": ({"num_hidden_layers": 4}, [3]),
    "exaone4": ({"sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 4}, [1, 3]),
    "cohere2_moe": ({**FULL, "num_experts": 4, "num_experts_per_tok": 2}, [0, 1, 2]),
}
KNOWN = {**HALF_SPLIT, **INTERLEAVED, **BACKWARDS, **{name: changes for name, (changes, _) in PARTLY.items()}}


def model_of(family: str, changes: dict) -> torch.nn.Module:
    try:
        config = transformers.AutoConfig.for_model(family, **{**COMMON, **changes})
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(1)
    kind = transformers.AutoModel if family.endswith(("vl_text", "4v_text", "ocr_text")) else None
    return (kind or transformers.AutoModelForCausalLM).from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def check_rotations(model: torch.nn.Module) -> dict[int, Rope]:
    """Every layer that sees all rotates as is said: keys of one token repeated, rotated back, are those at 0."""
    ropes, cache = ropes_of(model), DynamicCache(config=model.config)
    model(torch.full((1, 9), 5), **using(cache))
    whole = [i for i, reach in layer_kinds(check_model(model)).items() if reach is None]
    assert whole == list(ropes)
    for i in whole[:1] if model.config.model_type == "gpt_oss" else whole:  # behind sinks, places differ
        keys = cache.layers[i].keys[0]
        back = ropes[i].rotate(keys, -torch.arange(9))
        torch.testing.assert_close(back, keys[:, :1].expand_as(keys), rtol=1e-3, atol=1e-3)
    return ropes


@pytest.mark.parametrize("family", KNOWN)
def test_cached_keys_rotate_back(family):
    for i, rope in check_rotations(model_of(family, KNOWN[family])).items():
        turns = family not in PARTLY or i not in PARTLY[family][1]
        assert bool(len(rope.inv_freq)) == turns
        assert rope.interleaved == (turns and family in INTERLEAVED)
        assert bool((rope.inv_freq < 0).any()) == (family in BACKWARDS)


def test_models_whose_tokens_know_their_places_need_not_rotate():
    model = model_of("gpt2", {"n_positions": 512})
    assert [len(rope.inv_freq) for rope in ropes_of(model).values()] == [0, 0, 0]
    cache = KVCache(model, "expected_attention(budget=20)")
    generate(model, batch(), cache, new=3)
    assert "kept: exact 20" in cache.describe()


def test_layers_that_do_not_rotate_keep_what_will_be_asked():
    """In such a layer future queries are as past ones, wherever they stand."""
    model = model_of("smollm3", PARTLY["smollm3"][0])
    cache = KVCache(model, "expected_attention(budget=20, sinks=2)")
    inputs = batch()
    with torch.no_grad():
        model(**inputs, **using(cache))
    cache.compress()
    scores = [layer.state.store.score for layer in cache.layers_here]
    assert [len(score.rope.inv_freq) for score in scores] == [8, 8, 8, 0]
    rows = [row(inputs, i) for i in range(2)]
    alone = [KVCache(model, "expected_attention(budget=20, sinks=2)") for _ in rows]
    for each, own in zip(rows, alone, strict=True):
        with torch.no_grad():
            model(**each, **using(own))
    for i, layer in enumerate(cache.layers_here):
        held = positions(layer)
        for n, own in enumerate(alone):
            pads = 61 - rows[n]["input_ids"].shape[1]
            own.compress()
            assert [[p - pads for p in head] for head in held[n]] == positions(own.layers_here[i])[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_do(interleaved):
    freq = torch.tensor([1.0, 0.3, 0.01])
    x, pos = torch.randn(2, 4, 8), torch.tensor([0, 1, 7, 100])
    pairs = x[..., :6].reshape(2, 4, 3, 2) if interleaved else x[..., :6].reshape(2, 4, 2, 3).transpose(2, 3)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(4, 3), pos[:, None] * freq)
    want = torch.view_as_real(turned)
    want = want.flatten(2) if interleaved else want.transpose(2, 3).flatten(2)
    torch.testing.assert_close(Rope(freq, interleaved).rotate(x, pos), torch.cat([want, x[..., 6:]], -1))


def test_expected_attention_keeps_the_same_whatever_the_layout():
    """A layer's keys and queries laid out for the one and for the other."""
    torch.manual_seed(0)
    freq, at = 0.3 ** torch.arange(8), torch.arange(16).view(2, 8).T.flatten()
    q, k, v = torch.randn(1, 4, 60, 16), torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16)
    kept = []
    for interleaved in (False, True):
        asked = (q[..., at], k[..., at], v) if interleaved else (q, k, v)
        kv = layer_of("expected_attention(budget=20, future=16)", asked, rope=Rope(freq, interleaved))
        feed(kv, asked)
        kv.settle()
        kept.append(positions(kv))
    assert kept[0] == kept[1]


def test_bases_are_for_half_split_keys():
    model = model_of("cohere", {})
    with pytest.raises(ValueError, match="does not rotate all keys alike, in the half-split layout"):
        Run(model, torch.zeros(1, 8, dtype=torch.long))


def test_frequencies_are_those_of_the_text_model_not_of_the_vision_tower():
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen3VLConfig(
        text_config={**COMMON, **MROPE},
        vision_config={**vision, "intermediate_size": 48, "deepstack_visual_indexes": [0]},
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    own = model.model.language_model.rotary_emb.inv_freq
    assert sum(name.endswith("rotary_pos_emb.inv_freq") for name, _ in model.named_buffers()) == 1  # the tower's
    ropes = ropes_of(model)
    assert len(ropes) == 3 and all(torch.equal(rope.inv_freq, own) for rope in ropes.values())


def test_frequencies_that_do_not_fit_the_heads_are_refused():
    model = tiny()
    model.model.rotary_emb.inv_freq = torch.ones(9)  # heads have 16 channels
    assert ropes_of(model) == {}


def test_a_vocabulary_may_be_small():
    assert len(ropes_of(tiny(vocab_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0))) == 3


def test_rotations_are_known_without_weights():
    for family in ("llama", "cohere", "nanochat"):
        config = transformers.AutoConfig.for_model(family, **COMMON)
        ropes = ropes_of(skeleton(config))
        assert len(ropes) == 3 and all(rope.interleaved == (family == "cohere") for rope in ropes.values()), family


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_of_a_pipeline_knows_the_rotations_of_its_layers(first):
    away = pytest.importorskip("transformers.distributed.pipeline_parallel").PipelineIdentityLayer
    model = model_of("smollm3", {"num_hidden_layers": 4})
    whole = ropes_of(model_of("smollm3", {"num_hidden_layers": 4}))
    for i in (2, 3) if first else (0, 1):
        model.model.layers[i] = away()
    if not first:
        model.model.embed_tokens = away()
    ropes = ropes_of(model)
    for i in (0, 1) if first else (2, 3):
        assert torch.equal(ropes[i].inv_freq, whole[i].inv_freq)


def test_trying_leaves_dynamic_frequencies_and_random_numbers_alone():
    model = tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=16)
    with torch.no_grad():
        model(torch.full((1, 40), 5))  # longer than it was trained for: frequencies are lower now
    own = model.model.rotary_emb.inv_freq.clone()
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    ropes = ropes_of(model)
    assert torch.equal(torch.rand(1), want)
    assert len(ropes) == 3 and all(torch.equal(rope.inv_freq, own) for rope in ropes.values())
    assert torch.equal(model.model.rotary_emb.inv_freq, own)


def test_a_trial_leaves_modules_in_their_modes_and_shows_nothing_to_hooks_of_others():
    model = tiny().train()
    model.model.layers[1].mlp.eval()
    modes = [m.training for m in model.modules()]
    assert len(ropes_of(model)) == 3
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_that_cannot_be_tried_are_refused(monkeypatch):
    model = tiny()

    def fails(*args, **kwargs):
        raise RuntimeError("another signature")

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(ValueError, match="expected_attention does not know how llama rotates keys in layer 0"):
        KVCache(model, "expected_attention(budget=32)")
    KVCache(model, "snapkv(budget=64)")
