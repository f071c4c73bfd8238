"""Memory for what is held on a CPU, in pages of 2 MB where Linux gives them: who reads all of it at every step has
fewer addresses to look up, and processors read ahead to the end of a page only. Nothing is larger for it; without such
pages it is memory as torch finds it."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE = 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COLLAPSE = 25  # Linux's MADV_COLLAPSE, which `mmap` does not name
APART = 4096  # bytes between two tensors that lie side by side: malloc notes a few of its own


@functools.cache
def there() -> bool:
    """Whether programs may ask for such pages here."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """`like.new_empty(shape)`, with the whole pages of it huge."""
    size = like.element_size() * math.prod(shape)
    if size < PAGE or not like.is_cpu or type(like) is not Tensor or not there():
        return like.new_empty(shape)
    room = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # takes memory where it is written
    start = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % PAGE
    room.madvise(mmap.MADV_HUGEPAGE, start, size // PAGE * PAGE)
    return torch.frombuffer(room, dtype=like.dtype, count=size // like.element_size(), offset=start).view(shape)


def copy(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return empty(x, x.shape).copy_(x) if _holds(x) else x.clone(memory_format=torch.contiguous_format)


def cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """As torch.cat, of tensors of one dtype."""
    first = parts[0]
    if not all(_holds(x) and x.dtype == first.dtype for x in parts):
        return torch.cat(list(parts), dim)
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    return torch.cat(list(parts), dim, out=empty(first, shape))


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """As torch.gather."""
    return torch.gather(x, dim, index, out=empty(x, index.shape)) if _holds(x) else x.gather(dim, index)


def marked(x: Tensor, keep: Tensor) -> Tensor:
    """x[keep], contiguous: keep bool, of the first dims of x."""
    if not _holds(x):
        return x[keep].contiguous()
    out = empty(x, (int(keep.sum()), *x.shape[keep.dim() :]))
    return torch.ops.aten.index.Tensor_out(x, [keep], out=out)


def _holds(x: Tensor) -> bool:
    """Whether it can be written to memory of ours."""
    return x.is_cpu and type(x) is Tensor and not x.requires_grad


def moved(held: Iterable[Tensor]) -> int:
    """Moves what is in memory already to huge pages, as far as tensors fill them together; nobody sees a difference but
    in time. -> how many bytes are in such pages now. What is mapped from a file stays there, and so does all with a
    Linux before 6.1."""
    if sys.platform != "linux" or not there():
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    spans: list[list[int]] = []
    for start, stop in sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in held if x.is_cpu):
        if spans and start - spans[-1][1] <= APART:
            spans[-1][1] = max(stop, spans[-1][1])
        else:
            spans.append([start, stop])
    total = 0
    for start, stop in spans:
        first, size = -(-start // PAGE) * PAGE, stop // PAGE * PAGE - -(-start // PAGE) * PAGE
        if size > 0 and advise(first, size, COLLAPSE) == 0:
            total += size
    return total
