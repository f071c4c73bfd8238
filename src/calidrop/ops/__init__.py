"""Picks what computes attention, and says which. Everything here has `attention.attend` as its oracle."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.attention import SCORE_BYTES, Partial, Queries, finite, grouped, logits, merge
from calidrop.attention import attend as oracle
from calidrop.ops import cpu, gpu
from calidrop.ops.piece import MOST_QUERIES as MOST_QUERIES
from calidrop.ops.piece import Heard, Piece
from calidrop.tokens import Tokens
from calidrop.window import Window


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Partial | None:
    """torch's own fused attention with its lse, q [B,H,T,D], k [B,H,N,D] and v [B,H,N,Dv]; None where it cannot run."""
    D, Dv = k.shape[-1], v.shape[-1]
    if Dv > D or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if Dv < D:
        found = flash(q, k, F.pad(v, (0, D - Dv)), scale, causal)
        return None if found is None else (found[0][..., :Dv], found[1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the ops below take that for granted
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, causal, scale=scale)
    if q.device.type == "cuda" and k.shape[-1] % 8 == 0:
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        o, lse, *_ = op(q, k, v, None, True, 0.0, causal, scale=scale)
        return o, lse[:, :, : q.shape[2]]  # some builds pad lse to a multiple of 32
    return None


def attend(qs: Queries, t: Tokens, bias: Tensor | None = None) -> Partial:
    """Attention over tokens that are all visible unless their slot is empty or `qs.visible` says otherwise.

    bias: [B,H,N], added to the logits."""
    B, Hq, T, _ = qs.q.shape
    H = t.k.shape[1]
    if t.dense and bias is None and qs.visible is None and qs.softcap is None:
        # no mask needed, so the group's queries can be packed as rows of one head: keys are read once
        out = _in_stretches(grouped(qs.q, H), t.k, t.values, qs.scale, _stretches(t.k))
        if out is not None:
            return out[0].reshape(B, Hq, T, -1), out[1].reshape(B, Hq, T)
    return oracle(qs, t.k, t.v, t.pos, bias)


def _stretches(k: Tensor) -> int:
    """How many parts of the tokens k [B,H,N,D] are asked at once: a GPU shares by heads, so one would be one of its
    processors' work."""
    heads, N = k.shape[0] * k.shape[1], k.shape[2]
    return max(1, min(128 // heads, N // 256)) if k.device.type == "cuda" else 1


def _in_stretches(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: int) -> Partial | None:
    """`flash`, over so many stretches of equal length side by side, as if they were heads, and what is left of them."""
    if parts == 1:
        return flash(q, k, v, scale)
    H, N = k.shape[1:3]
    n = N // parts * parts
    cut_k, cut_v = (x[:, :, :n].unflatten(2, (parts, -1)).flatten(1, 2) for x in (k, v))
    found = flash(q.repeat_interleave(parts, 1), cut_k, cut_v, scale)
    rest = flash(q, k[:, :, n:], v[:, :, n:], scale) if n < N else None
    if found is None or (n < N and rest is None):
        return None
    o, lse = (x.unflatten(1, (H, parts)) for x in found)
    said = [(o[:, :, i], lse[:, :, i]) for i in range(parts)]
    return merge([*said, rest] if rest is not None else said)


def prompt(qs: Queries, t: Tokens, reach: int | None = None, sink: bool = False) -> Partial:
    """A block of new queries over itself; t are the tokens of the same columns, perhaps with older ones in front.

    reach: how far back a query can see at all, when that is bounded (sliding window): saves the work beyond it. sink:
    whether the answer comes to depend on lse, of which `flash` knows no gradient."""
    if _in_kernel(qs, t) and cpu.leads(qs.q, len(t)):
        return cpu.prompt(qs, t)[0]
    T, N = len(qs), len(t)
    known = qs.softcap is None and (qs.visible is None or qs.window is not None)
    known = known and not (sink and any(x.requires_grad for x in (qs.q, t.k, t.v)))
    if known and (N == T or (qs.window is not None and N <= 2 * T)):  # else most of the first block is for nothing
        if t.dense:
            out = _causal(qs.q, t.k, t.values, qs.scale, qs.window)
            if out is not None:
                return out
        else:
            rows = [_causal_row(qs, t, b, pad) for b, pad in enumerate(_left_pads(t.pos[:, 0]))]
            if all(row is not None for row in rows):
                return torch.cat([o for o, _ in rows]), torch.cat([lse for _, lse in rows])  # type: ignore[misc]
    parts = []
    for start in range(0, T, 256):
        stop = min(start + 256, T)
        first = 0 if reach is None else max(0, N - T + start - reach)
        seen = t.slice(first, N - T + stop)
        parts.append(oracle(qs.slice(start, stop), seen.k, seen.v, seen.pos))
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Partial | None:
    """Queries of the last T of N columns, none of them a pad: q [B,Hq,T,D], k and v [B,H,N,D]; each sees as many
    columns as the window says, its own included, or all up to its own (T = N). None where `flash` cannot run.

    Columns are cut into blocks as wide as the window. A query then sees its own block up to itself, and of the block
    before what is less than a window away: in reverse order that is causal too, without the diagonal."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    old, N = k.shape[2] - q.shape[2], k.shape[2]
    window = min(window or N, N)
    if old == 0 and window == N:
        return flash(q, k, v, scale, causal=True)
    if any(x.requires_grad for x in (q, k, v)):  # `flash` gives lse none, by which two answers are joined
        return None
    first, blocks = old // window, -(-N // window)  # first: of the queries
    asked = slice(old - first * window, N - first * window)
    q = F.pad(q, (0, 0, asked.start, 0))
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - N)).unflatten(2, (-1, window)) for x in (q, k, v))
    own = _causal_blocks(q, k[:, :, first:], v[:, :, first:], scale)
    if own is None:
        return None
    o, lse = own
    alone = 1 if first == 0 else 0  # the first of all blocks has none before
    if window > 1 and blocks - first > alone:
        before = slice(first + alone - 1, blocks - 1)
        k, v = (x[:, :, before].flip(3)[..., :-1, :] for x in (k, v))
        far = _causal_blocks(q[:, :, alone:].flip(3)[..., 1:, :], k, v, scale)
        assert far is not None
        both = (slice(None), slice(None), slice(alone, None), slice(window - 1))
        joined = merge([(o[both], lse[both]), (far[0].flip(3), far[1].flip(3))])
        o, lse = o.float(), lse.clone()
        o[both], lse[both] = joined
    return o.flatten(2, 3)[:, :, asked], lse.flatten(2, 3)[:, :, asked]


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial | None:
    """Each block by itself: [B,H,blocks,columns,D]."""
    found = flash(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), scale, causal=True)
    return None if found is None else (found[0].unflatten(1, q.shape[1:3]), found[1].unflatten(1, q.shape[1:3]))


def prompt_with_mass(qs: Queries, t: Tokens) -> tuple[Partial, Tensor | None]:
    """`prompt`, and its queries' `mass` where a kernel says both in less than the time of both."""
    if _in_kernel(qs, t) and (qs.q.dtype == torch.float32 or cpu.leads(qs.q, len(t))):
        return cpu.prompt(qs, t)
    return prompt(qs, t), None


def _in_kernel(qs: Queries, t: Tokens) -> bool:
    """Whether the kernel for CPUs can attend a prompt. It knows no gradients."""
    return len(qs) > 1 and cpu.sums(qs, t) and not any(x.requires_grad for x in (qs.q, t.k, t.v))


def _left_pads(pos: Tensor) -> list[int]:
    """Pads in front of each row of pos [B,N]; -1 for a row whose pads are elsewhere."""
    real = pos >= 0
    pads = (~real).sum(1)
    left = real == (torch.arange(pos.shape[1], device=real.device) >= pads[:, None])
    return torch.where(left.all(1), pads, -1).tolist()


def _causal_row(qs: Queries, t: Tokens, row: int, pad: int) -> Partial | None:
    """One left-padded row without its pads, so that no mask is needed."""
    if pad < 0:
        return None
    (Hq, T), N = qs.q.shape[1:3], len(t)
    o = qs.q.new_zeros(1, Hq, T, t.values.shape[-1])
    lse = qs.q.new_full((1, Hq, T), float("-inf"), dtype=torch.float32)
    first = max(0, pad - (N - T))  # query
    if first < T:
        q, k, v = qs.q[row : row + 1, :, first:], *(x[row : row + 1, :, pad:] for x in (t.k, t.values))
        out = _causal(q, k, v, qs.scale, qs.window)
        if out is None:
            return None
        o[:, :, first:], lse[:, :, first:] = out
    return o, lse


def piece(t: Tokens, bias: Tensor | None = None) -> Piece:
    """Tokens for `joined`, without a copy; k and v must have a stride of 1 in their last dim. bias: fp32 [B,H,N]."""
    columns = {"k": t.k, "v": t.values}
    if not t.dense:
        columns["pos"] = t.pos
    if bias is not None:
        columns["bias"] = bias
    width = columns["v"].shape[-1]
    return Piece("exact", columns, None, t.k.shape[1], width, lambda qs: attend(qs, t, bias), len(t))


class Answer(Protocol):
    def __call__(self, qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None) -> Partial: ...


@dataclass(frozen=True)
class Backend:
    """Who answers for stored pieces: a kernel, or torch and why. decode: what is `heard` is for it to fill, where it
    can."""

    name: str
    decode: Answer


CPU = Backend("the kernel for CPUs", cpu.decode)
GPU = Backend("the Triton kernel", gpu.decode)


def pick(qs: Queries, parts: Sequence[Partial | Piece]) -> Backend:
    """One kernel for all the pieces that it can read, torch for the others."""
    own, kernel = (gpu, GPU) if _triton(qs.q) else (cpu, CPU)
    why, unread, pieces = own.refusal(qs), {}, 0
    for p in parts:  # of which most steps have one or two, all of them read
        if isinstance(p, Piece):
            pieces += 1
            if said := why or own.unread(p, qs):
                unread[id(p)] = said
    if not pieces:
        return Backend("torch (no stored token is asked)", _merged)
    if not unread:
        return kernel
    why = "; ".join(sorted(set(unread.values())))
    if len(unread) == pieces:
        return Backend(f"torch ({why})", _merged)

    def both(qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None) -> Partial:
        asked = [p.answer(qs) if isinstance(p, Piece) and id(p) in unread else p for p in parts]
        return kernel.decode(qs, asked, heard)

    return Backend(f"{kernel.name} and torch ({why})", both)


def _triton(x: Tensor) -> bool:
    return not x.is_cpu or _interpreted()


@functools.cache
def _interpreted() -> bool:
    return gpu.runs(torch.device("cpu"))


def _merged(qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None) -> Partial:
    return merge([p.answer(qs) if isinstance(p, Piece) else p for p in parts])


def joined(qs: Queries, parts: Sequence[Partial | Piece]) -> Partial:
    """The answer of the union of disjoint sets. -> o fp32 [B,Hq,T,Dv], lse [B,Hq,T]."""
    return pick(qs, parts).decode(qs, parts)


def in_turn(said: Sequence[Sequence[Partial | Piece]]) -> list[Partial | Piece]:
    """What the same parts say to several queries, each asked by itself, as if they had been asked at once."""
    parts: list[Partial | Piece] = []
    for same in zip(*said, strict=True):
        first = same[0]
        if isinstance(first, Piece):
            q = [x.q for x in same if isinstance(x, Piece) and x.q is not None]
            parts.append(replace(first, q=torch.cat(q, 2)) if q else first)
        else:
            o, lse = zip(*same, strict=True)
            parts.append((torch.cat(o, 2), torch.cat(lse, 2)))
    return parts


def step(
    qs: Queries, new: Tokens, window: Window, parts: Sequence[Partial | Piece], heard: Heard | None = None,
    last: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Partial, str]:  # fmt: skip
    """Lets generated tokens into the window, and answers their queries over disjoint `parts`, which all of them see,
    and the window's columns up to their own. last: that they see so many of these, which is all that their mask says;
    None: all. heard: gets what one query says. -> o [B,Hq,T,Dv], of that dtype where a kernel can say it so, else fp32;
    lse [B,Hq,T]; and who answered."""
    asked = qs if last is None else replace(qs, visible=None, window=None)
    alone = cpu.takes(asked, new, window) and not _triton(new.k)
    if alone and not any(isinstance(p, Piece) and cpu.unread(p, asked) for p in parts):
        return cpu.step(asked, new, window, parts, heard, last, dtype), CPU.name
    if len(qs) > 1:
        window.append(new)
        held, n = window.tokens(), len(window) - len(qs)
        if last is not None:
            parts = [*parts, prompt(qs, held.slice(max(0, n + 1 - last)), last)]
        else:
            parts = [*parts, *([piece(held.slice(0, n))] if n else []), prompt(qs, held.slice(n))]
        backend = pick(asked, parts)
        return backend.decode(asked, parts), backend.name
    if gpu.puts(new, window):
        gpu.put(new, window)
        window.written(new)
    else:
        window.append(new)
    return again(qs, window, parts, heard, last)


def again(
    qs: Queries, window: Window, parts: Sequence[Partial | Piece], heard: Heard | None = None, last: int | None = None
) -> tuple[Partial, str]:
    """`step` for one query of a token that is in the window already."""
    asked, held = qs if last is None else replace(qs, visible=None, window=None), window.tokens()
    parts = [*parts, piece(held if last is None else held.slice(max(0, len(held) - last)))]
    backend = pick(asked, parts)
    return backend.decode(asked, parts, heard), backend.name


def backend(device: torch.device) -> str:
    """What decodes on this device, where it can read the format."""
    if device.type != "cpu" or _interpreted():
        return f"torch (no kernel: {gpu.reason(device)})" if gpu.reason(device) else GPU.name
    return f"torch flash (no kernel: {cpu.kernel().reason})" if cpu.kernel().reason else CPU.name


def mass(qs: Queries, lse: Tensor, t: Tokens) -> Tensor:
    """Softmax weights summed over the queries, mean over each kv head's group: fp32 [B,H,N]. lse: [B,Hq,W], over
    everything the queries saw. No queries x tokens matrix is held."""
    if qs.visible is None and qs.q.shape[-1] <= gpu.MOST_CHANNELS and gpu.runs(qs.q.device):
        return gpu.mass(qs, lse, t)
    if cpu.sums(qs, t):
        return cpu.mass(qs, lse, t)
    return mass_in_torch(qs, lse, t)


def weights(qs: Queries, lse: Tensor, t: Tokens, group: str = "mean", block: int = 1) -> Tensor:
    """Softmax weights of one query: of every `block` tokens the largest, then of a kv head's query heads the "mean" or
    the "max". lse: [B,Hq,1]. -> fp32 [B,H,N/block]; N must be a multiple of block."""
    own = gpu if _triton(qs.q) else cpu
    if t.logits is not None and own.pools(t, block):
        return own.weights(qs, lse, t.logits, group == "max", block)
    if own is cpu and cpu.sums(qs, t) and cpu.pools(t, block):
        return cpu.mass(qs, lse, t, group == "max", block)
    return weights_in_torch(qs, lse, t, group, block)


def weights_in_torch(qs: Queries, lse: Tensor, t: Tokens, group: str = "mean", block: int = 1) -> Tensor:
    """`weights` without a kernel."""
    if t.logits is not None:
        s = t.logits.masked_fill((qs.pos < 0)[:, None, None], float("-inf"))
    else:
        s = logits(qs, t.k, t.pos)[:, :, :, 0]  # [B,H,G,N]
    p = torch.exp(s - finite(lse).view(*s.shape[:3], 1))
    if block > 1:
        p = p.unflatten(-1, (-1, block)).amax(-1)
    return p.mean(2) if group == "mean" else p.amax(2)


def mass_in_torch(qs: Queries, lse: Tensor, t: Tokens) -> Tensor:
    """`mass` without a kernel, in blocks of queries."""
    B, Hq, W, _ = qs.q.shape
    block = min(max(1, SCORE_BYTES // max(1, 4 * B * Hq * len(t))), 256)
    total = torch.zeros(t.pos.shape, dtype=torch.float32, device=t.pos.device)
    for start in range(0, W, block):
        part, norm = qs.slice(start, start + block), lse[:, :, start : start + block]
        n = len(t)
        if W > 1:  # what the whole block is too early to see, where tokens are in the order of their positions
            seen = (t.pos <= part.pos.max()).any(0).any(0).nonzero()
            if not len(seen):  # a block of pads
                continue
            n = int(seen[-1]) + 1
        s = logits(part, t.k[:, :, :n], t.pos[:, :, :n])  # [B,H,G,W,n]
        total[:, :, :n] += torch.exp(s - finite(norm).view(*s.shape[:4], 1)).mean(2).sum(2)
    return total
