"""How fast a decode step reads a layer's cache, against a copy on the same device and torch's sdpa on bf16."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu import pieces
from benchmarks.gpu.run import Run, show
from calidrop import ops
from calidrop.ops.gpu.attention import LEAST, Tile, decode

NAMES = ["exact", "int8", "fp8", "int4", "kivi4", "kivi2"]
LARGEST = 6 << 30  # bytes of exact keys and values that are rounded at once
COLUMNS = [("format", "6"), ("tokens", "7"), ("batch", "3"), ("us", "9.1f"), ("gb_s", "7.0f"), ("of_copy", "6.1%"),
           ("of_exact", "5.2f"), ("host_us", "6.0f")]  # fmt: skip
TILES: dict[str, list[Tile]] = {  # the first is `attention.tile_of`'s
    "exact": [(64, 4, 3), (64, 4, 4)],
    "int8": [(64, 4, 3), (128, 4, 3), (64, 2, 3)],
    "fp8": [(128, 4, 3), (64, 4, 3), (64, 2, 3)],
    "int4": [(128, 4, 3), (64, 4, 3), (64, 2, 3), (128, 4, 4)],
    "kivi4": [(64, 2, 3), (128, 4, 3), (64, 4, 3), (32, 1, 3), (64, 2, 4)],
    "kivi2": [(64, 1, 3), (64, 1, 4), (64, 2, 3)],
    "int2": [(32, 1, 3), (64, 1, 3)],
}


def timed(run: Run, fn: Callable[[], object]) -> tuple[float, float]:
    """Microseconds on the device (a captured graph, so without launches; the L2 cache cleared before each; median), and
    of the host when it calls it."""
    for _ in range(1 if run.tiny else 3):
        fn()
    run.sync()
    start = time.perf_counter()
    calls = 1 if run.tiny else 10
    for _ in range(calls):
        fn()
    host = (time.perf_counter() - start) / calls * 1e6
    run.sync()
    if run.device.type != "cuda":
        return host, host
    from triton.testing import do_bench

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return do_bench(graph.replay, warmup=5, rep=30, return_mode="median") * 1e3, host


def copy_speed(run: Run) -> float:
    """Bytes per second of a copy on the device, read and written."""
    x = torch.empty((1 << 20) if run.tiny else (2 << 30), dtype=torch.uint8, device=run.device).random_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / (timed(run, lambda: y.copy_(x))[0] * 1e-6)


def bandwidth(run: Run) -> Iterator[dict]:
    copied = copy_speed(run)
    yield show({"format": "copy", "gb_s": copied / 1e9}, COLUMNS)
    H, G, D = (2, 2, 32) if run.tiny else (8, 4, 128)
    lengths, batches = ([64], [1]) if run.tiny else ([32, 8, 128, 512], [8, 1, 32])
    for tokens in lengths:
        for batch in batches:
            N = tokens if run.tiny else tokens * 1024
            if batch * H * N * D * 4 > LARGEST:
                continue
            exact = 0.0
            for name in ("sdpa", *NAMES):
                row = {"format": name, "tokens": N, "batch": batch}
                row = run.guarded(row, lambda name=name, batch=batch, N=N: _measured(run, name, batch, H, G, N, D))
                if "us" in row:
                    exact = row["us"] if name == "exact" else exact
                    row |= {"of_copy": row["gb_s"] * 1e9 / copied, "of_exact": exact / row["us"] if exact else None}
                yield show(row, COLUMNS)
    N, batch, D = (64, 1, 320) if run.tiny else (32 * 1024, 8, 576)  # latents of multi-head latent attention
    for G in (16,) if run.tiny else (16, 128):
        for name in ("exact", "int8", "fp8", "int4"):
            row = {"format": f"{name} latents, {G} heads", "tokens": N, "batch": batch}
            row = run.guarded(row, lambda name=name, G=G: _measured(run, name, batch, 0, G, N, D))
            yield show(row | ({"of_copy": row["gb_s"] * 1e9 / copied} if "us" in row else {}), COLUMNS)


def _measured(run: Run, name: str, B: int, H: int, G: int, N: int, D: int) -> dict:
    """H: kv heads, 0 where tokens are latents."""
    dtype = torch.float32 if run.tiny else torch.bfloat16
    t = pieces.tokens(B, H, N, D, dtype, run.device) if H else pieces.latents(B, N, D, dtype, run.device)
    H = H or 1
    qs = pieces.queries(B, H * G, 1, D, dtype, run.device)
    if name == "sdpa":
        k, v, nbytes = t.k, t.v, t.k.nbytes + t.v.nbytes
        us, host = timed(run, lambda: F.scaled_dot_product_attention(qs.q, k, v, enable_gqa=True))
    else:
        store = pieces.stored(name, t)
        del t
        parts = store.attend(qs)
        nbytes = pieces.held_bytes(parts)
        us, host = timed(run, lambda: ops.joined(qs, parts))
    return {"us": us, "gb_s": nbytes / us / 1e3, "host_us": host, "bytes": nbytes}


def tune(run: Run) -> Iterator[dict]:
    """Tiles of the decode kernel at 32k tokens, and for one row how many tokens are worth a program."""
    N = 64 if run.tiny else 32 * 1024
    for name, tiles in {"int4": [(32, 4, 2)]}.items() if run.tiny else TILES.items():
        yield from _tuned(run, name, 2 if run.tiny else 8, N, [(tile, LEAST) for tile in tiles])
        yield from _tuned(
            run, name, 1, N, [(tiles[0], least) for least in ((32,) if run.tiny else (128, 256, 512, 1024))]
        )


def _tuned(run: Run, name: str, B: int, N: int, choices: list[tuple[Tile, int]]) -> Iterator[dict]:
    H, G, D = (2, 2, 32) if run.tiny else (8, 4, 128)
    dtype = torch.float32 if run.tiny else torch.bfloat16
    qs = pieces.queries(B, H * G, 1, D, dtype, run.device)
    parts = pieces.stored(name, pieces.tokens(B, H, N, D, dtype, run.device)).attend(qs)

    def measure(tile: Tile, least: int) -> dict:
        us = timed(run, lambda: decode(qs, parts, least=least, tile=tile))[0]
        return {"us": us, "gb_s": pieces.held_bytes(parts) / us / 1e3}

    for tile, least in choices:
        row = {"format": name, "tokens": N, "batch": B, "tile": f"{tile} {least}"}
        yield show(run.guarded(row, functools.partial(measure, tile, least)), [("tile", "20"), *COLUMNS])
