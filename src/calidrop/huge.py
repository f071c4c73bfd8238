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
    room = _room(like, shape)
    return like.new_empty(shape) if room is None else room


def copy(x: Tensor) -> Tensor:
    """A contiguous copy."""
    room = _room(x, x.shape)
    return x.clone(memory_format=torch.contiguous_format) if room is None else room.copy_(x)


def cat(parts: list[Tensor], dim: int) -> Tensor:
    """As torch.cat."""
    first, room = parts[0], None
    if all(x.dtype == first.dtype and not x.requires_grad for x in parts):
        room = _room(first, (*first.shape[:dim], sum(x.shape[dim] for x in parts), *first.shape[dim + 1 :]))
    return torch.cat(parts, dim) if room is None else torch.cat(parts, dim, out=room)


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """As torch.gather."""
    room = _room(x, index.shape)
    return x.gather(dim, index) if room is None else torch.gather(x, dim, index, out=room)


def marked(x: Tensor, keep: Tensor) -> Tensor:
    """x[keep], contiguous: keep bool, of the first dims of x."""
    room = None
    if x.is_cpu and x.nbytes >= PAGE:  # else there is nothing to gain, and a device would be waited for
        room = _room(x, (int(keep.sum()), *x.shape[keep.dim() :]))
    return x[keep].contiguous() if room is None else torch.ops.aten.index.Tensor_out(x, [keep], out=room)


def _room(like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Memory of ours, of the dtype of `like`; None where torch's does as well, or where gradients are to flow."""
    size = like.element_size() * math.prod(shape)
    if size < PAGE or not like.is_cpu or type(like) is not Tensor or like.requires_grad or not there():
        return None
    room = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # takes memory where it is written
    start = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % PAGE
    room.madvise(mmap.MADV_HUGEPAGE, start, size // PAGE * PAGE)
    return torch.frombuffer(room, dtype=like.dtype, count=size // like.element_size(), offset=start).view(shape)


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
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if last > first and advise(first, last - first, COLLAPSE) == 0:
            total += last - first
    return total
