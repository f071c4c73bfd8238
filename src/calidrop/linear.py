"""Linear layers of a model on a CPU, by the faster of the two libraries that torch brings along.

torch multiplies in fp32 by MKL. On processors that are not Intel's, MKL reads the weights for a few rows at a fraction
of what memory gives and makes a prompt's products without AVX-512; oneDNN, which torch uses for bf16, does neither.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

M = TypeVar("M", bound=nn.Module)
CPUINFO = Path("/proc/cpuinfo")
FEW = 4  # rows up to which MKL is the faster one after all, given the weights as its first operand


class Linear(nn.Linear):
    """nn.Linear on the same weights, with the same results but for the order of sums.

    It is nn.Linear to the letter where gradients, autocast, a dtype but fp32 or a device but the CPU are at work.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._ours(input):
            return super().forward(input)
        rows = input.numel() // self.in_features
        if 1 <= rows <= FEW:
            flat = input.reshape(rows, self.in_features)
            # A single row twice: MKL's product of a matrix and a vector takes twice as long as one with two.
            out = torch.mm(self.weight, (torch.cat((flat, flat)) if rows == 1 else flat).T).T[:rows].contiguous()
            out = out.view(*input.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        if torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled or unpack_dual(input).tangent is not None:
            return super().forward(input)
        # This call has no derivatives of any kind, and torch.compile does not take it.
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")

    def _ours(self, input: Tensor) -> bool:
        weight = self.weight
        if type(weight) is not nn.Parameter:  # quantized, or shared among processes: it has a product of its own
            return False
        known = input.is_cpu and weight.is_cpu and input.dtype is weight.dtype is torch.float32
        if not known or input.shape[-1] != self.in_features or torch.is_autocast_enabled("cpu"):
            return False
        return not torch.is_grad_enabled() or not (
            input.requires_grad or any(p.requires_grad for p in self.parameters())
        )


def fast_linear(model: M, on: bool = True) -> M:
    """Have the linear layers of `model` run by the faster library where this machine has one; `on=False` takes it back.

    On AMD processors, in fp32, a decode step reads weights one and a half to three times as fast and a prompt's
    products take half the time (`python -m benchmarks.linear`). `calidrop.load` has done it. Weights stay as they are.
    Layers of a class of their own (LoRA's, quantized ones) are left alone. Returns the model, changed in place.
    """
    old, new = (nn.Linear, Linear) if on else (Linear, nn.Linear)
    found: list[Any] = [layer for layer in model.modules() if type(layer) is old]
    for layer in found if helps() or not on else ():
        layer.__class__ = new
    return model


@cache
def helps() -> bool:
    """Whether torch's own choice for fp32 is the slower one here: MKL on a processor of AMD's."""
    has: Any = torch.backends
    both = has.mkl.is_available() and has.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return both and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """Of an x86 processor, as Linux tells it; else ""."""
    if platform.machine() != "x86_64" or not CPUINFO.is_file():
        return ""
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
