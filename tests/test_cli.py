import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from calidrop import __version__
from calidrop.cli import app
from calidrop.compare import Row
from calidrop.methods import METHODS
from calidrop.terminal import COLUMNS, print_rows

FIELDS = [
    *("recipe", "kl", "kl_p95", "agreement", "nll", "nll_full", "device_bytes", "host_bytes", "full_bytes", "ratio"),
    *("prefill_s", "decode_ms_per_token", "recompute_rate"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random Llama; its vocabulary covers English poorly, and most words are read as "the"."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {"</s>": 0, "the": 1, "of": 2, "and": 3, "a": 4, "to": 5, "in": 6}
    words = Tokenizer(WordLevel(vocabulary, unk_token="the"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=len(vocabulary),
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def run(*args, code=0, columns=100):
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result


def test_help():
    for command in ("demo", "generate", "compare", "plan", "methods"):
        assert command in run("--help").output
        assert "--help" in run(command, "--help").output


def test_version():
    assert run("--version").output == f"calidrop {__version__}\n"


def test_cli_itself_needs_no_torch():
    """What `--help` costs beyond `import calidrop`."""
    stub = "import sys, types; p = types.ModuleType('calidrop'); p.__path__ = sys.argv[1:]; sys.modules['calidrop'] = p"
    code = f"{stub}; import calidrop.cli; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    import calidrop

    subprocess.run([sys.executable, "-c", code, *calidrop.__path__], check=True)


def test_methods():
    out = run("methods", columns=200).output
    for name in METHODS:
        assert name in out
    assert "budget, recent=32, kernel=5, every=None" in out
    assert "what becomes of the rest" in out
    assert "arXiv 2507.19906" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "--recipe", "snapkw"], "unknown method 'snapkw'"),
        (["compare", "--recipe", "full", "--text", "no.txt"], "No such file or directory: no.txt"),
        (["compare", "--recipe", "full", "--json", "no/such/out.json"], "cannot write no/such/out.json"),
        (["compare", "--recipe", "full", "--model", "no/such [model]"], "model 'no/such [model]' not found"),
        (["generate", "hello", "--recipe", "h2o()"], "h2o: missing a required argument: 'budget'"),
        (["generate"], "give either a PROMPT or --file"),
        (["generate", "hello", "--file", "x"], "give either a PROMPT or --file"),
        (["generate", "--file", "no.txt"], "No such file or directory: no.txt"),
        (["generate", "hello", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, float64"),
    ],
)
def test_errors_are_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.strip().count("\n") == 0


def test_not_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\xff")
    assert "is not UTF-8 text" in run("compare", "--recipe", "full", "--text", tmp_path / "x", code=2).stderr


def test_compare(tiny, tmp_path):
    out = tmp_path / "rows.json"
    recipes = "snapkv(budget=40)+calidrop", "full"
    named = [word for recipe in recipes for word in ("--recipe", recipe)]
    table = run("compare", *named, "--model", tiny, "--context", 200, "--continuation", 8, "--json", out).stdout
    rows = json.loads(out.read_text())
    assert [row["recipe"] for row in rows] == list(recipes)
    assert all(list(row) == FIELDS for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in FIELDS[1:])
    assert rows[1]["kl"] == 0
    for recipe in recipes:
        assert recipe in table


def test_compare_other_text(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the of and " * 20)
    args = ["compare", "--recipe", "full", "--model", tiny, "--text", text, "--continuation", 8]
    run(*args, "--context", 51)
    assert "got 60 tokens, need 61" in run(*args, "--context", 52, code=2).stderr


def test_generate(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the of and " * 30)
    args = ["--recipe", "snapkv(budget=40)", "--max-new-tokens", 5, "--model", tiny]
    told = run("generate", "the of and " * 30, *args, "--describe")
    assert len(told.stdout.split()) == 5
    assert "MB on the device" in told.stderr
    assert "layer 1: exact window" in told.stderr
    assert run("generate", "--file", text, *args).stdout == told.stdout
    half = run("generate", "--file", text, *args, "--dtype", "bfloat16").stderr
    full = [float(re.search(r"([\d.]+) MB uncompressed", said)[1]) for said in (told.stderr, half)]
    assert full[1] == pytest.approx(full[0] / 2, rel=0.1)


def test_demo(tiny):
    out = run("demo", "--model", tiny, "--context", 150, "--continuation", 4, "--tokens", 3, "--threads", 1).stdout
    for words in ("adakv(budget=40)+calidrop", "kivi(bits=4)", "the book goes on", "uncompressed:"):
        assert words in out


def test_table_fits_100_columns(capsys):
    """The largest plausible numbers, on one line each."""
    row = Row("snapkv(budget=256)+calidrop", 9.9999, 12.3456, 1, 12.345, 3, 10**10, 10**11, 10**11, 99.9, 999, 9999, 1)
    print_rows(Console(width=100), [row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    head = next(i for i, line in enumerate(lines) if line.startswith("recipe"))
    assert lines[head].split() == [name for name, _, _ in COLUMNS]
    assert lines[head + 1].split()[:3] == [row.recipe, "9.9999", "12.3456"]
    assert lines[head + 1].split()[-1] == "100%"


@pytest.mark.slow
def test_demo_on_the_real_model():
    """As a user runs it, only shorter. The recipes differ as they should: 4 bits hurt least, asking back helps."""
    args = "--context", "512", "--continuation", "16", "--tokens", "8"
    code = "from calidrop.cli import app; app()"
    wide = {**os.environ, "COLUMNS": "110"}  # a narrow terminal folds long recipes
    command = [sys.executable, "-c", code, "demo", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=wide)
    lines = [line.split() for line in done.stdout.splitlines()]
    numbers = [line for line in lines if len(line) == len(COLUMNS) and re.fullmatch(r"[\d.]+", line[1])]
    kl = {line[0]: float(line[1]) for line in numbers}
    assert len(kl) == 5, done.stdout
    assert kl["full"] == 0
    assert kl["kivi(bits=4)"] < kl["snapkv(budget=64)+calidrop"] < kl["snapkv(budget=64)"]
