"""Masks that others make: an outer model, another cache, the user."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from calidrop import KVCache
from calidrop.plugin import using
from tiny import COMMON, batch, generate, tiny, worst


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])  # two without sdpa: softcap, sinks
@torch.no_grad()
def test_a_static_cache_after_ours(family):
    """Its columns are filled from the front; the sliding ones wrap."""
    model = tiny(family)
    model.set_attn_implementation("eager" if family in ("gemma2", "gpt_oss") else "sdpa")

    def steps(inputs, **changes):
        """Logits of a prompt, a block and single tokens, and what `generate` says."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        at, cache = (mask.cumsum(1) - 1).clamp(min=0), StaticCache(config=model.config, max_cache_len=80)
        out = []
        for a, b in ((0, 18), (18, 30), *((i, i + 1) for i in range(30, 40))):
            given = changes or {"attention_mask": mask[:, :b], "position_ids": at[:, a:b]}
            out.append(model(ids[:, a:b], **given, **using(cache)).logits)
        real = mask[:, :, None].bool() if not changes else mask.new_ones(1, dtype=torch.bool)
        return torch.cat(out, 1).masked_fill(~real, 0), *generate(model, inputs, cache_implementation="static")

    for inputs, changes in ((batch(2, 40, (0, 9)), {}), (batch(1, 40, (0,)), {"attention_mask": None})):
        model.set_attn_implementation("eager" if family in ("gemma2", "gpt_oss") else "sdpa")
        want = steps(inputs, **changes)
        KVCache(model)
        assert model.config._attn_implementation == "calidrop"
        got = steps(inputs, **changes)
        assert worst(want[0], got[0]) < 2e-4
        assert worst(want[2], got[2]) < 2e-4
        assert torch.equal(want[1], got[1])
