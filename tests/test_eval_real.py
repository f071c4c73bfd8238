"""The embedded model: what tells recipes apart does."""

import pytest

from calidrop.eval.cell import Job, measure
from calidrop.eval.kit import Kit
from calidrop.eval.tasks import TASKS

pytestmark = pytest.mark.slow


def test_a_needle_is_found_and_lost(smollm2):
    """The uncompressed cache finds the number, so do 8 bits; 40 tokens do not know it, asked before or after."""
    model, tokenizer = smollm2
    s, rows = TASKS["needle"].make(Kit(tokenizer), 512, 1), {}
    few, bits = "streaming_llm(budget=40)", "int8"
    for question in ("seen", "later"):
        keys = {recipe: recipe for recipe in ("full", bits, few)}
        rows |= {(r.recipe, question): r for r in measure(model, tokenizer, Job("smollm2", s, question, keys))}
    for question in ("seen", "later"):
        full, int8, lost = (rows[recipe, question] for recipe in ("full", bits, few))
        assert (full.score, int8.score, lost.score) == (1.0, 1.0, 0.0)
        assert full.nll < 0.2 * full.answer_tokens
        assert abs(int8.nll - full.nll) < 0.1
        assert lost.nll > full.nll + 5
        assert full.kl < 1e-9 < int8.kl < 0.01 < 0.1 < lost.kl
        assert lost.device_bytes < 0.25 * full.device_bytes
    # asked in one way or the other, the uncompressed cache answers the same
    assert rows["full", "seen"].nll == pytest.approx(rows["full", "later"].nll, abs=1e-3)


def test_prompts_fit_the_length(smollm2):
    _, tokenizer = smollm2
    kit = Kit(tokenizer)
    for name, task in TASKS.items():
        s = task.make(kit, 1024, 0)
        assert 850 < kit.count(s.context + s.question + s.prefix) <= 1026, name
