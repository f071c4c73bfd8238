"""The kernels for CPUs, which `build` compiles at first use.

The oracle of `decode` is `attention.attend` on the decoded tokens, joined by `attention.merge`; that of `mass` is
`ops.mass_in_torch`, that of `last_alike` `alike.in_torch`, that of `linear` torch's. What `attention_predictor` asks
is in `ops.predicting`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

from calidrop.attention import Partial, Queries, values
from calidrop.ops import build, piece
from calidrop.ops.described import DTYPES, KINDS, NOW, Array, array, describe, listed, packed, strided, whole
from calidrop.ops.piece import MOST_QUERIES, Heard, Piece
from calidrop.state import Ragged
from calidrop.tokens import Tokens
from calidrop.window import Window

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256, 512, 576)  # what there are loops for: narrower rows are filled up
_ASKED = struct.Struct("@5Q2q7i2f" + "Q3q" * 4)  # Asked of pieces.h
_NONE_NEW = (0,) * 16


class Kernel:
    """Why there is no kernel (`reason`), or the compiled functions. flags: further ones for the compiler."""

    def __init__(self, *flags: str) -> None:
        self.reason = ""
        if wish := os.environ.get("CALIDROP_KERNEL"):
            self.reason = f"CALIDROP_KERNEL={wish}"
            return
        try:
            library = ctypes.CDLL(str(build.built(flags)))
        except (OSError, subprocess.SubprocessError) as error:
            self.reason = " ".join(str(error).split())[:200]
            return
        i32, i64, real, ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        self.decode, self.columns = library.calidrop_decode, library.calidrop_columns
        self.prompt, self.alike = library.calidrop_prompt, library.calidrop_alike
        self.network, self.weights = library.calidrop_network, library.calidrop_weights
        self.linear, self.latents = library.calidrop_linear, library.calidrop_latents
        self.remember, self.follow, self.exchange = (
            library.calidrop_remember, library.calidrop_follow, library.calidrop_exchange,
        )  # fmt: skip
        self.decode.argtypes, self.latents.argtypes = [ptr], [ptr, ptr]
        self.columns.argtypes = [Array, Array, i32, ptr, ptr, ptr, *[i64] * 5, i32, real, real, i32, i32, ptr, i32]
        self.prompt.argtypes = [*[Array] * 3, i32, ptr, ptr, *[i64] * 5, i32, i32, real, real, *[ptr] * 3, i32]
        self.alike.argtypes = [ptr, i64, i64, i32, real, i32, ptr, i32]
        self.network.argtypes = [ptr, i64, *[ptr] * 6, i64, i64, i32, ptr, i32]
        self.weights.argtypes = [ptr, ptr, ptr, *[i64] * 4, i32, i32, ptr, i32]
        self.remember.argtypes = [*[ptr] * 5, i64, i64, *[i32] * 3, real, i32, real, real, ptr, i32, *[ptr] * 8, i32]
        self.follow.argtypes = [
            *(ptr, i64, i64, i64, ptr, ptr, i64, i64, ptr, ptr, i32, ctypes.c_double),
            *[ptr] * 5, real, *[ptr] * 3, i32,
        ]  # fmt: skip
        self.linear.argtypes = [ptr, ptr, i32, ptr, i32, i32, i32, ptr, i32]
        self.exchange.argtypes = [ptr, i64, i64, i64, ptr, ptr, i64, i64, ptr, ptr, i64, ptr, i64, ptr, i32]
        for function in (
            *(self.decode, self.columns, self.prompt, self.alike, self.network),
            *(self.weights, self.remember, self.follow, self.exchange, self.linear, self.latents),
        ):
            function.restype = None


@functools.cache
def kernel() -> Kernel:
    return Kernel()


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def refusal(qs: Queries) -> str:
    """Why `decode` cannot answer these queries; "" where it can."""
    return kernel().reason or piece.refusal(qs)


def unread(x: Piece, qs: Queries) -> str:
    """Why `decode` cannot read a piece; "" where it can."""
    if x.kind not in KINDS:
        return f"{x.kind} is not for CPUs"
    D = x.queries(qs).shape[-1]
    if max(D, x.value_dim) > HEAD_DIMS[-1]:
        return f"{D} and {x.value_dim} channels, the kernel takes {HEAD_DIMS[-1]}"
    if x.kind == "exact":
        dtype = x.columns["k"].dtype
        return "" if dtype in DTYPES else f"tokens are {dtype}"
    if x.kind in ("per token", "e4m3"):
        return ""
    wide = 4 if x.bits == 3 and x.kind == "per group" else x.bits  # as they are read
    per_vector = 8 * 8 // wide  # the narrowest vector is eight bytes of codes
    fits = x.channels % per_vector == 0 and wide in (2, 4, 8, 16 if x.kind == "tiers" else 8)
    if x.kind == "per channel":
        fits = fits and x.group % per_vector == 0
    if x.kind == "per group":
        fits = fits and x.bits < 8 and D % x.channels == 0
    if x.kind == "tiers":
        if x.columns["order"].dtype != torch.uint8:
            return f"{D} channels in an order, the kernel takes 256"
        fits = fits and x.tiers[2] % 32 == 0
    if fits:
        return ""
    return f"groups of {x.group} tokens and {x.channels} channels of {x.bits} bits do not fill vectors"


def decode(qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None) -> Partial:
    """Attention over the union of disjoint sets, all of them visible: one call. -> o fp32 [B,Hq,T,Dv], lse [B,Hq,T].

    heard: gets the logits of all pieces, if there is one query."""
    B, Hq, T, _ = qs.q.shape
    first, keep, told = None, [], []
    for p in parts:
        told.append(describe(p, qs.q, keep, heard if T == 1 else None))
        if first is None and isinstance(p, Piece):
            first = p
    assert first is not None
    out, lse = blank(B, Hq, T, first.value_dim), blank(B, Hq, T)
    _ask(qs.q, first.heads, qs.scale, qs.softcap, told, out, lse)
    return out, lse


def takes(qs: Queries, new: Tokens, window: Window) -> bool:
    """Whether `step` can write tokens behind such a window, and answer their queries."""
    k, v, there = new.k, new.v, window.k.data
    if there is None or window.before is not None or k.requires_grad or refusal(qs):
        return False
    known = k.dtype == v.dtype == there.dtype and k.dtype in DTYPES and max(k.shape[-1], v.shape[-1]) <= HEAD_DIMS[-1]
    return (
        known
        and k.stride(-1) == values(k, v).stride(-1) == 1
        and new.pos.dtype == torch.int32
        and k.device.type == "cpu"
    )


def step(
    qs: Queries, new: Tokens, window: Window, parts: Sequence[Partial | Piece], heard: Heard | None, last: int | None,
    dtype: torch.dtype,
) -> Partial:  # fmt: skip
    """`decode` over `parts` and a window, to which the tokens of the queries are written first: each sees the window's
    columns up to its own, the last so many of them (None: all). -> o [B,Hq,T,Dv] of that dtype (or fp32), lse
    [B,Hq,T]. heard: as `decode` does."""
    B, Hq, T, D = qs.q.shape
    H, Dv = new.v.shape[1], new.values.shape[-1]
    k, v, pos = window.grow(new)
    memory = k, v, pos = k, values(k, v), pos  # where those are the keys, they are written twice to one place
    known = window.note.get(memory, window.dense)
    if known is None:
        columns = {"k": strided(k), "v": strided(v), **({} if window.dense else {"pos": strided(pos)})}
        known = packed(columns, "exact", DTYPES[k.dtype]), strided(pos)
        window.note.put(memory, window.dense, known)
    stored, at = known
    n = len(window)
    skip = 0 if last is None else max(0, n - last - T + 1)
    logits, room = 0, 0
    heard = heard if T == 1 else None
    if heard is not None:
        logits, room = heard.room_for(v, (B, H, Hq // H, n - skip)).data_ptr(), n - skip
    out = blank(B, Hq, T, Dv, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    lse, keep = blank(B, Hq, T), []
    told = [describe(p, qs.q, keep, heard) for p in parts]
    told.append(NOW.pack(0, logits, room, 0, n - skip, skip, D, T, last or 0) + stored)
    coming = *strided(new.k), *strided(new.values), *strided(new.pos), *at
    _ask(qs.q, H, qs.scale, qs.softcap, told, out, lse, coming=coming)
    return out, lse


def recalls(k: Tensor, v: Tensor) -> bool:
    """Whether `recall` can be asked about such keys and values."""
    v = values(k, v)
    known = max(k.shape[-1], v.shape[-1]) <= HEAD_DIMS[-1] and k.dtype == v.dtype in DTYPES
    return known and k.device.type == "cpu" and not kernel().reason


def recall(q: Tensor, scale: float, lists: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """What lists of exact tokens say to queries, read where they lie: q [P,G,D], P queries' groups, on the host; each
    of `lists` k [slots,D], v [slots,Dv], and where those of a group begin and how many they are, int64 [P].
    -> o [P,G,Dv], lse [P,G], the weighted mean key [P,G,D], fp32."""
    P, G, D = q.shape
    Dv = values(*lists[0][:2]).shape[-1]
    out, lse, mean = blank(P, G, Dv), blank(P, G), blank(P, G, D)
    told = [listed(k, v, lens, starts) for k, v, starts, lens in lists]
    _ask(q, 1, scale, None, told, out, lse, mean)
    return out, lse, mean


Memory = tuple[Tensor, Tensor, Tensor, Tensor]


def remembers(q: Tensor) -> bool:
    """Whether `remembered` can be asked."""
    return q.device.type == "cpu" and q.shape[-1] <= HEAD_DIMS[-1] and not q.requires_grad and not kernel().reason


def remembered(
    q: Tensor, scale: float, held: Memory, order: int, recompute: float, apply: float, evicted: Sequence[Ragged],
) -> tuple[Memory | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """A step of `calidrop`. q [B,Hq,D]; held: what query heads remember, the query [B,Hq,D], o [B,Hq,Dv], lse [B,Hq]
    and the weighted mean key [B,Hq,D], fp32. evicted: tokens with columns k and v that `recalls` allows; none where
    they are gone. -> what is remembered now (None: what was), the lse of what answers [B,Hq], -inf where nothing does,
    whether it does, bool [B,Hq], and int64 [B,2]: heads that were asked again, and that could have been."""
    B, Hq, D = q.shape
    H, Dv = evicted[0].lens.shape[1] if evicted else Hq, held[1].shape[-1]
    q, *old = (x.float().contiguous() for x in (q, *held))
    new = tuple(torch.empty_like(x) for x in old)
    said, applied = blank(B, Hq), blank(B, Hq, dtype=torch.bool)
    counts, asked = blank(B, 2, dtype=torch.int64), (ctypes.c_int64 * 1)()
    told = b"".join([whole(x) for x in evicted])
    kernel().remember(
        q.data_ptr(), *(x.data_ptr() for x in old), B, H, Hq // H, D, Dv, scale, order, recompute, apply, told,
        len(evicted), *(x.data_ptr() for x in (*new, said, applied, counts)), asked, torch.get_num_threads(),
    )  # fmt: skip
    return (new if asked[0] else None), said, applied, counts  # type: ignore[return-value]


def sums(qs: Queries, t: Tokens) -> bool:
    """Whether `mass` and `prompt` can be asked."""
    known = qs.q.shape[-1] in HEAD_DIMS and t.v.shape[-1] in HEAD_DIMS and t.k.dtype == t.v.dtype in DTYPES
    return known and qs.q.device.type == "cpu" and qs.visible is None and not kernel().reason


def pools(t: Tokens, block: int) -> bool:
    """Whether `mass` and `weights` can take the largest weight of every `block` tokens."""
    return block in (1, 16, 32, 64) and len(t) % block == 0


def mass(qs: Queries, lse: Tensor, t: Tokens, largest: bool = False, block: int = 1) -> Tensor:
    """qs.q [B,Hq,W,D], lse [B,Hq,W] over everything they saw -> fp32 [B,H,N]; empty slots weigh 0. Of one query (W = 1)
    also the largest of a kv head's query heads, and of every `block` tokens (`pools`): [B,H,N/block]."""
    B, Hq, W, D = qs.q.shape
    H, N = t.k.shape[1:3]
    k, pos = t.k if t.k.stride(-1) == 1 else t.k.contiguous(), t.pos.int()
    q, norm, at = qs.q.float().contiguous(), lse.float().contiguous(), qs.pos.int().contiguous()
    out = blank(B, H, N // block)
    kernel().columns(
        array(k), array(pos), DTYPES[k.dtype], q.data_ptr(), norm.data_ptr(), at.data_ptr(),
        B, H, Hq // H, W, N, D, qs.scale, qs.softcap or 0.0, block, largest, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def weights(qs: Queries, lse: Tensor, logits: Tensor, largest: bool = False, block: int = 1) -> Tensor:
    """`mass` of one query whose logits [B,H,G,N] are there, as `decode` leaves them: [B,H,N/block]."""
    B, H, G, N = logits.shape
    norm, at = lse.float().contiguous(), qs.pos.int().contiguous()
    out = blank(B, H, N // block)
    kernel().weights(
        logits.data_ptr(), norm.data_ptr(), at.data_ptr(), B, H, G, N, block, largest, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def prompt(qs: Queries, t: Tokens) -> tuple[Partial, Tensor]:
    """Causal attention (o fp32 [B,Hq,W,Dv]) and `mass` in one pass, of what `sums` allows."""
    B, Hq, W, D = qs.q.shape
    H, N, Dv = t.k.shape[1], len(t), t.v.shape[-1]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (t.k, t.v))
    pos, q, at = t.pos.int(), qs.q.float().contiguous(), qs.pos.int().contiguous()
    o, lse, sums = blank(B, Hq, W, Dv), blank(B, Hq, W), blank(B, H, N)
    kernel().prompt(
        array(k), array(v), array(pos), DTYPES[k.dtype], q.data_ptr(), at.data_ptr(), B, H, Hq // H, W, N, D, Dv,
        qs.scale, qs.softcap or 0.0, o.data_ptr(), lse.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return (o, lse), sums


def leads(q: Tensor, tokens: int) -> bool:
    """Whether `prompt` is no slower than torch's attention, as far as that was measured: on x86, up to a number of
    tokens whose scores fit the caches."""
    there = set(build.features().split())
    if build.of_amd() and "avx512f" in there:
        return tokens <= 16384
    return "avx2" in there and tokens <= 4096 and q.dtype == torch.float32


def compares(k: Tensor) -> bool:
    """Whether `last_alike` can be asked."""
    return k.device.type == "cpu" and k.dtype == torch.float32 and k.shape[-1] % 16 == 0 and not kernel().reason


def last_alike(k: Tensor, limit: float, later: bool) -> Tensor:
    """As `alike.last_alike`, of what `compares` allows."""
    B, H, N, D = k.shape
    k, last = k.contiguous(), blank(B, H, N, dtype=torch.int64)
    kernel().alike(k.data_ptr(), B * H, N, D, limit, later, last.data_ptr(), torch.get_num_threads())
    return last


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` can be asked for x [...,I] and weights [O,I]."""
    known = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
    return known and 0 < x.numel() <= MOST_QUERIES * x.shape[-1] and x.shape[-1] % 16 == 0 and not kernel().reason


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer for up to `MOST_QUERIES` rows, of what `multiplies` allows: x [...,I], weight [O,I], bias [O], all
    of one dtype -> [...,O] of that."""
    wide, width = weight.shape
    x, out = x.contiguous(), x.new_empty((*x.shape[:-1], wide))
    bias = None if bias is None else bias.contiguous()
    kernel().linear(
        weight.data_ptr(), 0 if bias is None else bias.data_ptr(), DTYPES[x.dtype], x.data_ptr(),
        x.numel() // width, wide, width, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _ask(
    q: Tensor, heads: int, scale: float, softcap: float | None, told: list[bytes], out: Tensor, lse: Tensor,
    mean: Tensor | None = None, coming: tuple[int, ...] = _NONE_NEW,
) -> None:  # fmt: skip
    """Fills out, lse and mean. q: [B,...,D], of `heads` kv heads one behind the other. coming: where keys, values and
    positions of new tokens lie, and where positions go."""
    q = read(q)
    kernel().decode(asked(q, heads, scale, softcap, told, out, lse, mean, coming))


def read(q: Tensor) -> Tensor:
    """Queries as a kernel reads them; whoever asks one keeps this until it has answered."""
    return (q if q.dtype in (torch.float32, torch.bfloat16) else q.float()).contiguous()


def asked(
    q: Tensor, heads: int, scale: float, softcap: float | None, told: list[bytes], out: Tensor, lse: Tensor,
    mean: Tensor | None = None, coming: tuple[int, ...] = _NONE_NEW, width: int | None = None,
) -> bytes:  # fmt: skip
    """Asked of pieces.h, with the pieces behind it. width: of stored values, if not that of out."""
    B, D, Dv = q.shape[0], q.shape[-1], width or out.shape[-1]
    head = _ASKED.pack(
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), 0 if mean is None else mean.data_ptr(), 0, B, heads,
        lse.numel() // (B * heads), D, Dv, len(told), torch.get_num_threads(), DTYPES[q.dtype], DTYPES[out.dtype],
        scale, softcap or 0.0, *coming,
    )  # fmt: skip
    return b"".join((head, *told))
