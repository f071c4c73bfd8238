"""Whose rotary frequencies are taken, and whether keys are rotated as `Rope` does: against keys that models cached."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from calidrop import KVCache
from calidrop.plugin import using
from calidrop.skeleton import skeleton
from calidrop.support import rope_of
from tiny import COMMON, tiny

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
OTHERWISE = {
    "cohere": {},
    "cohere2_moe": {**FULL, "num_experts": 4, "num_experts_per_tok": 2},
    "glm": {},
    "glm4": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "glm4v_text": NARROW,
    "glm_ocr_text": MROPE,
    "helium": {"head_dim": 8},
    "nanochat": {},  # half-split, but turned the other way
    "smollm3": {},  # every fourth layer does not rotate
    "exaone4": {"sliding_window": 24, "sliding_window_pattern": 2},  # nor do those that see all
}


def model_of(family: str, changes: dict) -> torch.nn.Module:
    try:
        config = transformers.AutoConfig.for_model(family, **{**COMMON, **changes})
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(1)
    kind = transformers.AutoModel if family.endswith(("vl_text", "4v_text", "ocr_text")) else None
    return (kind or transformers.AutoModelForCausalLM).from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def unrotated(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The keys of the first layer for one token repeated, rotated back to position 0, and that at 0: [H,N,D] each."""
    rope, cache = rope_of(model), DynamicCache(config=model.config)
    model(torch.full((1, 9), 5), **using(cache))
    keys = cache.layers[0].keys[0]
    return None if rope is None else (rope.rotate(keys, -torch.arange(9)), keys[:, :1].expand_as(keys))


@pytest.mark.parametrize("family", HALF_SPLIT)
def test_cached_keys_of_half_split_models_rotate_back(family):
    found = unrotated(model_of(family, HALF_SPLIT[family]))
    assert found is not None
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", OTHERWISE)
def test_models_that_rotate_otherwise_are_refused_by_name(family):
    model = model_of(family, OTHERWISE[family])
    assert unrotated(model) is None
    with pytest.raises(ValueError, match=f"half-split rotary positions, which {family} does not have in every layer"):
        KVCache(model, "expected_attention(budget=32)")


def test_frequencies_are_those_of_the_text_model_not_of_the_vision_tower():
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen3VLConfig(
        text_config={**COMMON, **MROPE},
        vision_config={**vision, "intermediate_size": 48, "deepstack_visual_indexes": [0]},
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    own = model.model.language_model.rotary_emb.inv_freq
    assert sum(name.endswith("rotary_pos_emb.inv_freq") for name, _ in model.named_buffers()) == 1  # the tower's
    rope = rope_of(model)
    assert rope is not None
    assert torch.equal(rope.inv_freq, own)


def test_frequencies_that_do_not_fit_the_heads_are_refused():
    model = tiny()
    model.model.rotary_emb.inv_freq = torch.ones(9)  # heads have 16 channels
    assert rope_of(model) is None


def test_rotations_are_known_without_weights():
    for family, known in (("llama", True), ("cohere", False), ("nanochat", False)):
        config = transformers.AutoConfig.for_model(family, **COMMON)
        assert (rope_of(skeleton(config)) is not None) == known, family


def test_trying_leaves_dynamic_frequencies_and_random_numbers_alone():
    model = tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=16)
    with torch.no_grad():
        model(torch.full((1, 40), 5))  # longer than it was trained for: frequencies are lower now
    own = model.model.rotary_emb.inv_freq.clone()
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    rope = rope_of(model)
    assert rope is not None
    assert torch.equal(torch.rand(1), want)
    assert torch.equal(rope.inv_freq, own)
    assert torch.equal(model.model.rotary_emb.inv_freq, own)
