"""The benchmarks of decoding and of prompts from end to end, tiny: what they print, write and draw."""

import json
import sys

import pytest
import torch
from benchmarks import decode, huge, linear, prefill, shapes

import calidrop.linear
import calidrop.mla
import calidrop.shared
from test_cli import tiny  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def as_before():
    """They set these for a whole process."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(tiny, dtype, tmp_path, monkeypatch):  # noqa: F811
    out, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    recipes = "full", "snapkv(budget=40)+int4"
    named = [word for recipe in recipes for word in ("--recipe", recipe)]
    sizes = "--contexts", "96,128", "--batches", "1,2", "--rounds", "2", "--steps", "1", "--threads", "1"
    monkeypatch.setattr(sys, "argv", ["decode", "--model", tiny, "--dtype", dtype, *named, *sizes,
                                      "--json", str(out), "--plot", str(picture)])  # fmt: skip
    decode.main()
    told = json.loads(out.read_text())
    assert f"{dtype}, 1 threads" in told["machine"]
    rows = {(r["context"], r["batch"], r["cache"]): r for r in told["rows"]}
    assert {key[:2] for key in rows} == {(n, b) for n in (96, 128) for b in (1, 2)}
    for (context, batch, _), row in rows.items():
        base = rows[context, batch, decode.FULL]
        assert row["times"] == pytest.approx(base["best_ms"] / row["best_ms"])
        assert 0 < row["best_ms"] <= row["median_ms"]
    full = rows[128, 2, "full"]
    assert full["device_bytes"] > 2 * rows[128, 2, recipes[1]]["device_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_decode_without_fp8(tiny, monkeypatch, capsys):  # noqa: F811
    def unknown(backend, config):
        raise ValueError(f"Unknown quantization backend `{backend}`")

    monkeypatch.setattr(decode, "QuantizedCache", unknown)
    sizes = "--contexts", "64", "--batches", "1", "--rounds", "1", "--steps", "1", "--threads", "1", "--recipe", "full"
    monkeypatch.setattr(sys, "argv", ["decode", "--model", tiny, *sizes])
    decode.main()
    said = capsys.readouterr().out
    assert "QuantizedCache fp8 is left out: Unknown quantization backend `fp8`" in said
    assert "full" in said


def test_decode_of_proposals(tiny, monkeypatch, capsys):  # noqa: F811
    sizes = "--contexts", "64", "--batches", "1,2", "--rounds", "1", "--steps", "2", "--threads", "1", "--proposed", "3"
    monkeypatch.setattr(sys, "argv", ["decode", "--model", tiny, *sizes, "--recipe", "snapkv(budget=40)"])
    fed, held, measure = [], [], decode.Bench.measure

    def watched(bench, caches, ids, *more):
        fed.append(tuple(ids.shape))
        found = measure(bench, caches, ids, *more)
        held.extend(cache.get_seq_length() for cache in caches.values())
        return found

    monkeypatch.setattr(decode.Bench, "measure", watched)
    decode.main()
    assert fed == [(1, 3), (2, 3)]
    caches = 3 + calidrop.linear.helps()  # DynamicCache on torch's linear layers too
    assert held == [67] * caches + [70] * caches  # of three passes one token each stays
    assert "QuantizedCache" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["decode", "--proposed", "2", "--compiled"])
    with pytest.raises(SystemExit):
        decode.main()
    assert "--proposed must be 1" in capsys.readouterr().err


@pytest.mark.parametrize("differ", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_with_torchs_linear_layers_too(tiny, dtype, differ, monkeypatch, capsys):  # noqa: F811
    """Where ours are others: one row more, the only one whose steps they take."""
    monkeypatch.setattr(calidrop.linear, "helps", lambda: differ)
    sizes = "--contexts", "64", "--batches", "1", "--rounds", "2", "--steps", "1", "--threads", "1", "--recipe", "full"
    monkeypatch.setattr(sys, "argv", ["decode", "--model", tiny, "--dtype", dtype, *sizes])
    kinds, step = [], decode.Bench.step

    def watched(bench, cache, ids):
        if ids.shape[1] == 1:
            kinds.append((id(cache), type(bench.model.lm_head)))
        return step(bench, cache, ids)

    monkeypatch.setattr(decode.Bench, "step", watched)
    decode.main()
    assert (decode.STOCK in capsys.readouterr().out) is differ
    torchs = {cache for cache, kind in kinds if kind is torch.nn.Linear}
    ours = {cache for cache, kind in kinds if kind is calidrop.linear.Linear}
    assert not torchs & ours
    assert (len(torchs), len(ours)) == ((1, 4) if differ else (4, 0))


def test_linear(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(calidrop.linear, "helps", lambda: True)
    out = tmp_path / "rows.json"
    sizes = "--rows", "1,3,70", "--rounds", "1", "--threads", "1", "--json", str(out)
    monkeypatch.setattr(sys, "argv", ["linear", "--model", tiny, *sizes])
    kinds, once = [], linear.once

    def watched(layers, inputs):
        kinds.append((len(layers), {type(layer) for layer in layers}))
        return once(layers, inputs)

    monkeypatch.setattr(linear, "once", watched)
    linear.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["rows"] for row in rows] == [1, 3, 70]
    assert all(row["times"] == row["torch_ms"] / row["ours_ms"] for row in rows)
    each = [{torch.nn.Linear}] * 2 + [{calidrop.linear.Linear}] * 2
    assert [kind for _, kind in kinds] == each * 3
    assert kinds[-1][0] == kinds[0][0] - 1  # a prompt's rows do not go through the head


LATENT, SHARED = calidrop.mla.LatentKV, calidrop.shared.SharedKV
KINDS = {"deepseek-v2-lite": LATENT, "glm-4.7-flash": LATENT, "gemma-3n-e2b": SHARED, "llama-3.1-8b": None}


def shrink(shape, monkeypatch) -> int:
    """-> its layers."""
    kind, layers, given = shapes.SHAPES[shape]
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    if KINDS[shape] is LATENT:
        small |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        small |= {"q_lora_rank": 16, "num_key_value_heads": 4}
    else:
        small |= {"head_dim": 16}
    monkeypatch.setitem(shapes.SHAPES, shape, (kind, layers, {**given, **small}))
    monkeypatch.setattr(shapes, "WORDS", 100)
    return layers


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes(shape, tmp_path, monkeypatch):
    layers = shrink(shape, monkeypatch)
    out, recipes, caches = tmp_path / "rows.json", ("full", "snapkv(budget=40)+int4"), []
    named = [word for recipe in recipes for word in ("--recipe", recipe)]
    sizes = "--contexts", "96", "--batches", "1,2", "--rounds", "1", "--steps", "1", "--threads", "1"
    monkeypatch.setattr(sys, "argv", ["shapes", "--shape", shape, *named, *sizes, "--json", str(out)])
    size = decode.size
    monkeypatch.setattr(decode, "size", lambda cache: caches.append(cache) or size(cache))
    shapes.main()
    told = json.loads(out.read_text())
    rows = {(r["batch"], r["cache"]): r for r in told["rows"]}
    assert told["machine"].startswith(f"{shape}, {layers} layers")
    assert {(b, name) for b in (1, 2) for name in (*recipes, decode.FULL)} <= set(rows)
    for b in (1, 2):
        assert rows[b, recipes[1]]["device_bytes"] < rows[b, recipes[0]]["device_bytes"]
    ours = [layer for cache in caches if isinstance(cache, calidrop.KVCache) for layer in cache.layers_here]
    assert {type(layer) for layer in ours} - {calidrop.layer.LayerKV} == {KINDS[shape]} - {None}


@pytest.mark.parametrize("shape", ["glm-4.7-flash", "llama-3.1-8b"])
def test_prompts_of_shapes(shape, tmp_path, monkeypatch):
    shrink(shape, monkeypatch)
    out, recipes = tmp_path / "rows.json", ["full", "h2o(budget=40)"]
    asked = "--prefill", "--recipe", recipes[0], "--recipe", recipes[1]
    sizes = "--contexts", "96,128", "--rounds", "1", "--threads", "1", "--json", str(out)
    monkeypatch.setattr(sys, "argv", ["shapes", "--shape", shape, *asked, *sizes])
    shapes.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["context"], r["cache"]) for r in rows] == [(n, c) for n in (96, 128) for c in (prefill.PLAIN, *recipes)]
    told_apart = {r["compressing"] is not None for r in rows if r["cache"] != prefill.PLAIN}
    assert told_apart == {KINDS[shape] is None}


def test_prefill(tiny, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "rows.json"
    sizes = "--contexts", "128", "--rounds", "1", "--threads", "1", "--recipe", "snapkv(budget=40)"
    monkeypatch.setattr(sys, "argv", ["prefill", "--model", tiny, *sizes, "--json", str(out)])
    prefill.main()
    plain, ours = json.loads(out.read_text())["rows"]
    assert ours["cache"] == "snapkv(budget=40)"
    assert ours["over_plain"] == pytest.approx(ours["best_s"] / plain["best_s"] - 1)


def test_huge(tiny, capsys):  # noqa: F811
    huge.linear(tiny, "bfloat16", 2)
    row, moved = capsys.readouterr().out.splitlines()
    before, after, _ = map(float, row.split()[-3:])
    assert before > 0 and after > 0 and "MB of weights were moved" in moved
