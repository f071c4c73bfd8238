"""A cache in a file."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import calidrop
import test_hybrids
import test_mla
import test_shared
from calidrop import steady, written
from calidrop.plugin import using
from calidrop.state import tensors
from helpers import kernels, predictor
from tape import tape
from tiny import batch, generate, soft, tiny, worst

KEPT = ["snapkv(budget=24, recent=8)", "h2o(budget=20)", "adakv(budget=24, recent=8)"]
RECIPES = [
    "full",
    *KEPT,
    "expected_attention(budget=20)+calidrop(offload=False, summary=3)",
    "g_kv(budget=32, every=8)",
    "r_kv(budget=24, every=8)",
    "lazy_eviction(budget=24, window=8)",
    f"judge_q(budget=20, file={soft(tiny())!r})",
    predictor(24, dense=1, skip=1),
    "kivi(bits=2, group=16)",
    "int8",
    "fp8",
    "ott(bits=4)",
    "mixkvq",
    "think(0.5)+int8",
    "decoquant(bits=4)",
    f"{KEPT[0]}+calidrop",
    f"{KEPT[0]}+int4+calidrop(summary=3)",
    f"{KEPT[0]}+kvcrush+calidrop(late=1)",
    f"{KEPT[2]}+kivi(bits=4, group=16)+calidrop(recompute=0.3)",
    f"{KEPT[1]}+mikv(bits=3)",
]


def bytes_of(cache):
    return cache.nbytes, cache.host_nbytes, cache.full_nbytes


def check(model, recipe, file, tokens=12, **how):
    """A cache goes on from its file as it goes on itself, with 2 padded rows."""
    cache = calidrop.KVCache(model, recipe, **how)
    inputs = batch()
    said, _ = generate(model, inputs, cache, new=tokens)
    cache.save(file)
    held = bytes_of(cache)
    again = calidrop.KVCache.load(model, file, **how)
    assert str(again.recipe) == str(cache.recipe) and again.get_seq_length() == cache.get_seq_length()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1)
    more = {"input_ids": torch.cat([inputs["input_ids"], said], 1), "attention_mask": mask}
    _, got = generate(model, more, again, new=tokens)
    assert bytes_of(cache) == held  # the one has nothing of the other
    _, want = generate(model, more, cache, new=tokens)
    assert torch.equal(got, want)
    assert bytes_of(again) == bytes_of(cache)
    both = [[x for x in c.describe().split("\n") if "recorded" not in x] for c in (again, cache)]
    assert both[0] == both[1] and len(both[0]) > 2
    assert str(again.holdings()) == str(cache.holdings())


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cache_goes_on_from_its_file(llama, recipe, tmp_path):
    check(llama, recipe, tmp_path / "cache")


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen2"])
def test_other_layers(family, tmp_path):
    check(tiny(family), f"{KEPT[0]}+int4+calidrop", tmp_path / "cache")


@pytest.mark.parametrize("family", test_hybrids.FAMILIES)
def test_states_beside_keys_and_values(family, tmp_path):
    check(test_hybrids.hybrid(family), "h2o(budget=20)+calidrop", tmp_path / "cache")


@pytest.mark.parametrize("family", test_mla.HERE)
def test_latents(family, tmp_path):
    check(test_mla.made(family), f"{KEPT[0]}+int8", tmp_path / "cache")


@pytest.mark.parametrize("family", test_shared.FAMILIES)
def test_layers_that_share(family, tmp_path):
    check(test_shared.shared(family), f"{KEPT[0]}+calidrop", tmp_path / "cache")


def test_recorded_steps(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(steady.RECORDERS, "cpu", tape)
    with kernels(monkeypatch, "torch"):
        check(llama, "h2o(budget=20)+int4", tmp_path / "cache", graph=True)


def test_another_process_reads_it(llama, tmp_path):
    """The file holds what the cache holds and little more, and leans on nothing in this process."""
    recipe, inputs = f"{KEPT[2]}+calidrop", batch(length=400)
    cache = calidrop.KVCache(llama, recipe)
    generate(llama, inputs, cache, new=8)
    cache.save(tmp_path / "cache")
    held = cache.nbytes + cache.host_nbytes
    assert held <= (tmp_path / "cache").stat().st_size < held + 40_000
    token = torch.full((2, 1), 7)
    with torch.no_grad():
        want = llama(token, **using(cache)).logits
    code = (
        "import sys, torch, calidrop; sys.path.insert(0, sys.argv[1])\n"
        "from tiny import tiny; from calidrop.plugin import using\n"
        "model = tiny(); cache = calidrop.KVCache.load(model, sys.argv[2] + '/cache')\n"
        "with torch.no_grad(): torch.save(model(torch.full((2, 1), 7), **using(cache)).logits, sys.argv[2] + '/logits')"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True)
    assert worst(torch.load(tmp_path / "logits"), want) < 1e-5


def test_what_a_mask_said_is_known(llama, tmp_path):
    cache, inputs = calidrop.KVCache(llama, "h2o(budget=20)"), batch()
    generate(llama, inputs, cache, new=2)
    cache.save(tmp_path / "cache")
    again = calidrop.KVCache.load(llama, tmp_path / "cache")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    mask[1, 20] = 0
    with pytest.raises(ValueError, match="must say of cached columns what it said"):
        llama(torch.full((2, 1), 7), attention_mask=mask, **using(again))
    # one thing for all layers, as it was
    assert len({id(layer.told) for layer in again.layers_here}) == 1


def test_a_cache_of_nothing(llama, tmp_path):
    calidrop.KVCache(llama, f"{KEPT[0]}+calidrop").save(tmp_path / "cache")
    again = calidrop.KVCache.load(llama, tmp_path / "cache")
    want, _ = generate(llama, batch(), calidrop.KVCache(llama, f"{KEPT[0]}+calidrop"))
    assert torch.equal(generate(llama, batch(), again)[0], want)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: tiny("qwen2"), "model type llama, got qwen2"),
        (lambda: tiny(num_key_value_heads=3), "heads per layer"),
        (lambda: tiny(num_hidden_layers=4), "heads per layer"),
        (lambda: tiny().bfloat16(), "dtype torch.float32, got torch.bfloat16"),
        (lambda: tiny(initializer_range=0.3), "key weights are not this model's"),
    ],
)
def test_another_model_is_refused(llama, model, said, tmp_path):
    cache = calidrop.KVCache(llama, "h2o(budget=20)")
    generate(llama, batch(), cache, new=2)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=said):
        calidrop.KVCache.load(model(), tmp_path / "cache")


def test_files_that_are_no_caches(llama, tmp_path):
    with pytest.raises(FileNotFoundError):
        calidrop.KVCache.load(llama, tmp_path / "none")
    (tmp_path / "text").write_text("no cache")
    save_file({"x": torch.zeros(2)}, tmp_path / "tensors")
    for name in ("text", "tensors"):
        with pytest.raises(ValueError, match=r"is no cache that can be read: expected what `KVCache\.save` writes"):
            calidrop.KVCache.load(llama, tmp_path / name)
    cache = calidrop.KVCache(llama, "int8")
    generate(llama, batch(), cache, new=2)
    cache.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="is no cache that can be read"):
        calidrop.KVCache.load(llama, tmp_path / "short")


def changed(file, fn):
    """The file with another head."""
    with safe_open(file, "pt") as f:
        head, held = json.loads(f.metadata()[written.ENTRY]), {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    fn(head)
    save_file(held, file, {written.ENTRY: json.dumps(head)})


def test_files_of_another_version_are_refused(llama, tmp_path):
    def of(**change):
        cache = calidrop.KVCache(llama, "int8")
        generate(llama, batch(), cache, new=2)
        cache.save(tmp_path / "cache")
        return tmp_path / "cache"

    changed(of(), lambda head: head.update(format=2))
    with pytest.raises(ValueError, match="format 2, expected 1"):
        calidrop.KVCache.load(llama, tmp_path / "cache")
    changed(of(), lambda head: head["parts"]["layers"]["list"][0]["of"].pop("seen"))
    with pytest.raises(ValueError, match=r"another version of calidrop: layers\[0\] differs in seen"):
        calidrop.KVCache.load(llama, tmp_path / "cache")
    for name in ("calidrop.state:Nothing", "calidrop.nothing:State", "os:system", "calidrop.cache:KVCache"):
        changed(of(), lambda head, name=name: head["parts"]["layers"]["list"][0].update(part=name))
        with pytest.raises(ValueError, match=f"does not know: {name}"):
            calidrop.KVCache.load(llama, tmp_path / "cache")


def test_a_file_is_there_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    cache = calidrop.KVCache(llama, "full")
    generate(llama, batch(), cache, new=2)
    cache.save(tmp_path / "cache")
    was = (tmp_path / "cache").read_bytes()

    def full(data, file, *args):
        with open(file, "w") as f:
            f.write("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(written, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == was
    assert [x.name for x in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "nowhere" / "cache")


def test_what_no_file_can_say_is_refused(llama, tmp_path):
    cache = calidrop.KVCache(llama, "h2o(budget=20)")
    generate(llama, batch(), cache, new=2)
    cache.layers_here[1].state.store.more = lambda: 0
    with pytest.raises(ValueError, match=r"cannot save layers\[1\].store.more: got function"):
        cache.save(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_copy_is_one_and_a_pickle_is_refused(llama):
    cache = calidrop.KVCache(llama, f"{KEPT[0]}+calidrop")
    generate(llama, batch(), cache, new=2)
    twin = copy.deepcopy(cache)
    states = [[x.data_ptr() for layer in c.layers_here for x in tensors(layer.state)] for c in (cache, twin)]
    assert not set(states[0]) & set(states[1])
    for fn in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=r"cannot be pickled: cache.save\(file\)"):
            fn(cache)
