"""What a model must do under our cache, whatever its layers are."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import calidrop
from calidrop import steady, tee
from calidrop.eval.subject import fill, together
from calidrop.plugin import using
from calidrop.support import check_plain
from helpers import kernels
from tape import tape
from tiny import batch, generate, row, soft, tiny, worst


def padded_rows_are_as_alone(model: nn.Module, recipe: str, limit: float, monkeypatch) -> None:
    inputs = batch(3, 61, (0, 13, 50))
    with kernels(monkeypatch, "torch"):  # a kernel that rounds queries to 16 bits may flip a code of the next layer
        tokens, logits = generate(model, inputs, calidrop.KVCache(model, recipe))
        for i in range(3):
            alone, alone_logits = generate(model, row(inputs, i), calidrop.KVCache(model, recipe))
            assert worst(logits[i : i + 1], alone_logits) < limit, f"row {i}"
            assert torch.equal(tokens[i : i + 1], alone)


@torch.no_grad()
def beams_score_as_their_tokens(model: nn.Module, recipe: str) -> None:
    """As the same tokens do, fed one by one."""
    ids = batch(1, 45, (0,))["input_ids"]
    out = model.generate(  # type: ignore[operator]
        ids, **using(calidrop.KVCache(model, recipe)), num_beams=3, max_new_tokens=12, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True, pad_token_id=0,
    )  # fmt: skip
    tokens, cache = out.sequences[:, 45:], calidrop.KVCache(model, recipe)
    logits = [model(ids, **using(cache)).logits[:, -1]]
    logits += [model(tokens[:, i : i + 1], **using(cache)).logits[:, -1] for i in range(11)]
    score = torch.stack(logits, 1).log_softmax(-1).gather(2, tokens[..., None]).sum()
    assert worst(score, out.sequences_scores) < 1e-3


def chunks_are_as_one_prompt(model: nn.Module, recipe: str, limit: float) -> None:
    """And a second turn goes on behind them."""
    inputs = batch(1, 61, (0,))
    want, logits = generate(model, inputs, calidrop.KVCache(model, recipe))
    cache = calidrop.KVCache(model, recipe)
    got, in_chunks = generate(model, inputs, cache, prefill_chunk_size=20)
    assert torch.equal(want, got) and worst(logits, in_chunks) < limit
    more = torch.cat([inputs["input_ids"], got, batch(1, 30, (0,), 5)["input_ids"]], 1)
    turn = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    told, after = generate(model, turn, cache, new=8)
    assert told.shape == (1, 8) and cache.get_seq_length() == more.shape[1] + 7
    if recipe == "full":
        _, fresh = generate(model, turn, calidrop.KVCache(model), new=8)
        assert worst(after, fresh) < 2e-4


@torch.no_grad()
def rows_are_repeated_chosen_and_forgotten(model: nn.Module, recipe: str) -> None:
    inputs = batch(2, 61, (0, 0))
    given = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(2))

    def told(cache, ids):
        return torch.cat([model(ids[:, i : i + 1], **using(cache)).logits for i in range(5)], 1)

    cache = calidrop.KVCache(model, recipe)
    model(**inputs, **using(cache))
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    got, cache = told(cache, given[[1, 0, 0]]), calidrop.KVCache(model, recipe)
    for _ in range(2):
        model(**inputs, **using(cache))
        assert worst(got, told(cache, given)[[1, 0, 0]]) < 5e-4
        cache.reset()


def speculation_is_plain_decoding(model: nn.Module, recipe: str) -> None:
    motif = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(1, 5)
    inputs = {"input_ids": motif, "attention_mask": torch.ones_like(motif)}
    plain, _ = generate(model, inputs, calidrop.KVCache(model, recipe), new=32)
    cache = calidrop.KVCache(model, recipe)
    got, _ = generate(model, inputs, cache, new=32, prompt_lookup_num_tokens=4, output_logits=False)
    assert torch.equal(plain, got)


def recorded_steps_are_those_from_python(model: nn.Module, recipe: str, monkeypatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = model.to(device), {name: x.to(device) for name, x in batch().items()}
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    with kernels(monkeypatch, "torch") if device == "cpu" else nullcontext():  # the C++ kernel is not on the tape
        plain, steps = calidrop.KVCache(model, recipe), calidrop.KVCache(model, recipe, graph=True)
        (want, logits), (got, ours) = (generate(model, inputs, cache, 40) for cache in (plain, steps))
    assert torch.equal(got, want) and worst(ours, logits) < 1e-3  # a code may flip
    assert (ours - logits).abs().median() < 1e-5
    assert steps.steps is not None and steps.steps.steady is not None
    assert steps.steps.steady.recorded == 1 and "steps: replayed" in steps.describe()


def compiled_steps_are_those_from_python(model: nn.Module, recipes: list[str]) -> None:
    """All in one compilation. recipes: without codes, one of which may flip."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for recipe in recipes:
        plain, steps = calidrop.KVCache(model, recipe), calidrop.KVCache(model, recipe, compile=True)
        (want, logits), (got, ours) = (generate(model, batch(), cache, 40) for cache in (plain, steps))
        assert torch.equal(got, want) and worst(ours, logits) < 1e-3
        assert steps.steps is not None and steps.steps.describe() == "steps: compiled"
        assert steps.get_seq_length() == plain.get_seq_length()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def what_needs_plain_layers_says_so(model: nn.Module, said: str) -> None:
    """said: what its errors match."""
    for make in (
        lambda: calidrop.KVCache(model, f"judge_q(budget=20, file={soft(model)!r})"),
        lambda: tee.prefill(model, [calidrop.KVCache(model)], torch.ones(1, 5, dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    check_plain(tiny(), "this")


@torch.no_grad()
def plans_are_what_is_held(model: nn.Module, advice) -> None:
    """Bytes of a plan for 512 tokens of one row."""
    for option in advice.options:
        cache = calidrop.KVCache(model, option.recipe, eager=True)
        model(torch.randint(3, 97, (1, 512)), **using(cache))
        assert (cache.nbytes, cache.host_nbytes) == (option.device_bytes, option.host_bytes)


def an_evaluation_goes_back(model: nn.Module, recipe: str) -> None:
    """One recipe at a time, and to where it was before an answer was fed."""
    assert together(model, 2) == 1
    ids = torch.randint(3, 97, (61,), generator=torch.Generator().manual_seed(3))
    (subject,) = fill(model, [recipe], ids)
    saved = subject.saved()
    first = subject.feed(ids[:5])
    subject.restore(saved)
    assert torch.equal(first, subject.feed(ids[:5]))
