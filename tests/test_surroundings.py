"""What programs do around a cache: drop it, set torch's defaults, train, cast, save."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

import calidrop
from calidrop import steady
from calidrop.plugin import using
from calidrop.state import tensors
from helpers import kernels, predictor
from tape import tape
from tiny import batch, generate, soft, tiny, worst

RECIPES = [
    "full",
    "h2o(budget=20)+int4",
    "snapkv(budget=24, recent=8)+kivi(bits=4, group=16)+calidrop(recompute=0.3)",
    "adakv(budget=24, recent=8)+calidrop(late=1)",
    "h2o(budget=20)+mikv(bits=4)",
    "expected_attention(budget=20)+calidrop(offload=False, summary=3)",
    "r_kv(budget=24, every=8)",
    f"judge_q(budget=20, file={soft(tiny())!r})",
    predictor(24, dense=3, skip=1),
]


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_free_when_nobody_has_the_cache(llama, recipe, graph, monkeypatch):
    """At once: the garbage collector may wait for long."""
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    with kernels(monkeypatch, "torch") if graph else nullcontext():  # the C++ kernel is not on the tape
        cache = calidrop.KVCache(llama, recipe, graph=graph)
        generate(llama, batch(), cache, new=12)
        assert cache.nbytes and cache.holdings() and cache.describe()
    gc.collect()
    gc.disable()
    try:
        states = [layer.state for layer in cache.layers_here]
        held = [x for state in states for x in tensors(state)]
        there = [weakref.ref(x) for x in (cache, *states, *held)]
        del cache, states, held
        assert sum(x() is not None for x in there) == 0
    finally:
        gc.enable()


def test_a_copy_records_its_own_steps(llama, monkeypatch):
    """What was recorded writes to the memory of the first."""
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    with kernels(monkeypatch, "torch"), torch.no_grad():
        _copied_and_recorded(llama)


def _copied_and_recorded(llama):
    cache = calidrop.KVCache(llama, "snapkv(budget=24, recent=8)", graph=True)
    generate(llama, batch(), cache, new=8)
    assert cache.steps is not None and cache.steps.steady is not None and cache.steps.steady.again is not None
    twin = copy.deepcopy(cache)
    assert twin.steps is not None and twin.steps.cache is twin and "from Python" in twin.steps.describe()
    before = [x.clone() for x in tensors(cache.layers_here[0].state)]
    said = []
    for given in (twin, cache):
        for token in (5, 6, 7, 8):
            said.append(llama(torch.full((2, 1), token), **using(given)).logits)
        if given is twin:
            assert "replayed, recorded 1 times" in twin.steps.describe()
            assert all(map(torch.equal, before, tensors(cache.layers_here[0].state)))
    assert worst(torch.cat(said[:4]), torch.cat(said[4:])) < 1e-5


DEFAULTS = [*RECIPES, "snapkv(budget=24, recent=8)+kvcrush+decoquant(bits=4)", "pyramidkv(budget=24, recent=8)+int8"]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", DEFAULTS)
def test_torch_may_have_other_defaults(llama, recipe, default):
    """Scripts that load in bf16 set them; the kernel fills memory that has the size it was told."""
    want, logits = generate(llama, batch(), calidrop.KVCache(llama, recipe))
    torch.set_default_dtype(default)
    try:
        got, others = generate(llama, batch(), calidrop.KVCache(llama, recipe))
    finally:
        torch.set_default_dtype(torch.float32)
    assert others.dtype == torch.float32 and worst(logits, others) < 1e-4
    assert torch.equal(want, got)


@pytest.mark.parametrize("recipe", DEFAULTS)
def test_what_is_made_lies_where_the_model_is(llama, recipe):
    """Whatever torch's default device is: a model may stay on the CPU beside it, and the host is always one."""
    inputs, steps = batch(), 12
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    masks = [torch.cat([mask, mask.new_ones(2, i)], 1) for i in range(steps)]
    given = [ids, *(torch.full((2, 1), i) for i in range(5, 4 + steps))]
    places = [(x.cumsum(1) - 1).clamp(min=0)[:, -len(y[0]) :] for x, y in zip(masks, given, strict=True)]

    def logits():
        cache, out = calidrop.KVCache(llama, recipe), []
        for x, mine, at in zip(given, masks, places, strict=True):
            out.append(llama(x, attention_mask=mine, position_ids=at, **using(cache)).logits[:, -1])
        return torch.stack(out)

    with torch.no_grad():
        want = logits()
        torch.set_default_device("meta")
        try:
            got = logits()
        finally:
            torch.set_default_device(None)
    assert worst(want, got) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=24, recent=8)+int4+calidrop(recompute=0.3)"])
def test_gradients_are_right_or_refused(family, recipe):
    """Those of a first prompt are right; none go through what a cache holds."""
    model, inputs = tiny(family), batch(pads=(0, 0))
    model.set_attn_implementation("eager")
    model(**inputs, use_cache=False).logits.square().mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = calidrop.KVCache(model, recipe)
    model(**inputs, **using(cache)).logits.square().mean().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in want)
        if n in want:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-3, atol=1e-4)
    model.zero_grad()
    for n in (1, 6, 1, 20):
        out = model(inputs["input_ids"][:, :n], **using(cache)).logits
        assert out.requires_grad
        with pytest.raises(RuntimeError, match="no gradients go through the tokens of a calidrop KVCache"):
            out.sum().backward()
    with torch.no_grad():
        twin, said = calidrop.KVCache(model, recipe), []
        for n in (61, 1, 6, 1, 20):
            said.append(model(inputs["input_ids"][:, :n], **using(twin)).logits)
    assert worst(said[-1], out) < 1e-4
    assert not any(x.requires_grad for layer in cache.layers_here for x in tensors(layer.state))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["full", "h2o(budget=80)+int8+calidrop"])
def test_autocast(family, recipe):
    """Rotated keys come in fp32 and values in bf16; what is cached is in bf16, as if the model were."""
    model, inputs = tiny(family), batch()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tokens, exact = generate(model, inputs, DynamicCache(config=model.config), new=1)
        with torch.autocast("cpu", torch.bfloat16):
            _, stock = generate(model, inputs, DynamicCache(config=model.config), new=1)
            cache = calidrop.KVCache(model, recipe)
            _, ours = generate(model, inputs, cache, new=1)
            step = model(tokens, **using(cache)).logits
            assert {x.dtype for x in tensors(cache.layers_here[0].state.window.k)} == {torch.bfloat16}
        full = calidrop.KVCache(model)
        generate(model, inputs, full, new=1)
        want = model(tokens, **using(full)).logits
    rounding = worst(exact, stock)
    assert worst(exact, ours) < 2 * rounding and worst(want, step) < 3 * rounding


@pytest.mark.parametrize("kernel", ["", "torch"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_inference_mode_may_end(llama, recipe, kernel, monkeypatch):
    """What was made under it nobody may write to later, and a cache goes on."""
    ids = batch(pads=(0, 0))["input_ids"]
    with kernels(monkeypatch, kernel):
        said = []
        for mode in (torch.no_grad, torch.inference_mode):
            cache = calidrop.KVCache(llama, recipe)
            with mode():
                llama(ids[:, :40], **using(cache))
                llama(ids[:, 40:41], **using(cache))
            with torch.no_grad():
                parts = ids[:, 41:42], ids[:, 42:55], ids[:, 55:56]
                said.append(torch.cat([llama(x, **using(cache)).logits for x in parts], 1))
    assert worst(*said) < 1e-5


@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=24, recent=8)+int4", "h2o(budget=20)+calidrop(late=1)"])
def test_recorded_steps_go_on_after_inference_mode(llama, recipe, monkeypatch):
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    ids, said = batch(pads=(0, 0))["input_ids"], []
    with kernels(monkeypatch, "torch"):
        for graph in (False, True):
            cache = calidrop.KVCache(llama, recipe, graph=graph)
            out = []
            for at, mode in ((0, torch.inference_mode), (46, torch.no_grad), (52, torch.inference_mode)):
                with mode():
                    out += [llama(ids[:, :40], **using(cache)).logits[:, -1].clone()] if at == 0 else []
                    steps = range(at or 40, at + 6 if at else 46)
                    out += [llama(ids[:, i : i + 1], **using(cache)).logits[:, 0].clone() for i in steps]
            said.append(torch.stack(out))
            assert not graph or (cache.steps is not None and "replayed" in cache.steps.describe())
    assert worst(*said) < 1e-4


class Interrupted(Exception):
    pass


def raises(*args, **kwargs):
    raise Interrupted


CUT = ["full", "snapkv(budget=24, recent=8)+calidrop", "h2o(budget=20)+int4", "lazy_eviction(budget=24, window=8)"]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("recipe", CUT)
@torch.no_grad()
def test_a_pass_that_was_interrupted_cannot_be_repeated(llama, recipe, at):
    """By Ctrl-C, or a hook: layers below `at` have its tokens. Before the first, nothing happened."""
    inputs, token = batch(), torch.full((2, 1), 7)
    for prompt in (True, False):
        cache = calidrop.KVCache(llama, recipe)
        if not prompt:
            llama(**inputs, **using(cache))
        given = inputs if prompt else {"input_ids": token}
        hook = llama.model.layers[at].self_attn.register_forward_pre_hook(raises)
        with pytest.raises(Interrupted):
            llama(**given, **using(cache))
        hook.remove()
        if at:
            with pytest.raises(ValueError, match=r"a forward pass was interrupted .* reset\(\) it or use a new one"):
                llama(**given, **using(cache))
            cache.reset()
            given = inputs
        again = llama(**given, **using(cache)).logits
        fresh = calidrop.KVCache(llama, recipe)
        if not at and not prompt:
            llama(**inputs, **using(fresh))
        assert worst(again, llama(**given, **using(fresh)).logits) < 1e-5


@torch.no_grad()
def test_a_layer_that_was_interrupted_says_so(llama, monkeypatch):
    """Its window may have the token by then, which it would have twice."""
    cache = calidrop.KVCache(llama, "h2o(budget=20)")
    llama(**batch(), **using(cache))
    with monkeypatch.context() as patched:
        patched.setattr(type(cache.layers_here[0]), "_stepped", raises)
        with pytest.raises(Interrupted):
            llama(torch.full((2, 1), 7), **using(cache))
    with pytest.raises(ValueError, match="a forward pass was interrupted"):
        llama(torch.full((2, 1), 7), **using(cache))


@pytest.mark.parametrize("recipe", [*DEFAULTS, "lazy_eviction(budget=24, window=8)"])
@torch.no_grad()
def test_a_model_may_change_its_dtype_under_a_cache(recipe):
    """What comes is taken as what came; the answers are the model's."""
    model, inputs = tiny(), batch()
    if "judge_q" in recipe:
        recipe = f"judge_q(budget=20, file={soft(model)!r})"
    cache = calidrop.KVCache(model, recipe)
    generate(model, inputs, cache, new=2)
    want = [model(torch.full((2, 1), 7), **using(copy.deepcopy(cache))).logits]
    for dtype, limit in ((torch.float64, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.5)):
        for _ in range(2):
            own = copy.deepcopy(cache)
            got = model.to(dtype)(torch.full((2, 1), 7), **using(own)).logits
            assert got.dtype == dtype and worst(got.float(), want[0]) < limit
            held = {x.dtype for layer in own.layers_here for x in tensors(layer.state) if x.dtype.is_floating_point}
            assert dtype not in held - {torch.float16}  # scales are in fp16
            for token in (8, 9, 10):
                assert model(torch.full((2, 1), token), **using(own)).logits.isfinite().all()


@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=24, recent=8)+calidrop", "adakv(budget=24, recent=8)+int4"])
@torch.no_grad()
def test_rows_are_chosen_by_whatever_chooses_rows(llama, recipe):
    inputs, token = batch(3, pads=(0, 13, 5)), torch.full((1, 1), 7)
    first = calidrop.KVCache(llama, recipe)
    generate(llama, inputs, first, new=4)
    for rows in ([2], -1, slice(2, 3), torch.tensor([-1]), torch.tensor([False, False, True]), [False, False, True]):
        cache, want = copy.deepcopy(first), copy.deepcopy(first)
        cache.batch_select_indices(rows)
        want.batch_select_indices(torch.tensor([2]))
        assert worst(llama(token, **using(cache)).logits, llama(token, **using(want)).logits) == 0
    held = first.nbytes
    for rows in ([3], torch.tensor([0, -4])):
        with pytest.raises(IndexError):
            first.batch_select_indices(rows)
    assert first.nbytes == held and llama(token.expand(3, 1), **using(first)).logits.isfinite().all()
