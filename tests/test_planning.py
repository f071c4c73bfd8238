import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import calidrop
from calidrop import KVCache, pareto
from calidrop.cache import layers_of
from calidrop.cli import app
from calidrop.compare import Row
from calidrop.footprint import Prompt, footprint
from calidrop.memory import parse_bytes
from calidrop.planning import Advice, Option, candidates
from calidrop.plugin import using
from calidrop.recipe import parse
from tiny import soft, tiny

RECIPES = [
    "full",
    "snapkv(budget=96)",
    "snapkv(budget=96, every=16)+calidrop",
    "snapkv(budget=0.3)+int4+calidrop",
    "adakv(budget=96)+calidrop(summary=8)",
    "h2o(budget=96)",
    "lazy_eviction(budget=96, window=16)",
    "tova(budget=80)+int8",
    "expected_attention(budget=90)",
    "pyramidkv(budget=100)+calidrop",
    "g_kv(budget=96)",
    "kivi(bits=4, group=16)",
    "snapkv(budget=128)+kivi(bits=2, group=16)",
    "mixkvq(group=16, block=32)",
    "decoquant",
    "ott(block=64)",
    "think(keep=0.6)+int4",
    "h2o(budget=0.2)+mikv",
    "streaming_llm(budget=100)+fp8",
    "judge_q(budget=96, file=SOFT)+int4+calidrop",
    "attention_predictor(budget=160, sinks=16, recent=32, skip=1)",
    "attention_predictor(budget=160, sinks=16, recent=32, skip=0)+int4",
]


@torch.no_grad()
def held(model, recipe: str, context: int, batch: int) -> KVCache:
    cache = KVCache(model, recipe, eager=True)
    ids = torch.randint(3, 97, (batch, context), generator=torch.Generator().manual_seed(0))
    model(ids, **using(cache), use_cache=True, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prediction_is_what_a_prefill_leaves(family, recipe):
    """To the byte where no format's size depends on the values of keys."""
    model = tiny(family, max_position_embeddings=1024)
    layers, recipe = layers_of(model, rotations=True), recipe.replace("SOFT", repr(soft(model)))
    size = footprint(parse(recipe), layers, Prompt(layers[0][0], 500, model.dtype), 500, 2)
    cache = held(model, recipe, 500, 2)
    exact = not recipe.startswith("ott")
    assert size.device == pytest.approx(cache.nbytes, rel=0 if exact else 0.03)
    assert size.host == cache.host_nbytes


def test_half_precision_and_beyond_the_ruler(monkeypatch):
    monkeypatch.setattr("calidrop.footprint.RULER", 200)
    model = tiny(max_position_embeddings=1024).to(torch.bfloat16)
    recipes = ["full", "snapkv(budget=128)+decoquant+calidrop", "h2o(budget=64)+mikv", "int8"]
    advice = calidrop.plan(model, context=500, memory="1GB", recipes=recipes)
    for option in advice.options:
        cache = held(model, option.recipe, 500, 1)
        assert option.device_bytes == pytest.approx(cache.nbytes, rel=1e-3)
        assert option.host_bytes == cache.host_nbytes
        assert advice.full_bytes == cache.full_nbytes


def test_tokens_and_bits_are_read_off_what_is_held():
    recipes = [recipe.replace("SOFT", repr(soft(tiny()))) for recipe in RECIPES]
    advice = calidrop.plan(tiny(), context=300, memory="1GB", recipes=recipes)
    told = {o.recipe: (o.tokens, o.bits) for o in advice.options}
    assert told["full"] == (300, 32)
    assert told["snapkv(budget=96)"] == (96, 32)
    assert told["snapkv(budget=0.3)+int4+calidrop"] == (90, 4)  # what is on the host does not count
    assert told["tova(budget=80)+int8"] == (80, 8)
    assert told["lazy_eviction(budget=96, window=16)"] == (300, 32)  # prompts stay whole
    assert told["h2o(budget=0.2)+mikv"] == (300, 2)
    assert told["kivi(bits=4, group=16)"] == (300, 4)
    assert told["ott(block=64)"] == (300, 2)
    assert told["pyramidkv(budget=100)+calidrop"][0] == pytest.approx(100, abs=1)


def test_a_config_gives_what_its_model_gives():
    model = tiny("gemma2")
    recipes = ["full", "expected_attention(budget=90)+int4"]
    of_model, of_config = (
        calidrop.plan(x, context=200, batch=3, memory="1GB", recipes=recipes, dtype=torch.float16)
        for x in (model, model.config)
    )
    assert of_config.options == of_model.options


def test_more_tokens_at_four_bits_before_fewer_exact():
    model = tiny(head_dim=32)
    full = calidrop.plan(model, context=512, memory="1GB").full_bytes
    assert calidrop.plan(model, context=512, memory="1GB").recommended.recipe == "full"
    options = calidrop.plan(model, context=512, memory=full // 3).options
    assert options[0].bits == 4
    assert options[0].tokens == max(o.tokens for o in options)
    assert any(o.bits == 32 and o.tokens < 512 for o in options)
    assert all(o.device_bytes <= full // 3 for o in options)
    below = [o.bits < 4 for o in options]
    assert below == sorted(below)
    assert any(below)


def test_host_memory():
    model = tiny(head_dim=32)
    most = calidrop.plan(model, context=512, memory="300kB").options
    some = calidrop.plan(model, context=512, memory="300kB", host_memory="400kB").options
    none = calidrop.plan(model, context=512, memory="300kB", host_memory=0).options
    assert max(o.host_bytes for o in most) > 400_000 >= max(o.host_bytes for o in some) > 0
    assert not any("calidrop" in o.recipe for o in none)


def test_free_memory_is_read_and_said_and_not_spent_twice(monkeypatch):
    free = type("Free", (), {"available": 300_000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    advice = calidrop.plan(tiny(head_dim=32), context=512)
    assert advice.memory == advice.host_memory == 300_000
    assert "available on this machine" in advice.memory_source
    assert all(o.device_bytes + o.host_bytes <= 300_000 for o in advice.options)


def test_notes():
    advice = calidrop.plan(tiny(), context=600, memory="200kB")
    assert "context 600 is beyond the 512 positions the model was made for" in advice.notes
    assert any("left out: kivi: group must divide head_dim" in note for note in advice.notes)
    assert any("do not fit" in note for note in advice.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "1kB"}, "nothing fits in 0.00 MB: the smallest of .* needs 0.* MB on the device"),
        ({"memory": "2 apples"}, "memory must be bytes .* got '2 apples'"),
        ({"memory": 0}, "memory must be at least 1 bytes"),
        ({"context": 0}, "context must be a whole number >= 1"),
        ({"batch": 0}, "batch must be a whole number >= 1"),
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": ["kivi"]}, "group must divide head_dim"),
        ({"recipes": ["nothing"]}, "unknown method 'nothing'"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        calidrop.plan(tiny(), **{"context": 100, "memory": "1GB", **changes})


def test_models_that_cannot_work():
    from transformers import BloomConfig, T5Config

    for config, message in ((BloomConfig(n_layer=1), "ALiBi"), (T5Config(), "t5 is not supported"), ("llama", "str")):
        with pytest.raises(ValueError, match=message):
            calidrop.plan(config, context=100, memory="1GB")


@pytest.mark.parametrize(
    ("text", "n"),
    [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5 kb", 1500), ("7", 7), (7, 7), ("3b", 3), ("1TiB", 1 << 40)],
)
def test_sizes(text, n):
    assert parse_bytes("memory", text) == n


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "2G iB", "1.5", 1.5, True, None, "1iB"])
def test_bad_sizes(text):
    if text == "1.5":
        assert parse_bytes("memory", text) == 1
        return
    with pytest.raises(ValueError, match="memory must be bytes"):
        parse_bytes("memory", text)


def test_candidates_are_all_different_and_smaller_than_the_context():
    for context in (10, 100, 2048, 100_000):
        recipes = [str(r) for r in candidates(context, host=True)]
        assert len(set(recipes)) == len(recipes)
        assert {"full", "int4"} <= set(recipes)
    assert not any("calidrop" in str(r) for r in candidates(2048, host=False))


def test_front():
    assert pareto.front([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (1, 5)]) == {0, 1, 4, 5}


def test_drawing(tmp_path):
    """Many points on a front, two of them the same, one without any KL; needs no display."""
    row = Row("x", 0.0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0)
    kls = [0.5, 0.1, 0.1, 0.01, 0.0, 0.2]
    sizes = [1, 2, 2, 3, 4, 5]
    best = pareto.front(list(zip(sizes, kls, strict=True)))
    options = tuple(
        Option(f"snapkv(budget={i})", n * 10**6, i % 2, 1, 1, 1, 4, replace(row, kl=kl), i in best)
        for i, (n, kl) in enumerate(zip(sizes, kls, strict=True))
    )
    advice = Advice(100, 2, "float32", 6 * 10**6, "given", 10**9, "given", 10**7, options, ())
    pareto.draw(advice, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    bare = replace(advice, options=tuple(replace(o, row=None) for o in options))
    with pytest.raises(ValueError, match="nothing was measured"):
        pareto.draw(bare, tmp_path / "y.png")


def run(*args, code=0):
    result = CliRunner().invoke(app, ["plan", *map(str, args)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("option", ["--plot", "--text"])
def test_what_needs_measuring(option, tmp_path):
    told = run("--context", 100, option, tmp_path / "x", code=2).stderr
    assert told == "Error: --plot and --text need --measure\n"


@pytest.mark.parametrize("name", ["p.txt", "p"])
def test_a_picture_of_no_known_format_is_refused_before_anything_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr("calidrop.cli.load_model", lambda *args: pytest.fail("a model was loaded"))
    told = run("--context", 100, "--measure", "--plot", tmp_path / name, code=2).stderr
    assert told.startswith("Error: cannot draw ") and "expected a name that ends in .png (or" in told


def test_command_with_a_config(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    out = tmp_path / "plan.json"
    told = run("--config", tmp_path, "--context", 300, "--memory", "100kB", "--json", out).stdout
    read = json.loads(out.read_text())
    assert f"recommended: {read['recommended']} " in told
    assert read["recommended"] == read["options"][0]["recipe"]
    assert read["memory"] == 100_000
    args = "--config", tmp_path / "config.json", "--context", 300, "--memory", "1kB"
    assert run(*args, code=2).stderr.startswith("Error: nothing fits in 0.00 MB")
    assert "no such config" in run("--config", tmp_path / "no", "--context", 300, code=2).stderr
    assert "needs a model with weights" in run("--config", tmp_path, "--context", 300, "--measure", code=2).stderr


@pytest.mark.slow
def test_measured_on_the_real_model(tmp_path):
    """The front is drawn, and 4 bits for all tokens are nearer than a quarter of them exact, at fewer bytes."""
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    recipes = ["int4", "snapkv(budget=128)", "snapkv(budget=64)", "snapkv(budget=128)+int4+calidrop"]
    named = [word for recipe in recipes for word in ("--recipe", recipe)]
    args = "--context", 512, "--continuation", 16, "--memory", "8MB", "--measure"
    told = run(*args, *named, "--plot", png, "--json", out).stdout
    options = {o["recipe"]: o for o in json.loads(out.read_text())["options"]}
    assert "recommended: int4 (lowest KL)" in told
    assert options["int4"]["device_bytes"] < options["snapkv(budget=128)"]["device_bytes"]
    assert options["int4"]["row"]["kl"] < options["snapkv(budget=128)"]["row"]["kl"]
    assert options["int4"]["front"]
    assert not options["snapkv(budget=128)"]["front"]
    for o in options.values():  # 16 more tokens are in the measured one
        assert o["device_bytes"] <= o["row"]["device_bytes"] <= o["device_bytes"] * 1.25
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(png.read_bytes()) > 10_000


def test_contexts_that_no_run_can_hold_are_refused_at_once():
    with pytest.raises(ValueError, match=r"for 2,000,000,000 tokens takes about .* MB of host memory, got"):
        calidrop.plan(tiny(), context=2 * 10**9, recipes=["full"])
