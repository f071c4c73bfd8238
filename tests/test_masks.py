"""Masks that others make: an outer model, another cache, the user."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from calidrop import KVCache
from tiny import COMMON, batch, generate, worst


def test_an_outer_model_makes_the_mask():
    """PaliGemma: its decoder is handed the mask, of a prefix that sees itself both ways."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.PaliGemmaConfig(
        text_config={**COMMON, "model_type": "gemma"}, vision_config={**vision.to_dict(), "projection_dim": 48},
        image_token_index=90, projection_dim=48, hidden_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model, inputs = transformers.PaliGemmaForConditionalGeneration(config).eval(), batch(2, 60, (0, 13))
    inputs["input_ids"].clamp_(max=80)[:, 20:24] = 90  # the image
    inputs |= {"pixel_values": torch.randn(2, 3, 28, 28), "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    tokens, logits = generate(model, inputs, DynamicCache(config=config.get_text_config(decoder=True)), new=12)
    for recipe in ("full", "h2o(budget=200)"):
        ours, our_logits = generate(model, inputs, KVCache(model, recipe), new=12)
        assert worst(logits, our_logits) < 2e-4
        assert torch.equal(tokens, ours)


def test_a_model_that_looks_into_the_cache_is_refused():
    config = transformers.MllamaTextConfig(
        **{**COMMON, "num_hidden_layers": 2}, cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.MllamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"\(mllama_text_model\) is not supported: .* keys of images"):
        KVCache(model)
    assert model.config._attn_implementation != "calidrop"
