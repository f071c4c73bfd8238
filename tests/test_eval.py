import dataclasses
import json
import lzma
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from calidrop.cache import KVCache
from calidrop.cli import app
from calidrop.eval import cell, subject
from calidrop.eval.cell import Job, measure
from calidrop.eval.encode import encode
from calidrop.eval.folder import Folder, lines
from calidrop.eval.peers import is_peer
from calidrop.eval.rows import Row, key_of, latest, read
from calidrop.eval.run import Ask, run, samples
from calidrop.eval.sample import Sample
from calidrop.eval.subject import groups
from calidrop.eval.tasks import TASKS
from calidrop.eval.workers import How, here
from calidrop.eval_cli import progress
from calidrop.models import load
from calidrop.plugin import using
from words import byte_model

SNAP = "snapkv(budget=40, recent=8)"
TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def sample(**changes):
    told = {
        "task": "needle",
        "group": "needle",
        "metric": "string_match_all",
        "context": TEXT[:300],
        "length": 330,
        "question": "\nWhat is it?",
        "prefix": " It is",
        "answers": ("12345",),
        "gold": " 12345",
        "index": 0,
        "max_new_tokens": 6,
    }
    return Sample(**{**told, **changes})


def job(s, recipes, question="seen", together=8, timed=True):
    return Job("bytes", s, question, {r: f"key of {r}" for r in recipes}, together, timed)


def by_recipe(rows):
    return {row.recipe: row for row in rows}


@torch.inference_mode()
def by_hand(model, recipe, prompt, later, gold, new):
    """The plain way: a cache of its own, fed token by token. -> predictions of the gold answer, greedy tokens, cache"""
    out = []
    for fed in (gold, None):
        cache = KVCache(model, recipe, eager=True)
        logits = model(prompt[None], **using(cache)).logits[0, -1]
        for token in later:
            logits = model(token.view(1, 1), **using(cache)).logits[0, -1]
        seen = [logits]
        for i in range(new - 1 if fed is None else len(fed) - 1):
            token = seen[-1].argmax() if fed is None else fed[i]
            seen.append(model(token.view(1, 1), **using(cache)).logits[0, -1])
        out.append(torch.stack(seen))
    return out[0], out[1].argmax(-1).tolist(), cache


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("question", ["seen", "later"])
def test_row_by_hand(lm, question, timed):
    """Each for itself, and all in one batch."""
    model, tokenizer = lm
    recipes = ["full", SNAP, f"{SNAP[:-1]}, every=4)+calidrop(summary=4)", "kivi(bits=2, group=16, residual=16)"]
    prompt, later, gold = map(torch.tensor, encode(tokenizer, sample(), question))
    rows = by_recipe(measure(model, tokenizer, job(sample(), recipes, question, timed=timed)))
    full, _, _ = by_hand(model, "full", prompt, later, gold, 6)
    for recipe in recipes:
        logits, tokens, cache = by_hand(model, recipe, prompt, later, gold, 6)
        row, start = rows[recipe], 0 if len(later) else 1
        assert row.error is None
        nll = -logits.log_softmax(-1).gather(1, gold[:, None]).sum()
        assert (row.nll, row.answer_tokens) == (pytest.approx(float(nll), rel=1e-4), 6)
        p, q = (x[start:].double().log_softmax(-1) for x in (full, logits))
        assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
        assert row.prediction == tokenizer.decode(tokens, skip_special_tokens=True)
        held = (cache.nbytes, cache.host_nbytes, cache.full_nbytes, cache.recompute_rate)
        assert (row.device_bytes, row.host_bytes, row.full_bytes, row.recompute_rate) == held
        assert row.prefill_s > 0
        assert (row.decode_ms_per_token is not None) == timed
    assert rows["full"].kl < 1e-9
    assert rows[SNAP].kl > 1e-3
    assert rows["full"].agreement == 1.0


def test_one_that_fails_in_a_batch_fails_alone(lm, monkeypatch):
    model, tokenizer = lm
    real, sizes = subject.Ours.measured, []

    def measured(self):
        sizes.append(str(self.cache.recipe))
        if "int8" in str(self.cache.recipe):
            raise RuntimeError("broken")
        return real(self)

    monkeypatch.setattr(subject.Ours, "measured", measured)
    rows = by_recipe(measure(model, tokenizer, job(sample(), ["full", "int8", SNAP], timed=False)))
    assert {name: row.error for name, row in rows.items()} == {
        "full": None, "int8": "RuntimeError: broken", SNAP: None,
    }  # fmt: skip
    assert sizes == ["full", "int8", "full", "int8", SNAP]


def test_questions_differ(lm):
    """Asked later, the question is not in what is compressed."""
    model, tokenizer = lm
    asked = "\nWhat is it? It is"
    for question, texts in (("seen", (TEXT[:300] + asked, "")), ("later", (TEXT[:300], asked))):
        prompt, later, gold = encode(tokenizer, sample(), question)
        assert (tokenizer.decode(prompt), tokenizer.decode(later)) == texts
        assert tokenizer.decode(gold) == " 12345"
    seen, later = (by_recipe(measure(model, tokenizer, job(sample(), [SNAP], q)))[SNAP] for q in ("seen", "later"))
    assert seen.nll != pytest.approx(later.nll, rel=1e-3)


def test_peers(lm):
    model, tokenizer = lm
    names = ["transformers:DynamicCache", "transformers:QuantizedCache-fp8"]
    rows = by_recipe(measure(model, tokenizer, job(sample(), names, "later")))
    assert list(rows) == names  # full ran, but was not asked for
    exact, fp8 = rows.values()
    assert exact.error is fp8.error is None
    assert exact.kl < 1e-9 < fp8.kl
    assert fp8.device_bytes < 0.4 * exact.device_bytes
    assert model.config._attn_implementation == "calidrop"


@pytest.mark.parametrize("timed", [True, False])
def test_own_answer_is_gold(lm, timed):
    """Without a gold answer, the one of the uncompressed cache is."""
    model, tokenizer = lm
    s = sample(task="generation", metric="same_start", question="", prefix="", answers=(), gold="", max_new_tokens=40)
    rows = by_recipe(measure(model, tokenizer, job(s, ["full", SNAP], None, timed=timed)))
    assert (rows["full"].score, rows["full"].kl) == (1.0, pytest.approx(0.0, abs=1e-9))
    assert rows[SNAP].gold == rows["full"].gold == rows["full"].prediction
    same = [a == b for a, b in zip(rows[SNAP].prediction, rows[SNAP].gold, strict=False)]
    assert 0 <= rows[SNAP].score < 1
    assert rows[SNAP].answer_tokens == 40
    assert same[: int(rows[SNAP].score * 40) // 4] == [True] * (int(rows[SNAP].score * 40) // 4)


def test_who_shares_a_prefill():
    assert [is_peer(x) for x in ("transformers:DynamicCache", "recalkv('C:/x')", "int4")] == [True, False, False]
    names = ["full", "int8", "transformers:DynamicCache", "int4", "fp8", "kivi"]
    assert groups(names, 8) == [["full", "int8", "int4", "fp8", "kivi"], ["transformers:DynamicCache"]]
    assert groups(names[3:], 2) == [["int4", "fp8"], ["kivi"]]
    assert groups(["full", "judge_q(budget=9)", "int8"], 8) == [["full", "int8"], ["judge_q(budget=9)"]]


def test_a_recipe_that_dies_takes_no_other_along(lm, monkeypatch):
    model, tokenizer = lm
    real = cell.fill

    def fill(model, names, ids):
        if SNAP in names:
            raise RuntimeError("out of\nmemory")
        return real(model, names, ids)

    monkeypatch.setattr(cell, "fill", fill)
    rows = by_recipe(measure(model, tokenizer, job(sample(), ["int8", SNAP, "fp8"])))
    assert rows[SNAP].error == "RuntimeError: out of memory"
    assert rows[SNAP].score is None
    assert rows["int8"].error is rows["fp8"].error is None


def ask(folder, **changes):
    told = {
        "models": (folder,),
        "recipes": (SNAP,),
        "tasks": ("needle", "fidelity"),
        "lengths": (320,),
        "samples": 2,
        "questions": ("seen", "later"),
        "text": TEXT,
    }
    return Ask(**{**told, **changes})


def go(folder, out, counted=None, **changes):
    def workers(jobs):
        for rows in here(How(threads=1))(jobs):
            if counted is not None:
                counted.extend(rows)
            yield rows

    return run(ask(folder, **changes), How(threads=1), out, workers, "calidrop eval")


def test_run_goes_on(folder, tmp_path):
    """A folder is read, not measured again; only what is new is. A line that was cut off is measured again."""
    out, counted = tmp_path / "run", []
    table = go(folder, out, counted)
    assert len(counted) == 2 * (2 * 2 + 2)  # recipes x (needle x questions + fidelity), 2 samples
    assert [(x.task, x.question, x.recipe, x.n, x.errors) for x in table] == [
        (task, question, recipe, 2, 0)
        for task, question in (("needle", "seen"), ("needle", "later"), ("fidelity", None))
        for recipe in ("full", SNAP)
    ]
    assert json.loads((out / "table.json").read_text()) == [dataclasses.asdict(x) for x in table]
    assert lines(out) == table
    assert [x.decode_ratio for x in table[::2]] == [1.0] * 3
    counted.clear()
    go(folder, out, counted)
    assert counted == []
    go(folder, out, counted, recipes=(SNAP, "int8"))
    assert {row.recipe for row in counted} == {"int8"}
    counted.clear()
    text = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(text[:-9])
    again = go(folder, out, counted, recipes=(SNAP, "int8"))
    assert len(counted) == 1
    assert (out / "rows.jsonl").read_text().count("\n") == text.count("\n")
    assert all(line.errors == 0 for line in again)
    told = json.loads((out / "run.json").read_text())
    assert len(told["commands"]) == 4
    assert told["commands"][-1]["asked"]["recipes"] == ["full", SNAP, "int8"]


def test_packed_rows(folder, tmp_path):
    """They are read as they are, and a run goes on with them."""
    out, few = tmp_path / "run", {"tasks": ("fidelity",), "samples": 1}
    table = go(folder, out, **few)
    text = (out / "rows.jsonl").read_bytes()
    (out / "rows.jsonl").unlink()
    (out / "rows.jsonl.xz").write_bytes(lzma.compress(text))
    assert lines(out) == table
    assert not (out / "rows.jsonl").exists()
    assert len(go(folder, out, tasks=("fidelity",), samples=2)) == len(table)
    assert (out / "rows.jsonl").read_bytes().startswith(text)
    assert len(read(out / "rows.jsonl")) == 2 * len(table)
    (out / "rows.jsonl").unlink()
    (out / "rows.jsonl.xz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.xz cannot be unpacked"):
        lines(out)


def test_errors_are_tried_again(folder, tmp_path, monkeypatch):
    real, left = cell.answer, ["once", "twice"]

    def answer(*args):
        if left:
            raise RuntimeError(left.pop())
        return real(*args)

    monkeypatch.setattr(cell, "answer", answer)
    out, few = tmp_path / "run", {"tasks": ("fidelity",), "samples": 1}
    table = go(folder, out, **few)
    assert [x.errors for x in table] == [1, 1]
    first, second = read(out / "rows.jsonl")
    assert first.error == "RuntimeError: twice"
    assert second.error == "RuntimeError: there is nothing to compare with: full failed"
    table = run(ask(folder, **few), How(threads=1), out, here(How(threads=1)), "again", retry=1)
    assert [(x.n, x.errors) for x in table] == [(1, 0), (1, 0)]
    assert left == []


def test_settings_are_not_mixed(folder, tmp_path):
    out = tmp_path / "run"
    go(folder, out, tasks=("fidelity",), samples=1)
    with pytest.raises(ValueError, match=r"other settings: seed \(0 there, 3 now\), chat \(False there, True now\)"):
        Folder(out, {"device": None, "dtype": None, "threads": 1, "seed": 3, "chat": True})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match=r"no run\.json: no folder of a run, and not empty"):
        Folder(tmp_path / "other", {})
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"key": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3 is no row"):
        lines(out)
    first, second = (Folder(tmp_path / "new", {}) for _ in range(2))
    first.open("", {})
    with pytest.raises(ValueError, match="another run is writing"):
        second.open("", {})


def test_keys():
    base = key_of(sample(), "m", "r", "seen", {"threads": 1})
    assert base == key_of(sample(), "m", "r", "seen", {"threads": 1})
    others = [
        key_of(sample(gold="x"), "m", "r", "seen", {"threads": 1}),
        key_of(sample(), "n", "r", "seen", {"threads": 1}),
        key_of(sample(), "m", "s", "seen", {"threads": 1}),
        key_of(sample(), "m", "r", "later", {"threads": 1}),
        key_of(sample(), "m", "r", "seen", {"threads": 2}),
    ]
    assert len({base, *others}) == 6


def test_latest():
    told = dict.fromkeys(("model", "recipe", "task", "group", "metric", "gold"), "x")
    a, b, c, d = (
        Row("k", length=1, depth=None, question=None, sample=0, error=e, **told) for e in ("1", None, "2", None)
    )
    assert latest([a])["k"] is a
    assert latest([a, c])["k"] is c
    assert latest([a, b, c])["k"] is b
    assert latest([a, b, c, d])["k"] is d


FIELDS = [
    "key",
    "model",
    "recipe",
    "task",
    "group",
    "length",
    "depth",
    "question",
    "sample",
    "score",
    "metric",
    "nll",
    "kl",
    "kl_p95",
    "agreement",
    "prediction",
    "gold",
    "device_bytes",
    "host_bytes",
    "full_bytes",
    "prefill_s",
    "decode_ms_per_token",
    "recompute_rate",
    "error",
    "versions",
    "seconds",
    "time",
]


def test_schema(lm):
    (row,) = measure(*lm, job(sample(), ["full"]))
    assert set(json.loads(json.dumps(dataclasses.asdict(row)))) == {*FIELDS, "answer_tokens"}
    assert all(getattr(row, name) is not None for name in FIELDS if name not in ("depth", "error"))


def test_chat(lm, folder):
    _, tokenizer = lm
    with pytest.raises(ValueError, match="no chat template"):
        samples(ask(folder, chat=True), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    try:
        (s, *_) = samples(ask(folder, chat=True, tasks=("needle",)), tokenizer)
    finally:
        tokenizer.chat_template = None
    assert s.context.startswith("<u>")
    assert s.modes(("seen", "later")) == ("seen", "later")
    assert (s.context + s.question + s.prefix).endswith("Answer:</u><a>The magic number is")


def test_ray_without_an_address(folder, tmp_path, monkeypatch):
    def cluster(address, how, n, cpus, gpus):
        raise ValueError(f"asked for {address}, {n} x {gpus}")

    monkeypatch.setattr("calidrop.eval.ray.cluster", cluster)
    rest = ("--recipe", "full", "--task", "vt", "--out", tmp_path / "r", "--model", folder, "--gpus", "0.5")
    assert "asked for local, None x 0.5" in call(*rest, "--ray", code=2).stderr
    assert "asked for local, 3 x 0.5" in call("--ray", "--workers", 3, *rest, code=2).stderr
    assert "asked for head:6379, None x 0.5" in call("--ray", "head:6379", *rest, code=2).stderr


def call(*args, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, args)], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


def test_command(folder, tmp_path):
    assert all(task in call("--list").output for task in TASKS)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "run"
    (tmp_path / "book.txt").write_text(TEXT)
    book = ("--text", tmp_path / "book.txt", "--model", folder)
    call("--task", "needle,fidelity", "--length", "300,320", "--samples", 1, "--dump-prompts", prompts, *book)
    assert len(prompts.read_text().splitlines()) == 4
    said = call("--jsonl", prompts, "--recipe", SNAP, "--out", out, "--model", folder, "--threads", 1)
    assert "8 of 8 rows" in said.stderr
    assert "needle, 320 tokens, question seen" in said.stdout
    assert call("--table", "--out", out).stdout == said.stdout
    same = call("--task", "needle,fidelity", "--length", "300,320", "--samples", 1, "--recipe", SNAP, "--out", out,
                "--threads", 1, *book)  # fmt: skip
    assert "rows" not in same.stderr  # samples from a file are those that were written to it
    assert len(read(out / "rows.jsonl")) == 8


def test_a_command_without_anything():
    assert "nothing to measure" in call(code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "full", "--out", "r"], "nothing to measure: give at least one task or JSON-lines file"),
        (["--recipe", "snapkw", "--task", "vt", "--out", "r"], "unknown method 'snapkw'"),
        (["--recipe", "full", "--task", "neddle", "--out", "r"], "unknown task 'neddle'; known: needle"),
        (["--recipe", "full", "--task", "vt", "--length", "1k", "--out", "r"], "length must be a whole number"),
        (["--recipe", "full", "--task", "vt", "--length", "0", "--out", "r"], "length must be a whole number >= 1"),
        (
            ["--recipe", "full", "--task", "vt", "--question", "now", "--out", "r"],
            "question must be one of seen, later",
        ),
        (["--recipe", "full", "--task", "vt"], "give at least one --recipe, and --out"),
        (["--task", "vt", "--out", "r"], "give at least one --recipe, and --out"),
        (["--recipe", "full", "--jsonl", "no.jsonl", "--out", "r"], "No such file or directory: no.jsonl"),
        (["--recipe", "full", "--task", "vt", "--model", "no/such", "--out", "r"], "model 'no/such' not found"),
        (["--table", "--out", "r"], "r has no rows"),
        (["--table"], "--table needs --out"),
        (
            ["--recipe", "other:Cache", "--task", "vt", "--out", "r"],
            "unknown cache 'other:Cache'; known: transformers:",
        ),
        (["--recipe", "kivi(group=64)", "--task", "vt", "--out", "r"], "group must divide head_dim"),
        (["--recipe", "full", "--task", "fidelity", "--length", "200000", "--out", "r"], "text too short"),
    ],
)
def test_command_errors(folder, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calidrop.eval.workers.measure", lambda *_: pytest.fail("worked"))
    result = call(*args, *([] if "--model" in args else ["--model", folder]), code=2)
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "r").exists()


def test_the_time_that_is_left_is_that_of_the_run(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("calidrop.eval_cli.time", SimpleNamespace(monotonic=lambda: now))
    with progress() as tick:
        for total in (4, 3):
            for done in range(1, total + 1):
                now += 60.0
                tick("cell", done, total)
    said = [line.split(" min left")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        *("1 of 4 rows, 3.0", "2 of 4 rows, 2.0", "3 of 4 rows, 1.0", "4 of 4 rows, 0.0"),
        *("1 of 3 rows, 2.0", "2 of 3 rows, 1.0", "3 of 3 rows, 0.0"),
    ]
