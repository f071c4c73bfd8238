"""G-KV's post-training: losses, masks through TRL's trainers, folders, and that it learns."""

import copy
import json
import shlex
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import calidrop
from calidrop.adapter import ABOUT
from calidrop.cli import app
from calidrop.plugin import using
from calidrop.train._gsm8k import answered, asked, numbers, reward, rows, score
from tiny import tiny, worst

pytest.importorskip("trl")
from calidrop.train import distill, reinforce

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers")
RECIPE = "g_kv(budget=12, every=4, recent=3)"
LETTERS = "?|abcdefghijklmnopqrstuvwxyz0123456789 .,#:<>=+-*/"
CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}" \
    "{% if add_generation_prompt %}a:{% endif %}"  # fmt: skip


def letters() -> PreTrainedTokenizerFast:
    """One token a letter; 0 is the pad, | ends a turn."""
    words = Tokenizer(WordLevel({"_": 0} | {c: i + 1 for i, c in enumerate(LETTERS)}, unk_token="?"))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="|", pad_token="_", chat_template=CHAT, padding_side="left"
    )


def sums(n: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i} and {i + 3} and {9 * i}", "answer": f"it is <<1+1={i}>>{i}. #### {i}"} for i in
            range(n)]  # fmt: skip


def model():
    return tiny("llama", vocab_size=60, num_hidden_layers=2, eos_token_id=2)


def test_the_answer_begins_in_one_column():
    features = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [4, 3], "labels": [-100, 3]},
    ]
    got = distill.collate(0, features)
    assert got["prompt"] == 2
    assert got["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 4, 3, 0, 0]]
    assert got["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert got["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]


def peft(lm, rank=2):
    from peft import get_peft_model

    from calidrop.train._lora import lora

    return get_peft_model(lm, lora(rank))


def test_logits_predict_the_column_after_them():
    lm = model()
    draw = torch.Generator().manual_seed(0)
    features = []
    for n, answer in ((30, 9), (22, 14)):
        ids = torch.randint(3, 50, (n + answer,), generator=draw).tolist()
        features.append({"input_ids": ids, "labels": [-100] * n + ids[n:]})
    given = distill.collate(0, features)
    learner = peft(lm)
    with torch.no_grad():
        for recipe in ("g_kv(budget=99, every=4)", RECIPE):
            teacher, student, real = distill.both(learner, given, recipe)
            assert teacher.shape == (2, 14, 60)
            assert real.sum(1).tolist() == [9, 14]
            for i, f in enumerate(features):
                n, ids = f["labels"].count(-100), torch.tensor([f["input_ids"]])
                plain = learner(ids).logits[0, n - 1 : -1]
                assert worst(teacher[i][real[i]], plain) < 1e-4
                cache = calidrop.KVCache(learner.get_base_model(), recipe, eager=True)
                out = [learner(ids[:, :n], **using(cache)).logits[:, -1]]
                out += [learner(ids[:, j : j + 1], **using(cache)).logits[:, -1] for j in range(n, ids.shape[1] - 1)]
                assert worst(student[i][real[i]], torch.cat(out)) < 1e-4
            same = float(distill.divergence(teacher, student)[real].sum())
            assert same < 1e-3 if "99" in recipe else same > 0.05


def test_divergence_is_kl():
    p, q = torch.randn(2, 3, 5, 7)
    want = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(distill.divergence(p, q), want)


def learn(out, lm, **kwargs):
    options = {"held_out": 4, "steps": 12, "batch": 4, "rate": 2e-2, "rank": 4}
    return distill.train(lm, letters(), sums(16), out, RECIPE, **options | kwargs)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "adapter"
    return out, learn(out, model(), name="tiny", command="as it was called")


def test_distillation_brings_the_compressed_model_nearer(learned):
    out, told = learned
    assert told["after"]["kl"] < 0.7 * told["before"]["kl"]
    about = json.loads((out / ABOUT).read_text())
    assert about["command"] == "as it was called"
    assert about["settings"]["recipe"] == RECIPE
    assert len([x for x in about["log"] if "loss" in x]) == 12
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".json", ".md", ".safetensors"]
    assert not out.with_name("adapter.part").exists()


def test_adapted_is_the_model_that_was_trained(learned):
    from peft import PeftModel

    out, _ = learned
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = model()(ids).logits
        want = PeftModel.from_pretrained(model(), str(out))(ids).logits
        own = calidrop.adapt(model(), out)
        assert type(own) is type(model())
        assert worst(own(ids).logits, want) < 1e-4 < worst(want, plain)


def test_an_adapter_of_another_model_is_refused(learned, tmp_path):
    out, _ = learned
    with pytest.raises(ValueError, match="layers is 2 there, 3 here"):
        calidrop.adapt(tiny("llama", vocab_size=60), out)
    other = model()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="other weights"):
        calidrop.adapt(other, out)
    assert all(map(torch.equal, before, other.parameters()))
    with pytest.raises(ValueError, match="no adapter in"):
        calidrop.adapt(model(), tmp_path)
    with pytest.raises(ValueError, match="exists"):
        learn(out, model())


def test_a_killed_run_goes_on_where_it_was(learned, tmp_path):
    whole, _ = learned

    def killed(stage, done, total):
        if done == 8:
            raise KeyboardInterrupt

    out = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        learn(out, model(), name="tiny", progress=killed)
    part = tmp_path / "adapter.part"
    shutil.copytree(part / "checkpoint-5", part / "checkpoint-9")
    (part / "checkpoint-9" / "trainer_state.json").unlink()  # killed as it wrote
    with pytest.raises(ValueError, match=r"rate was 0.02, now 0.01"):
        learn(out, model(), name="tiny", rate=1e-2)
    with pytest.raises(ValueError, match="another model"):
        learn(out, tiny("llama", vocab_size=60, num_hidden_layers=1), name="tiny")
    steps = []
    learn(out, model(), name="tiny", progress=lambda stage, done, total: steps.append(done))
    assert steps == list(range(6, 13))
    a, b = (torch.nn.Module.state_dict(calidrop.adapt(model(), folder)) for folder in (whole, out))
    assert max(worst(a[n], b[n]) for n in a) < 1e-5


def test_reinforcing_trains_on_what_the_rollouts_saw(tmp_path, monkeypatch):
    """The log-probabilities in the loss, after TRL shuffled the rows, are those of generation; and long answers are not
    punished."""
    seen = []

    class Spy(reinforce.SparseTrainer):
        def _get_per_token_logps_and_entropies(self, lm, ids, mask, keep, **kwargs):
            out = super()._get_per_token_logps_and_entropies(lm, ids, mask, keep, **kwargs)
            seen.append((ids.clone(), mask.clone(), keep, out[0].detach()))
            return out

        def _compute_loss(self, lm, inputs):
            ended = (inputs["completion_ids"] == 2).any(1)
            assert (inputs["advantages"][~ended] >= 0).all()
            loss = super()._compute_loss(lm, inputs)
            ids, mask, keep, logps = seen[-1]
            for i in range(len(ids)):
                real, n = ids[i, mask[i].bool()][None], int(mask[i, :-keep].sum())
                with torch.no_grad():
                    cache = calidrop.KVCache(self.base, RECIPE, eager=True)
                    out = [lm(real[:, :n], **using(cache)).logits[:, -1]]
                    out += [lm(real[:, j : j + 1], **using(cache)).logits[:, -1] for j in range(n, real.shape[1] - 1)]
                want = (torch.cat(out) / 0.8).log_softmax(-1).gather(1, real[0, n:, None])[:, 0]
                assert worst(logps[i, : len(want)], want) < 1e-4
            return loss

    monkeypatch.setattr(reinforce, "SparseTrainer", Spy)
    monkeypatch.setattr(reinforce, "reward", lambda completions, **_: [c[0]["content"].count("e") for c in completions])
    lm, out = model(), tmp_path / "rl"
    options = {"held_out": 3, "steps": 3, "prompts": 2, "samples": 4, "new": 14, "rate": 1e-3, "rank": 2}
    told = reinforce.train(lm, letters(), sums(12), out, RECIPE, **options)
    assert len(seen) == 6
    assert all("reward" in x for x in told["log"][:3])
    assert any(x["loss"] != 0 for x in told["log"][:3])
    assert told["before"]["rows"] == told["after"]["rows"] == 3
    assert "generate" not in vars(lm)
    calidrop.adapt(model(), out)


def test_command(tmp_path, monkeypatch):
    """What it writes into the folder is what to call again."""
    lm, out = tmp_path / "lm", tmp_path / "made"
    model().save_pretrained(lm)
    letters().save_pretrained(lm)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sums(6)))
    said = ["train", "g-kv", "--how", "distill", "--recipe", RECIPE, "--model", str(lm), "--out", str(out)]
    said += ["--data", str(data), "--held-out", "2", "--rank", "2", "--seed", "3", "--steps", "2", "--batch", "2"]
    told = CliRunner().invoke(app, said, catch_exceptions=False).output
    assert "on 2 held-out rows, kl " in " ".join(told.split())  # lines are folded at the terminal's width
    assert shlex.split(json.loads((out / ABOUT).read_text())["command"]) == ["calidrop", *said]
    assert "exists: delete it or choose another" in CliRunner().invoke(app, said).output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "this needs trl and peft: pip install 'calidrop[train]'" in CliRunner().invoke(app, said).output


def test_reward():
    answer = "Natalia sold 48/2 = <<48/2=24>>24 in May. 48+24 = <<48+24=1,072>>1072.\n#### 1,072"
    assert score("it is 1072", answer) == 1
    assert score("1072, of 5", answer) == 0.25
    assert score("24 and 1,072 and 3", answer) == 0.5
    assert score("none", answer) == 0
    assert score("none", "#### 4") == 0
    assert numbers("-3.5 and 2,000.") == [-3.5, 2000]
    assert reward([[{"content": "1072"}], "24 3"], [answer, answer], trainer_state=None) == [1, 0.25]


def test_rows(tmp_path):
    own = rows(None)
    assert len(own) == 200
    assert all(numbers(row["answer"].split("####")[1]) for row in own)
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(ValueError, match="line 2"):
        rows(bad)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"steps": 0}, "steps must be"),
        ({"held_out": 16}, "more than the 16 rows"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"rate": -1.0}, "rate must be"),
    ],
)
def test_wrong_use_is_refused(kwargs, reason, tmp_path):
    for train in (distill.train, reinforce.train):
        with pytest.raises(ValueError, match=reason):
            train(model(), letters(), sums(16), tmp_path / "x", RECIPE, **kwargs)
    with pytest.raises(ValueError, match="only says which tokens stay"):
        distill.train(model(), letters(), sums(40), tmp_path / "x", RECIPE + "+int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_model_learns_under_the_mask_it_generates_with(smollm2):
    """(h5) And a few steps on two answers bring it nearer to what it says with everything in its cache."""
    lm, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    recipe, features = "g_kv(budget=32, every=16, recent=8)", []
    for row in rows(None)[:2]:
        text = tokenizer.apply_chat_template(asked(row), add_generation_prompt=True, tokenize=False)
        asks, more = (tokenizer(x)["input_ids"] for x in (text, answered(row)[0]["content"]))
        ids = asks + more
        features.append({"input_ids": ids, "labels": [-100] * len(asks) + ids[len(asks) :]})
    given = distill.collate(tokenizer.pad_token_id, features)
    learner = peft(lm, 16)
    with torch.no_grad():
        _, student, real = distill.both(learner, given, recipe)
        n, ids, mask = given["prompt"], given["input_ids"], given["attention_mask"]
        cache = calidrop.KVCache(lm, recipe, eager=True)
        out = [lm(ids[:, :n], attention_mask=mask[:, :n], position_ids=given["position_ids"][:, :n],
                  **using(cache)).logits[:, -1:]]  # fmt: skip
        for i in range(n, ids.shape[1] - 1):
            at = {"position_ids": given["position_ids"][:, i : i + 1], "attention_mask": mask[:, : i + 1]}
            out.append(lm(ids[:, i : i + 1], **at, **using(cache)).logits)
        assert worst(student[real], torch.cat(out, 1)[real]) < 2e-3
    steps, optimizer = [], torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=2e-4)
    for _ in range(4):
        teacher, student, real = distill.both(learner, given, recipe)
        loss = distill.divergence(teacher, student)[real].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(loss.item())
    assert steps[-1] < 0.7 * steps[0], steps
