"""The embedded SmolLM2: what the tiny models cannot show."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache

from calidrop import KVCache
from calidrop.compare import compare
from calidrop.plugin import using
from calidrop.state import tensors
from helpers import ALICE, feed
from openloop import built, record
from tiny import generate, worst

pytestmark = pytest.mark.slow


def prompt(tokenizer, start: int, n: int) -> torch.Tensor:
    return tokenizer(ALICE.read_text()[start : start + 8 * n], return_tensors="pt").input_ids[:, :n]


def test_full_is_the_dynamic_cache(smollm2):
    model, tokenizer = smollm2
    texts = ["The capital of France is", "Once upon a time, in a small village near the sea, there lived a man who"]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    model.set_attn_implementation("sdpa")
    tokens, logits = generate(model, inputs, DynamicCache(config=model.config), new=24)
    ours, our_logits = generate(model, inputs, KVCache(model), new=24)
    assert worst(logits, our_logits) < 2e-4
    assert torch.equal(tokens, ours)


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv(budget=64)",
        "adakv(budget=64)+calidrop",
        "kivi(bits=4)",
        "h2o(budget=64)+calidrop(summary=8)",
        "lazy_eviction(budget=64, window=8)",
    ],
)
def test_padded_rows_and_lookup_decoding(smollm2, recipe):
    model, tokenizer = smollm2
    texts = [ALICE.read_text()[9000:10200], ALICE.read_text()[30000:31900]]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    tokens, logits = generate(model, inputs, KVCache(model, recipe), new=16)
    # the last bit differs between batch sizes, and may move a code or a choice between near equals
    limit = 5e-2 if "kivi" in recipe else 2e-3
    for i, text in enumerate(texts):
        alone = dict(tokenizer(text, return_tensors="pt"))
        row, row_logits = generate(model, alone, KVCache(model, recipe), new=16)
        assert worst(logits[i : i + 1], row_logits) < limit
        assert torch.equal(tokens[i : i + 1], row)
    lookup, _ = generate(model, alone, KVCache(model, recipe), new=16, prompt_lookup_num_tokens=3, output_logits=False)
    assert torch.equal(lookup, row)


@torch.no_grad()
def test_first_order_beats_the_constant_open_loop(smollm2, monkeypatch):
    """Attention-output error where earlier layers make none, so that both orders recompute exactly the same heads."""
    model, tokenizer = smollm2
    n, steps, layers = 2048, 128, model.config.num_hidden_layers
    recorded = record(model, prompt(tokenizer, 60000, n + steps), monkeypatch)
    base = f"snapkv(budget={n // 20})"
    recipes = {
        "evict": base,
        "published": f"{base}+calidrop(order=0, recompute=0.7, apply=0.85)",
        "order 0": f"{base}+calidrop(order=0, recompute=0.7)",
        "order 1": f"{base}+calidrop(order=1, recompute=0.7)",
    }
    errors: dict[str, list] = {name: [] for name in recipes}
    counts = {name: [0, 0] for name in recipes}
    for i, qkv in enumerate(recorded):
        want = feed(built("full", qkv, i, layers), qkv, [n] + [1] * steps)[:, :, n:]
        for name, recipe in recipes.items():
            layer = built(recipe, qkv, i, layers)
            out = feed(layer, qkv, [n] + [1] * steps)[:, :, n:]
            errors[name].append(((out - want).norm(dim=-1) / want.norm(dim=-1)).mean())
            asked, of = layer.state.store.recomputed()
            counts[name] = [counts[name][0] + asked, counts[name][1] + of]
    error = {name: torch.stack(e).mean().item() for name, e in errors.items()}
    rate = {name: asked / max(1, of) for name, (asked, of) in counts.items()}
    print({k: f"{error[k]:.4f} ({rate[k]:.3f})" for k in error})
    assert rate["order 0"] == rate["order 1"] > 0.05
    assert error["order 1"] <= 0.6 * error["order 0"]
    assert error["order 1"] < error["evict"]
    assert error["order 1"] < error["published"]


def test_first_order_beats_the_constant_closed_loop(smollm2):
    model, tokenizer = smollm2
    base = "snapkv(budget=102)"
    recipes = [base, f"{base}+calidrop(order=0, recompute=0.7)", f"{base}+calidrop(order=1, recompute=0.7)"]
    kl = torch.zeros(3)
    starts = (20000, 60000, 100000)
    for start in starts:
        rows = compare(model, tokenizer, ALICE.read_text()[start:], recipes, context=2048, continuation=64)
        kl += torch.tensor([row.kl for row in rows])
    evict, constant, first = (kl / len(starts)).tolist()
    print(f"KL: evict {evict:.4f}, order 0 {constant:.4f}, order 1 {first:.4f}")
    assert first <= 0.6 * constant
    assert first < evict


@torch.no_grad()
def test_the_bytes_are_really_free(smollm2):
    """After compressing an 8k prompt, the live tensors of the process are the weights and what the cache reports."""
    import gc

    model, tokenizer = smollm2
    ids = prompt(tokenizer, 0, 8000)

    def live() -> dict[int, int]:
        gc.collect()
        found = {}
        for item in gc.get_objects():
            # isinstance asks every object, and some warn; what torch's compiler leaves behind has no memory
            if issubclass(type(item), torch.Tensor) and not issubclass(type(item), FakeTensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return found

    before = live()
    cache = KVCache(model, "snapkv(budget=512)+calidrop")
    model(ids, **using(cache), logits_to_keep=1)
    device, host = cache.nbytes, cache.host_nbytes
    new = {p: n for p, n in live().items() if p not in before}
    mine = {t.untyped_storage().data_ptr() for t in (*tensors(state(cache)), *tensors(state(cache), host=True))}
    assert sum(n for p, n in new.items() if p in mine) == device + host
    assert sum(n for p, n in new.items() if p not in mine) < 64_000  # masks and positions of the last call
    assert device < 0.09 * cache.full_nbytes
    assert 0.93 * cache.full_nbytes < host < 0.97 * cache.full_nbytes  # and positions


def state(cache: KVCache) -> list:
    return [layer.state for layer in cache.layers]


# VmHWM and not ru_maxrss, which a process inherits from the one that started it
PEAK = """
import re, sys, torch
torch.set_num_threads(2); torch.set_grad_enabled(False)
import calidrop
from calidrop.plugin import using
model, tokenizer = calidrop.load()
ids = tokenizer(open(sys.argv[1]).read(), return_tensors="pt").input_ids[:, :8000]
cache = calidrop.KVCache(model, "snapkv(budget=512)", eager=True)
model(ids, **using(cache), logits_to_keep=1)
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
print(ids.shape[1], peak / 2**20, cache.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prefill_of_8k_peaks_under_two_gib():
    out = subprocess.run([sys.executable, "-c", PEAK, str(ALICE)], capture_output=True, text=True, check=True).stdout
    n, peak, _ = out.split()
    print(f"{n} tokens, peak {peak} GiB")
    assert int(n) == 8000
    assert float(peak) < 2.0  # 1.3 here; plain attention that makes a matrix of scores would take 2.3 for that alone


def test_what_each_format_is_for(smollm2):
    """KL to the full cache at measured bytes. ThinK and 2-bit MiKV are not here: their claims do not hold on this model
    (LOG.md)."""
    model, tokenizer = smollm2
    pairs = [  # (better, worse, whether the better one may hold no more bytes)
        ("ott(block=64)", "kivi(bits=2, group=64, residual=64)", True),
        ("mixkvq(residual=32)", "kivi(bits=2, residual=96)", True),
        ("int4", "int4(rotate=False)", True),
        ("h2o(budget=0.2)+mikv(bits=4)", "h2o(budget=0.36)", True),
        ("snapkv(budget=412)+int4", "snapkv(budget=128)", True),
    ]
    recipes = [name for better, worse, _ in pairs for name in (better, worse)]
    rows = {r.recipe: r for r in compare(model, tokenizer, ALICE.read_text()[20000:], recipes, 1200, 40)}
    for better, worse, same_bytes in pairs:
        a, b = rows[better], rows[worse]
        print(f"{better} {a.kl:.4f} at {a.device_bytes:,} < {worse} {b.kl:.4f} at {b.device_bytes:,}")
        assert a.kl < b.kl
        assert a.device_bytes <= b.device_bytes * (1.0 if same_bytes else 1.1)
