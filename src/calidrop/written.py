"""Parts of a cache in a file: every storage they hold, once and as it is, and how they are made of these.

What a recipe and a model say anyway (functions, rotations, networks) is not written: it comes from peers, parts of a
new cache of the same recipe. So a file is data, from which nothing is executed, as large as what the parts hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calidrop import huge
from calidrop.state import Host, Note, Shared, State

ENTRY = "calidrop.cache"
FORMAT = 1


class Unsaved(ValueError):
    """Something is held that neither a file nor the recipe can say."""


def write(parts: dict[str, Any], peers: dict[str, Any], meta: dict[str, Any], file: str | os.PathLike) -> None:
    """parts: what to write; peers: the same of a new cache; meta: what to say of it, for `json`. The file is there at
    once or not at all. Raises `Unsaved` and OSError."""
    writer = _Writer()
    said = {name: writer.said(value, peers[name], name, False) for name, value in parts.items()}
    head = {**meta, "format": FORMAT, "parts": said, "storages": writer.places}
    path = Path(file)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        save_file({str(i): x.cpu() for i, x in enumerate(writer.storages)}, f"{beside}/new", {ENTRY: json.dumps(head)})
        os.replace(f"{beside}/new", path)


def head_of(file: str | os.PathLike) -> dict[str, Any]:
    """What `write` said. Raises ValueError for a file that it did not write."""
    try:
        with safe_open(file, "pt") as f:
            head = json.loads((f.metadata() or {}).get(ENTRY, "{}"))
    except SafetensorError:
        head = {}
    if head.get("format") != FORMAT:
        got = f"format {head['format']}, expected {FORMAT}" if head else "expected what `KVCache.save` writes"
        raise ValueError(f"{str(file)!r} is no cache that can be read: {got}")
    return head


def read(head: dict[str, Any], peers: dict[str, Any], file: str | os.PathLike, device: torch.device | None) -> Any:
    """The parts of a file, with what `peers` say of what is not in it. head: of `head_of`. device: where what was on a
    device goes; None: to the one where it was. Raises ValueError where the peers are made otherwise."""
    reader = _Reader(head["storages"], file, device)
    return {name: reader.made(value, peers[name], name) for name, value in head["parts"].items()}


class _Writer:
    def __init__(self) -> None:
        self.storages: list[Tensor] = []  # uint8 [bytes]
        self.places: list[tuple[str, bool]] = []  # of each, its device (or that it serves) and whether it is the host's
        self._known: dict[tuple[torch.device, int], int] = {}

    def said(self, value: Any, peer: Any, where: str, host: bool) -> Any:
        """value as `json` has it. host: whether it is part of a `Host`."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, host)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.cuda.Event):
            value.synchronize()  # what it tells of has arrived then
            return None
        if isinstance(value, Note):
            return {"note": None}
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            both = enumerate(zip(value, _peers(value, peer), strict=True))
            return {type(value).__name__: [self.said(x, p, f"{where}[{i}]", host) for i, (x, p) in both]}
        if isinstance(value, dict):
            peers = peer if isinstance(peer, dict) else {}
            return {"dict": [[n, self.said(x, peers.get(n), f"{where}[{n!r}]", host)] for n, x in value.items()]}
        if _is_part(value):
            peers = vars(peer) if type(peer) is type(value) else {}
            host = host or isinstance(value, Host)
            anew = value.anew if isinstance(value, State) else ()
            held = {n: None if n in anew else x for n, x in vars(value).items()}
            of = {n: self.said(x, peers.get(n), f"{where}.{n}", host) for n, x in held.items()}
            return {"part": f"{type(value).__module__}:{type(value).__qualname__}", "of": of}
        if type(peer) is not type(value):
            raise Unsaved(f"cannot save {where}: got {type(value).__name__}, which the recipe does not tell")
        return {"same": None}

    def _tensor(self, x: Tensor, host: bool) -> list[Any]:
        """[storage, dtype, shape, stride, offset]"""
        storage = x.untyped_storage()
        key = x.device, storage.data_ptr() or -len(self.storages)  # those of no bytes lie nowhere
        if key not in self._known:
            self._known[key] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage))
            self.places.append((str(x.device), host))
        of = str(x.dtype).removeprefix("torch."), list(x.shape), list(x.stride()), x.storage_offset()
        return [self._known[key], *of]


def _peers(items: Sequence[Any], peer: Any) -> Sequence[Any]:
    return peer if isinstance(peer, list | tuple) and len(peer) == len(items) else [None] * len(items)


def _is_part(value: Any) -> bool:
    return (isinstance(value, State) and not isinstance(value, Shared)) or dataclasses.is_dataclass(value)


class _Reader:
    def __init__(self, places: list[tuple[str, bool]], file: str | os.PathLike, device: torch.device | None):
        self.device = device
        with safe_open(file, "pt") as f:
            self.storages = [self._placed(f.get_tensor(str(i)), *where) for i, where in enumerate(places)]

    def _on(self, device: str) -> torch.device:
        return self.device or torch.device(device)

    def _placed(self, x: Tensor, device: str, host: bool) -> Tensor:
        on = self._on(device)
        if not host and on.type != "cpu":
            return x.to(on)
        x = huge.copy(x)  # the other may be a view of the file
        return x.pin_memory() if on.type == "cuda" else x

    def made(self, value: Any, peer: Any, where: str) -> Any:
        """What `_Writer.said` said."""
        if not isinstance(value, dict):
            return value
        (kind, said), *more = value.items()
        if kind == "tensor":
            return self._tensor(*said)
        if kind == "dtype":
            return getattr(torch, said)
        if kind == "device":
            return self._on(said)
        if kind == "note":
            return Note()
        if kind == "same":
            return peer
        if kind == "dict":
            peers = peer if isinstance(peer, dict) else {}
            return {n: self.made(x, peers.get(n), f"{where}[{n!r}]") for n, x in said}
        if kind == "part":
            return self._part(_class(said), dict(more)["of"], peer, where)
        items = [
            self.made(x, p, f"{where}[{i}]") for i, (x, p) in enumerate(zip(said, _peers(said, peer), strict=True))
        ]
        return items if kind == "list" else tuple(items)

    def _part(self, cls: type, of: dict[str, Any], peer: Any, where: str) -> Any:
        peers = vars(peer) if type(peer) is cls else None
        if peers is not None and peers.keys() != of.keys():
            differ = ", ".join(sorted(peers.keys() ^ of.keys()))
            raise ValueError(f"the file is of another version of calidrop: {where} differs in {differ}")
        new = object.__new__(cls)
        vars(new).update({n: self.made(x, (peers or {}).get(n), f"{where}.{n}") for n, x in of.items()})
        return new

    def _tensor(self, at: int, dtype: str, *how: Any) -> Tensor:
        """how: shape, stride and offset."""
        x, of = self.storages[at], getattr(torch, dtype)
        return x[: len(x) // of.itemsize * of.itemsize].view(of).as_strided(*how)


def _class(name: str) -> type:
    """A class of this package that holds parts of a cache, by `module:name`. Raises ValueError for any other."""
    module, _, found = name.partition(":")
    cls: Any = None
    if module.split(".")[0] == "calidrop":
        with contextlib.suppress(ImportError):
            cls = getattr(importlib.import_module(module), found, None)
    if not isinstance(cls, type) or not (issubclass(cls, State) or dataclasses.is_dataclass(cls)):
        raise ValueError(f"the file has parts that this version of calidrop does not know: {name}")
    return cls
