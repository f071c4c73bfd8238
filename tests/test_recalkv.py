"""ReCalKV: bases against the paper's factors, the store against the full cache, the training against being killed."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import calidrop
from calidrop import ops
from calidrop.attention import Queries, attend
from calidrop.cli import app
from calidrop.methods import recalkv
from calidrop.methods._artefact import kind
from calidrop.methods._latents import Artefact, Basis
from calidrop.plugin import using
from calidrop.recipe import parse
from calidrop.rope import Rope
from calidrop.train import _lowrank as lowrank
from calidrop.train._text import windows
from calidrop.train.recalkv import train
from helpers import ALICE, check_holdings, kernels
from tiny import batch, generate, row, tiny, worst

FULL = {"qwen2": "biases", "gemma2": "sliding layers, softcap", "gpt_oss": "yarn, sinks", "mixtral": "groups of heads"}


def ids(n: int = 4, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(7))


def made(model, file: Path, keep: float, **options) -> Artefact:
    return train(model, ids(), file, keep, **{"name": "tiny", "every": 1e9, **options})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Artefacts of the tiny Llama, by how much they keep."""
    folder = tmp_path_factory.mktemp("recalkv")
    paths = {keep: folder / f"{keep}.safetensors" for keep in (1.0, 0.5)}
    for keep, path in paths.items():
        made(tiny(), path, keep)
    return paths


def random_basis(heads: int = 4, dim: int = 8, size: int = 2, rank: int | None = None, bias: float = 1.0) -> Basis:
    """rank: of keys and of values, together; None is full."""
    rank = rank or heads * dim
    factors = torch.linalg.qr(torch.randn(heads // size, size * dim, size * dim)).Q[..., : rank * size // heads]
    values = torch.linalg.qr(torch.randn(heads * dim, heads * dim)).Q[:, :rank]
    order = [2, 0, 3, 1][:heads]
    return Basis(order, factors, values, *(bias * torch.randn(heads * dim) for _ in range(2)))


# ---- the bases


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_error_is_the_tail_of_the_singular_values(rank):
    """The paper's way, with a Cholesky root of the inputs' moments, gives the same product L R and the same error."""
    x, w = (torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64), torch.randn(16, 24))
    w = w.double()
    root = torch.linalg.cholesky(x.T @ x)
    u, s, vh = torch.linalg.svd(w @ root, full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank] @ torch.linalg.inv(root)
    outputs = x @ w.T
    basis = lowrank.basis(outputs.T @ outputs, rank)
    assert worst(basis @ basis.T @ w, left @ right) < 1e-8
    error = (outputs - outputs @ basis @ basis.T).norm()
    assert float(error) == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-8 * float(s[0]))
    assert lowrank.lost(outputs.T @ outputs, basis) == pytest.approx(float(s[rank:].square().sum() / s.square().sum()))


def test_alternating_step_is_least_squares():
    """L <- argmin |X (W - L R)'| for R of the old basis, by a solver; on the old inputs nothing changes."""
    old_x, x, w = torch.randn(200, 24).double(), torch.randn(200, 24).double().cumsum(1), torch.randn(16, 24).double()
    y = old_x @ w.T
    old = lowrank.basis(y.T @ y, 5)
    left = torch.linalg.lstsq(x @ w.T @ old, x @ w.T).solution.T
    new, y_new = lowrank.alternate(old, (x @ w.T).T @ (x @ w.T)), x @ w.T
    assert worst(new @ new.T, left @ torch.linalg.pinv(left)) < 1e-8
    assert lowrank.lost(y_new.T @ y_new, new) < lowrank.lost(y_new.T @ y_new, old)
    same = lowrank.alternate(old, y.T @ y)
    assert worst(same @ same.T, old @ old.T) < 1e-8


def test_latents_of_keys_are_those_of_inputs():
    """R = L⁺ W, whatever L: a latent of the layer's input is one of the key."""
    x, w, left = torch.randn(9, 24).double(), torch.randn(16, 24).double(), torch.randn(16, 5).double()
    right = torch.linalg.pinv(left) @ w
    basis = torch.linalg.qr(left).Q
    assert worst(x @ (left @ right).T, x @ w.T @ basis @ basis.T) < 1e-10


def test_similar_heads_share_a_group():
    x = torch.randn(300, 6, 8)
    for a, b in ((0, 3), (1, 5), (2, 4)):
        x[:, b] = x[:, a] @ torch.linalg.qr(torch.randn(8, 8)).Q + 0.1 * torch.randn(300, 8)
    flat = (x - x.mean(0)).flatten(1).double()
    cka = lowrank.similarity(flat.T @ flat, 6)
    assert float(cka[0, 3]) > 0.9 > 0.2 > float(cka[0, 1])
    assert worst(cka.diagonal(), torch.ones(6)) < 1e-9
    assert lowrank.grouped_order(cka, 2) == [0, 3, 1, 5, 2, 4]
    assert sorted(lowrank.grouped_order(cka, 3)) == list(range(6))
    assert [lowrank.group_size(h, 4) for h in (1, 2, 3, 5, 6, 8, 32)] == [1, 2, 3, 1, 3, 4, 4]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("spread", [0, 3])
def test_ranks_stay_within_the_budget(keep, spread):
    fisher = [float(10 ** (spread * torch.rand(1) - 3)) for _ in range(20)]
    ranks = lowrank.allocate(fisher, 192, keep, [24, 8] * 10)
    budget = keep * 192 * 20
    assert budget - 24 < sum(ranks) <= budget
    assert all(r % step == 0 and step <= r <= 192 for r, step in zip(ranks, [24, 8] * 10, strict=True))
    for (f, r), (g, s) in itertools.combinations(zip(fisher[1::2], ranks[1::2], strict=True), 2):
        assert (f - g) * (r - s) >= 0 or abs(r - s) <= 24
    with pytest.raises(ValueError, match="too little"):
        lowrank.allocate(fisher, 192, 0.02, [24, 8] * 10)


def test_permuted_heads_come_back():
    """At full rank, keys and values are what they were; so are scores, whatever the order of the heads."""
    basis = random_basis()
    k, q = torch.randn(2, 4, 11, 8), torch.randn(2, 4, 3, 8)
    back = basis.keys_of(basis.code_keys(k))
    assert worst(back, k) < 1e-5
    assert worst(q @ back.transpose(-1, -2), q @ k.transpose(-1, -2)) < 1e-4
    assert worst(basis.values_of(basis.code_values(k)), k) < 1e-5


def test_rebuilt_then_rotated_is_the_rotated_key():
    basis, rope, pos = random_basis(), Rope(0.1 ** torch.arange(4)), torch.arange(1000, 1011)
    k = torch.randn(2, 4, 11, 8)
    rotated = rope.rotate(k, pos)
    again = rope.rotate(basis.keys_of(basis.code_keys(rope.rotate(rotated, -pos))), pos)
    assert worst(again, rotated) < 1e-4


def test_attention_over_latents_is_attention_over_values():
    basis = random_basis(rank=12)
    k, v, pos = torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 8), torch.arange(11).expand(2, 4, 11)
    qs = Queries(torch.randn(2, 12, 3, 8), torch.full((2, 3), 20), 0.3)
    z = basis.code_values(v)
    fused, lse = attend(qs, k, z[:, None].expand(-1, 4, -1, -1), pos)
    o, same = attend(qs, k, basis.values_of(z), pos)
    assert worst(basis.output_of(fused), o) < 1e-5
    assert worst(lse, same) == 0


# ---- the cache


@pytest.mark.parametrize("family", ["llama", *FULL])
def test_full_rank_is_the_full_cache(family, tmp_path):
    changes = {"num_key_value_heads": 6} if family == "mixtral" else {}
    model, inputs, file = tiny(family, **changes), batch(3, 61, (0, 13, 50)), tmp_path / "full.safetensors"
    if family == "qwen2":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    made(model, file, 1.0)
    tokens, logits = generate(model, inputs, calidrop.KVCache(model))
    cache = calidrop.KVCache(model, recalkv(str(file), recent=4))
    got, other = generate(model, inputs, cache)
    assert worst(logits, other) < 2e-4
    assert torch.equal(tokens, got)
    alone = generate(model, row(inputs, 1), calidrop.KVCache(model, recalkv(str(file), recent=4)))[1]
    assert worst(alone, other[1:2]) < 2e-4


def test_pads_change_nothing_at_half_rank(files):
    """Positions count from the first real token: a basis of keys before rotation fits padded rows too."""
    model, inputs = tiny(), batch(2, 61, (0, 13))
    both = generate(model, inputs, calidrop.KVCache(model, recalkv(str(files[0.5]), recent=4)))[1]
    for i in range(2):
        alone = generate(model, row(inputs, i), calidrop.KVCache(model, recalkv(str(files[0.5]), recent=4)))[1]
        assert worst(alone, both[i : i + 1]) < 2e-4


@pytest.mark.parametrize("front", ["", "tova(budget=30)+", "streaming_llm(budget=30)+"])
@pytest.mark.parametrize("behind", ["", "+int4", "+int8", "+fp8", "+kivi(4, 8, residual=5)", "+ott(block=8)"])
def test_answers_as_its_tokens_would(front, behind, files):
    model, inputs = tiny(), batch(2, 61, (0, 13))
    behind = behind.replace(", residual=5", "") if front else behind  # an evictor says what stays exact
    cache = calidrop.KVCache(model, f"{front}recalkv({str(files[0.5])!r}){behind}")
    generate(model, inputs, cache, new=12)
    there = torch.arange(72) >= torch.tensor([[0], [13]])
    for layer in cache.layers:
        check_holdings(layer, there)
        store = layer.state.store
        held = store.tokens()
        qs = Queries(torch.randn(2, 6, 1, 16), torch.full((2, 1), 99), 0.25)
        parts = store.attend(qs)
        k, v, pos = (torch.cat([getattr(t, name) for t in held], 2) for name in ("k", "v", "pos"))
        o, lse = attend(qs, k, v, pos)
        merged, total = calidrop.attention.merge(parts)
        assert worst(o, merged) < 1e-4
        assert worst(lse, total) < 1e-4
        real = sorted(p for p in pos[1, 0].tolist() if p >= 0)
        assert len(set(real)) == len(real)
        assert real[0] >= 13


@pytest.mark.parametrize("behind", ["", "+int4"])
def test_the_triton_kernel_answers_as_torch_does(behind, files, monkeypatch):
    pytest.importorskip("triton")
    recipe = f"recalkv({str(files[0.5])!r}){behind}"
    model, inputs, asked = tiny(), batch(2, 40, (0, 13)), []
    own = ops.gpu.ask_latents
    monkeypatch.setattr(ops.gpu, "ask_latents", lambda *given: asked.append(len(given[0])) or own(*given))
    with kernels(monkeypatch, "triton"):
        got, logits = generate(model, inputs, calidrop.KVCache(model, recipe), new=4)
    assert asked
    with kernels(monkeypatch, "torch"):
        want, expected = generate(model, inputs, calidrop.KVCache(model, recipe), new=4)
    assert torch.equal(got, want)
    assert worst(logits, expected) < 2e-3


def test_a_rebuilt_token_codes_to_itself(files):
    """What an evictor takes out and puts back loses nothing more."""
    artefact = Artefact.load(str(files[0.5]))
    for basis in artefact.layers:
        z, y = basis.code_keys(torch.randn(1, 2, 9, 16)), basis.code_values(torch.randn(1, 2, 9, 16))
        assert worst(basis.code_keys(basis.keys_of(z)), z) < 1e-5
        assert worst(basis.code_values(basis.values_of(y)), y) < 1e-5


def test_bytes_are_those_of_the_latents(files):
    model, inputs, recent = tiny(), batch(2, 61, (0, 0)), 5
    artefact = Artefact.load(str(files[0.5]))
    cache = calidrop.KVCache(model, recalkv(str(files[0.5]), recent=recent), eager=True)
    model(inputs["input_ids"], **using(cache))
    n = 61 - recent
    for layer, (k, v) in zip(cache.layers, artefact.meta["ranks"], strict=True):
        store = layer.state.store
        latents = 2 * n * ((k + v) * 4 + 4)  # rows x tokens x (fp32 latents and an int32 position)
        rest = 2 * 8 + 2 * 8  # how many tokens a row holds, and its pads
        assert calidrop.state.held_bytes(store) == latents + rest
    assert sum(map(sum, artefact.meta["ranks"])) <= 0.5 * 3 * 2 * 32


def test_beams_and_forks(files):
    """Rows are reordered and repeated with the rest of the cache."""
    model, inputs = tiny(), batch(2, 40, (0, 9))
    want = generate(model, inputs, calidrop.KVCache(model), num_beams=3, output_logits=False)[0]
    got = generate(model, inputs, calidrop.KVCache(model, recalkv(str(files[1.0]))), num_beams=3, output_logits=False)
    assert torch.equal(want, got[0])


def test_a_second_turn(files, monkeypatch):
    """Several queries at once on stored latents, in tiles."""
    monkeypatch.setattr(sys.modules["calidrop.methods.recalkv"], "TILE", 7)  # the name is the builder's
    model, text = tiny(), batch(2, 61, (0, 0))["input_ids"]
    logits = []
    for recipe in ("full", recalkv(str(files[1.0]), recent=4)):
        cache = calidrop.KVCache(model, recipe, eager=True)
        logits += [torch.cat([model(t, **using(cache)).logits for t in text.split([30, 30, 1], 1)], 1)]
    assert worst(*logits) < 2e-4


def test_the_same_model_in_another_dtype(files, tmp_path):
    tiny().save_pretrained(tmp_path)
    model, inputs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), batch()
    full = generate(model, inputs, calidrop.KVCache(model), new=4)[1]
    got = generate(model, inputs, calidrop.KVCache(model, recalkv(str(files[1.0]))), new=4)[1]
    largest, apart = float(full.abs().max()), (full.float() - got.float()).abs()
    assert apart.max() < 0.03 * largest and apart.mean() < 0.003 * largest  # two products in bf16 instead of one


# ---- what is refused


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("snapkv(budget=64)+{}", ("snapkv", "recalkv", "streaming_llm and tova")),
        ("adakv(budget=64)+{}+int4", ("adakv", "recalkv")),
        ("{}+mixkvq", ("mixkvq", "recalkv")),
        ("{}+think", ("think", "recalkv")),
        ("recalkv(file='no.safetensors')", ("no.safetensors", "calidrop train recalkv")),
        ("recalkv(file=3)", ("path in quotes",)),
        ("recalkv(recent=3)", ("file",)),
    ],
)
def test_refused_by_name(recipe, names, files):
    with pytest.raises(ValueError, match=r".") as e:
        parse(recipe.format(f"recalkv(file={str(files[0.5])!r})"))
    assert all(name in str(e.value) for name in names)


def test_not_an_artefact(tmp_path):
    (tmp_path / "text").write_text("latents")
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        with pytest.raises(ValueError, match="not written by calidrop train recalkv"):
            recalkv(str(tmp_path / name))


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("qwen2", {}, "model type llama, this model has qwen2"),
        ("llama", {"num_hidden_layers": 2}, "compressed layers 3, this model has 2"),
        ("llama", {"num_key_value_heads": 3}, "kv heads 2, this model has 3"),
        ("llama", {"head_dim": 8}, "key dims per head 16, this model has 8"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary frequencies"),
        ("llama", {"initializer_range": 0.1}, "key weights"),
    ],
)
def test_artefact_of_another_model(family, changes, what, files):
    with pytest.raises(ValueError, match=rf"made for tiny \(llama\).*{what}"):
        calidrop.KVCache(tiny(family, **changes), recalkv(str(files[0.5])))


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("qwen3", {}, "normalizes keys.*k_norm"),
        ("olmo2", {}, "normalizes keys.*k_norm"),
        ("phi3", {}, "no k_proj and v_proj"),
        ("mistral", {}, "bounded window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "change with length",
        ),
    ],
)
def test_models_that_cannot_be_trained(family, changes, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        made(tiny(family, **changes), tmp_path / "x.safetensors", 0.5)
    assert not list(tmp_path.iterdir())


def test_keys_that_are_not_the_projection(tmp_path):
    model = tiny()
    turn = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: tuple(2 * y for y in turn(x, position_ids))
    with pytest.raises(ValueError, match="not its rotated k_proj"):
        made(model, tmp_path / "x.safetensors", 0.5)


def test_keys_that_are_not_rotated(tmp_path):
    model = tiny()
    turn = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: turn(x, 0 * position_ids)
    with pytest.raises(ValueError, match="does not rotate all keys alike"):
        made(model, tmp_path / "x.safetensors", 0.5)


# ---- the training


def test_a_killed_training_continues(tmp_path):
    """Killed once in every stage, and between two writes; the file is the same to the byte."""
    whole, broken = tmp_path / "whole" / "x.safetensors", tmp_path / "broken" / "x.safetensors"
    whole.parent.mkdir()
    broken.parent.mkdir()
    made(tiny(), whole, 0.5, command="calidrop train recalkv")
    seen = []

    def kill(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if seen.count((stage, done)) == 1 and done == {"keys and values": 2, "gradients": 3}.get(stage, total - 6):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            made(tiny(), broken, 0.5, command="calidrop train recalkv", every=0.0, progress=kill)
        assert [p.name for p in broken.parent.iterdir()] == ["x.safetensors.part"]
    made(tiny(), broken, 0.5, command="calidrop train recalkv", every=0.0, progress=kill)
    assert seen.count(("keys and values", 1)) == 1
    assert seen.count(("compressed layers", 1)) == 1
    assert [p.name for p in broken.parent.iterdir()] == ["x.safetensors"]
    assert whole.read_bytes() == broken.read_bytes()


def test_a_part_of_another_run(tmp_path):
    file = tmp_path / "x.safetensors"

    def kill(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tiny(), file, 0.5, every=0.0, progress=kill)
    with pytest.raises(ValueError, match=r"another run: keep was 0\.5, now 0\.25"):
        made(tiny(), file, 0.25, every=0.0)


def test_training_leaves_the_model_as_it_was(files):
    model = tiny()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    made(model, files[0.5].with_name("again.safetensors"), 0.5)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values_follow_the_compressed_layers(tmp_path, monkeypatch):
    """The first layer's inputs are the same, so its values are the paper's factors still; later layers' have moved."""
    monkeypatch.setattr(lowrank, "allocate", lambda *_: [16] * 6)  # none of them full
    model, outputs = tiny("qwen2"), {}
    artefact = made(model, tmp_path / "x.safetensors", 0.5)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda m, x, y, i=i: outputs.update({i: y.flatten(0, 1).double()}))
    with torch.no_grad():
        model(ids())
    for i, basis in enumerate(artefact.layers):
        best = lowrank.basis(outputs[i].T @ outputs[i], 16)
        apart = worst(best @ best.T, (basis.values @ basis.values.T).double())
        assert apart < 1e-4 if i == 0 else apart > 1e-2
        assert lowrank.lost(outputs[i].T @ outputs[i], best) <= artefact.meta["lost"][i][1] + 1e-4
        for one in (*basis.keys, basis.values):
            assert worst(one.T @ one, torch.eye(one.shape[1])) < 1e-5


def test_windows_cover_the_text():
    class Words:
        def __call__(self, text: str, verbose: bool) -> dict:
            return {"input_ids": [int(w) for w in text.split()]}

    text = " ".join(map(str, range(100)))
    assert windows(Words(), text, 3, 20)[:, 0].tolist() == [0, 40, 80]
    assert windows(Words(), text, 5, 20).flatten().tolist() == list(range(100))
    with pytest.raises(ValueError, match="got 100 tokens, need 120"):
        windows(Words(), text, 6, 20)


def test_what_the_file_tells(files):
    with safe_open(files[0.5], "pt") as f:
        meta = json.loads(f.metadata()[kind("recalkv")])
    told = {"model": "tiny", "model_type": "llama", "layers": 3, "kv_heads": 2, "head_dim": 16, "hidden": 48}
    assert told.items() <= meta.items()
    assert meta["keep"] == 0.5
    assert meta["version"] == calidrop.__version__
    assert len(meta["ranks"]) == len(meta["orders"]) == 3


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--out", "no/such/x.safetensors"], "in a folder that does not exist"),
        (["--out", "."], "a folder"),
        (["--text", "no.txt"], "No such file or directory: no.txt"),
    ],
)
@pytest.mark.parametrize("what", ["recalkv", "judge-q"])
def test_wrong_commands_are_told_before_any_work(what, args, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", what, *args])
    assert result.exit_code == 2
    assert why in result.stderr
    assert not list(tmp_path.iterdir())


def test_too_little_is_told_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"keep=0\.1 is too little"):
        made(tiny(), tmp_path / "x.safetensors", 0.1, progress=lambda *_: pytest.fail("worked"))


# ---- the real model


@pytest.mark.slow
def test_quick_training_of_the_real_model(smollm2, tmp_path):
    """By the command, on little text: half the dims are half the bytes, and predictions stay finite and sensible."""
    from calidrop.compare import compare

    out = tmp_path / "quick.safetensors"
    command = ["train", "recalkv", "--out", str(out), "--windows", "4", "--length", "256", "--gradients", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    artefact = Artefact.load(str(out))
    ranks = sum(map(sum, artefact.meta["ranks"]))
    assert 0.49 * 30 * 2 * 192 < ranks <= 0.5 * 30 * 2 * 192
    assert artefact.meta["command"].startswith("calidrop train recalkv --model smollm2")
    text = ALICE.read_text()
    plain, rounded = compare(*smollm2, text, [f"recalkv({str(out)!r})", f"recalkv({str(out)!r})+int4"], 512, 16)
    assert plain.ratio == pytest.approx(2, rel=0.12)  # the last tokens are exact, and there are positions
    assert rounded.ratio > 4
    assert plain.kl < 3
    assert rounded.kl < 3
