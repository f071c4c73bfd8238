"""Recorded steps are the steps that would have run from Python."""

import copy
import inspect
from contextlib import nullcontext

import pytest
import torch

from calidrop import steady
from calidrop.cache import KVCache
from calidrop.plugin import using
from helpers import kernels
from tape import tape
from tiny import batch, generate, tiny, worst

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SNAP = "snapkv(budget=24, recent=8)"
# and how often they are recorded in 48 steps
RECORDED = {
    "full": 1,
    "streaming_llm(budget=24, sinks=2)": 1,
    "h2o(budget=24)": 1,
    "tova(budget=24)": 1,
    "adakv(budget=24, recent=8)": 1,
    "pyramidkv(budget=24, recent=8)": 1,
    "expected_attention(budget=24)": 1,
    "lazy_eviction(budget=24, window=8)": 1,
    "g_kv(budget=24)": 1,
    "r_kv(budget=24)": 1,
    SNAP: 1,
    "snapkv(budget=24, recent=8, every=4)": 1,
    f"{SNAP}+kvcrush": 1,
    f"{SNAP}+int4": 1,
    f"{SNAP}+mikv": 1,
    f"{SNAP}+calidrop(late=1)": 1,
    f"{SNAP}+calidrop(late=1, decide='layer', order=0)": 1,
    f"{SNAP}+calidrop(offload=False)": 1,
    f"{SNAP}+calidrop(summary=4, offload=False)": 1,
    "h2o(budget=24, every=4)+calidrop(late=2)": 1,
    "ott": 1,
    "mixkvq": 1,
    "int8": 3,  # 16 tokens go to the store at a time, which grows
    "think(0.4)": 3,
    "kivi(bits=4, group=8, residual=16)": 6,
}


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    with kernels(monkeypatch, "torch") if DEVICE == "cpu" else nullcontext():  # the C++ kernel is not on the tape
        yield


@pytest.fixture(scope="module")
def llama():
    return tiny().to(DEVICE)


def inputs(**kwargs):
    return {name: x.to(DEVICE) for name, x in batch(**kwargs).items()}


def both(model, recipe, given, new=48, **kwargs):
    """With steps from Python and recorded. -> the caches"""
    plain, steps = KVCache(model, recipe), KVCache(model, recipe, graph=True)
    (want, want_logits), (got, logits) = (generate(model, given, c, new, **kwargs) for c in (plain, steps))
    assert torch.equal(got, want)
    # sums in another order differ by 1e-6, until one of them rounds a number to the code beside it
    rounds = any(name in recipe for name in ("int", "kivi", "mixkvq", "mikv"))
    assert want_logits is None or worst(logits, want_logits) < (1e-3 if rounds else 1e-4)
    assert want_logits is None or (logits - want_logits).abs().median() < 1e-5  # most never meet one
    assert steps.get_seq_length() == plain.get_seq_length()
    return plain, steps


def tracked(cache):
    """Of every layer, what is kept of each token by its column: name -> [B,H,columns]."""
    out = []
    for state in (layer.state for layer in cache.layers):
        at = {}
        for t in (*(state.store.tokens() if state.store else ()), state.window.tokens()):
            for name, x in t.stats.items():
                table = at.setdefault(name, x.new_zeros(*x.shape[:2], state.seen + 1))
                table.scatter_(2, t.pos.long().masked_fill(t.pos < 0, state.seen), x)
        out.append({name: table[..., :-1] for name, table in at.items()})
    return out


@pytest.mark.parametrize("recipe", RECORDED)
def test_same_as_from_python(llama, recipe):
    plain, steps = both(llama, recipe, inputs())
    assert bool(tracked(plain)[0]) == any(name in recipe for name in ("h2o", "lazy", "g_kv"))
    torch.testing.assert_close(tracked(steps), tracked(plain), rtol=1e-4, atol=1e-4)
    assert steps.steps.steady.recorded == RECORDED[recipe] and "replayed" in steps.describe()
    (a, b) = ([[(x.form, x.how) for x in layer] for layer in c.holdings()] for c in (plain, steps))
    assert a == b
    assert abs(steps.recompute_rate - plain.recompute_rate) < 1e-6


def test_windows_are_given_more_room(llama, monkeypatch):
    monkeypatch.setattr(steady, "ROOM", 16)
    for recipe in ("full", SNAP):
        _, steps = both(llama, recipe, inputs(), new=80)
        assert steps.steps.steady.recorded == 5


def test_given_up_where_rows_move_at_every_step(llama):
    """Each search moves them once per step: what is recorded would never be replayed."""
    cache = KVCache(llama, graph=True)
    generate(llama, inputs(), cache, new=steady.TRIES + 10, num_beams=2, output_logits=False)
    assert cache.steps.steady.tries == steady.TRIES and cache.layers[0].state.window.before is None


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "qwen3"])
def test_families(family):
    _, steps = both(tiny(family).to(DEVICE), SNAP, inputs())
    # experts are looked up on the host
    assert steps.steps.steady.recorded or (family == "gpt_oss" and "asks the host" in steps.describe())


def test_everything_else_goes_on_from_python(llama):
    both(llama, SNAP, inputs(), num_beams=3, output_logits=False)
    _, steps = both(llama, SNAP, inputs(rows=1), prompt_lookup_num_tokens=3, output_logits=False)
    assert not steps.steps.steady.recorded


@pytest.mark.parametrize(
    "recipe", [SNAP, "h2o(budget=24)", f"{SNAP}+calidrop(late=1)", "kivi(bits=4, group=8, residual=16)"]
)
@torch.no_grad()
def test_turns_rows_and_plain_calls(llama, recipe):
    """Steps, a second prompt, steps, other rows, steps: none of them knows of what was recorded."""
    found = []
    for graph in (False, True):
        cache, ids = KVCache(llama, recipe, graph=graph), inputs()["input_ids"]
        logits = [llama(ids, **using(cache), use_cache=True).logits[:, -1:]]
        for turn in range(3):
            for _ in range(20):
                logits.append(llama(logits[-1].argmax(-1), **using(cache), use_cache=True).logits)
            if turn == 0:
                logits.append(llama(ids[:, :11], **using(cache), use_cache=True).logits[:, -1:])
            if turn == 1:
                cache.reorder_cache(torch.tensor([1, 1], device=DEVICE))
                logits.append(logits[-1][[1, 1]])
        found.append(torch.stack(logits))
    assert worst(*found) < 1e-3
    assert cache.steps is not None and cache.steps.steady.recorded >= 3


def test_what_waits_for_the_host_says_so(llama):
    _, steps = both(llama, f"{SNAP}+calidrop", inputs())
    assert not steps.steps.steady.recorded
    assert "from Python, recorded 0 times (calidrop waits for the host" in steps.describe()


def test_a_step_that_fails_to_record_is_run(llama, monkeypatch):
    def broken(fn):
        fn()
        raise RuntimeError("no graph today\nbut a trace")

    monkeypatch.setitem(steady.RECORDERS, DEVICE, broken)
    if DEVICE == "cpu":  # where recording has run the step already
        monkeypatch.setitem(steady.RECORDERS, DEVICE, lambda fn: 1 / 0)
    _, steps = both(llama, SNAP, inputs())
    assert not steps.steps.steady.recorded and steps.steps.steady.why


def test_the_model_stays_what_it_was(llama):
    model = copy.deepcopy(llama)
    takes = inspect.signature(model.forward)
    KVCache(model, graph=True)
    KVCache(model, SNAP, graph=True)
    assert inspect.signature(model.forward) == takes
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other
    with torch.no_grad():
        ids = inputs()["input_ids"]
        assert torch.equal(other(ids).logits, model(input_ids=ids).logits)


def test_refusals(monkeypatch):
    monkeypatch.delitem(steady.RECORDERS, "cpu")
    with pytest.raises(ValueError, match="needs a model on one cuda device, got cpu"):
        KVCache(tiny().to("cpu"), graph=True)
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    model = tiny()
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"something replaced LlamaForCausalLM\.forward"):
        KVCache(model, graph=True)
