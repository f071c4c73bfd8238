"""Rounding and packing, and KIVI's store against a loop in numpy."""

import itertools

import numpy as np
import pytest
import torch

from calidrop.quant import dequantize, pack, quantize, unpack
from calidrop.state import held_bytes
from helpers import feed, layer_of, live, positions, random_qkv, run

bits_2_4_8 = pytest.mark.parametrize("bits", [2, 4, 8])


def rounded(x, bits):
    """One group, by the definition: what is read back."""
    zero = np.float16(x.min())
    scale = np.float16((x.max() - np.float32(zero)) / (2**bits - 1))
    if scale <= 0:
        return np.full_like(x, zero)
    zero, scale = np.float32(zero), np.float32(scale)
    return np.clip(np.rint((x - zero) / scale), 0, 2**bits - 1) * scale + zero


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        *itertools.product((2, 4, 8), [(8,), (1, 4), (3, 5, 12), (2, 0, 7, 4), (1, 3, 1, 1, 20)]),
        *itertools.product((3,), [(8,), (2, 0, 24), (3, 5, 40)]),  # eight codes in three bytes
    ],
)
def test_pack_round_trip(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_first_code_is_in_the_low_bits():
    assert pack(torch.tensor([1, 2, 3, 0, 3, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b01001111]
    assert pack(torch.tensor([1, 15, 7, 0], dtype=torch.uint8), 4).tolist() == [0xF1, 0x07]
    three = pack(torch.tensor([1, 0, 7, 0, 0, 0, 0, 5], dtype=torch.uint8), 3)  # 0o50000701
    assert three.tolist() == [0xC1, 0x01, 0xA0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (30.0, 200.0), (1e-3, -5.0), (1e4, 0.0)])
def test_rounding_is_to_the_nearest_level_and_within_half_a_step(bits, size, offset):
    x = size * torch.randn(7, 3, 24) + offset
    codes, scale, zero = quantize(x, bits)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.float16)
    error = (dequantize(codes, scale, zero) - x).abs()
    levels = torch.arange(2**bits) * scale.float()[..., None] + zero.float()[..., None]
    nearest = (x[..., None] - levels[:, :, None]).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=1e-3, atol=1e-6 * (size + abs(offset)))
    # the ends of the range are missed by what rounding zero and scale to fp16 moved them
    ulp_zero, ulp_scale = (torch.tensor(np.abs(np.spacing(x.numpy())), dtype=torch.float32) for x in (zero, scale))
    ends = torch.maximum(ulp_zero / 2, (2**bits - 1) * ulp_scale / 2)
    assert (error <= (torch.maximum(scale.float() / 2, ends) * 1.001 + 1e-6 * (size + abs(offset)))[..., None]).all()


@bits_2_4_8
def test_constant_groups_are_exact(bits):
    x = torch.tensor([0.0, -3.5, 1e-4, 2048.0, -0.1]).half().float()[:, None].expand(5, 12)
    codes, scale, zero = quantize(x, bits)
    assert torch.equal(dequantize(codes, scale, zero), x)
    assert (scale > 0).all()  # no 0/0 that only a cast happens to hide
    mixed = torch.cat([x, torch.randn(5, 12)])
    assert dequantize(*quantize(mixed, bits)).isfinite().all()


@bits_2_4_8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_rounded_per_channel_and_values_per_token(bits, dtype):
    B, H, N, D, group = 2, 2, 61, 24, 8
    q, k, v = (x.to(dtype) for x in random_qkv(B, H, 3, N, D))
    k[0, 0, :, 5] += 40  # a channel with a bias, as keys have
    v[:, :, 9] = 1.5  # a token whose values are all the same
    kv = run(f"kivi(bits={bits}, group={group}, residual=18)", (q, k, v))
    decoded, waiting = kv.state.store.tokens()
    assert (len(decoded), len(waiting), len(kv.state.window)) == (40, 3, 18)
    assert positions(kv) == [[list(range(N))] * H] * B
    want_k, want_v = (x[:, :, :40].float().numpy().copy() for x in (k, v))
    for head_k, head_v in zip(want_k.reshape(-1, 40, D), want_v.reshape(-1, 40, D), strict=True):
        for first in range(0, 40, group):
            for channel in range(D):
                head_k[first : first + group, channel] = rounded(head_k[first : first + group, channel], bits)
        for token in range(40):
            for first in range(0, D, group):
                head_v[token, first : first + group] = rounded(head_v[token, first : first + group], bits)
    assert decoded.k.dtype == dtype
    torch.testing.assert_close(decoded.k, torch.tensor(want_k).to(dtype))
    torch.testing.assert_close(decoded.v, torch.tensor(want_v).to(dtype))
    assert torch.equal(waiting.k, k[:, :, 40:43])


@bits_2_4_8
@pytest.mark.parametrize(("N", "dtype"), [(1003, torch.float32), (4100, torch.bfloat16)])
def test_bytes_are_those_of_the_formula(bits, N, dtype):
    B, H, D, group, residual = 2, 2, 64, 32, 128
    kv = run(f"kivi(bits={bits})", tuple(x.to(dtype) for x in random_qkv(B, H, 1, N, D)))
    coded = (N - residual) // group * group
    exact = 2 * D * dtype.itemsize + 4  # key, value, position
    per_head = coded * (2 * (D * bits / 8 + 4 * D / group) + 4) + (N - residual - coded) * exact
    lengths = 2 * 8  # int64, of groups and of waiting tokens
    assert held_bytes(kv.state.store) == B * H * (per_head + lengths)
    window = held_bytes(kv.state.window)
    assert residual * B * H * exact <= window <= (residual + 16) * B * H * exact  # it has room for 16 more
    other = held_bytes([kv.state.obs, kv.state.context, kv.state.start])
    assert held_bytes(kv.state) == held_bytes(kv.state.store) + window + other


def same_content(a, b):
    """Of two stores: codes, scales and positions to the bit."""
    for x, y in ((a.held, b.held), (a.waiting.held, b.waiting.held)):
        assert torch.equal(x.lens, y.lens)
        assert x.data.keys() == y.data.keys()
        assert all(torch.equal(x.data[name], y.data[name]) for name in x.data)


@pytest.mark.parametrize("pads", [None, [0, 13]])
@pytest.mark.parametrize("prompt", [19, 43])
def test_streaming_equals_batch(prompt, pads):
    """24 generated tokens, 3 groups, after prompts that fill no whole number of groups."""
    qkv = random_qkv(2, 2, 3, prompt + 24, 16)
    recipe = "kivi(bits=2, group=8, residual=16)"
    streamed, batch = run(recipe, qkv, prompt, pads), run(recipe, qkv, None, pads)
    same_content(streamed.state.store, batch.state.store)
    assert torch.equal(streamed.state.window.tokens().k, batch.state.window.tokens().k)


@pytest.mark.parametrize("steps", [0, 23])
def test_left_padded_row_has_the_codes_it_has_alone(steps):
    qkv, pad = random_qkv(3, 2, 3, 60 + steps, 16), 21
    recipe = "kivi(bits=2, group=8, residual=11)"
    together = run(recipe, qkv, 60, [0, pad, 40])
    alone = run(recipe, tuple(x[1:2, :, pad:] for x in qkv), 60 - pad)
    together.state.take_rows(torch.tensor([1]))
    together.state.store.held.data["pos"] -= pad
    together.state.store.waiting.held.data["pos"] -= pad
    same_content(together.state.store, alone.state.store)


def test_more_bits_are_closer_and_eight_nearly_exact():
    qkv = random_qkv(2, 2, 3, 203, 16)
    full = feed(layer_of("full", qkv), qkv, [180] + [1] * 23)
    errors = []
    for bits in (2, 4, 8):
        out = feed(layer_of(f"kivi(bits={bits}, group=16, residual=16)", qkv), qkv, [180] + [1] * 23)
        assert torch.equal(out[:, :, :180], full[:, :, :180])  # the prompt itself is attended exactly
        errors.append((out - full).norm() / full.norm())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    assert errors[2] < 0.01


def test_heads_of_unequal_length_decode_to_their_own_tokens():
    """AdaKV in front: every head fills its own groups; what a head has too little for a group waits."""
    q, k, v = random_qkv(2, 3, 2, 151, 16)
    k *= torch.tensor([0.1, 1, 4]).view(1, 3, 1, 1)
    kv = run("adakv(budget=60, recent=6)+kivi(bits=8, group=8)", (q, k, v))
    plain = run("adakv(budget=60, recent=6)", (q, k, v))
    assert positions(kv) == positions(plain)
    lens = kv.state.store.kept.held.lens
    assert len(lens.unique()) > 1
    assert lens.tolist() == [[(len(head) - 6) // 8 for head in row] for row in positions(kv)]
    for t in live(kv):
        for b in range(2):
            for h in range(3):
                real = t.valid[b, h]
                at = t.pos[b, h, real].long()
                step = 1.1 * max(k[b, h].max() - k[b, h].min(), v.max() - v.min()) / 255 / 2
                torch.testing.assert_close(t.k[b, h, real], k[b, h, at], rtol=0, atol=float(step))
                torch.testing.assert_close(t.v[b, h, real], v[b, h, at], rtol=0, atol=float(step))
