"""What a CUDA graph does, on a CPU: the same operations, with the same numbers from Python, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ASKS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)


class Tape(TorchDispatchMode):
    """Refuses what would wait for a GPU: values, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        picks = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
        if func in ASKS or (picks and any(x is not None and x.dtype == torch.bool for x in args[1])):
            raise RuntimeError(f"{func} asks the host")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def again(self) -> None:
        for func, args, kwargs, out in self.done:
            for to, x in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, Tensor) and to.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    to.copy_(x)


def tape(fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    recorded = Tape()
    with recorded:
        out = fn()
    return out, recorded.again
