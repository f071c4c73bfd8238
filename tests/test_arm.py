"""The kernels for CPUs on ARM: cross-compiled, and every call that tests make of them runs in an emulated process."""

import ctypes
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import test_attention_predictor
import test_kernel
import test_rebuilding
from calidrop import ops
from calidrop.ops import build, cpu, described
from calidrop.state import Note
from test_kernel import (  # noqa: F401 (collected here once more)
    test_heads_of_unequal_length,
    test_only_a_view_of_a_buffer,
    test_several_sets_empty_slots_and_answers,
    test_what_is_no_number_stays_none,
)
from test_proposals import check_turns

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FUNCTIONS = (
    *("decode", "columns", "prompt", "alike", "network", "weights", "remember", "follow", "exchange", "linear"),
    "latents",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} or {EMULATOR} is not there"
    ),
]


class OnArm:
    """In the place of cpu.Kernel. Memory is what tensors' pointers were asked for since the last call."""

    reason = ""

    def __init__(self, program: Path, folder: Path, asked: list[torch.UntypedStorage]) -> None:
        self.program, self.folder, self.asked, self.calls = program, folder, asked, 0
        for i, name in enumerate(FUNCTIONS):
            setattr(self, name, partial(self._call, i))

    def _call(self, function: int, *given: object) -> None:
        ranges = {x.data_ptr(): x.nbytes() for x in self.asked if x.nbytes()}
        words, here = [], []
        for x in given:
            if isinstance(x, described.Array):
                words.append(bytes(x))
            elif isinstance(x, bytes | ctypes.Array):
                here.append(ctypes.create_string_buffer(x, len(x)) if isinstance(x, bytes) else x)
                ranges[ctypes.addressof(here[-1])] = ctypes.sizeof(here[-1])
                words.append(struct.pack("<q", ctypes.addressof(here[-1])))
            else:
                words.append(struct.pack("<d" if isinstance(x, float) else "<q", x or 0))
        told = b"".join(words)
        head = struct.pack("<3q", len(ranges), len(told) // 8, function)
        head += b"".join(struct.pack("<2q", *x) for x in ranges.items()) + told
        file = self.folder / "call"
        file.write_bytes(head + b"".join(ctypes.string_at(*x) for x in ranges.items()))
        subprocess.run([EMULATOR, str(self.program), str(file)], check=True)
        left = file.read_bytes()[len(head) :]
        for at, size in ranges.items():
            ctypes.memmove(at, left, size)
            left = left[size:]
        self.calls += 1
        self.asked.clear()


# what every such machine has, and what most of today's have
@pytest.fixture(scope="module", params=["armv8-a", "armv8.4-a+sve"])
def program(request, tmp_path_factory, worker_id):
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # that workers share: it takes a minute
    to = folder / request.param
    with FileLock(folder / f"{request.param}.lock"):
        if not to.exists():
            sources = [*sorted(build.SOURCES.glob("*.cpp")), Path(__file__).with_name("on_arm.cpp")]
            flags = [x for x in build.FLAGS if x not in ("-march=native", "-shared", "-fPIC")]
            command = [COMPILER, *flags, f"-march={request.param}", "-static", *sources, "-fopenmp", "-o", to]
            subprocess.run(command, check=True)
    return to


@pytest.fixture(autouse=True)
def on_arm(program, tmp_path, monkeypatch):
    asked: list[torch.UntypedStorage] = []
    pointer = torch.Tensor.data_ptr

    def data_ptr(x: torch.Tensor) -> int:
        asked.append(x.untyped_storage())
        return pointer(x)

    kernel = OnArm(program, tmp_path, asked)
    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
    monkeypatch.setattr(Note, "get", lambda *_: None)  # what is known already would not be asked for
    monkeypatch.setattr(cpu, "kernel", lambda: kernel)
    yield
    assert kernel.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", sorted(cpu.HEAD_DIMS))
def test_exact(D, dtype):
    test_kernel.test_exact(D, 65, dtype)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads):
    test_kernel.test_any_number_of_threads(threads, 1)


def test_a_step_writes_its_token():
    test_kernel.test_a_step_writes_its_token_on_the_way(24, 80, torch.bfloat16, 7, None)


@pytest.mark.parametrize("mask", ["all", "window"])
def test_queries_in_turn(mask):
    check_turns(mask, 5, torch.float32, None, ops.CPU.name)


@pytest.mark.parametrize("recipe", test_kernel.CODED)
def test_codes(recipe, monkeypatch):
    test_kernel.test_codes((), recipe, 64, monkeypatch)


@pytest.mark.parametrize(
    ("recipe", "D"), [("int8(residual=5)", 32), ("int4(residual=5)", 256), ("int8(residual=5)", 96)]
)
def test_codes_of_other_head_dims(recipe, D, monkeypatch):
    test_kernel.test_codes_for_any_number_of_queries_and_channels((), recipe, D, 7, monkeypatch)


@pytest.mark.parametrize(
    ("D", "W", "dtype"), [(64, 130, torch.float32), (80, 5, torch.bfloat16), (128, 7, torch.float16)]
)
def test_column_sums(D, W, dtype, monkeypatch):
    test_kernel.test_column_sums((), 5.0, D, W, dtype, monkeypatch)


@pytest.mark.parametrize(
    ("G", "D", "Dv", "W", "dtype"), [(3, 64, 64, 200, torch.float32), (7, 128, 32, 9, torch.float16)]
)
def test_a_prompt(G, D, Dv, W, dtype, monkeypatch):
    test_kernel.test_a_prompt_with_its_column_sums((), None, G, D, Dv, W, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(48, 3), (576, 130)])
def test_a_linear_layer(width, out, dtype, monkeypatch):
    test_kernel.test_a_linear_layer((), width, out, dtype, 2, monkeypatch)


@pytest.mark.parametrize("later", [False, True])
def test_the_last_key_that_is_alike(later, monkeypatch):
    test_kernel.test_the_last_key_that_is_alike((), 611, 128, later, monkeypatch)


@pytest.mark.parametrize("newest", [False, True])
def test_the_network_of_attention_predictor(newest, monkeypatch):
    test_kernel.test_the_network_of_attention_predictor((), 3, 65, newest, monkeypatch)


def test_a_step_of_attention_predictor(monkeypatch):
    test_kernel.test_a_step_of_attention_predictor((), 2, 3, 33, 1, 0.25, monkeypatch)


def test_what_attention_predictor_fetches(monkeypatch):
    test_attention_predictor.test_the_kernel_exchanges_as_torch_does("", 60, [0, 7], monkeypatch)


def test_what_heads_remember(monkeypatch):
    test_kernel.test_what_heads_remember((), 1, 0.85, 3, 64, 64, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("recipe", ["", "int4", "fp8"])
def test_latents(recipe, monkeypatch):
    test_rebuilding.test_latents((), recipe, 2, monkeypatch)


def test_latents_of_other_shapes():
    test_rebuilding.test_shapes(2, 7, 80, 96, 1, 40, 96, 16, torch.float16)
