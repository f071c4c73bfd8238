"""The seam to transformers: what generate() can do, it does with our cache, and gives the same."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, masking_utils

import calidrop
from calidrop import ops
from calidrop.cache import layers_of
from calidrop.layer import LayerKV
from calidrop.masks import _sliding
from calidrop.planning import plan
from calidrop.plugin import using
from calidrop.state import held_bytes
from helpers import kernels, predictor
from tiny import COMMON, FAMILIES, batch, generate, row, soft, tiny, worst

SOFT = soft(tiny())

RECIPES = [
    "streaming_llm(budget=20)",
    "h2o(budget=20)",
    "tova(budget=20, every=8)",
    "snapkv(budget=24, recent=8)",
    "snapkv(budget=24, recent=8, every=8)",
    "snapkv(budget=0.4, recent=8)",
    "expected_attention(budget=20)",
    "pyramidkv(budget=24, recent=8)",
    "adakv(budget=24, recent=8)",
    "lazy_eviction(budget=20, window=8, alpha=0.05)",
    "g_kv(budget=24, recent=8, every=8)",
    "g_kv(budget=0.4, recent=8, every=8, history='mean')+int4+calidrop(recompute=0.3)",
    "r_kv(budget=24, every=8)",
    "snapkv(budget=24, recent=8, every=8)+kvcrush+calidrop(recompute=0.3)",
    "kivi(bits=4, group=16, residual=16)",
    "snapkv(budget=40, recent=8)+kivi(bits=4, group=16)",
    "snapkv(budget=24, recent=8)+calidrop(recompute=0.3)",
    "adakv(budget=24, recent=8)+calidrop(order=0, recompute=0.3, apply=0.5)",
    "h2o(budget=20)+calidrop(decide='layer')",
    "h2o(budget=20)+calidrop(offload=False, summary=3)",
    f"judge_q(budget=20, file={SOFT!r})",
    f"judge_q(budget=24, recent=8, file={SOFT!r})+kivi(bits=4, group=16)+calidrop(recompute=0.3)",
    predictor(24, dense=3, skip=1),
    predictor(0.5, dense=4) + "+int4",
]


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_equals_dynamic_cache(family):
    model, inputs = tiny(family), batch()
    reference = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"  # sdpa has neither softcap nor sinks
    model.set_attn_implementation(reference)
    tokens, logits = generate(model, inputs, DynamicCache(config=model.config))
    ours, our_logits = generate(model, inputs, calidrop.KVCache(model))
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, ours)
    # and a plain cache keeps working under our attention implementation
    assert model.config._attn_implementation == "calidrop"
    plain, plain_logits = generate(model, inputs, DynamicCache(config=model.config))
    assert worst(logits, plain_logits) < 2e-4
    assert torch.equal(tokens, plain)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "qwen3"])
def test_compressing_works_on_every_kind_of_layer(family):
    model, inputs = tiny(family), batch()
    cache = calidrop.KVCache(model, "snapkv(budget=24, recent=8)+calidrop(recompute=2)")
    always, logits = generate(model, inputs, cache)
    full, full_logits = generate(model, inputs, calidrop.KVCache(model))
    assert torch.equal(always, full)  # recomputing always is full attention, softcap and sinks included
    assert worst(logits, full_logits) < 2e-4
    for layer in cache.layers:
        columns = layer.reach or 85
        assert held_bytes(layer.state) < (columns + 16) * 2 * 2 * (2 * 16 * 4 + 4) + 2048


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a transformers without Gemma 4")
@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=24, recent=8)+int4", "kivi(bits=4, group=16, residual=16)"])
def test_layers_of_several_shapes(recipe):
    """Gemma 4: layers that see all have other heads than those with a window."""
    shape = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 24,
             "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}  # fmt: skip
    config = AutoConfig.for_model("gemma4_text", **{**COMMON, **shape, "hidden_size_per_layer_input": 8})
    torch.manual_seed(1)
    model, inputs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), batch()
    assert [(x.kv_heads, x.head_dim, reach) for x, reach in layers_of(model)] == [(2, 16, 24), (1, 32, None)] * 2
    cache = calidrop.KVCache(model, recipe)
    tokens, logits = generate(model, inputs, cache)
    if recipe == "full":
        plain = DynamicCache(config=config)
        want, full = generate(model, inputs, plain)
        assert torch.equal(tokens, want) and worst(logits, full) < 2e-4
    else:
        alone, _ = generate(model, row(inputs, 1), calidrop.KVCache(model, recipe))
        assert torch.equal(tokens[1:], alone) and cache.nbytes < cache.full_nbytes
    for unable in (lambda: plan(config, context=512), lambda: calidrop.show(model, None, "text")):
        with pytest.raises(ValueError, match="1 kv heads of 32, 2 kv heads of 16"):
            unable()


@pytest.mark.parametrize("recipe", RECIPES)
def test_padded_row_equals_row_alone(llama, recipe, monkeypatch):
    inputs = batch(3, 61, (0, 13, 50))  # the last one is shorter than the recent window of most recipes
    with kernels(monkeypatch, "torch"):  # one that rounds queries to 16 bits may flip a code of the next layer
        tokens, logits = generate(llama, inputs, calidrop.KVCache(llama, recipe))
        for i in range(3):
            alone, alone_logits = generate(llama, row(inputs, i), calidrop.KVCache(llama, recipe))
            assert worst(logits[i : i + 1], alone_logits) < 2e-4, f"row {i}"
            assert torch.equal(tokens[i : i + 1], alone)


def forced(model, inputs, cache, tokens):
    """Logits of `tokens` [B,n] fed one by one after the prompt: the plain way."""
    n = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = [model(**inputs, position_ids=position[:, :n], **using(cache)).logits[:, -1:]]
    for i in range(tokens.shape[1] - 1):
        out.append(
            model(
                tokens[:, i : i + 1],
                attention_mask=mask[:, : n + i + 1],
                position_ids=position[:, n + i : n + i + 1],
                **using(cache),
            ).logits
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_beams_score_as_the_same_tokens_one_by_one(llama, recipe):
    """Every reorder must carry every piece of state: the score of the best beam is the sum of log-probs that its tokens
    have when they are simply fed in."""
    inputs = batch(2, 45, (0, 9))
    n = inputs["input_ids"].shape[1]
    out = llama.generate(
        **inputs, **using(calidrop.KVCache(llama, recipe)), num_beams=3, max_new_tokens=20, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True, pad_token_id=0,
    )  # fmt: skip
    tokens = out.sequences[:, n:]
    logits = forced(llama, inputs, calidrop.KVCache(llama, recipe), tokens)
    score = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
    assert worst(score, out.sequences_scores) < 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_speculative_decoding_is_plain_decoding(llama, recipe):
    motif = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(1, 5)
    inputs = {"input_ids": motif, "attention_mask": torch.ones_like(motif)}
    plain, _ = generate(llama, inputs, calidrop.KVCache(llama, recipe), new=32)
    cache = calidrop.KVCache(llama, recipe)
    lookup, _ = generate(llama, inputs, cache, new=32, prompt_lookup_num_tokens=4, output_logits=False)
    assert torch.equal(plain, lookup)
    assistant = copy.deepcopy(llama)  # proposes what the full cache says, so that some is accepted and some is not
    assistant.set_attn_implementation("sdpa")
    assistant.generation_config.num_assistant_tokens = 5
    assisted, _ = generate(
        llama, inputs, calidrop.KVCache(llama, recipe), new=32, assistant_model=assistant, output_logits=False
    )
    assert torch.equal(plain, assisted)


def test_plain_second_turn_after_speculative_decoding(llama):
    recipe, ids = "snapkv(budget=24, recent=8)", batch(1, 61, (0,))["input_ids"]
    more = batch(1, 50, (0,), seed=2)["input_ids"]
    out = []
    for kwargs in ({}, {"prompt_lookup_num_tokens": 4, "output_logits": False}):
        cache = calidrop.KVCache(llama, recipe)
        answer, _ = generate(llama, {"input_ids": ids}, cache, new=8, **kwargs)
        tokens, logits = generate(llama, {"input_ids": torch.cat([ids, answer, more], 1)}, cache, new=8)
        out.append((answer, tokens, logits, cache.nbytes))
    assert torch.equal(out[0][0], out[1][0])
    assert worst(out[0][2], out[1][2]) < 2e-4
    assert out[0][3] == out[1][3]  # the second turn was compressed after either


def test_speculative_decoding_of_a_second_turn_is_right_or_refused(llama):
    """Some versions of transformers give a cache that is not empty the whole conversation once more."""
    ids, more = batch(1, 61, (0,))["input_ids"], batch(1, 50, (0,), seed=2)["input_ids"]
    plain, cache = (calidrop.KVCache(llama, "full") for _ in range(2))
    for used in (plain, cache):
        generate(llama, {"input_ids": ids}, used, new=1)
    inputs = {"input_ids": torch.cat([ids, more], 1)}
    want, _ = generate(llama, inputs, plain, new=8)
    stock, fed = copy.deepcopy(llama), DynamicCache(config=llama.config)
    stock.set_attn_implementation("sdpa")
    generate(stock, {"input_ids": ids}, fed, new=1)
    generate(stock, inputs, fed, new=8, prompt_lookup_num_tokens=4, output_logits=False)
    twice = fed.get_seq_length() > 119
    with pytest.raises(ValueError, match=r"has 61 tokens.* all 111 ") if twice else nullcontext():
        got, _ = generate(llama, inputs, cache, new=8, prompt_lookup_num_tokens=4, output_logits=False)
    if twice:
        got, _ = generate(llama, inputs, cache, new=8)  # nothing is lost
    assert torch.equal(got, want)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("chunk", [7, 20, 61])  # 61 = 3 * 20 + 1
def test_chunked_prefill_is_plain_prefill(llama, recipe, chunk):
    inputs = batch()
    plain, logits = generate(llama, inputs, calidrop.KVCache(llama, recipe))
    chunked, chunk_logits = generate(llama, inputs, calidrop.KVCache(llama, recipe), prefill_chunk_size=chunk)
    # the last bit of a prompt computed in other blocks may cross a rounding boundary and move a code by one
    assert worst(logits, chunk_logits) < (5e-3 if "kivi" in recipe or "int4" in recipe else 2e-4)
    assert torch.equal(plain, chunked)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_conversation_on_one_cache(llama, recipe):
    """The second turn continues, and is compressed as well."""
    first, second = batch(1, 61, (0,), seed=1)["input_ids"], batch(1, 50, (0,), seed=2)["input_ids"]
    cache = calidrop.KVCache(llama, recipe)
    answer, _ = generate(llama, {"input_ids": first, "attention_mask": torch.ones_like(first)}, cache, new=8)
    held = cache.nbytes
    ids = torch.cat([first, answer, second], 1)
    _, logits = generate(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, new=8)

    plain = calidrop.KVCache(llama, recipe)
    forced(llama, {"input_ids": first, "attention_mask": torch.ones_like(first)}, plain, answer)
    rest = torch.cat([answer[:, -1:], second], 1)
    mask = torch.ones_like(ids)
    at = torch.arange(first.shape[1] + 7, ids.shape[1])[None]
    assert plain.get_seq_length() == at[0, 0]
    want = llama(rest, attention_mask=mask, position_ids=at, **using(plain)).logits[:, -1]
    assert worst(logits[:, 0], want) < 2e-4
    full = cache.full_nbytes
    assert full == (ids.shape[1] + 7) * 3 * 2 * 2 * 16 * 4
    if "budget=0" not in recipe and "calidrop" not in recipe and "kivi" not in recipe:
        assert cache.nbytes <= held + 8 * 3 * 2 * (2 * 16 * 4 + 8) * 3  # budget plus what was generated, and slack


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_conversations_interleaved(llama, recipe):
    a, b = batch(1, 61, (0,), seed=1), batch(1, 40, (0,), seed=2)
    want = [generate(llama, x, calidrop.KVCache(llama, recipe), new=12)[1] for x in (a, b)]
    caches = [calidrop.KVCache(llama, recipe) for _ in range(2)]
    logits: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        steps = [a["input_ids"], b["input_ids"]]
        for _ in range(12):
            for i in range(2):
                out = llama(steps[i], **using(caches[i])).logits[:, -1]
                logits[i].append(out)
                steps[i] = out.argmax(-1, keepdim=True)
    for i in range(2):
        assert worst(torch.stack(logits[i], 1), want[i]) < 2e-4


@pytest.mark.parametrize("chunk", [None, 20])
def test_generate_compresses_each_layer_in_the_prefill(llama, chunk):
    """Not all at the end: that would hold the whole uncompressed cache once."""
    inputs, held, flush = batch(), [], LayerKV.flush
    cache = calidrop.KVCache(llama, "snapkv(budget=24, recent=8)")

    def spy(self):
        flush(self)
        held.append([len(layer.state.window) for layer in cache.layers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerKV, "flush", spy)
        generate(llama, inputs, cache, new=1, prefill_chunk_size=chunk)
    before = 0 if chunk is None else 60
    assert held == [[8, before, before], [8, 8, before], [8, 8, 8]]


@torch.no_grad()
def test_a_plain_call_waits_and_eager_does_not(llama):
    inputs, recipe = batch(), "snapkv(budget=24, recent=8)"
    plain, eager = calidrop.KVCache(llama, recipe), calidrop.KVCache(llama, recipe, eager=True)
    llama(**inputs, **using(plain))
    llama(**inputs, **using(eager))
    assert [len(layer.state.window) for layer in plain.layers] == [61] * 3
    assert [len(layer.state.window) for layer in eager.layers] == [8] * 3
    assert plain.nbytes == eager.nbytes
    assert [len(layer.state.window) for layer in plain.layers] == [8] * 3


def test_prefix_reuse_by_deepcopy(llama):
    inputs = batch()
    recipe = "adakv(budget=24, recent=8)+calidrop(recompute=0.3)"
    cache = calidrop.KVCache(llama, recipe)
    with torch.no_grad():
        llama(**inputs, **using(cache))
    cache.compress()
    twin = copy.deepcopy(cache)
    one, other = torch.full((2, 1), 5), torch.full((2, 1), 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        a = llama(one, attention_mask=mask, **using(cache)).logits
        llama(other, attention_mask=mask, **using(twin))
        again = copy.deepcopy(twin)
        assert again.get_seq_length() == cache.get_seq_length() == 62
    fresh = calidrop.KVCache(llama, recipe)
    with torch.no_grad():
        llama(**inputs, **using(fresh))
        assert worst(llama(one, attention_mask=mask, **using(fresh)).logits, a) < 1e-5


def test_user_masks_in_four_dimensions(llama):
    inputs = batch(2, 33, (0, 0))["input_ids"]
    mask = torch.tril(torch.ones(2, 1, 33, 33, dtype=torch.bool))
    mask[:, :, 5:, 2] = False
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        want = llama(inputs, attention_mask=mask).logits
        got = llama(inputs, attention_mask=mask, **using(calidrop.KVCache(llama))).logits
    assert worst(want, got) < 2e-4


def test_reset_starts_over(llama):
    inputs, recipe = batch(), "h2o(budget=20)+calidrop"
    cache = calidrop.KVCache(llama, recipe)
    first, _ = generate(llama, inputs, cache)
    for layer in cache.layers:
        layer.reset()
    assert cache.nbytes == 0
    again, _ = generate(llama, inputs, cache)
    assert torch.equal(first, again)


class TestBadUse:
    def test_another_attention_implementation(self, llama):
        cache = calidrop.KVCache(llama)
        for other in ("sdpa", "eager"):
            llama.set_attn_implementation(other)
            with pytest.raises(RuntimeError, match="needs the attention implementation 'calidrop'"):
                generate(llama, batch(), cache)
            assert cache.get_seq_length() == 0
        llama.set_attn_implementation("calidrop")
        generate(llama, batch(), cache)

    def test_cache_of_another_model(self, llama):
        other = tiny()
        calidrop.KVCache(other)
        cache = calidrop.KVCache(llama)
        with pytest.raises(ValueError, match="built for another model"):
            generate(other, batch(), cache)
        assert cache.get_seq_length() == 0
        generate(llama, batch(), cache)

    def test_another_batch_size(self, llama):
        cache = calidrop.KVCache(llama)
        with torch.no_grad():
            llama(batch(2)["input_ids"], **using(cache))
            with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
                llama(torch.full((3, 1), 5), **using(cache))
        assert cache.get_seq_length() == 61

    @pytest.mark.parametrize(
        ("kind", "changes", "why"),
        [
            ("falcon", {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}, "attention interface"),
            ("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 2}, "attention interface"),
            ("t5", {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16}, "encoder-decoder"),
        ],
    )
    def test_unsupported_model_by_name(self, kind, changes, why):
        import transformers

        config = transformers.AutoConfig.for_model(kind, vocab_size=97, **changes)
        auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=rf"\({kind}\) is not supported: .*{why}"):
            calidrop.KVCache(model)
        assert model.config._attn_implementation == before

    def test_not_a_model(self):
        with pytest.raises(ValueError, match="expected a transformers model, got Linear"):
            calidrop.KVCache(torch.nn.Linear(2, 2))

    def test_empty_prompt(self, llama):
        cache = calidrop.KVCache(llama, "snapkv(budget=24, recent=8)")
        with torch.no_grad(), pytest.raises(ValueError, match="empty prompt"):
            llama(torch.zeros(1, 0, dtype=torch.long), **using(cache))
        assert cache.get_seq_length() == 0

    def test_crop_without_recording(self, llama):
        cache = calidrop.KVCache(llama, "snapkv(budget=24, recent=8)")
        with torch.no_grad():
            llama(batch()["input_ids"], **using(cache))
        with pytest.raises(ValueError, match="cannot remove 3 tokens"):
            cache.crop(-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_prompt_shorter_than_the_window(llama, recipe):
    """Works, and compresses nothing until there is something to compress."""
    inputs = batch(1, 5, (0,))
    tokens, logits = generate(llama, inputs, calidrop.KVCache(llama, recipe), new=3)
    full, full_logits = generate(llama, inputs, calidrop.KVCache(llama), new=3)
    if "0.4" not in recipe:
        assert worst(logits, full_logits) < 2e-4
        assert torch.equal(tokens, full)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["snapkv(budget=24, recent=8)", f"judge_q(budget=24, file={SOFT!r})"])
def test_plain_calls_after_assisted_decoding(llama, recipe):
    """A prompt that follows is a prompt, and nothing is kept to be undone."""
    caches = [calidrop.KVCache(llama, recipe) for _ in range(2)]
    tokens = [
        generate(llama, batch(1), cache, new=10, prompt_lookup_num_tokens=lookup, output_logits=False)[0]
        for cache, lookup in zip(caches, (None, 3), strict=True)
    ]
    assert torch.equal(*tokens)
    later = torch.randint(3, 97, (1, 40))
    out = [[llama(x, **using(cache)).logits[:, -1] for x in (later, later[:, :1])] for cache in caches]
    assert worst(torch.cat(out[0]), torch.cat(out[1])) < 1e-4
    assert caches[0].nbytes == caches[1].nbytes


@torch.no_grad()
@pytest.mark.parametrize(
    "recipe", ["snapkv(budget=24, recent=8)", "adakv(budget=24, recent=8)+calidrop", "r_kv(budget=24)"]
)
def test_nothing_but_pads_is_old(llama, recipe):
    inputs = batch(2, 40, (36, 37))
    tokens, logits = generate(llama, inputs, calidrop.KVCache(llama, recipe), new=4)
    for i in range(2):
        alone, alone_logits = generate(llama, row(inputs, i), calidrop.KVCache(llama, recipe), new=4)
        assert worst(logits[i : i + 1], alone_logits) < 2e-3
        assert torch.equal(tokens[i : i + 1], alone)


@torch.no_grad()
def test_a_sliding_layer_answers_from_its_last_columns():
    """Generated tokens ask the kernel for the columns they may see, instead of torch with a mask; any other mask of the
    model stays a mask."""
    model = tiny("mistral", head_dim=32)
    inputs, cache = batch(), calidrop.KVCache(model, "full")
    model.set_attn_implementation("sdpa")
    want = generate(model, inputs, DynamicCache(config=model.config), 60)[1]
    model.set_attn_implementation("calidrop")
    assert worst(generate(model, inputs, cache, 60)[1], want) < 1e-3
    assert all(layer.by == ops.backend(torch.device("cpu")) for layer in cache.layers_here)


def test_which_masks_are_a_sliding_window():
    seven, five = (masking_utils.sliding_window_causal_mask_function(n) for n in (7, 5))
    assert _sliding(seven) == 7 and _sliding(five) == 5
    causal, both = masking_utils.causal_mask_function, masking_utils.and_masks(seven, five)
    packed = masking_utils.and_masks(seven, masking_utils.packed_sequence_mask_function(torch.zeros(1, 9)))
    chunks = masking_utils.chunked_causal_mask_function(7, torch.zeros(1))
    either = masking_utils.or_masks(masking_utils.sliding_window_overlay(7), causal)
    wide = masking_utils.sliding_window_bidirectional_mask_function(7)
    for fn in (causal, both, packed, chunks, either, wide, lambda b, h, q, k: k <= q):
        assert _sliding(fn) is None
