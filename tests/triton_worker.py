"""Compiles every Triton kernel for a GPU that is not there, and prints what each takes: registers, bytes of stack.

Run in a process of its own, without TRITON_INTERPRET. Launches do everything but launch."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from calidrop import ops
from calidrop.attention import Queries, attend
from calidrop.ops import gpu
from calidrop.ops.gpu.attention import decode
from calidrop.window import Window
from helpers import random_qkv, run

RECIPES = [
    "snapkv(budget=40)",
    *(f"think(keep=0.6, recent=5){more}" for more in ("", "+int4", "+kivi(bits=4)")),
    "adakv(budget=90, recent=9)+int4",
    "int8(residual=5)",
    "fp8(residual=5)",
    "kivi(bits=4, residual=5)",
    "ott(bits=2, block=128, pool=3, spill=5, skip=0, residual=5)",
    *(f"h2o(budget=90)+mikv(bits={bits})" for bits in (2, 3, 4)),
    *(f"mixkvq(values={bits}, residual=5)" for bits in (2, 4)),
    "decoquant(residual=5)",
]


class Absent:
    """The driver of a GPU with nothing behind it."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def usage(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said)}
    return {"name": kernel.name, **found, "SHARED": kernel.metadata.shared}


def everything(dtype: torch.dtype, recipes: list[str], asked: list[str]) -> None:
    """Every kernel once, decode with every format. asked: gets the recipe before its kernels are compiled,
    and "heard" behind it where they leave logits."""
    D = 128
    qs = Queries(torch.randn(2, 6, 1, D).to(dtype), torch.full((2, 1), 999), 0.1)
    for recipe in recipes:
        asked.append(recipe)
        kv = run(recipe, tuple(x.to(dtype) for x in random_qkv(2, 2, 3, 300, D)))  # type: ignore[arg-type]
        window = kv.state.window.tokens()
        parts = [*kv.state.store.attend(qs), ops.piece(window), attend(qs, window.k, window.v, window.pos)]
        decode(qs, parts)
        asked.append(f"{recipe}, heard")
        decode(qs, parts, ops.Heard())
    gpu.mass(qs, torch.zeros(2, 6, 1), window)
    for block in (1, 16):
        gpu.weights(qs, torch.zeros(2, 6, 1), torch.randn(2, 2, 3, 64), block > 1, block)
    fixed = Window()
    fixed.append(window)
    gpu.put(window.slice(0, 1), fixed.fixed(400, 300))
    held = torch.randn(2, 6, D), torch.randn(2, 6), torch.randn(2, 6, D)
    counted = torch.zeros(2, 2, dtype=torch.int64)
    gpu.remembered(qs, held, 0, 0.7, None)
    for late in (0, 1):
        gpu.remembered(qs, held, 1, 0.7, 0.7, 2, late, counted)
    x = torch.randn(2, 2, 64, D).to(dtype)
    for bits in (2, 4, 8):
        gpu.rounded(x, bits)
        gpu.rounded(x.unflatten(2, (2, 32)).transpose(-1, -2), bits)
    weight, order, bias = torch.randn(2, D, 96), torch.arange(2, dtype=torch.int32), torch.randn(2 * D)
    z, pos = torch.randn(2, 40, 192).to(dtype), torch.arange(40, dtype=torch.int32).expand(2, 40)
    for freq in (torch.randn(48), torch.randn(64)):
        gpu.keys(z, pos, weight, bias, order, freq, 1.0)
        gpu.ask_latents(qs, z, z, pos, torch.zeros(2, dtype=torch.long), weight, bias, order, freq, 1.0)


def wide(dtype: torch.dtype, recipes: list[str], asked: list[str]) -> None:
    """Latents of multi-head latent attention: of few query heads, and of as many as there are."""
    z = torch.randn(2, 1, 300, 576).to(dtype)
    for recipe in recipes:
        for heads in (16, 128):
            kv = run(recipe, (torch.randn(2, heads, 300, 576).to(dtype), z, z[..., :0]))
            qs = Queries(torch.randn(2, heads, 1, 576).to(dtype), torch.full((2, 1), 999), 0.1)
            asked.append(f"{recipe}, {heads} heads of 576")
            parts = [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())]
            decode(qs, parts, ops.Heard() if heads == 16 else None)


def main(capability: int) -> None:
    driver.set_active(Absent(capability))
    whole, seen, asked = JITFunction.run, {}, [""]

    def compiled(self, *args, grid, warmup, **options):
        kernel = whole(self, *args, grid=grid, warmup=True, **options)
        seen.setdefault(kernel.hash, (kernel, asked[-1]))

    JITFunction.run = compiled
    recipes = [r for r in RECIPES if capability >= 89 or "fp8" not in r]  # older ones have no e4m3
    everything(torch.bfloat16, recipes, asked)
    wide(torch.bfloat16, [r for r in recipes if r.startswith(("int8", "fp8"))] + ["int4(residual=5)"], asked)
    print(json.dumps([usage(kernel) | {"recipe": recipe} for kernel, recipe in seen.values()]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
