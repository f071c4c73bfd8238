"""Decode steps under torch.compile are the steps that would have run from Python."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from transformers import DynamicCache

from calidrop.cache import KVCache
from calidrop.plugin import using
from tiny import batch, generate, soft, tiny, worst

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, as the compiler is imported
SNAP = "snapkv(budget=24, recent=8, every=4)"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@torch.no_grad()
def test_a_thousand_tokens_compile_once():
    """Whatever the cache does on the way: flushes, a window that grows, other caches, other prompts."""
    model = tiny(num_hidden_layers=2)
    for recipe in (SNAP, "full", f"{SNAP}+calidrop", "kivi(bits=4, group=8, residual=16)"):
        inputs = batch()
        plain, steps = KVCache(model, recipe), KVCache(model, recipe, compile=True)
        want, got = generate(model, inputs, plain, 40)[1], generate(model, inputs, steps, 40)[1]
        assert worst(got, want) < 1e-3
        assert steps.get_seq_length() == plain.get_seq_length() and "steps: compiled" in steps.describe()
    assert graphs() == 1
    cache = KVCache(model, SNAP, compile=True)
    logits = model(**batch(), **using(cache)).logits[:, -1:]
    for _ in range(1000):
        logits = model(logits.argmax(-1), **using(cache)).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 1061
    assert graphs() == 1


@pytest.mark.slow
def test_threads_wait_for_each_other():
    """Each step is answered by the cache it was given."""
    model = tiny(num_hidden_layers=2)
    given = [batch(rows=1, length=length) for length in (40, 61, 52)]
    want = [generate(model, x, KVCache(model, SNAP, compile=True), 40)[1] for x in given]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda x: generate(model, x, KVCache(model, SNAP, compile=True), 40)[1], given)
        for got, expected in zip(found, want, strict=True):
            assert worst(got, expected) < 1e-4


@pytest.mark.slow
def test_what_cannot_be_compiled_runs():
    model = tiny(num_hidden_layers=1)
    plain, steps = KVCache(model, SNAP), KVCache(model, SNAP, compile=True)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        got = generate(model, batch(), steps, 20)[0]
    assert torch.equal(generate(model, batch(), plain, 20)[0], got)
    assert "not compiled: " in steps.describe()


@pytest.mark.slow
@torch.no_grad()
def test_more_batch_sizes_than_torch_compiles():
    model = tiny(num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2):
            plain, steps = KVCache(model, SNAP), KVCache(model, SNAP, compile=True)
            want, got = (generate(model, batch(rows=rows), c, 20)[1] for c in (plain, steps))
            assert worst(got, want) < 1e-3
            assert ("steps: compiled" if rows == 1 else "not compiled: ") in steps.describe()


@pytest.mark.slow
@torch.no_grad()
def test_hooks_of_soft_tokens_let_it_pass():
    model = tiny(num_hidden_layers=1)
    recipe = f"judge_q(budget=24, recent=8, file='{soft(model)}')"
    plain, steps = KVCache(model, recipe), KVCache(model, recipe, compile=True)
    assert worst(generate(model, batch(), plain, 20)[1], generate(model, batch(), steps, 20)[1]) < 1e-3
    assert steps.steps is not None and steps.steps.describe() == "steps: compiled" and graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_sliding_layers(kind):
    """Past the window of 24 tokens, soft caps and sinks included."""
    model = tiny(kind)
    plain, steps = KVCache(model, SNAP), KVCache(model, SNAP, compile=True)
    assert worst(generate(model, batch(), plain, 40)[1], generate(model, batch(), steps, 40)[1]) < 1e-3
    assert steps.steps is not None and steps.steps.describe() == "steps: compiled" and graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KVCache", "DynamicCache"])
def test_a_model_that_its_user_compiled(kind):
    """In as many graphs as it takes: what a cache does from Python is in none of them. In a process of its own, where
    no types are checked, which cannot be compiled."""
    done = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0 and float(done.stdout) < 1e-4, done.stderr


@torch.no_grad()
def compiled_by_its_user(kind: str) -> float:
    model, found = tiny(num_hidden_layers=1), []
    ids = batch()["input_ids"]
    for forward in (model.forward, torch.compile(model.forward)):
        cache = KVCache(model, SNAP)  # after which any other cache works, too
        cache = cache if kind == "KVCache" else DynamicCache(config=model.config)
        logits = [forward(ids, **using(cache)).logits[:, -1:]]
        for _ in range(6):
            logits.append(forward(logits[-1].argmax(-1), **using(cache)).logits)
        found.append(torch.stack(logits))
    return worst(*found)


def test_refusals():
    model = tiny("mistral")
    model.config.layer_types, model.config.attention_chunk_size = ["chunked_attention"] * 3, 16
    with pytest.raises(ValueError, match="here some see chunks"):
        KVCache(model, compile=True)


if __name__ == "__main__":
    print(compiled_by_its_user(sys.argv[1]))
