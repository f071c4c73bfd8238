"""`calidrop.show`: the tables of a page against the caches they were read off, and text that stays as it was."""

import pytest
import torch
from typer.testing import CliRunner

import calidrop
from calidrop.cache import KVCache
from calidrop.cli import app
from calidrop.holding import places
from calidrop.models import load
from calidrop.plugin import using
from calidrop.showing import beginning
from calidrop.showing.pieces import written
from helpers import ALICE, predictor
from tiny import soft
from words import byte_model

TEXT = "naïve 日本 🦜🏽 <script>alert(1)</script>\r\n\n\tif x:  & &amp; العربية क्षि\n" * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def bytes_(folder):
    """`(model, tokenizer)`: random, of two layers with two kv heads; a token is a byte."""
    return load(folder)


def recipes(model):
    return [
        "full",
        "snapkv(budget=24, recent=8)",
        "adakv(budget=24, recent=8)+calidrop",
        "snapkv(budget=24, recent=8)+int4+calidrop",
        "h2o(budget=24, every=4)+mikv(bits=2)",
        "streaming_llm(budget=20)+calidrop(offload=False, summary=3)",
        "kivi(bits=2, group=16, residual=16)",
        "ott(bits=2, block=16, pool=2, spill=5, skip=0)",
        "lazy_eviction(budget=20, window=8)",
        predictor(24, dense=99) + "+int8",
        f"judge_q(budget=24, recent=8, file={soft(model)!r})+think",  # runs its own prefill
    ]


def test_tables_are_those_of_the_caches(bytes_):
    """Each recipe alone, fed by hand, ends where the shared prefill and the page's own writing did."""
    model, tokenizer = bytes_
    names = recipes(model)
    shown = calidrop.show(model, tokenizer, TEXT, names, context=90, generate=9)
    ids = tokenizer(TEXT)["input_ids"][:90]
    for name, held in zip(names, shown.held, strict=True):
        cache = KVCache(model, name, eager=True)
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), **using(cache)).logits[0, -1]
            new = []
            while len(new) < 9 and tokenizer.eos_token_id not in new:
                new.append(int(logits.argmax()))
                logits = model(torch.tensor([new[-1:]]), **using(cache)).logits[0, -1]
        assert (held.device_bytes, held.host_bytes) == (cache.nbytes, cache.host_nbytes), name
        assert [p.text for p in held.made] == [p.text for p in written(tokenizer, new)]
        end = 90 + len(new)
        assert held.table.shape == (2, 2, end)
        device = torch.zeros(2, 2)
        for i, holdings in enumerate(cache.holdings()):
            at = places(holdings, torch.ones(1, end, dtype=torch.bool), 2)[0]
            for head in range(2):
                for token in range(end):
                    h = holdings[at[head, token]]
                    assert held.kinds[held.table[i, head, token]] == (h.form, h.how)
                    device[i, head] += h.form in ("exact", "coded")
        assert torch.equal(held.per_head, device.long())
    assert shown.held[0].per_head.unique().tolist() == [end]


def test_one_prefill_for_all_that_can_share_it(bytes_, monkeypatch):
    model, tokenizer = bytes_
    calls, real = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    calidrop.show(model, tokenizer, TEXT, recipes(model)[:6], context=60)
    assert len(calls) == 1


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pieces_are_the_text(bytes_, real, request):
    tokenizer = request.getfixturevalue("smollm2")[1] if real else bytes_[1]
    ids, pieces = beginning(tokenizer, TEXT, None)
    assert len(ids) == len(pieces)
    assert "".join(p.text for p in pieces) == TEXT
    assert not any(p.special for p in pieces)
    bird = next(i for i, p in enumerate(pieces) if "🦜" in p.text)
    assert pieces[bird + 1].text == ""  # the rest of its bytes
    again = written(tokenizer, ids)
    assert "".join(p.text for p in again) == TEXT
    assert len(again) == len(ids)


def test_special_tokens_are_named(bytes_):
    _, tokenizer = bytes_
    _, pieces = beginning(tokenizer, "<s>ab", None)
    assert [(p.text, p.special) for p in pieces[1:]] == [("a", False), ("b", False)]
    assert pieces[0].text == "<s>"
    end = tokenizer.eos_token_id
    assert [(p.text, p.special) for p in written(tokenizer, [5, end])][1] == ("</s>", True)


def test_defaults(bytes_):
    model, tokenizer = bytes_
    shown = calidrop.show(model, tokenizer, "x" * 1500)
    assert len(shown.context) == 1024
    assert [h.recipe for h in shown.held][::5] == ["snapkv(budget=128)", "kivi(bits=2, group=16)"]
    assert len(calidrop.show(model, tokenizer, "x" * 50).context) == 50


def test_a_long_page_stays_small(bytes_):
    """A model's worth of random tables, which nothing can shrink much: 2000 tokens, 30 layers, 3 heads, 6 recipes."""
    model, tokenizer = bytes_
    shown = calidrop.show(model, tokenizer, ALICE.read_text("utf-8"), ["snapkv(budget=250)"], context=2000)
    one = shown.held[0]
    draw = [(torch.rand(30, 3, 2000) < 0.125).to(torch.uint8) for _ in range(6)]
    held = [type(one)(**{**vars(one), "table": table}) for table in draw]
    assert len(type(shown)(shown.model, shown.context, held).page()) < 1_000_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ""}, "empty text"),
        ({"context": 999}, "got .* tokens, need 999"),
        ({"context": 0}, "context must be a whole number >= 1, got 0"),
        ({"generate": -1}, "generate must be a whole number >= 0, got -1"),
        ({"recipes": "full"}, "recipes must be a list of at least one recipe, got 'full'"),
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": ["full", "nope"]}, "unknown method 'nope'"),
        ({"recipes": ["kivi(group=24)"]}, "group must divide head_dim"),
    ],
)
def test_errors_come_before_any_work(bytes_, monkeypatch, given, message):
    model, tokenizer = bytes_
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match=message):
        calidrop.show(model, tokenizer, **{"text": TEXT, **given})


def run(*args, code=0, stdin=None):
    result = CliRunner().invoke(app, ["show", *map(str, args)], input=stdin)
    assert result.exit_code == code, result.output
    return result


def test_command(folder, tmp_path):
    out = tmp_path / "page.html"
    told = run("--model", folder, "--text", "-", "-o", out, "--recipe", "h2o(budget=20)", stdin=TEXT.encode())
    assert "tokens under 1 recipes" in told.stdout
    page = out.read_text("utf-8")
    assert "h2o(budget=20)" in page
    assert "<script>alert" not in page


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "snapkw"], "unknown method 'snapkw'"),
        (["--text", "no.txt"], "No such file or directory: no.txt"),
        (["-o", "no/such/page.html"], "cannot write no/such/page.html"),
        (["--text", "-"], "empty text"),
        (["--context", "999999"], "need 999999"),
    ],
)
def test_command_refuses_before_the_model_is_loaded(folder, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calidrop.show_cli.load_model", lambda *_: pytest.fail("loaded"))
    result = run("--model", folder, *args, code=2, stdin=b"")
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.mark.slow
def test_what_snapkv_keeps_of_alice(smollm2):
    """Its heads differ, its last tokens stay, and each head holds its budget exactly."""
    model, tokenizer = smollm2
    shown = calidrop.show(
        model, tokenizer, ALICE.read_text("utf-8"), ["snapkv(budget=96)", "snapkv(budget=96)+int4"], 400
    )
    exact, coded = shown.held
    assert exact.per_head.unique().tolist() == coded.per_head.unique().tolist() == [96]
    there = torch.tensor([form in ("exact", "coded") for form, _ in exact.kinds])[exact.table.long()]
    assert bool(there[..., -32:].all())
    assert not bool((there == there[:1, :1]).all())
    forms = torch.tensor([form == "coded" for form, _ in coded.kinds])[coded.table.long()]
    assert torch.equal(forms, there & (torch.arange(400) < 400 - 32))
