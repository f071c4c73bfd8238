"""Attention of prompts (ops.prompt) against its oracle, attention.attend."""

import pytest
import torch

from calidrop import ops
from calidrop.attention import Queries, attend
from calidrop.masks import within
from calidrop.ops import build, cpu
from calidrop.tokens import Tokens


@pytest.mark.parametrize("pads", [(0, 0), (0, 3), (5, 20), (0, 19), (40, 40)])
@pytest.mark.parametrize(
    ("N", "T", "window"),
    [
        *((20, 20, window) for window in (1, 2, 7, 10, 19, 20, 99)),
        *((N, T, window) for N, T in ((20, 11), (41, 40), (40, 25)) for window in (1, 5, 7, 10, 30)),
    ],
)
@pytest.mark.parametrize("Dv", [16, 10])
def test_a_sliding_window(N, T, window, pads, Dv, monkeypatch):
    """Two rows with left pads; the last T of N columns ask. No mask is made and no score is computed by `attend`."""
    monkeypatch.setattr(ops, "oracle", None)
    B, H, G, D = 2, 2, 3, 16
    k, v, q = torch.randn(B, H, N, D), torch.randn(B, H, N, Dv), torch.randn(B, H * G, T, D)
    column = torch.arange(N, dtype=torch.int32).expand(B, N).clone()
    for row, n in enumerate(pads):
        column[row, :n] = -1
    t = Tokens(k, v, column[:, None].expand(B, H, N), dense=not any(pads))
    qs = Queries(q, column[:, N - T :], D**-0.5, None, within(window).visible, window)
    (o, lse), (want, norm) = ops.prompt(qs, t, window), attend(qs, k, v, t.pos)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(lse, norm, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("N", "parts"), [(40, 4), (43, 4), (43, 1), (7, 7), (2600, 10)])
@pytest.mark.parametrize(("H", "D", "Dv"), [(1, 576, 0), (3, 32, 20)])
def test_stretches_side_by_side(N, parts, H, D, Dv, monkeypatch):
    """As a GPU is asked, where one head would be too little for it."""
    k, v, q = torch.randn(2, H, N + 5, D)[:, :, :N], torch.randn(2, H, N + 5, Dv)[:, :, :N], torch.randn(2, 4 * H, 2, D)
    pos = torch.arange(N, dtype=torch.int32).expand(2, H, N)
    qs, t = Queries(q, torch.full((2, 2), N), D**-0.5), Tokens(k, v, pos, dense=True)
    monkeypatch.setattr(ops, "_stretches", lambda k: parts)
    monkeypatch.setattr(ops, "oracle", None)
    for x, y in zip(ops.attend(qs, t), attend(qs, k, v, pos), strict=True):
        torch.testing.assert_close(x.float(), y, rtol=1e-4, atol=2e-6)


def test_gradients_go_through_a_sliding_window():
    k, v, q = (x.requires_grad_() for x in torch.randn(3, 1, 2, 20, 16))
    pos = torch.arange(20)[None]
    t = Tokens(k, v, pos[:, None].expand(1, 2, 20), dense=True)
    qs = Queries(q, pos, 0.25, None, within(7).visible, 7)
    got, want = (
        torch.autograd.grad(answer[0].square().sum(), (q, k, v))
        for answer in (ops.prompt(qs, t, 7), attend(qs, k, v, t.pos))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_no_sliding_window_is_answered_with_its_mask():
    H, N, D = 2, 20, 16
    k, v, q = torch.randn(3, 1, H, N, D)
    pos, seven = torch.arange(N)[None], within(7).visible
    t = Tokens(k, v, pos[:, None].expand(1, H, N), dense=True)
    for rule in (
        {"visible": seven, "window": 7, "softcap": 5.0},
        {"visible": lambda a, b: seven(a, b) & (b[:, :, None] != 3)},
    ):
        qs = Queries(q, pos, D**-0.5, **rule)
        (o, lse), (want, norm) = ops.prompt(qs, t, 7), attend(qs, k, v, t.pos)
        torch.testing.assert_close(o, want, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(lse, norm, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("features", "dtype", "kernel"),
    [
        ("flags : avx2", torch.float32, True),
        ("flags : avx2 avx512f sse4a", torch.bfloat16, True),
        ("flags : avx2 avx512f sse4a", torch.float16, True),
        ("flags : avx2 avx512f", torch.bfloat16, False),
        ("Features : asimd", torch.float32, False),
    ],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("pads", [(0, 0), (0, 3), (70, 11)])
def test_a_whole_prompt(pads, softcap, features, dtype, kernel, monkeypatch):
    """By the kernel where it leads, else by torch; two rows with left pads, one of them nothing else."""
    if kernel and cpu.kernel().reason:
        pytest.skip(cpu.kernel().reason)
    asked = []
    inner = cpu.prompt
    monkeypatch.setattr(cpu, "prompt", lambda qs, t: asked.append(len(qs)) or inner(qs, t))
    monkeypatch.setattr(build, "features", lambda: features)
    B, H, G, N, D = 2, 2, 3, 70, 64
    k, v, q = (x.to(dtype) for x in (*torch.randn(2, B, H, N, D), torch.randn(B, H * G, N, D)))
    pos = torch.arange(N, dtype=torch.int32).expand(B, N).clone()
    for row, n in enumerate(pads):
        pos[row, :n] = -1
    t, qs = Tokens(k, v, pos[:, None].expand(B, H, N), dense=not any(pads)), Queries(q, pos, 0.125, softcap)
    (o, lse), (want, norm) = ops.prompt(qs, t), attend(qs, k, v, t.pos)
    exact = kernel or dtype == torch.float32  # torch rounds weights to 16 bits
    limit = {"rtol": 1e-4, "atol": 2e-6} if exact else {"rtol": 0.01, "atol": 0.02}
    torch.testing.assert_close(o.float(), want.float(), **limit)
    torch.testing.assert_close(lse, norm, **limit)
    assert bool(asked) == kernel


def test_a_long_prompt_is_not_for_the_kernel(monkeypatch):
    q = torch.zeros(1, 1, 1, 64)
    for features, most in (("sse4a avx2 avx512f", 16384), ("avx2 avx512f", 4096), ("sse4a avx2", 4096)):
        monkeypatch.setattr(build, "features", lambda features=features: features)
        assert cpu.leads(q, most) and not cpu.leads(q, most + 1)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradients_go_through_a_whole_prompt(which):
    drawn = dict(zip("qkv", torch.randn(3, 1, 2, 20, 64), strict=True))
    drawn[which].requires_grad_()
    q, k, v = drawn.values()
    pos = torch.arange(20)[None]
    t, qs = Tokens(k, v, pos[:, None].expand(1, 2, 20), dense=True), Queries(q, pos, 0.125)
    got, want = (
        torch.autograd.grad(answer[0].square().sum(), drawn[which])[0]
        for answer in (ops.prompt(qs, t), attend(qs, k, v, t.pos))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
