"""Linear layers of a model on a CPU, faster than torch has them.

For a few rows a layer is as fast as its weights can be read. torch's libraries lay bf16 weights out anew each time
(oneDNN), and in fp32 MKL reads them at a fraction of that pace on processors that are not Intel's, where it also
multiplies a prompt's rows without AVX-512. Here a kernel answers for a few rows (`ops.cpu.linear`), and oneDNN for
many in fp32 on AMD's.
"""

from __future__ import annotations

import functools
import platform
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from calidrop import huge
from calidrop.ops import MOST_QUERIES, build, cpu

M = TypeVar("M", bound=nn.Module)
_library = torch.library.Library("calidrop", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # what torch.compile sees


@torch.library.impl(_library, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.linear(x, weight, bias) if cpu.multiplies(x, weight) else F.linear(x, weight, bias)


@torch.library.register_fake("calidrop::linear", lib=_library)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """nn.Linear on the same weights, with the same results but for the order of sums.

    It is nn.Linear to the letter where gradients, autocast, a dtype but fp32 and bf16 or a device but the CPU are at
    work.
    """

    def forward(self, input: Tensor) -> Tensor:
        own: Any = self._parameters  # as attributes they would be searched for, which takes as long as the rest
        if "weight" not in own or "bias" not in own or not _plain(input, own["weight"], own["bias"]):
            return super().forward(input)
        weight, bias = own["weight"], own["bias"]
        if torch.compiler.is_compiling():
            few = input.numel() <= MOST_QUERIES * self.in_features
            return torch.ops.calidrop.linear(input, weight, bias) if few else super().forward(input)
        if _followed(input):
            return super().forward(input)
        if cpu.multiplies(input, weight):
            return cpu.linear(input, weight, bias)
        if input.dtype is torch.float32 and torch.backends.mkldnn.enabled and onednn_leads():
            return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return super().forward(input)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are ordinary tensors, of which nothing is asked but the product."""
    # one that is quantized, or shared among processes, has a product of its own
    if type(weight) is not nn.Parameter or type(x) not in (Tensor, nn.Parameter):
        return False
    known = x.is_cpu and weight.is_cpu and x.dtype is weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    if not known or x.shape[-1] != weight.shape[1] or torch.is_autocast_enabled("cpu"):
        return False
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return not learns and (bias is None or bias.dtype is x.dtype)


def _followed(x: Tensor) -> bool:
    """Whether something keeps track of what becomes of it, which neither call here tells: forward-mode differentiation,
    torch.func or a trace."""
    if unpack_dual(x).tangent is not None or torch.jit.is_tracing():  # type: ignore[attr-defined]  documented, though
        return True
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False


def fast_linear(model: M, on: bool = True) -> M:
    """Have the linear layers of `model` run faster on a CPU (x86-64); `on=False` takes it back.

    A decode step of up to eight rows reads weights at the pace of memory, in fp32 and bf16; a prompt's products take
    half the time in fp32 on AMD's processors (`python -m benchmarks.linear`). `calidrop.load` has done it. Weights
    stay as they are; those that are not mapped from a file are moved to huge pages, where Linux has them (6.1 or later;
    some 2 s a GB). Layers of a class of their own (LoRA's, quantized ones) are left alone. Returns the model, changed
    in place.
    """
    old, new = (nn.Linear, Linear) if on else (Linear, nn.Linear)
    found: list[Any] = [layer for layer in model.modules() if type(layer) is old]
    if on and not helps():
        return model
    for layer in found:
        layer.__class__ = new
    if on:
        huge.moved(layer.weight for layer in found if type(layer.weight) is nn.Parameter)
    return model


def helps() -> bool:
    """Whether that was measured on such a machine."""
    return platform.machine() == "x86_64"


@functools.cache
def onednn_leads() -> bool:
    """Whether torch's own choice for many rows in fp32 is the slower one: MKL on a processor of AMD's."""
    has: Any = torch.backends
    both = has.mkl.is_available() and has.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return both and build.of_amd()
