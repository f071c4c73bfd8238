import json
import random

import numpy as np
import pytest

from calidrop.eval.jsonl import dump, load
from calidrop.eval.kit import Kit, hide
from calidrop.eval.sample import Sample
from calidrop.eval.score import KNOWN, MEASURED, METRICS, interval, known, score
from calidrop.eval.tasks import TASKS, named
from calidrop.models import peek
from words import byte_model

LENGTH = 8000  # bytes
RULER = {"context": "a 1", "question": "q?", "answer_prefix": " is", "answer": ["1"], "max_new_tokens": 4, "task": "vt"}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return Kit(peek(byte_model(tmp_path_factory.mktemp("bytes")))[1])


@pytest.mark.parametrize("task", TASKS)
def test_task(kit, task):
    """The prompt fills the length, holds the answer, is the same each time and another one for another index."""
    make = TASKS[task].make
    s = make(kit, LENGTH, 3)
    prompt = s.context + s.question + s.prefix
    assert 0.8 * LENGTH < kit.count(prompt) <= LENGTH
    assert make(kit, LENGTH, 3) == s
    assert make(kit, LENGTH, 4).context != s.context
    assert (s.task, s.group, s.length, s.index) == (task, TASKS[task].group, LENGTH, 3)
    assert s.metric in METRICS or s.metric in MEASURED
    if task not in ("gsm8k", "fidelity", "generation"):
        assert all(answer in s.context for answer in s.answers)
        assert all(answer in s.gold for answer in s.answers)
        assert all(answer not in s.question + s.prefix for answer in s.answers)
    if s.metric in METRICS and s.answers:
        assert score(s.metric, s.gold, s.answers) == 1.0
        assert score(s.metric, "I do not know", s.answers) == 0.0
    if s.depth is not None and len(s.answers) == 1:
        assert s.context.index(s.answers[0]) / len(s.context) == pytest.approx(s.depth, abs=0.1)


def test_ruler_is_complete():
    assert named(["ruler"]) == [task for task, (group, _) in KNOWN.items() if group == "ruler"]
    assert len(named(["ruler"])) == 13
    assert named(["all"]) == list(TASKS)
    assert named(["vt", "needle", "vt"]) == ["vt", "needle"]
    with pytest.raises(ValueError, match="unknown task 'neddle'; known: needle, "):
        named(["neddle"])


def test_ruler_kinds(kit):
    """What is asked for, and how much like it there is."""
    one, four = (TASKS[f"niah_{kind}"].make(kit, LENGTH, 0) for kind in ("single_2", "multikey_1"))
    assert (one.context.count("special magic number for"), four.context.count("special magic numbers for")) == (0, 4)
    assert len(TASKS["niah_multivalue"].make(kit, LENGTH, 0).answers) == 4
    assert len(set(TASKS["niah_multiquery"].make(kit, LENGTH, 0).answers)) == 4
    assert TASKS["niah_multikey_3"].make(kit, LENGTH, 0).context.count("One of the special magic uuids for") > 50
    words = TASKS["cwe"].make(kit, LENGTH, 0)
    listed = words.context.split("Memorize the ones that appear most often.\n")[2].split()
    assert [listed.count(word) for word in words.answers] == [30] * 10
    assert {listed.count(word) for word in listed[1::2]} == {3, 30}
    coded = TASKS["fwe"].make(kit, LENGTH, 0)
    counts = [coded.context.split().count(word) for word in coded.answers]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == pytest.approx(2.25 * counts[1], rel=0.1)
    chain = TASKS["vt"].make(kit, LENGTH, 0)
    value = chain.prefix.split("value ")[1].split(",")[0]
    at = chain.context.index(f"VAR {chain.answers[0]} = {value}")
    for name, before in zip(chain.answers[1:], chain.answers, strict=False):
        assert (at := chain.context.index(f"VAR {name} = VAR {before}", at))


def test_too_short(kit):
    with pytest.raises(ValueError, match="needle: a length of 60 tokens is too short"):
        TASKS["needle"].make(kit, 60, 0)
    with pytest.raises(ValueError, match="vt: a length of 100 tokens is too short"):
        TASKS["vt"].make(kit, 100, 0)
    with pytest.raises(ValueError, match="text too short: the text given has 12 tokens, a passage of 364 is needed"):
        TASKS["fidelity"].make(Kit(kit.tokenizer, "Hello world."), 300, 0)
    with pytest.raises(ValueError, match="gsm8k: 120 problems come along, sample 121 was asked for"):
        TASKS["gsm8k"].make(kit, LENGTH, 120)
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        Kit(object())


def test_hide():
    hay = "One. Two. Three. Four. "
    assert hide(hay, ["X "], [0.0]) == "X " + hay
    assert hide(hay, ["X "], [0.5]) == "One. Two. X Three. Four. "
    assert hide(hay, ["X ", "Y "], [0.25, 1.0]) == "One. X Two. Three. Four. Y "


@pytest.mark.parametrize(
    ("metric", "said", "answers", "expected"),
    [
        ("string_match_all", "It is ABC and d", ["abc", "x"], 0.5),
        ("string_match_any", "It is ABC and d", ["abc", "x"], 1.0),
        ("f1", "The red house!", ["a red car", "blue"], 0.5),
        ("em", "The Red house.", ["red house"], 1.0),
        ("em", "The Red house is", ["red house"], 0.0),
        ("first_number", "<1,234>, not 5", ["1234"], 1.0),
        ("first_number", "none", ["1234"], 0.0),
        ("exact_number", "3 + 4 = 7\n#### 7.0 or 9", ["7"], 1.0),
        ("exact_number", "so 3 and then 1,000.", ["1000"], 1.0),
        ("exact_number", "The answer is $5. 6", ["6"], 0.0),
        ("rouge_l", "a b c d", ["b x d"], 2 * 2 / (3 + 3)),  # the article a is left out
        ("number_share", "Paragraph 3, maybe 4", ["Paragraph 3"], 0.5),
        ("edit_similarity", "\n# so\nreturn x\n", ["return x"], 1.0),
        ("cloze", "{'<mask-0>': 'Bob', '<mask-1>': 'Eve'}", ['{"<mask-0>": "Bob", "<mask-1>": "Al"}'], 0.5),
        ("cloze", "no {json", ['{"<mask-0>": "Bob"}'], 0.0),
    ],
)
def test_score(metric, said, answers, expected):
    assert score(metric, said, answers) == pytest.approx(expected)


def test_classification():
    classes = ["City", "City name", "Date"]
    assert score("classification", "City name", ["City name"], classes) == 1.0
    assert score("classification", "City name or Date", ["City name"], classes) == 0.5
    assert score("classification", "Date", ["City name"], classes) == 0.0


def test_interval():
    assert interval([0.5]) is None
    low, high = interval([0.0, 1.0] * 50)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.03)  # 1.96 * 0.5 / 10
    assert interval([0.0, 1.0] * 50) == (low, high)
    assert interval([1.0] * 9) == (1.0, 1.0)


def test_interval_of_a_ratio():
    draw = random.Random(1)
    pairs = [(draw.random() * n, n) for n in (3, 8, 5, 6, 2, 9, 4, 7)]
    drawn = [draw.choices(pairs, k=8) for _ in range(4000)]
    means = [sum(a for a, _ in some) / sum(n for _, n in some) for some in drawn]
    assert interval(*zip(*pairs, strict=True)) == pytest.approx(np.quantile(means, (0.025, 0.975)), rel=0.05)
    assert interval([1.0], [2]) is None


def test_known():
    assert known("qasper_e") == ("longbench", "f1")
    assert known("qa_1") == ("ruler", "string_match_any")
    assert known("nothing") is None


def test_jsonl_round_trip(kit, tmp_path):
    made = [task.make(kit, LENGTH, 1) for task in TASKS.values()]
    made.append(
        Sample("trec", "longbench", "classification", "c", "q", "", ("A",), " A", 9, 5, 0, None, ("\n",), ("A", "B"))
    )
    dump(tmp_path / "x.jsonl", made)
    assert load(tmp_path / "x.jsonl") == made


def test_jsonl_of_others(tmp_path):
    file = tmp_path / "x.jsonl"
    long = RULER | {"task": "trec", "answers": ["LOC"], "all_classes": ["LOC", "NUM"], "length": 77, "_id": "3"}
    del long["answer"]
    file.write_text("\n".join(map(json.dumps, [RULER, long, RULER | {"task": "shortdep_qa", "answer": "x y"}])))
    a, b, c = load(file)
    assert (a.group, a.metric, a.answers, a.gold, a.modes(("seen", "later"))) == (
        *("ruler", "string_match_all", ("1",), " 1"), ("seen", "later"),
    )  # fmt: skip
    assert (b.group, b.metric, b.classes, b.length, b.stop, b.index) == (
        *("longbench", "classification", ("LOC", "NUM"), 77, ("\n",), 1),
    )  # fmt: skip
    assert (c.group, c.metric, c.gold) == ("loogle", "rouge_l", " x y")
    own = tmp_path / "niah_multikey_3_4096.jsonl"
    own.write_text(json.dumps({"index": 7, "input": "text What? It is", "outputs": ["u"], "length": 9}) + "\n")
    (d,) = load(own)
    assert (d.task, d.context, d.question, d.index, d.answers) == ("niah_multikey_3", "text What? It is", "", 7, ("u",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "line 2 is no JSON"),
        ("[1]", "line 2: expected an object with columns, got list"),
        ({k: v for k, v in RULER.items() if k != "question"}, "line 2: missing column question; expected context"),
        (RULER | {"contxt": ""}, "line 2: unknown column contxt; known: context"),
        (RULER | {"max_new_tokens": "4"}, "line 2: column max_new_tokens must be int, got '4'"),
        (RULER | {"max_new_tokens": 0}, "line 2: column max_new_tokens must be at least 1, got 0"),
        (RULER | {"context": ""}, "line 2: column context is empty"),
        (RULER | {"answer": []}, "line 2: answer is empty"),
        (RULER | {"task": "my_task"}, "line 2: task 'my_task' has no known metric: add a column metric"),
    ],
)
def test_jsonl_errors(tmp_path, row, message):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(RULER) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(file) in str(error.value)


def test_jsonl_empty(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no samples"):
        load(tmp_path / "x.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps({"index": 7, "input": "t", "outputs": ["u"], "length": 9}))
    with pytest.raises(ValueError, match="must be named after its task"):
        load(tmp_path / "other.jsonl")
