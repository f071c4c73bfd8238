"""Tensor parallelism: the kv heads of a layer may be spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

KEYS = ("k_proj", "qkv_proj", "query_key_value")  # the projections that make keys, alone or fused


class HeadGroup:
    """The processes that hold the other heads of the same layers. Alone (the usual case) everything is local.

    Ranks hold heads in order: rank r of size n holds heads [r*H, (r+1)*H). Every rank must call `gather` at the same
    points; that holds because all ranks run the same layers on the same tokens.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @staticmethod
    def of(model: nn.Module) -> HeadGroup:
        """Read off how transformers spread the model: its mesh, and whether its plan leaves a process with some heads.

        Plans that gather the keys again ("colwise_gather_output": phi3, olmo2, ...) leave it with all of them, so do
        pipelines and data parallelism."""
        mesh: Any = getattr(model, "_device_mesh", None)
        plan: Any = getattr(model, "tp_plan", None) or {}
        if mesh is None or not any(n.split(".")[-1] in KEYS and style == "colwise" for n, style in plan.items()):
            return HeadGroup()
        names = mesh.mesh_dim_names or ("tp",)  # unnamed in older versions, which have no other kind
        if "tp" not in names or mesh.size(names.index("tp")) == 1:
            return HeadGroup()
        return HeadGroup(mesh.get_group(names.index("tp")))

    def gather(self, x: Tensor) -> Tensor:
        """[B,H,...] -> [B,H*size,...], the same on every rank."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def longest(self, x: Tensor) -> int:
        """The largest x.shape[2] of any process, for those that must agree on a shape before they `gather`."""
        if self.group is None:
            return x.shape[2]
        n = torch.tensor(x.shape[2], device=x.device)
        dist.all_reduce(n, dist.ReduceOp.MAX, group=self.group)
        return int(n)

    def mine(self, x: Tensor) -> Tensor:
        """[B,H*size,...] -> [B,H,...]"""
        heads = x.shape[1] // self.size
        return x[:, self.rank * heads : (self.rank + 1) * heads]

    def __deepcopy__(self, memo: dict) -> HeadGroup:
        return self  # a process group cannot be copied, and a copied cache belongs to the same one
