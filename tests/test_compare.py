import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from calidrop.cache import KVCache
from calidrop.compare import Row, compare
from calidrop.generate import generate
from calidrop.plugin import using

CONTEXT, STEPS = 60, 12
TEXT = " ".join(str(i * i % 97 + 1) for i in range(CONTEXT + STEPS + 20))
FIELDS = [
    *("recipe", "kl", "kl_p95", "agreement", "nll", "nll_full", "device_bytes", "host_bytes", "full_bytes", "ratio"),
    *("prefill_s", "decode_ms_per_token", "recompute_rate"),
]


class Tokens:
    """A text is its token ids, written out."""

    def __call__(self, text, return_tensors=None, **_):
        ids = [int(word) for word in text.split()]
        if return_tensors is None:
            return {"input_ids": ids}
        rows = torch.tensor([ids], dtype=torch.long)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=512,
        initializer_range=0.3,  # at the usual 0.02 every prediction is nearly uniform and a wrong one goes unseen
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def rows(model, *recipes, **kwargs):
    return compare(model, Tokens(), TEXT, list(recipes), CONTEXT, STEPS, **kwargs)


def test_fields():
    assert [f.name for f in dataclasses.fields(Row)] == FIELDS


def test_full(model):
    (row,) = rows(model, "full")
    assert row.recipe == "full"
    assert (row.kl, row.kl_p95, row.agreement, row.nll) == (0.0, 0.0, 1.0, row.nll_full)
    assert (row.host_bytes, row.recompute_rate) == (0, 0.0)
    # 3 layers, 2 heads, keys and values of 16 floats, every token that was fed
    assert row.full_bytes == 3 * 2 * 2 * 16 * 4 * (CONTEXT + STEPS)
    assert row.ratio == row.full_bytes / row.device_bytes
    assert row.prefill_s > 0
    assert row.decode_ms_per_token > 0


def test_positions_are_those_of_a_plain_forward(model):
    """Off by one anywhere, and the nll is that of other tokens."""
    (row,) = rows(model, "full")
    ids = torch.tensor([[int(word) for word in TEXT.split()]])[:, : CONTEXT + STEPS + 1]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logp = model(ids).logits.double().log_softmax(-1)[0]
    # the logits after the continuation tokens CONTEXT .. CONTEXT + STEPS - 1 predict the tokens one further
    expected = -logp[CONTEXT:-1].gather(1, ids[0, CONTEXT + 1 :, None]).mean()
    assert row.nll_full == pytest.approx(float(expected), abs=1e-4)
    assert row.nll_full > 5  # of a model this sharp; a uniform one has log(100) = 4.6 whatever the positions


def test_kl_is_that_of_full_from_recipe(model):
    """Against torch's own, with full as the target."""
    recipe = "snapkv(budget=24, recent=8)"
    ids = torch.tensor([[int(word) for word in TEXT.split()]])
    logp = []
    for name in ("full", recipe):
        cache = KVCache(model, name, eager=True)
        with torch.no_grad():
            model(ids[:, :CONTEXT], **using(cache))
            steps = [model(ids[:, i : i + 1], **using(cache)).logits[0, -1] for i in range(CONTEXT, CONTEXT + STEPS)]
        logp.append(torch.stack(steps).log_softmax(-1))
    kl = F.kl_div(logp[1], logp[0], log_target=True, reduction="none").sum(-1)
    (row,) = rows(model, recipe)
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert row.kl_p95 == pytest.approx(float(kl.quantile(0.95)), rel=1e-4)
    assert row.agreement == float((logp[0].argmax(-1) == logp[1].argmax(-1)).float().mean())


def test_asking_always_is_exact(model):
    """Asking every evicted token at every step is full attention, and dropping the same tokens is not."""
    exact, dropped = rows(model, "snapkv(budget=24, recent=8)+calidrop(recompute=2)", "snapkv(budget=24, recent=8)")
    assert exact.kl < 1e-8
    assert exact.agreement == 1.0
    assert exact.recompute_rate == 1.0
    assert exact.host_bytes > 0
    assert exact.nll == pytest.approx(exact.nll_full, abs=1e-4)
    assert dropped.kl > 1e-3
    assert dropped.kl_p95 >= dropped.kl
    assert dropped.ratio > 1.2  # a window has room for 64 tokens, which weighs here


def test_order_of_rows_and_one_reference(model):
    names = ["snapkv(budget=24, recent=8)", "full", "streaming_llm(budget=24)"]
    seen = []
    table = rows(model, *names, progress=lambda recipe, done, total: seen.append((recipe, done, total)))
    assert [row.recipe for row in table] == names
    assert len({row.nll_full for row in table}) == 1
    # "full" runs first and once; a tick for each layer of the prefill and each step
    assert seen == [(name, i + 1, 3 + STEPS) for name in ("full", names[0], names[2]) for i in range(3 + STEPS)]


def test_decoding_really_happens(model):
    """Generated tokens are compressed too when the recipe says so."""
    once, often = rows(model, "snapkv(budget=24, recent=8)", "snapkv(budget=24, recent=8, every=4)")
    assert often.kl != once.kl


def test_one_step(model):
    (row,) = compare(model, Tokens(), TEXT, ["kivi(bits=4, group=16)"], context=1, continuation=1)
    assert row.full_bytes == 3 * 2 * 2 * 16 * 4 * 2
    assert row.kl_p95 == row.kl


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 500}, "got 92 tokens, need 513"),
        ({"context": 80}, "got 92 tokens, need 93"),
        ({"context": 0}, "context must be a whole number >= 1"),
        ({"continuation": 0}, "continuation must be a whole number >= 1"),
        ({"continuation": 2.5}, "continuation must be a whole number >= 1"),
        ({"recipes": ["full", "snapkw(budget=3)"]}, "unknown method 'snapkw'"),
        ({"recipes": ["full", "kivi(bits=4, group=32)"]}, "group must divide head_dim"),
        ({"recipes": "full"}, "recipes must be a list"),
        ({"recipes": []}, "recipes must be a list"),
    ],
)
def test_errors_before_work(model, monkeypatch, change, message):
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("worked"))
    given = {"recipes": ["full"], "context": CONTEXT, "continuation": STEPS} | change
    with pytest.raises(ValueError, match=message):
        compare(model, Tokens(), TEXT, **given)


def test_generate_full_is_plain_generate(model):
    ids = torch.tensor([[int(word) for word in TEXT.split()]])
    model.set_attn_implementation("sdpa")
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    pieces, ticks = [], []
    made = generate(
        model, Tokens(), TEXT, max_new_tokens=8, on_token=pieces.append, progress=lambda *tick: ticks.append(tick)
    )
    assert made.tokens == expected[0, ids.shape[1] :].tolist()
    assert made.text == "".join(pieces) == "".join(f"{i} " for i in made.tokens)
    assert len(pieces) == 9  # one for each token, one at the end
    assert ticks == [("full", i + 1, 3 + 8) for i in range(3 + 8)]
    assert made.cache.get_seq_length() == ids.shape[1] + 7
    assert made.prefill_s > 0
    assert made.decode_ms_per_token > 0


def test_generate_compresses(model):
    made = generate(model, Tokens(), TEXT, "snapkv(budget=24, recent=8)", 1)
    assert made.cache.nbytes < made.cache.full_nbytes
    assert made.decode_ms_per_token != made.decode_ms_per_token  # one token: no step to time


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ("", {}, "empty prompt"),
        ("1 2", {"max_new_tokens": 0}, "max_new_tokens"),
        ("1 2", {"recipe": "no"}, "unknown method"),
    ],
)
def test_generate_errors(model, prompt, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, Tokens(), prompt, **change)
