"""Judge Q: soft tokens decide by what they see, and leave no trace; their training against being killed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache
from typer.testing import CliRunner

import calidrop
from calidrop.cli import app
from calidrop.masks import PositionMask
from calidrop.methods import judge_q
from calidrop.methods._artefact import kind
from calidrop.methods.judge_q import SoftTokens
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.train._frozen import Frozen, distance
from calidrop.train._prompts import chat, prompts, read_questions
from calidrop.train.judge_q import Options, train
from helpers import ALICE, layer_of, live, positions, random_qkv
from tiny import batch, generate, soft, tiny, worst

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "mixtral", "olmo2"]


def recipe(model, budget: int | float = 20, **kwargs) -> str:
    more = "".join(f", {name}={value!r}" for name, value in kwargs.items())
    return f"judge_q(budget={budget}, file={soft(model)!r}{more})"


@pytest.fixture(scope="module")
def llama():
    return tiny()


# ---- no trace


@pytest.mark.parametrize("family", FAMILIES)
def test_what_evicts_nothing_is_the_full_cache(family):
    model, inputs = tiny(family), batch(3, 61, (0, 13, 50))
    want, logits = generate(model, inputs, calidrop.KVCache(model))
    cache = calidrop.KVCache(model, recipe(model, 500))
    got, other = generate(model, inputs, cache)
    assert worst(logits, other) < 5e-5  # matrices have more rows, so sums are in another order
    assert torch.equal(want, got)
    assert other.shape[-1] == 97  # the vocabulary has not grown: no soft token can be said
    assert cache.get_seq_length() == 61 + 23


def held(cache) -> list[torch.Tensor]:
    """Per layer, the columns each head holds, [B,H,n]."""
    return [torch.cat([t.pos for t in live(layer)], 2) for layer in cache.layers]


@torch.no_grad()
def test_nothing_of_them_is_held(llama):
    cache = calidrop.KVCache(llama, recipe(llama, 20))
    plain = calidrop.KVCache(llama, "snapkv(budget=20, recent=1)", eager=True)
    llama(**batch(), **using(cache))
    llama(**batch(), **using(plain))
    assert cache.get_seq_length() == 61
    assert cache.nbytes <= plain.nbytes
    assert cache.full_nbytes == plain.full_nbytes
    for pos in held(cache):
        assert pos.shape == (2, 2, 20)
        assert 0 <= int(pos.min()) <= int(pos.max()) < 61
    assert all(layer.state.obs is None for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_every_output_is_cut(family):
    """Hidden states of all layers, what routes to experts, tuples, and the loss."""
    model, ids = tiny(family), batch(2, 40, (0, 0))["input_ids"]
    more = {"output_router_logits": True} if family == "mixtral" else {}
    caches = [calidrop.KVCache(model, name) for name in ("full", recipe(model))]
    full, ours = (model(ids, labels=ids, output_hidden_states=True, **more, **using(cache)) for cache in caches)
    assert float(full.loss) == pytest.approx(float(ours.loss), abs=1e-4)
    for one, other in zip(full.hidden_states, ours.hidden_states, strict=True):
        assert one.shape == other.shape
        assert worst(one, other) < 1e-4
    for one, other in zip(full.get("router_logits") or (), ours.get("router_logits") or (), strict=True):
        assert one.shape == other.shape == (80, 4)
        assert worst(one, other) < 1e-4
    cache = calidrop.KVCache(model, recipe(model))
    assert model.model(ids, None, None, cache, return_dict=False)[0].shape == (2, 40, 48)  # in order, without names


# ---- what is kept


def by_hand(model, inputs: dict, rows: torch.Tensor, budget: int, pool: str) -> list[torch.Tensor]:
    """The prompt and the soft tokens through transformers' own attention, and the best of its weights' means."""
    n, (B, N) = len(rows), inputs["input_ids"].shape
    embeds = torch.cat([model.get_input_embeddings()(inputs["input_ids"]), rows.expand(B, -1, -1)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(B, n, dtype=torch.long)], 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=at, output_attentions=True, use_cache=False)
    picked = []
    for weights in out.attentions:
        score = weights[:, :, N:, :N].float().unflatten(1, (2, 3))  # [B,H,G,n,N]
        score = (score.mean(2) if pool == "mean" else score.amax(2)).mean(2)
        score = score.masked_fill(inputs["attention_mask"][:, None] == 0, -1.0)
        picked.append(score.topk(budget, -1).indices.sort(-1).values)
    return picked


@pytest.mark.parametrize("group", ["mean", "max"])
@torch.no_grad()
def test_kept_is_what_the_soft_tokens_attend_to(llama, group):
    inputs = batch(2, 61, (0, 13))
    want = by_hand(tiny(), inputs, SoftTokens.load(soft(llama)).rows, 9, group)
    cache = calidrop.KVCache(llama, recipe(llama, 9, group=group))
    generate(llama, inputs, cache, new=1)
    for theirs, ours in zip(want, held(cache), strict=True):
        assert torch.equal(theirs, ours.sort(-1).values.long())
    pos = torch.cat(held(cache), 1)
    assert not torch.equal(pos[:, :1].expand_as(pos), pos)  # heads differ: the test can fail


@torch.no_grad()
def test_pooling_and_recent_by_hand():
    """One kv head, two query heads; three soft tokens, whose softmax is over the prompt and those before them."""
    N, n, D = 21, 3, 8
    q, k, v = random_qkv(1, 1, 2, N + n, D)
    file = soft(n=n, layers=1, kv_heads=1, head_dim=D, model_type="", hidden=4)
    kv = layer_of(f"judge_q(budget=7, recent=2, kernel=3, file={file!r})", (q, k, v))
    kv.soft_columns = n
    kv.update(k, v)
    kv.attend(q, PositionMask(), D**-0.5, None, None)
    kv.settle()
    score = [0.0] * N
    for head in range(2):
        for i in range(N, N + n):
            e = torch.exp(q[0, head, i] @ k[0, 0, : i + 1].T / D**0.5)
            score = [s + float(w) for s, w in zip(score, e / e.sum(), strict=False)]
    old = score[: N - 2]
    smooth = [sum(old[max(0, j - 1) : j + 2]) for j in range(N - 2)]
    best = sorted(sorted(range(N - 2), key=lambda j: -smooth[j])[:5])
    assert positions(kv) == [[[*best, N - 2, N - 1]]]


@torch.no_grad()
def test_blocks_of_plain_calls(llama):
    """Every block may be the last one; the soft tokens behind the last one decide."""
    inputs = batch(2, 61, (0, 0))["input_ids"]
    whole, parts = (calidrop.KVCache(llama, recipe(llama)) for _ in range(2))
    want = llama(inputs, **using(whole)).logits
    got = torch.cat([llama(block, **using(parts)).logits for block in inputs.split([30, 30, 1], 1)[:2]], 1)
    assert worst(want[:, :60], got) < 2e-4
    llama(inputs[:, 60:], **using(parts))  # a single token: the prompt before it is compressed
    short = calidrop.KVCache(llama, recipe(llama))
    llama(inputs[:, :60], **using(short))
    llama(inputs[:, 60:], **using(short))
    assert all(torch.equal(a, b) for a, b in zip(held(short), held(parts), strict=True))
    assert [x.shape[2] for x in held(parts)] == [21] * 3
    assert [x.shape[2] for x in held(whole)] == [61] * 3  # still waits


@torch.no_grad()
def test_two_juries_and_other_caches_on_one_model(llama):
    """What decides lives in the cache. Others pass through the hooks as they did, to the bit."""
    model, inputs = tiny(), batch()
    calidrop.KVCache(model)
    before = generate(model, inputs, DynamicCache(config=model.config))[1]
    names = [recipe(model), f"judge_q(budget=20, file={soft(model, n=9)!r})", "snapkv(budget=24, recent=8)"]
    snap = generate(model, inputs, calidrop.KVCache(model, names[2]))[1]
    caches = [calidrop.KVCache(model, name) for name in names]
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    assert torch.equal(before, generate(model, inputs, DynamicCache(config=model.config))[1])
    assert torch.equal(snap, generate(model, inputs, caches[2])[1])
    first, logits = inputs["input_ids"][:1], []
    for name in names[:2]:
        cache = calidrop.KVCache(model, name)
        model(first, **using(cache))
        logits.append([model(torch.full((1, 1), 7), **using(cache)).logits for _ in range(2)])
    model(first, **using(caches[0]))
    model(first, **using(caches[1]))
    for step in range(2):
        for i in range(2):
            assert torch.equal(model(torch.full((1, 1), 7), **using(caches[i])).logits, logits[i][step])
    assert worst(logits[0][0], logits[1][0]) > 1e-3  # they keep different tokens


@torch.no_grad()
def test_a_copied_model_has_the_hooks(llama):
    calidrop.KVCache(llama, recipe(llama))
    twin = copy.deepcopy(llama)
    got = generate(twin, batch(), calidrop.KVCache(twin, recipe(twin)))[1]
    assert len(twin.model._forward_pre_hooks) == 1
    assert torch.equal(got, generate(llama, batch(), calidrop.KVCache(llama, recipe(llama)))[1])


@torch.no_grad()
def test_inputs_may_be_embeddings(llama):
    inputs = batch(1, 61, (0,))
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    one, other = (calidrop.KVCache(llama, recipe(llama)) for _ in range(2))
    want = llama(inputs["input_ids"], **using(one)).logits
    assert worst(want, llama(inputs_embeds=embeds, **using(other)).logits) < 1e-5
    bare = calidrop.KVCache(llama.model, recipe(llama))  # the decoder alone
    hidden = llama.model(inputs["input_ids"], **using(bare)).last_hidden_state
    assert worst(want, llama.lm_head(hidden)) < 1e-5
    for cache in (one, other, bare):
        cache.compress()
        assert all(torch.equal(a, b) for a, b in zip(held(one), held(cache), strict=True))


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("qwen2", {}, "model type llama, this model has qwen2"),
        ("llama", {"num_hidden_layers": 2}, "compressed layers 3, this model has 2"),
        ("llama", {"head_dim": 8}, "key dims per head 16, this model has 8"),
        ("llama", {"initializer_range": 0.1}, "key weights"),
    ],
)
def test_soft_tokens_of_another_model(llama, family, changes, what):
    name, other = recipe(llama), tiny(family, **changes)
    with pytest.raises(ValueError, match=rf"made for tiny \(llama\).*{what}"):
        calidrop.KVCache(other, name)
    assert not other.model._forward_pre_hooks


def test_other_models_have_none_shipped(llama):
    with pytest.raises(ValueError, match=r"made for smollm2.*calidrop train judge-q --model MODEL --out FILE"):
        calidrop.KVCache(llama, "judge_q(budget=20)")


def test_models_without_room_for_them():
    with pytest.raises(ValueError, match="soft tokens of 8 dims do not fit LlamaForCausalLM, which has 48"):
        calidrop.KVCache(tiny(), f"judge_q(budget=20, file={soft(tiny(), hidden=8)!r})")
    staged = tiny()
    staged._pp_stage = None
    with pytest.raises(ValueError, match="do not cross from one stage of a pipeline"):
        calidrop.KVCache(staged, recipe(staged))
    layered = tiny()
    layered.config.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError, match="look up token ids of their own"):
        calidrop.KVCache(layered, recipe(layered))


@torch.no_grad()
def test_masks_in_four_dimensions(llama):
    cache = calidrop.KVCache(llama, recipe(llama))
    with pytest.raises(ValueError, match=r"padding mask \[rows, columns\], got a tensor of shape \[1, 1, 9, 9\]"):
        llama(torch.full((1, 9), 5), attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(), **using(cache))
    assert cache.get_seq_length() == 0
    llama(torch.full((1, 9), 5), **using(cache))
    assert cache.get_seq_length() == 9


def test_a_prompt_that_did_not_pass_the_decoder(llama):
    model = tiny()
    cache = calidrop.KVCache(model, recipe(model), eager=True)
    model.model._forward_pre_hooks.clear()
    with torch.no_grad(), pytest.raises(RuntimeError, match="without its soft tokens"):
        model(torch.full((1, 40), 5), **using(cache))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("judge_q(budget=20, file='no.safetensors')", ("no.safetensors", "calidrop train judge-q --out")),
        ("judge_q(budget=20, file=3)", ("path in quotes", "3")),
        ("judge_q(budget=20, kernel=4)", ("odd", "4")),
        ("judge_q(budget=20, group='sum')", ("'mean', 'max'", "'sum'")),
        ("judge_q(budget=20, recent=20)", ("recent must be smaller", "20")),
        ("judge_q(budget=20, every=4)", ("every", "budget")),
        ("judge_q(budget=20)+recalkv('x')", ("recalkv",)),
    ],
)
def test_refused_by_name(text, names):
    with pytest.raises(ValueError, match=r".") as e:
        parse(text)
    assert all(name in str(e.value) for name in names)


def test_not_an_artefact(tmp_path):
    save_file({"rows": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by calidrop train judge-q"):
        judge_q(20, file=str(tmp_path / "other.safetensors"))


# ---- the training


def questions(n: int = 4) -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (30 + 5 * i,), generator=draw).tolist() for i in range(n)]


def made(model, file, every: float = 1e9, progress=None, command: str = "", **options) -> SoftTokens:
    plain = {"tokens": 4, "response": 6, "epochs": 3}
    settings = Options(**{**plain, **options})
    return train(model, questions(), file, settings, name="tiny", every=every, progress=progress, command=command)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_true_response_has_no_loss(loss):
    frozen = Frozen(tiny())
    with frozen.use():
        sample, said = frozen.sample(questions()[0], None, 6)
        right = frozen.embed(torch.tensor(said))
        assert len(said) == 6
        assert float(frozen.loss(sample, right, loss)) < 1e-6
        assert float(frozen.loss(sample, right.flip(0) + 1, loss)) > 1e-3
        again, _ = frozen.sample(questions()[0], said, 6)
    assert torch.equal(again.target, sample.target)


def test_response_is_the_models_own():
    model, prompt = tiny(), questions()[1]
    want = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    frozen = Frozen(model)
    with frozen.use():
        assert frozen.sample(prompt, None, 6)[1] == want


def test_distance_is_the_formula():
    soft_, target = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    want = sum(float((a - b) ** 2) for a, b in zip(soft_.flatten(), target.flatten(), strict=True)) / 6
    assert float(distance(soft_, target, "mse")) == pytest.approx(want, rel=1e-5)
    assert float(distance(target * 0.5, target, "kl")) == pytest.approx(0, abs=1e-6)  # distributions only


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_training_moves_nothing_but_the_rows(family, tmp_path):
    model = tiny(family)
    calidrop.KVCache(model)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    made_rows = made(model, tmp_path / "x.safetensors", epochs=6, rate=0.05)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert all(h.__module__.startswith("transformers.") for h in hooks)  # those that collect attention stay
    assert model.config._attn_implementation == "calidrop"
    assert made_rows.meta["losses"][-1] < 0.9 * made_rows.meta["losses"][0]
    cache = calidrop.KVCache(model, judge_q(20, file=str(tmp_path / "x.safetensors")))
    generate(model, batch(), cache, new=2)
    assert worst(SoftTokens.load(str(tmp_path / "x.safetensors")).rows, made_rows.rows) < 1e-2


def test_a_killed_training_continues(tmp_path):
    """Killed among the responses and among the steps; the file is the same to the byte."""
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    made(tiny(), whole)
    seen = []

    def kill(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if seen.count((stage, done)) == 1 and done == {"responses": 2, "soft tokens": 3}[stage]:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(tiny(), broken, every=0.0, progress=kill)
    made(tiny(), broken, every=0.0, progress=kill)
    assert seen.count(("soft tokens", 1)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.safetensors", "whole.safetensors"]
    assert whole.read_bytes() == broken.read_bytes()


def test_a_part_of_another_run(tmp_path):
    file = tmp_path / "x.safetensors"

    def kill(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tiny(), file, every=0.0, progress=kill)
    with pytest.raises(ValueError, match="another run: loss was 'mse', now 'kl'"):
        made(tiny(), file, loss="kl")


def test_models_that_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="judge_q: MistralForCausalLM has only layers that see a bounded window"):
        made(tiny("mistral"), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [({"tokens": 0}, "tokens must be"), ({"loss": "l1"}, "loss must be one of"), ({"rate": -1.0}, "rate must be")],
)
def test_wrong_options(options, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        made(tiny(), tmp_path / "x.safetensors", **options)


class Words:
    chat_template = "yes"

    def __call__(self, text: str, verbose: bool = True) -> dict:
        return {"input_ids": text.split()}

    def decode(self, ids: list[str]) -> str:
        return " ".join(ids)

    def apply_chat_template(self, turn: list[dict], add_generation_prompt: bool, return_dict: bool) -> dict:
        return {"input_ids": ["<user>", *turn[0]["content"].split(), "<assistant>"]}


def test_prompts_end_where_the_answer_begins(tmp_path):
    text, asked = " ".join(map(str, range(500))), [f"what is {i} ?" for i in range(20)]
    made_ = prompts(Words(), text, asked, 40, 20, 200)
    assert made_ == prompts(Words(), text, asked, 40, 20, 200)
    assert all(p[0] == "<user>" and p[-1] == "<assistant>" for p in made_)
    lists = [p for p in made_ if "what" in p and "is" in p and "?" in p and "Solve" in p]
    assert len(lists) >= 8
    assert min(map(len, made_)) < 60 < 150 < max(map(len, made_)) < 230
    with pytest.raises(ValueError, match="got 500 tokens, need 600"):
        prompts(Words(), text, asked, 4, 20, 600)
    (tmp_path / "bad.jsonl").write_text('{"answer": 3}')
    with pytest.raises(ValueError, match="line 1: expected a JSON object with question"):
        read_questions(tmp_path / "bad.jsonl")
    assert chat(Words(), "a b") == ["<user>", "a", "b", "<assistant>"]


def test_what_the_file_tells(tmp_path):
    made(tiny(), tmp_path / "x.safetensors", command="calidrop train judge-q")
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        meta = json.loads(f.metadata()[kind("judge_q")])
        assert f.get_tensor("rows").shape == (4, 48)
    told = {"model": "tiny", "model_type": "llama", "layers": 3, "kv_heads": 2, "head_dim": 16, "hidden": 48}
    assert (told | {"tokens": 4, "samples": 4, "command": "calidrop train judge-q"}).items() <= meta.items()
    assert len(meta["losses"]) == 3


def test_missing_questions_are_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "judge-q", "--questions", "no.jsonl"])
    assert result.exit_code == 2
    assert "No such file or directory: no.jsonl" in result.stderr
    assert not list(tmp_path.iterdir())


# ---- the real model, with the soft tokens shipped for it


@pytest.mark.slow
def test_no_trace_in_the_real_model(smollm2):
    model, tokenizer = smollm2
    texts = [ALICE.read_text()[9000:9900], ALICE.read_text()[30000:31300]]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    tokens, logits = generate(model, inputs, calidrop.KVCache(model), new=8)
    ours, other = generate(model, inputs, calidrop.KVCache(model, "judge_q(budget=1000)"), new=8)
    assert worst(logits, other) < 2e-3
    assert torch.equal(tokens, ours)
    # at a budget of 64 two tokens of next to equal scores change places where a processor rounds in another order
    caches = [calidrop.KVCache(model, "judge_q(budget=80)") for _ in range(2)]
    chunks = generate(model, inputs, caches[0], new=8, prefill_chunk_size=100)
    whole = generate(model, inputs, caches[1], new=8)
    assert torch.equal(chunks[0], whole[0])
    assert worst(chunks[1], whole[1]) < 2e-3
    assert [positions(x) for x in caches[0].layers] == [positions(x) for x in caches[1].layers]


@pytest.mark.slow
@torch.no_grad()
def test_more_is_kept_of_what_the_response_attends_to(smollm2):
    """Of the 64 tokens that the model's own response attends to most, per layer and kv head, on a book and with
    instructions that training has not seen. SnapKV without its pooling too, which costs it hits."""
    model, tokenizer = smollm2
    calidrop.KVCache(model)
    recipes = ["judge_q(budget=64)", "snapkv(budget=64)", "snapkv(budget=64, kernel=1)"]
    frozen, rates = Frozen(model), []
    for i, ask in enumerate(["What is this text about?", "What does Alice do here?", "Describe it as a picture."]):
        prompt = chat(tokenizer, f"{ALICE.read_text()[30000 * i + 500 : 30000 * i + 2000]}\n\n{ask}")
        with frozen.use():
            sample, _ = frozen.sample(prompt, None, 24)
        target = sample.target.float().unflatten(1, (3, 3)).mean(2).topk(64).indices.flatten(0, 1).tolist()
        rates.append([])
        for name in recipes:
            cache = calidrop.KVCache(model, name, eager=True)
            model(torch.tensor([prompt]), **using(cache), logits_to_keep=1)
            ours = [set(head) for layer in cache.layers for head in positions(layer)[0]]
            both = [len(a & set(b)) / 64 for a, b in zip(ours, target, strict=True)]
            rates[-1].append(sum(both) / len(both))
    assert all(judge > plain + 0.05 > snap + 0.05 for judge, snap, plain in rates), rates


@pytest.mark.slow
def test_quick_training_of_the_real_model(tmp_path):
    """By the command, on little text."""
    out = tmp_path / "quick.safetensors"
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "What is two plus two?"}\n')
    command = ["train", "judge-q", "--out", str(out), "--tokens", "4", "--samples", "4", "--shortest", "24"]
    command += ["--longest", "48", "--response", "6", "--epochs", "4", "--questions", str(asked), "--rate", "0.02"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    made_rows = SoftTokens.load(str(out))
    assert made_rows.rows.shape == (4, 576)
    assert made_rows.meta["losses"][-1] < 0.8 * made_rows.meta["losses"][0]
    assert made_rows.meta["command"].startswith("calidrop train judge-q --model smollm2 --tokens 4")
