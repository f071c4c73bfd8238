"""Every kernel on this device against its oracle in plain torch, fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu import pieces
from benchmarks.gpu.run import Run, show
from calidrop import KVCache, ops
from calidrop.attention import Queries, attend, logits, merge
from calidrop.hadamard import hadamard
from calidrop.methods._latents import Basis
from calidrop.methods.calidrop import Answer, Calibrated
from calidrop.ops import gpu
from calidrop.parallel import HeadGroup
from calidrop.plugin import using
from calidrop.quant import pack, quantize
from calidrop.rope import Rope
from calidrop.state import tensors
from calidrop.window import Window

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Check = tuple[str, float, Callable[[], float]]  # what, the largest error allowed, the error
COLUMNS = [("what", "52"), ("worst", ".1e"), ("limit", ".0e"), ("passed", "")]


def checks(run: Run) -> Iterator[dict]:
    found = [*_steps(run), *_others(run), *_decode(run)]
    yield from (_checked(run, what, limit, measure) for what, limit, measure in found)


def _checked(run: Run, what: str, limit: float, measure: Callable[[], float]) -> dict:
    row = {"what": what, "limit": limit, "passed": False}
    row = run.guarded(row, lambda: {"worst": float(measure())})
    if "worst" in row:
        row["passed"] = row["worst"] <= limit  # NaN does not
    return show(row, COLUMNS)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _steps(run: Run) -> Iterator[Check]:
    """Recorded steps against steps from Python: the logits of 40 tokens."""
    if run.device.type == "cuda":
        snap = "snapkv(budget=64, recent=16)"
        for recipe in ("full", snap, f"{snap}+int4", f"{snap}+calidrop(offload=False)", f"{snap}+calidrop(late=4)",
                       "h2o(budget=64)", "kivi(bits=4, group=16, residual=32)", "think(keep=0.5)+int4"):  # fmt: skip
            yield f"recorded steps {recipe}", 2e-3, functools.partial(_recorded, run, recipe)


def _recorded(run: Run, recipe: str) -> float:
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    config = AutoConfig.for_model("llama", **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(run.device).eval()
    ids = torch.randint(3, 97, (2, 200), device=run.device)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    logits = []
    for graph in (False, True):
        cache = KVCache(model, recipe, graph=graph)
        logits.append(torch.stack(model.generate(
            input_ids=ids, attention_mask=mask, **using(cache), max_new_tokens=40, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        ).logits))  # fmt: skip
    assert cache.steps is not None and cache.steps.steady is not None
    if not cache.steps.steady.recorded:
        raise RuntimeError(cache.steps.describe())
    return float((logits[0] - logits[1]).abs().max())


def _decode(run: Run) -> Iterator[Check]:
    """Formats x dtypes, heads of equal and unequal length, with a window and an answer beside them, logits left or not.
    Each is another kernel to compile, seconds: fp16 checks three formats."""
    shape = (
        {"B": 1, "H": 2, "G": 2, "T": 1, "D": 32, "N": 70}
        if run.tiny
        else {"B": 2, "H": 4, "G": 4, "T": 1, "D": 128, "N": 3000}
    )
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(name, fp32, True, shape) for name in pieces.FORMATS]
    if not run.tiny:
        cases += [(name, bf16, uneven, shape) for name in pieces.FORMATS for uneven in (False, True)]
        cases += [(name, fp16, True, shape) for name in ("exact", "int4", "kivi4")]
        for T, D, G in ((4, 64, 3), (8, 80, 7), (1, 96, 1), (2, 256, 8)):
            other = {**shape, "T": T, "D": D, "G": G, "N": 900}
            cases += [
                (name, bf16, True, other) for name in ("exact", "int4", "kivi4") if name != "kivi4" or D % 32 == 0
            ]
    for name, dtype, uneven, s in cases:
        listens = s["T"] == 1 and (dtype == fp32 or not uneven)
        what = f"decode {name} {str(dtype)[6:]} T={s['T']} D={s['D']} G={s['G']}{' uneven' * uneven}"
        what += " heard" * listens
        yield what, LIMITS[dtype], functools.partial(_one, run, name, dtype, uneven, listens, **s)


def _one(
    run: Run, name: str, dtype: torch.dtype, uneven: bool, listens: bool,
    *, B: int, H: int, G: int, T: int, D: int, N: int,
) -> float:  # fmt: skip
    t, window, other = (
        pieces.tokens(B, H, n, D, dtype, run.device, u) for n, u in ((N, uneven), (45, True), (33, False))
    )
    qs = pieces.queries(B, H * G, T, D, dtype, run.device)
    store = pieces.stored(name, t)
    parts = [*store.attend(qs), ops.piece(window), attend(qs, other.k, other.v, other.pos)]
    picked = ops.pick(qs, parts)
    if picked is not ops.GPU:
        raise RuntimeError(f"the dispatch took {picked.name}")
    heard = ops.Heard() if listens else None
    o, lse = picked.decode(qs, parts, heard)
    want, total = merge([attend(qs, x.k, x.v, x.pos) for x in (*store.tokens(), window, other)])
    errors = [relative(o, want), float((lse - total).abs().max())]
    for t, decoded in zip(store.told(heard), store.tokens(), strict=True) if listens else ():
        if t.logits is None:
            raise RuntimeError("no logits were left")
        said = logits(qs, decoded.k, decoded.pos)[:, :, :, 0]
        if not torch.equal(t.logits.isinf(), said.isinf()):
            raise RuntimeError("logits of other tokens were left")
        errors.append(relative(t.logits.nan_to_num(neginf=0.0), said.nan_to_num(neginf=0.0)))
        p = ops.weights_in_torch(qs, total, decoded)
        errors.append(relative(ops.weights(qs, total, t), p))
    return max(errors)


def _others(run: Run) -> Iterator[Check]:
    for dtype in [torch.float32] if run.tiny else list(LIMITS):
        exact = dtype == torch.float32
        for W in (70 if run.tiny else 2100, 1):
            yield (
                f"column sums {str(dtype)[6:]} W={W}",
                1e-5 if exact else 1e-4,
                functools.partial(_mass, run, W, dtype),
            )
        for bits in (2, 4, 8):
            what = f"rounding {str(dtype)[6:]} to {bits} bits: codes that differ"
            yield what, 0.0, functools.partial(_rounding, run, bits, dtype)
        for what, asked in (("keys from", False), ("attention over", True)):
            limit = 1e-5 if exact else 1e-2
            yield f"{what} latents {str(dtype)[6:]}", limit, functools.partial(_latents, run, dtype, asked)

        for name, G, T in (("exact", 16, 1), ("exact", 128, 2), ("int8", 16, 1), ("int4", 16, 1), ("fp8", 20, 1)):
            what = f"latents of 576 {name} {str(dtype)[6:]} T={T} G={G}"
            yield what, LIMITS[dtype], functools.partial(_wide, run, name, dtype, G, T)
        limit = 1e-4 if exact else 2e-2
        yield f"latents of 576 {str(dtype)[6:]}, by torch", limit, functools.partial(_wide_torch, run, dtype)
        yield f"a token to its slot {str(dtype)[6:]}", 0.0, functools.partial(_placed, run, dtype)
        for late in (0, 2):
            what = f"what heads remember {str(dtype)[6:]}" + ", some asked later" * bool(late)
            yield what, 1e-4, functools.partial(_remembered, run, late, dtype)


def _wide(run: Run, name: str, dtype: torch.dtype, G: int, T: int) -> float:
    """Of multi-head latent attention; values are the keys."""
    B, N, D = (1, 70, 320) if run.tiny else (2, 3001, 576)
    t, window = (pieces.latents(B, n, D, dtype, run.device) for n in (N, 45))
    qs = pieces.queries(B, G, T, D, dtype, run.device)
    store = pieces.stored(name, t)
    parts = [*store.attend(qs), ops.piece(window)]
    picked = ops.pick(qs, parts)
    if picked is not ops.GPU:
        raise RuntimeError(f"the dispatch took {picked.name}")
    o, lse = picked.decode(qs, parts)
    want, total = merge([attend(qs, x.k, x.values, x.pos) for x in (*store.tokens(), window)])
    return max(relative(o, want), float((lse - total).abs().max()))


def _wide_torch(run: Run, dtype: torch.dtype) -> float:
    """Where the kernel is off or does not take them."""
    B, G, N, D = (1, 4, 70, 80) if run.tiny else (2, 16, 3001, 576)
    t = pieces.latents(B, N, D, dtype, run.device)
    qs = pieces.queries(B, G, 1, D, dtype, run.device)
    (o, lse), (want, total) = ops.attend(qs, t), attend(qs, t.k, t.values, t.pos)
    return max(relative(o, want), float((lse - total).abs().max()))


def _placed(run: Run, dtype: torch.dtype) -> float:
    """In a window of fixed memory, where the next step's would be."""
    t = pieces.tokens(2, 4, 50, 128, dtype, run.device, False)
    own, want = Window(), Window()
    for window in (own, want):
        window.append(t.slice(0, 40))
    own, want = own.fixed(64, 40), want.fixed(64, 40)
    for i in range(40, 50):
        new = t.slice(i, i + 1)
        if not gpu.puts(new, own):
            raise RuntimeError("the kernel does not take it")
        gpu.put(new, own)
        own.written(new)
        want.append(new)
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(tensors(own), tensors(want), strict=True))


def _remembered(run: Run, late: int, dtype: torch.dtype) -> float:
    """The lse of what still answers, of queries near and far, and who is to be asked."""
    B, H, G, D = (1, 2, 2, 32) if run.tiny else (3, 8, 4, 128)
    q0, mean, drift = (torch.randn(B, H * G, D, device=run.device) for _ in range(3))
    answer = Answer(torch.zeros_like(q0), torch.randn(B, H * G, device=run.device), mean)
    far = torch.linspace(0, 1.5, H * G, device=run.device)[:, None]
    pos = torch.full((B, 1), 99, dtype=torch.int32, device=run.device)
    qs = Queries((q0 + far * drift)[:, :, None].to(dtype), pos, D**-0.5)
    store = Calibrated(1, 0.7, 0.8, "head", True, 0, HeadGroup(), late)
    m = store.memories[0]
    m.q, m.answer = q0, answer
    near = store._similarity(m, qs)
    said, applied, asked, counts, _ = gpu.remembered(qs, (q0, answer.lse, mean), 1, 0.8, 0.7, H, late)
    assert asked is not None and counts is not None
    ask = near[..., 0] < 0.7
    if late:
        furthest = near[..., 0].masked_fill(~ask, float("inf")).view(B, H, G).amin(-1).topk(late, largest=False).indices
        ask &= torch.zeros(B, H, dtype=torch.bool, device=run.device).scatter(1, furthest, True).repeat_interleave(G, 1)
    told = (applied, near >= 0.8), (asked, ask), (counts[:, 0], ask.sum(1))
    if not all(torch.equal(x, y) for x, y in told):
        raise RuntimeError("other heads answer, or are asked")
    return float((said - m.moved(qs, 1))[applied].abs().max())


def _mass(run: Run, W: int, dtype: torch.dtype) -> float:
    B, H, G, D, N = (1, 2, 2, 32, 70) if run.tiny else (2, 4, 4, 128, 2100)
    device = run.device
    t = pieces.tokens(B, H, N, D, dtype, device, True)
    pos = torch.arange(N - W, N, device=device).expand(B, W)
    qs = Queries(torch.randn(B, H * G, W, D, device=device, dtype=dtype), pos, D**-0.5)
    lse = attend(qs, t.k, t.v, t.pos)[1]
    return relative(gpu.mass(qs, lse, t), ops.mass_in_torch(qs, lse, t))


def _rounding(run: Run, bits: int, dtype: torch.dtype) -> float:
    x = torch.randn(2, 3, 64, 128, device=run.device, dtype=dtype) * 3
    x[0, 0, :8], x[0, 1, :, :32] = 0.25, torch.arange(32.0, device=run.device) * 0.5
    wrong = 0
    for groups in (x, hadamard(x.float()), x.unflatten(2, (2, 32)).transpose(-1, -2), x.unflatten(-1, (-1, 32))):
        codes, *meta = quantize(groups, bits)
        wrong += sum(
            int((a != b).sum()) for a, b in zip(gpu.rounded(groups, bits), (pack(codes, bits), *meta), strict=True)
        )
    return wrong


def _latents(run: Run, dtype: torch.dtype, asked: bool) -> float:
    """Keys that are rebuilt, or what is said where they are."""
    device = run.device
    B, H, N, D, rank, values = (1, 4, 40, 32, 24, 40) if run.tiny else (2, 8, 1500, 128, 200, 512)
    weight, *others = (torch.randn(x, device=device) for x in ((2, H // 2 * D, rank), (H * D, values), H * D, H * D))
    basis = Basis([*range(1, H), 0], weight * rank**-0.5, *others)
    rope = Rope(10_000.0 ** -(torch.arange(D // 2, device=device) * 2 / D))
    pos = torch.arange(100_000, 100_000 + N, device=device, dtype=torch.int32).expand(B, N)
    z, v = (torch.randn(B, N, n, device=device, dtype=dtype) for n in (2 * rank, values))
    want = rope.rotate(basis.keys_of(z), pos[:, None])
    if not asked:
        return relative(gpu.keys(z, pos, basis.keys, basis.key_bias, basis.at, rope.inv_freq, 1.0), want)
    qs = pieces.queries(B, 4 * H, 1, D, dtype, device)
    start = torch.zeros(B, dtype=torch.long, device=device)
    at = (z, v, pos, start, basis.keys, basis.key_bias, basis.slots, rope.inv_freq, 1.0)
    o, lse = gpu.ask_latents(qs, *at)
    every = pos[:, None].expand(B, H, N)
    whole, total = attend(qs, want.to(dtype), v[:, None].expand(B, H, N, values), every)
    return max(relative(o, whole), float((lse - total).abs().max()))
