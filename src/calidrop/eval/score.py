"""Scores from 0 to 1, as the fields of the tasks define them, and the interval of their mean."""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""(prediction, answers, classes) -> score"""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
CHINESE = re.compile(r"[一-鿿]")


def string_match_all(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """RULER: the share of the answers that occur in the prediction, whatever their case."""
    return mean(float(answer.lower() in prediction.lower()) for answer in answers)


def string_match_any(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """RULER's QA: whether one of the answers occurs in the prediction."""
    return max(float(answer.lower() in prediction.lower()) for answer in answers)


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, no punctuation, no articles; Chinese character by character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return CHINESE.sub(lambda c: f" {c[0]} ", text).split()


def f1(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """SQuAD: harmonic mean of precision and recall of the words, for the nearest answer."""
    return max(_f1(words(prediction), words(answer)) for answer in answers)


def _f1(said: list[str], true: list[str]) -> float:
    same = sum((Counter(said) & Counter(true)).values())
    return 2 * same / (len(said) + len(true)) if same else 0.0


def em(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """SQuAD: whether the words are those of an answer."""
    return max(float(words(prediction) == words(answer)) for answer in answers)


def first_number(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """LongEval: whether the first number said is the answer's."""
    found = NUMBER.search(prediction)
    return max(float(found is not None and _value(found[0]) == _value(answer)) for answer in answers)


def exact_number(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """GSM8K: whether the number behind the first "####" or "answer is" equals the answer's; without either, the last
    number."""
    marked = re.search(r"(?:####|answer is:?)[\s$*]*(-?\d[\d,]*(?:\.\d+)?)", prediction, re.IGNORECASE)
    found = [marked[1]] if marked else NUMBER.findall(prediction)[-1:]
    return max(float(bool(found) and _value(found[0]) == _value(answer)) for answer in answers)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def rouge_l(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, for the nearest answer."""
    return max(_rouge_l(words(prediction), words(answer)) for answer in answers)


def _rouge_l(said: list[str], true: list[str]) -> float:
    row = [0] * (len(true) + 1)  # of the usual table
    for word in said:
        before, row = row, [0]
        for i, other in enumerate(true):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return 2 * row[-1] / (len(said) + len(true)) if row[-1] else 0.0


def classification(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """LongBench: one over the number of labels that occur in the prediction, if the right one is among them. Labels
    that are parts of the right one do not count."""
    named = [label for label in classes if label in prediction and not (label in answers[0] and label != answers[0])]
    return 1 / len(named) if answers[0] in named else 0.0


def number_share(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """LongBench's count and retrieval: the share of the numbers said that are the answer's."""
    said, true = re.findall(r"\d+", prediction), [n for answer in answers for n in re.findall(r"\d+", answer)]
    return mean(float(n in true) for n in said) if said else 0.0


def edit_similarity(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """LongBench's code: similarity of the first line that is no comment and no fence to the nearest answer."""
    lines = [x for x in prediction.lstrip("\n").split("\n") if not any(mark in x for mark in ("`", "#", "//"))]
    return max(difflib.SequenceMatcher(None, lines[0] if lines else "", answer).ratio() for answer in answers)


def cloze(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """LooGLE: the share of the masks that the JSON in the prediction fills as the answer does."""
    true, found = json.loads(answers[0]), re.search(r"\{.*?\}", prediction, re.DOTALL)
    try:
        said = json.loads(found[0].replace("'", '"')) if found else {}
    except ValueError:
        said = {}
    return mean(float(said.get(mask) == name) for mask, name in true.items())


METRICS: dict[str, Metric] = {
    fn.__name__: fn
    for fn in (
        *(string_match_all, string_match_any, f1, em, first_number, exact_number),
        *(rouge_l, classification, number_share, edit_similarity, cloze),
    )
}
MEASURED = {
    "agreement": "how often the likeliest token is the uncompressed cache's",
    "same_start": "the share of the answer generated before it first differs from the uncompressed cache's",
}
"""Scores that come from the model's own answers and not from a text."""

LONG_BENCH = {
    "f1": "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique triviaqa",
    "rouge_l": "gov_report qmsum multi_news vcsum samsum dureader",
    "classification": "trec lsht",
    "number_share": "passage_count passage_retrieval_en passage_retrieval_zh",
    "edit_similarity": "lcc repobench-p",
}
LOOGLE = {"rouge_l": "shortdep_qa longdep_qa longdep_summarization", "cloze": "shortdep_cloze"}
RULER = {
    "string_match_all": "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 "
    "niah_multivalue niah_multiquery vt cwe fwe",
    "string_match_any": "qa_1 qa_2",
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of LongBench: what follows is the model's next example

KNOWN = {
    task: (group, metric)
    for group, metrics in (("longbench", LONG_BENCH), ("loogle", LOOGLE), ("ruler", RULER))
    for metric, tasks in metrics.items()
    for task in tasks.split()
}
"""Tasks of known files: their group and metric."""


def known(task: str) -> tuple[str, str] | None:
    """LongBench-E's tasks are LongBench's with `_e` behind."""
    return KNOWN.get(task) or KNOWN.get(task.removesuffix("_e"))


def score(metric: str, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    return METRICS[metric](prediction, answers, classes)


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0, draws: int = 1000
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean, or with weights of sum(values) / sum(weights); None for less
    than two values."""
    import numpy as np  # not at the top: commands that only name scores start without it

    if len(values) < 2:
        return None
    above, below = np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights, float)
    drawn = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)
