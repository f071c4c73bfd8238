"""Masks that others make: an outer model, another cache, the user."""

import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from calidrop import KVCache, masks
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


def causal(n, hidden, dtype=torch.float32):
    return torch.full((1, 1, n, n), hidden, dtype=dtype).triu(1)


@pytest.fixture(scope="module")
def models():
    """(under ours, under sdpa)"""
    ours, sdpa = tiny(), tiny()
    sdpa.set_attn_implementation("sdpa")
    KVCache(ours)
    return ours, sdpa


def said(model, ids, mask, cache):
    return model(ids, attention_mask=mask, **using(cache)).logits


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4])
@torch.no_grad()
def test_an_additive_mask_hides_what_is_far_below_zero(models, hidden):
    ours, sdpa = models
    ids, mask = batch(2, 40, (0, 0))["input_ids"], causal(40, hidden)
    mask[..., 20:, 3:9] = hidden
    mask = torch.cat([mask, causal(40, hidden)])
    want = said(sdpa, ids, mask, DynamicCache(config=sdpa.config))
    for cache in (KVCache(ours), DynamicCache(config=ours.config)):
        assert worst(want, said(ours, ids, mask, cache)) < 2e-4
    softcapped = tiny("gemma2", sliding_window=64)
    got = [said(softcapped, ids, m, KVCache(softcapped)) for m in (mask, mask == 0)]
    got.append(said(softcapped, ids, mask, DynamicCache(config=softcapped.config)))
    softcapped.set_attn_implementation("eager")
    want = said(softcapped, ids, mask, DynamicCache(config=softcapped.config))
    assert max(worst(want, x) for x in got) < 2e-4


@torch.no_grad()
def test_biases_and_masks_per_head_are_refused_or_honoured(models):
    ours, sdpa = models
    ids = batch(1, 40, (0,))["input_ids"]
    at = torch.arange(40)
    biased = causal(40, float("-inf")) - 0.5 * (at[:, None] - at).abs()
    of_heads = causal(40, float("-inf")).repeat(1, 6, 1, 1)
    of_heads[:, 3, 10:, :5] = float("-inf")
    for mask, why in (
        (biased, r"adds -\d+(\.5)? to a score, expected 0 .* or -1000 and less"),
        (causal(40, -100.0), "adds -100 to a score, expected 0"),
        (of_heads, r"shape \[1, 6, 40, 40\], expected \[1, 1, 40, 40\]"),
        (causal(40, float("-inf"))[..., :30], r"shape \[1, 1, 40, 30\], expected \[1, 1, 40, 40\]"),
        (causal(40, 1, torch.long), "got a mask of torch.int64, expected bool or floating point"),
    ):
        with pytest.raises(ValueError, match=why):
            said(ours, ids, mask, KVCache(ours))
    for mask in (biased, of_heads):  # another cache: sdpa takes both
        want = said(sdpa, ids, mask, DynamicCache(config=sdpa.config))
        assert worst(want, said(ours, ids, mask, DynamicCache(config=ours.config))) < 2e-4


@torch.no_grad()
def test_an_additive_mask_is_read_once_per_forward_call(models, monkeypatch):
    ours, _ = models
    ids, mask, read = batch(1, 40, (0,))["input_ids"], causal(40, -1e9), []
    shown = masks._shown
    monkeypatch.setattr(masks, "_shown", lambda mask: read.append(mask) or shown(mask))
    said(ours, ids, mask, KVCache(ours))
    assert len(read) == 1
    mask[..., 20:, 3:9] = -1e9  # in place
    got = said(ours, ids, mask, KVCache(ours))
    assert len(read) == 2
    assert worst(got, said(ours, ids, mask == 0, KVCache(ours))) < 1e-6
    read.clear()
    del mask
    assert not masks._read  # nothing of it stays


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("new", [1, 9])
@torch.no_grad()
def test_a_mask_that_changes_its_mind_about_cached_columns(family, new):
    model, ids = tiny(family), batch(2, 60, (0, 0))["input_ids"]
    plain = torch.ones(2, 60, dtype=torch.long)
    holes = plain.clone()
    holes[1, 5:20] = 0

    def second(first, then, between=False):
        """Logits behind 40 columns, of which `first` said something and `then` says something."""
        cache = KVCache(model, "h2o(budget=30)")
        model(ids[:, :40], attention_mask=None if first is None else first[:, :40], **using(cache))
        if between:  # what came meanwhile without a mask is real
            model(ids[:, 40:45], **using(cache))
        at = cache.get_seq_length()
        model(ids[:, at : at + new], attention_mask=then[:, : at + new], **using(cache))
        return model(ids[:, at + new : at + new + 1], attention_mask=then[:, : at + new + 1], **using(cache)).logits

    hidden, shown = "got 0 in column 5 of row 1, expected 1", "got 1 in column 5 of row 1, expected 0"
    for first, then, why in ((plain, holes, hidden), (None, holes, hidden), (holes, plain, shown)):
        for between in (False, True):
            with pytest.raises(ValueError, match=why):
                second(first, then, between)
    late = plain.clone()
    late[0, 42] = 0
    with pytest.raises(ValueError, match="got 0 in column 42 of row 0, expected 1"):
        second(plain, late, between=True)
    for mask in (plain, holes, holes.bool(), late):  # which hides a column before it comes
        assert second(mask, mask).isfinite().all()
    second(None, plain)
    short = KVCache(model)
    model(ids[:, :40], attention_mask=plain[:, :40], **using(short))
    model(ids[:, 40:41], attention_mask=plain[:, :1], **using(short))


@torch.no_grad()
def test_a_mask_that_is_written_into(models):
    ours, _ = models
    ids, mask, cache = batch(1, 60, (0,))["input_ids"], torch.ones(1, 60, dtype=torch.bool), KVCache(ours)
    mask[0, :3] = False
    ours(ids[:, :40], attention_mask=mask[:, :40], **using(cache))
    before = cache.nbytes
    mask[0, :5] = False
    for _ in range(2):  # it stays as it was
        with pytest.raises(ValueError, match="got 0 in column 3 of row 0, expected 1"):
            ours(ids[:, 40:41], attention_mask=mask[:, :41], **using(cache))
        assert (cache.get_seq_length(), cache.nbytes) == (40, before)
    mask[0, 3:5] = True
    ours(ids[:, 40:41], attention_mask=mask[:, :41], **using(cache))


@torch.no_grad()
def test_masks_are_compared_once_per_step_and_only_with_pads(models, monkeypatch):
    ours, _ = models
    compared, compare = [], masks._compare
    monkeypatch.setattr(masks, "_compare", lambda *args: compared.append(args) or compare(*args))
    generate(ours, batch(2, 40, (0, 0)), KVCache(ours), new=8)
    assert not compared
    generate(ours, batch(2, 40, (0, 9)), KVCache(ours), new=8)
    assert len(compared) == 7


@torch.no_grad()
def test_models_without_a_cache_can_be_traced_and_exported(models):
    """What holds for the pads of the example is no fact."""
    ours, theirs = models
    plain, padded = batch(pads=(0, 0)), batch(pads=(0, 13))
    real = padded["attention_mask"].bool()
    want = theirs(**padded, use_cache=False).logits[real]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' code
        traced = torch.jit.trace(Logits(), tuple(plain.values()), check_trace=False)
        exported = torch.export.export(ours, (), {**plain, "use_cache": False}, strict=False).module()
    assert worst(traced(*padded.values())[real], want) < 1e-4
    assert worst(exported(**padded, use_cache=False).logits[real], want) < 1e-4
