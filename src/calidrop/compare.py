"""The measuring instrument: how far a recipe moves the model's predictions, at what size and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from calidrop.cache import KVCache
from calidrop.parts import Part, check_int
from calidrop.plugin import ATTENTION, using
from calidrop.recipe import Recipe, parse
from calidrop.state import held_bytes

Progress = Callable[[str, int, int], None]
"""(recipe, done, total): layers of the prefill plus decoded tokens."""

WARM_UP = 64  # tokens run before anything is timed: thread pools and kernels start, memory is mapped


@dataclass(frozen=True)
class Row:
    """What `compare` measured for one recipe. KL and nll in nats, per predicted token.

    kl, kl_p95: mean and 95th percentile over positions of KL(full || recipe). agreement: fraction of positions with the
    same likeliest token. nll, nll_full: mean negative log-likelihood of the true next token under the recipe and under
    the uncompressed cache. device_bytes, host_bytes: what the cache held at the end of the run; full_bytes: what an
    uncompressed one needs for the same tokens. ratio: full_bytes / device_bytes; host bytes do not count in it.
    prefill_s: attending and compressing the context. decode_ms_per_token: the median step. recompute_rate: fraction of
    (step, layer, query head) that went back to evicted tokens.
    """

    recipe: str
    kl: float
    kl_p95: float
    agreement: float
    nll: float
    nll_full: float
    device_bytes: int
    host_bytes: int
    full_bytes: int
    ratio: float
    prefill_s: float
    decode_ms_per_token: float
    recompute_rate: float


@dataclass(frozen=True)
class _Run:
    logits: list[Tensor]  # fp32 [vocabulary] on the CPU, after each continuation token
    measured: dict[str, Any]  # the fields of Row that need no other run


def compare(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    recipes: Sequence[str | Part | Recipe],
    context: int = 2048,
    continuation: int = 64,
    progress: Progress | None = None,
    peers: Mapping[str, Callable[[], Cache]] | None = None,
) -> list[Row]:
    """One row per recipe, in the order given. Sets the model's attention implementation to "calidrop".

    peers: other transformers caches to measure in the same way, by name; each is made anew and run under sdpa, and gets
    a row after those of the recipes.

    The first `context` tokens of `text` are the prompt; each layer is compressed right after it attended them. The
    next `continuation` tokens are fed one per forward pass, so that whatever a recipe does while decoding really
    happens, and the logits after each of them are compared with those of the recipe "full", run in the same way. The
    logits after the prompt itself are left out: the prompt is attended exactly, so they are the same for every recipe
    and would only dilute the KL. The last fed token predicts one more, so the text must have context + continuation + 1
    tokens.

    The first of the steps is not timed, unless it is the only one. Raises ValueError before any work for a text that is
    too short, numbers below 1, and a recipe that makes no sense or does not fit the model.
    """
    check_int("context", context, 1)
    check_int("continuation", continuation, 1)
    if isinstance(recipes, str) or not recipes:
        raise ValueError(f"recipes must be a list of at least one recipe, got {recipes!r}")
    parsed = [parse(recipe) for recipe in recipes]
    ids = _ids(tokenizer, text, context + continuation + 1).to(model.device)  # type: ignore[arg-type]
    caches = [KVCache(model, recipe, eager=True) for recipe in parsed]  # empty; all of them now, for their errors
    warm = min(WARM_UP, context)
    _run(model, KVCache(model), ids[:, : warm + 2], warm, None)
    full = _run(model, KVCache(model, eager=True), ids, context, progress)
    rows, targets = [], ids[0, context + 1 :].tolist()
    while caches:
        cache = caches.pop(0)  # so that its memory is free before the next one fills
        run = full if str(cache.recipe) == "full" else _run(model, cache, ids, context, progress)
        rows.append(_row(run, full, targets))
    for name, make in (peers or {}).items():
        run = _run_peer(model, make(), ids, context, name, full.measured["full_bytes"])
        rows.append(_row(run, full, targets))
    return rows


def _run_peer(model: Any, cache: Cache, ids: Tensor, context: int, name: str, full_bytes: int) -> _Run:
    model.set_attn_implementation("sdpa")
    try:
        run = _run(model, cache, ids, context, None)
    finally:
        model.set_attn_implementation(ATTENTION)
    device_bytes = held_bytes([vars(layer) for layer in cache.layers])
    bytes_ = {"device_bytes": device_bytes, "host_bytes": 0, "full_bytes": full_bytes}
    run.measured.update(bytes_, recipe=name, ratio=full_bytes / device_bytes, recompute_rate=0.0)
    return run


def _ids(tokenizer: Any, text: str, need: int) -> Tensor:
    """int64 [1,need]"""
    ids = tokenizer(text, verbose=False)["input_ids"]  # verbose warns that a long text is long
    if len(ids) < need:
        raise ValueError(f"text too short: got {len(ids)} tokens, need {need} (context + continuation + 1)")
    return torch.tensor([ids[:need]])


@torch.inference_mode()
def _run(model: nn.Module, cache: Cache, ids: Tensor, context: int, progress: Progress | None) -> _Run:
    """ids: [1, context + n + 1]; the last one is only predicted."""
    n = ids.shape[1] - context - 1
    with prefill_progress(model, cache, n, progress):
        start = now(ids)
        model(ids[:, :context], **using(cache), use_cache=True, logits_to_keep=1)
        prefill_s = now(ids) - start
    logits, seconds = [], []
    for i in range(n):
        start = now(ids)
        out = model(ids[:, context + i : context + i + 1], **using(cache), use_cache=True)
        seconds.append(now(ids) - start)
        logits.append(out.logits[0, -1].float().cpu())
        if progress:
            progress(_name(cache), len(cache.layers) + i + 1, len(cache.layers) + n)
    return _Run(logits, _measured(cache) | {
        "prefill_s": prefill_s, "decode_ms_per_token": 1000 * median(seconds[1:] or seconds),
    })  # fmt: skip


def _name(cache: Cache) -> str:
    return str(cache.recipe) if isinstance(cache, KVCache) else type(cache).__name__


def _measured(cache: Cache) -> dict[str, Any]:
    """What a filled cache tells, so that it need not be kept."""
    if not isinstance(cache, KVCache):
        return {}
    device_bytes, full_bytes = cache.nbytes, cache.full_nbytes
    return {
        "recipe": str(cache.recipe),
        "device_bytes": device_bytes,
        "host_bytes": cache.host_nbytes,
        "full_bytes": full_bytes,
        "ratio": full_bytes / device_bytes,
        "recompute_rate": cache.recompute_rate,
    }


def now(like: Tensor) -> float:
    """Seconds, once all work on the device of `like` is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


@contextmanager
def prefill_progress(model: nn.Module, cache: Cache, steps: int, progress: Progress | None) -> Iterator[None]:
    """Report each layer of a forward pass as done, out of the layers and `steps` more. Silent where the model keeps its
    layers in no list."""
    n = len(cache.layers)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    layers = next(lists, ()) if progress else ()

    def hook(done: int) -> Callable[..., None]:
        def report(*_: Any) -> None:
            if progress:
                progress(_name(cache), done, n + steps)

        return report

    handles = [layer.register_forward_hook(hook(i + 1)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(run: _Run, full: _Run, targets: list[int]) -> Row:
    """targets: the true token after each of the logits."""
    theirs, own = torch.stack(full.logits), torch.stack(run.logits)
    return Row(
        **divergence(theirs, own),
        nll=float(nll(own, targets).mean()),
        nll_full=float(nll(theirs, targets).mean()),
        **run.measured,
    )


# Row by row and in fp64, since the log-sum-exp of a large vocabulary in fp32 is off by more than the KL of a good
# recipe.


def divergence(theirs: Tensor, own: Tensor) -> dict[str, float]:
    """kl, kl_p95 and agreement as in `Row`, of logits [n,vocabulary]."""
    each = torch.stack(
        [_kl(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(theirs, own, strict=True)]
    )
    agree = (theirs.argmax(-1) == own.argmax(-1)).double().mean()
    return {"kl": float(each.mean()), "kl_p95": float(each.quantile(0.95)), "agreement": float(agree)}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum().clamp(min=0.0)


def nll(logits: Tensor, targets: list[int]) -> Tensor:
    """fp64 [n], in nats, of logits [n,vocabulary] that predict the targets."""
    return -torch.stack([row.double().log_softmax(-1)[t] for row, t in zip(logits, targets, strict=True)])
