"""lm-evaluation-harness asks through the compressed cache."""

import pytest
import torch

from words import byte_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
pytest.importorskip("lm_eval")

TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank. " * 3 + "Then"
PAIRS = [(TEXT, " Alice"), (TEXT, " sister on"), ("The cat", " sat"), ("", "Once"), (TEXT, " Alice was"), (TEXT, "q")]
SMALL = "streaming_llm(budget=24)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("bytes"))


def requests(kind, pairs):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def ours(folder, recipe, **more):
    from lm_eval.api.registry import get_model

    import calidrop.lm_eval  # noqa: F401

    return get_model("calidrop").create_from_arg_string(f"pretrained={folder},recipe={recipe}", more)


@pytest.fixture(scope="module")
def stock(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(folder, device="cpu", dtype="float32", batch_size=2)


def test_likelihoods(folder, stock):
    """Under `full` those of lm_eval's own "hf"; compressed, others, and each from the same state of the context."""
    expected = stock.loglikelihood(requests("loglikelihood", PAIRS))
    full = ours(folder, "full").loglikelihood(requests("loglikelihood", PAIRS))
    for (a, greedy), (b, same) in zip(expected, full, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy == same
    lm = ours(folder, "snapkv(budget=24, recent=8)")
    small = lm.loglikelihood(requests("loglikelihood", PAIRS))
    changed = [abs(full[i][0] - small[i][0]) for i in (0, 1, 4, 5)]
    assert min(changed) > 0.01, changed
    assert [small[i][0] for i in (2, 3)] == pytest.approx([full[i][0] for i in (2, 3)], abs=1e-4)  # nothing to evict
    assert small[4] == pytest.approx(lm.loglikelihood(requests("loglikelihood", PAIRS[4:5]))[0], abs=1e-5)


def test_one_token_at_a_time(folder):
    """A continuation is what decoding it token by token would be."""
    from calidrop.cache import KVCache
    from calidrop.plugin import using

    lm = ours(folder, f"{SMALL[:-1]}, every=2)")
    ids, more = lm.tok_encode(TEXT), lm.tok_encode(" sister on")
    cache, total = KVCache(lm.model, lm.recipe, eager=True), 0.0
    with torch.inference_mode():
        lm.model(torch.tensor([ids[:-1]]), **using(cache))
        logits = lm.model(torch.tensor([ids[-1:]]), **using(cache)).logits[0, -1]
        for token in more:
            total += float(logits.log_softmax(-1)[token])
            logits = lm.model(torch.tensor([[token]]), **using(cache)).logits[0, -1]
    ((got, _),) = lm.loglikelihood(requests("loglikelihood", PAIRS[1:2]))
    assert got == pytest.approx(total, abs=1e-3)


def test_generating(folder, stock):
    """A padded batch, as "hf" generates it under `full`."""
    asked = [(TEXT, {"until": ["\n\n"], "max_gen_toks": 12}), (TEXT[:50], {"until": ["\n\n"], "max_gen_toks": 12})]
    expected = stock.generate_until(requests("generate_until", asked))
    assert ours(folder, "full", batch_size=2).generate_until(requests("generate_until", asked)) == expected
    assert ours(folder, SMALL, batch_size=2).generate_until(requests("generate_until", asked)) != expected


def test_errors(folder):
    with pytest.raises(ValueError, match="unknown method 'snapkw'"):
        ours(folder, "snapkw")
    with pytest.raises(ValueError, match="group must divide head_dim"):
        ours(folder, "kivi(group=64)")
