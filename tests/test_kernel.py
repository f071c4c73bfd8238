"""The decode kernel for CPUs (ops/cpp) against its oracle, attention.attend and merge on the decoded tokens."""

import copy
import ctypes
import functools
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from calidrop import ops
from calidrop.attention import Queries, attend, logits, merge
from calidrop.methods._predictor import Predictor
from calidrop.methods._rows import Rows
from calidrop.methods.calidrop import Calibrated
from calidrop.observe import Observation
from calidrop.ops import alike, build, cpu, predicting
from calidrop.parallel import HeadGroup
from calidrop.state import Ragged, tensors
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens
from calidrop.window import Window
from helpers import check_heard, check_steps_heard, live, random_qkv, run

# not where it fails to compile
pytestmark = pytest.mark.skipif(cpu.kernel().reason.startswith("no C++ compiler"), reason=cpu.kernel().reason)


CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
ONLY_VNNI = pytest.mark.skipif("avx512_vnni" not in CPUINFO, reason="what AMX rests on is not there")
ONLY_AMX = pytest.mark.skipif("amx_int8" not in CPUINFO, reason="native is the same without AMX")
ONLY_AVX_VNNI = pytest.mark.skipif("avx_vnni" not in CPUINFO, reason="this processor has none for AVX2")
ONLY_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64")
compiled = functools.cache(lambda flags: cpu.Kernel(*flags))
IN_KERNEL = Calibrated._in_kernel


def queries(B: int, Hq: int, T: int, D: int, softcap: float | None = None) -> Queries:
    return Queries(torch.randn(B, Hq, T, D), torch.full((B, T), 10_000), D**-0.5, softcap)


def tokens(B: int, H: int, N: int, D: int, dtype=torch.float32, empty: float = 0.0) -> Tokens:
    pos = torch.arange(N, dtype=torch.int32).expand(B, H, N).clone()
    pos[torch.rand(B, H, N) < empty] = -1
    return Tokens(torch.randn(B, H, N, D).to(dtype), torch.randn(B, H, N, D).to(dtype), pos, dense=empty == 0.0)


def check(qs: Queries, parts: list, sets: list[Tokens], limit: float) -> None:
    assert ops.pick(qs, parts) is ops.CPU
    o, lse = cpu.decode(qs, parts)
    want, total = merge([attend(qs, t.k, t.v, t.pos) for t in sets])
    assert torch.equal(lse.isinf(), total.isinf())
    assert (lse - total).nan_to_num(0.0, 0.0, 0.0).abs().max() < limit
    assert (o - want).abs().max() < limit


def check_left(qs: Queries, store: Store, limit: float) -> None:
    """`check_heard`, and leaving logits changes no bit of the answer."""
    parts = store.attend(qs)
    heard, plain = cpu.decode(qs, parts, ops.Heard()), cpu.decode(qs, parts)
    assert all(torch.equal(x, y) for x, y in zip(heard, plain, strict=True))
    check_heard(cpu.decode, ops.weights, qs, store, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", sorted(cpu.HEAD_DIMS))
@pytest.mark.parametrize("N", [1, 63, 65, 700])
def test_exact(D, N, dtype):
    t = tokens(2, 2, N, D, dtype)
    for group, T in ((1, 1), (3, 1), (4, 2), (7, 1)):
        qs = queries(2, 2 * group, T, D)
        check(qs, [ops.piece(t)], [t], 2e-5)


@pytest.mark.parametrize("D", [24, *sorted(cpu.HEAD_DIMS)])
@pytest.mark.parametrize("N", [1, 63, 65, 700])
def test_exact_keys_and_queries_in_bf16(D, N):
    """Whose products are exact; a query that is no such number is asked as it is."""
    t = tokens(2, 2, N, D, torch.bfloat16)
    for group, T in ((1, 1), (3, 1), (4, 2), (7, 1), (3, 6)):
        qs = queries(2, 2 * group, T, D)
        qs = replace(qs, q=qs.q.bfloat16())
        check(qs, [ops.piece(t)], [t], 2e-5)
        check(replace(qs, softcap=3.0), [ops.piece(t)], [t], 2e-5)
        q = qs.q.float()
        q[0, 0, 0, 0] += 1e-3
        check(replace(qs, q=q), [ops.piece(t)], [t], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "Dv"), [(24, 64), (38, 38), (112, 16), (128, 130), (320, 1), (192, 128), (576, 512)])
def test_rows_of_any_width(D, Dv, dtype):
    """What lies behind a row is no number, and is not read."""
    room = torch.full((2, 2, 150, D + Dv + 40), float("nan"), dtype=dtype)
    k, v = room[..., :D], room[..., D + 20 : D + Dv + 20]
    k.copy_(torch.randn(k.shape)), v.copy_(torch.randn(v.shape))
    t = Tokens(k, v, torch.arange(150, dtype=torch.int32).expand(2, 2, 150).clone(), dense=True)
    other = Tokens(*(torch.randn(2, 2, 70, d).to(dtype) for d in (D, Dv)), t.pos[:, :, :70].clone(), dense=True)
    qs = queries(2, 6, 1, D)
    answer = attend(qs, other.k, other.v, other.pos)
    check(qs, [ops.piece(t), answer, ops.piece(other)], [t, other, other], 2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_several_sets_empty_slots_and_answers(softcap):
    D, qs = 64, queries(3, 6, 1, 64, softcap)
    a, b, c = tokens(3, 2, 70, D), tokens(3, 2, 33, D, empty=0.4), tokens(3, 2, 41, D)
    b.pos[1, 1] = -1  # a head with nothing
    check(qs, [ops.piece(a), attend(qs, c.k, c.v, c.pos), ops.piece(b)], [a, b, c], 2e-5)
    nothing = tokens(3, 2, 5, D, empty=1.1)
    check(qs, [ops.piece(nothing)], [nothing], 2e-5)


def test_heads_of_unequal_length():
    qs = queries(2, 6, 1, 64)
    t = tokens(2, 3, 900, 64, empty=0.5)
    t.pos[0, 1, 20:] = -1
    store = Exact()
    store.held = Ragged(t.columns(), t.valid)
    assert not store.held.uniform
    check(qs, store.attend(qs), [t], 2e-5)
    check_left(qs, store, 2e-5)
    check_left(replace(qs, softcap=2.0), store, 2e-5)


def test_only_a_view_of_a_buffer():
    qs, t = queries(2, 4, 1, 64), tokens(2, 2, 200, 64)
    part = t.slice(7, 150)
    check(qs, [ops.piece(part)], [part], 2e-5)


@pytest.mark.parametrize("last", [None, 20])
@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (24, 80)])
def test_a_step_writes_its_token_on_the_way(D, Dv, dtype, pads, last):
    """Beside tokens of heads of unequal length and an answer; the window grows out of its memory twice."""
    first = tokens(2, 3, 30, D, dtype)
    first.v, first.pos[1, :, :pads], first.dense = torch.randn(2, 3, 30, Dv).to(dtype), -1, pads == 0
    old = tokens(2, 3, 90, D, empty=0.5)
    old.k, old.v, old.pos[0, 1, 5:] = old.k.to(dtype), torch.randn(2, 3, 90, Dv).to(dtype), -1
    store, own, want = Exact(), Window(), Window()
    store.held = Ragged(old.columns(), old.valid)
    own.append(first), want.append(first)
    for i in range(30, 75):
        k, v = (torch.randn(2, 1, 3, d).to(dtype).transpose(1, 2) for d in (D, Dv))  # as models have them
        new = Tokens(k, v, torch.full((2, 1), i, dtype=torch.int32)[:, None].expand(2, 3, 1), dense=True)
        qs = replace(queries(2, 6, 1, D), q=torch.randn(2, 6, 1, D).to(dtype))
        said = attend(qs, old.k[:, :, :9], old.v[:, :, :9], old.pos[:, :, :9])
        parts, heard = [*store.attend(qs), said], ops.Heard()
        (o, lse), by = ops.step(qs, new, own, parts, heard, last, dtype)
        assert by == ops.CPU.name
        want.append(new)
        whole, t = want.tokens(), own.tokens()
        assert all(torch.equal(getattr(t, x), getattr(whole, x)) for x in ("k", "v", "pos")) and t.dense == whole.dense
        seen = whole.slice(0 if last is None else len(whole) - last)
        exact, total = merge([*(attend(qs, x.k, x.v, x.pos) for x in (old, seen)), said])
        assert (lse - total).abs().max() < 2e-5
        assert o.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert (o - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-5)
        plain = cpu.decode(qs, [*parts, ops.piece(seen)])
        assert torch.equal(plain[0].to(o.dtype), o) and torch.equal(plain[1], lse)
        left = heard.of(t.v, len(seen))
        assert left is not None
        torch.testing.assert_close(left, logits(qs, seen.k, seen.pos)[:, :, :, 0], rtol=0, atol=2e-5)
    assert not own.dense or pads == 0


def test_what_a_step_does_not_write_is_appended(monkeypatch):
    """A window of fixed memory, one without any, tokens of another dtype, and more queries than a kernel takes."""
    t, asked = tokens(1, 2, 20, 64), []
    monkeypatch.setattr(cpu, "step", lambda *_: asked.append(1))
    loose, fixed = Window(), Window()
    loose.append(t.slice(0, 10)), fixed.append(t.slice(0, 10))
    halves = Tokens(t.k.half(), t.v.half(), t.pos, dense=True)
    for window, new, T in ((fixed.fixed(30, 10), t, 1), (Window(), t, 1), (loose, halves, 1), (loose, t, 9)):
        n, qs = len(window), queries(1, 4, T, 64)
        (o, lse), _ = ops.step(qs, new.slice(10, 10 + T), window, [])
        assert len(window) == n + T and not asked
        seen = window.tokens()
        want, total = attend(qs, seen.k, seen.v, seen.pos)
        assert (o - want).abs().max() < 2e-5 and (lse - total).abs().max() < 2e-5


@pytest.mark.parametrize("how", ["rows are taken", "copied", "forked"])
def test_what_is_known_of_tokens_is_forgotten_where_they_move(how):
    qs, t = queries(2, 6, 1, 64), tokens(2, 3, 90, 64, empty=0.5)
    store = Exact()
    store.held = Ragged(t.columns(), t.valid)
    for _ in range(2):
        check(qs, store.attend(qs), store.tokens(), 2e-5)
    other = store
    if how == "copied":
        other = copy.deepcopy(store)
        store.held.data["k"].fill_(float("nan"))
    elif how == "forked":
        other = store.fork()
    else:
        store.take_rows(torch.tensor([1, 0]))
    check(qs, other.attend(qs), other.tokens(), 2e-5)
    other.held = other.held.replace({"k": torch.randn(other.held.padded()[0]["k"].shape)})
    check(qs, other.attend(qs), other.tokens(), 2e-5)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(rows, threads):
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        qs, t, more = queries(rows, 6, 1, 64), tokens(rows, 3, 3001, 64), tokens(rows, 3, 5, 64)
        check(qs, [ops.piece(t)], [t], 2e-5)
        check(qs, [ops.piece(t), attend(qs, more.k, more.v, more.pos)], [t, more], 2e-5)
    finally:
        torch.set_num_threads(was)


CODED = [
    "int8(residual=5)",
    "fp8(residual=5)",
    "adakv(budget=300, recent=9)+fp8",
    "int4(residual=5)",
    "int4(rotate=False, residual=5)",
    *(f"kivi(bits={bits}, group={group}, residual=7)" for bits in (2, 4, 8) for group in (32, 64)),
    "ott(bits=2, block=64, pool=3, spill=5, skip=0, residual=5)",
    "ott(bits=4, block=128, pool=3, spill=2, skip=0, residual=5)",
    "adakv(budget=300, recent=9)+int4",
    "adakv(budget=300, recent=9)+kivi(bits=2)",
    "snapkv(budget=200, recent=9)+calidrop",
    *(f"h2o(budget=100)+mikv(bits={bits}{more})" for bits in (2, 3, 4) for more in ("", ", balancer=False")),
    *(
        f"think(keep={keep}, recent=5){more}"
        for keep in (0.5, 0.6)
        for more in ("", "+int8", "+fp8", "+int4", "+kivi(bits=2)", "+decoquant")
        if keep == 0.6 or more != "+decoquant"
    ),
    *(f"decoquant(bits={bits}, residual=5)" for bits in (2, 4, 8)),
    "adakv(budget=300, recent=9)+decoquant",
    "mixkvq(residual=5)",
    "mixkvq(quota=(3, 13, 48), values=4, residual=5)",
    "mixkvq(quota=(0, 64, 0), values=8, group=64, residual=5)",
    "mixkvq(quota=(0, 0, 64), block=32, residual=5)",
    "mixkvq(values=16, residual=5)",
    "mixkvq(quota=(3, 13, 48), values=16, block=32, residual=5)",
    "mixkvq(quota=(64, 0, 0), values=16, residual=5)",
    "adakv(budget=300, recent=9)+mixkvq",
    "adakv(budget=300, recent=9)+mixkvq(values=16)",
]


# as it is compiled for this machine, without its AMX and its VNNI path, and for machines with AVX2
VARIANTS = [
    pytest.param((), id="native"),
    pytest.param(("-DCALIDROP_NO_AMX",), id="no amx", marks=[ONLY_AMX]),
    pytest.param(("-DCALIDROP_PORTABLE",), id="portable"),
    pytest.param(("-march=x86-64-v3",), id="avx2", marks=[pytest.mark.slow, ONLY_X86]),
]
EMULATED = ("-include", str(Path(__file__).with_name("amx_emulated.h")))
CODES = [
    *VARIANTS,
    pytest.param(("-march=x86-64-v3", "-mavxvnni"), id="avx vnni", marks=[pytest.mark.slow, ONLY_AVX_VNNI]),
    pytest.param(EMULATED, id="amx emulated", marks=[pytest.mark.slow, ONLY_VNNI]),
]


def use(flags: tuple[str, ...], monkeypatch) -> None:
    if flags:
        other = compiled(flags)
        assert not other.reason
        monkeypatch.setattr(cpu, "kernel", lambda: other)


@pytest.fixture
def one(tmp_path, monkeypatch):
    """A single small source, and an empty cache."""
    (tmp_path / "cpp").mkdir()
    source = tmp_path / "cpp" / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpp")
    monkeypatch.setenv("CALIDROP_CACHE", str(tmp_path / "cache"))
    return source


@pytest.mark.parametrize("locks", [True, False])
def test_it_is_compiled_once_and_says_so(locks, one, tmp_path, monkeypatch, caplog):
    """By whoever comes first; where the file system knows no locks, by all who come before it is there."""
    if not locks:

        def refuse(self):
            raise NotImplementedError

        monkeypatch.setattr(build.FileLock, "acquire", refuse)
    with ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: build.built(()), range(4))}
    assert ctypes.CDLL(str(found.pop())).one() == 1 and not found
    said = [x.getMessage() for x in caplog.records if x.name == build.__name__]
    assert len(said) == 1 if locks else said
    assert all("once" in x for x in said)
    build.built(())
    assert len(said) == len([x for x in caplog.records if x.name == build.__name__])
    assert not list((tmp_path / "cache").glob(".compiling-*"))


@pytest.mark.parametrize("left", [0, 0.4, 0.99, "garbage"])
def test_a_damaged_library_is_compiled_again(left, one):
    library = build.built(())
    whole = library.read_bytes()
    library.write_bytes(b"no library" * 9 if left == "garbage" else whole[: int(left * len(whole))])
    assert build.built(()) == library
    assert ctypes.CDLL(str(library)).one() == 1
    before = library.stat().st_mtime_ns
    build.built(())
    assert library.stat().st_mtime_ns == before


def test_a_compiler_may_have_arguments(one, monkeypatch):
    one.write_text('extern "C" int one() { return SAID; }')
    monkeypatch.setenv("CXX", "g++ -DSAID=7 '-DTWO=a b'")
    assert ctypes.CDLL(str(build.built(()))).one() == 7


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-g++ -O2", "CXX=no-such-g++ -O2: there is no program no-such-g++"),
        ("g++ 'x", "CXX=g++ 'x: No closing quotation"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(compiler, reason, one, monkeypatch):
    build.built(())
    monkeypatch.setenv("CXX", compiler)
    assert cpu.Kernel().reason == reason


def test_the_reason_is_what_the_compiler_said(one, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    one.write_text('#warning "first"\nint one() { return no_such_name; }')
    reason = cpu.Kernel().reason
    assert reason.startswith("g++ failed: ") and "one.cpp:2:" in reason and "no_such_name" in reason
    monkeypatch.setenv("CXX", "false")  # says nothing
    assert cpu.Kernel().reason == "false failed: exit status 1"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-9", "g++-10", "g++-11", "clang++"])
def test_other_compilers(compiler, monkeypatch):
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    monkeypatch.setenv("CXX", compiler)
    own = cpu.Kernel()
    assert not own.reason
    monkeypatch.setattr(cpu, "kernel", lambda: own)
    for dtype in cpu.DTYPES:
        test_exact(64, 65, dtype)
    test_codes((), "int4(residual=5)", 64, monkeypatch)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("recipe", CODED)
@pytest.mark.parametrize("flags", CODES)
def test_codes(flags, recipe, D, monkeypatch):
    use(flags, monkeypatch)
    B, H, G, N = 2, 2, 3, 611
    if "quota" in recipe:
        D = 64
    if "think(keep=0.6" in recipe and "decoquant" in recipe:
        D = 128  # of which 80 stay, five times 16
    qkv = random_qkv(B, H, G, N, D)
    kv = run(recipe, qkv, pads=[0, 77])
    qs = Queries(torch.randn(B, H * G, 1, D), torch.full((B, 1), N), D**-0.5)
    store = kv.state.store
    parts = store.attend(qs)
    if "calidrop" in recipe:
        assert any(isinstance(p, tuple) for p in parts)  # what is remembered joins as an answer
        o, lse = cpu.decode(qs, parts)
        want, total = merge([p if isinstance(p, tuple) else p.answer(qs) for p in parts])
        assert (o - want).abs().max() < 2e-5
        assert (lse - total).abs().max() < 2e-5
        return
    assert sum(not isinstance(p, tuple) for p in parts) == len(parts)
    check(qs, [*parts, ops.piece(kv.state.window.tokens())], live(kv), 2e-4)
    check_left(qs, store, 1e-3)


@pytest.mark.parametrize("G", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("recipe", "D"),
    [
        *((f"int{bits}(residual=5)", D) for bits in (8, 4) for D in (32, 64, 96, 128, 256)),
        *(("fp8(residual=5)", D) for D in cpu.HEAD_DIMS),
        *(("h2o(budget=.5)+mikv(bits=2)", D) for D in (64, 128, 256)),
        *((f"h2o(budget=.5)+mikv(bits={bits})", D) for bits in (3, 4) for D in (32, 64, 96, 128, 256)),
        *(("kivi(bits=8, group=64, residual=5)", D) for D in (64, 256)),
        *((f"int{bits}(residual=5)", D) for bits in (8, 4) for D in (24, 40, 72, 80, 112, 192, 320, 512, 576)),
        *(("fp8(residual=5)", D) for D in (24, 40, 112, 320)),
        *(("decoquant(bits=2, residual=5)", D) for D in (48, 96)),
        ("kivi(bits=8, residual=5)", 512),
        *(("mixkvq(residual=5)", D) for D in (96, 256)),
        *(("mixkvq(values=16, residual=5)", D) for D in (96, 160, 256)),
    ],
)
@pytest.mark.parametrize("flags", CODES)
def test_codes_for_any_number_of_queries_and_channels(flags, recipe, D, G, monkeypatch):
    use(flags, monkeypatch)
    B, H, N = 1, 2, 203
    kv = run(recipe, random_qkv(B, H, G, N, D))
    qs = Queries(torch.randn(B, H * G, 1, D), torch.full((B, 1), N), D**-0.5)
    assert kv.state.store is not None
    check(qs, [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())], live(kv), 2e-4)


@pytest.mark.parametrize("D", [64, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_values_beside_coded_keys(dtype, D):
    qkv = tuple(x.to(dtype) for x in random_qkv(2, 2, 3, 517, D))
    kv = run("mixkvq(values=16, residual=5)", qkv, pads=[0, 128])
    qs = queries(2, 6, 1, D)
    parts = kv.state.store.attend(qs)
    assert [p.kind for p in parts] == ["tiers"]  # whole blocks
    check(qs, parts, kv.state.store.tokens(), 2e-3)  # those are decoded to that dtype


def test_what_it_does_not_take_is_answered_by_torch():
    for qs in (queries(1, 4, 1, 600), queries(1, 4, 9, 64)):
        t = tokens(1, 2, 20, qs.q.shape[-1])
        assert ops.pick(qs, [ops.piece(t)]).name.startswith("torch (")
        o, lse = ops.joined(qs, [ops.piece(t)])
        want, total = attend(qs, t.k, t.v, t.pos)
        assert (o - want).abs().max() < 2e-5
        assert (lse - total).abs().max() < 2e-5


@pytest.mark.parametrize("recipe", ["int8(residual=1)", "int4(residual=1)", "kivi(bits=4, residual=1)"])
@pytest.mark.parametrize("gap", [60, 78, 80, 84, 100])
def test_weights_that_are_next_to_nothing(recipe, gap):
    """Blocks whose weights are e^-gap of those before them."""
    q, k, v = random_qkv(1, 1, 1, 257, 64)
    k[:, :, :64] = gap * 8 * q[:, :, -1:] / q[:, :, -1:].square().sum(-1, keepdim=True)
    kv = run(recipe, (q, k, v))
    qs = Queries(q[:, :, -1:], torch.full((1, 1), 257), 64**-0.5)
    check(qs, [*kv.state.store.attend(qs), ops.piece(kv.state.window.tokens())], live(kv), 2e-3)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_no_number_stays_none(which):
    qs, t = queries(1, 2, 1, 64), tokens(1, 2, 300, 64)
    {"q": qs.q, "k": t.k, "v": t.v}[which][0, 0, 0, 5] = float("nan")
    o, lse = cpu.decode(qs, [ops.piece(t)])
    want, total = attend(qs, t.k, t.v, t.pos)
    assert torch.equal(o.isnan(), want.isnan())
    assert torch.equal(lse.isnan(), total.isnan())


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("D", "W", "dtype"),
    [
        (64, 130, torch.float32),
        (80, 5, torch.bfloat16),
        (128, 7, torch.float16),
        (32, 1, torch.float32),
        (256, 66, torch.bfloat16),
        (192, 9, torch.float32),
    ],
)
def test_column_sums(flags, softcap, D, W, dtype, monkeypatch):
    """Few queries and many, left pads, empty slots with no numbers in them, tokens in any order."""
    use(flags, monkeypatch)
    B, H, G, N = 2, 2, 3, 131
    t = tokens(B, H, N, D, dtype, empty=0.2)
    pos = torch.arange(N - W, N).expand(B, W).clone()
    pos[1, : W // 3], t.pos[1, :, : N // 3] = -1, -1
    t = t.slice(1, N)  # a view of a buffer
    for order in (torch.arange(N - 1), torch.randperm(N - 1)):
        t = Tokens(t.k[:, :, order], t.v[:, :, order], t.pos[:, :, order])
        qs = Queries(torch.randn(B, H * G, W, D).to(dtype), pos, D**-0.5, softcap)
        lse = attend(qs, t.k, t.v, t.pos)[1]
        assert cpu.sums(qs, t)
        held = Tokens(t.k.masked_fill(~t.valid[..., None], float("nan")), t.v, t.pos)
        got = cpu.mass(qs, lse, held)
        start = torch.zeros(B, dtype=torch.long)
        want = Observation(qs, lse, start + N, start).head_weights(t).mean(2).sum(2)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        assert (got[~t.valid] == 0).all()


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize(
    ("G", "D", "dtype", "softcap"),
    [
        (3, 64, torch.float32, None),
        (1, 80, torch.bfloat16, 5.0),
        (15, 128, torch.float16, None),
        (17, 64, torch.float32, None),
    ],
)
def test_the_largest_weights_of_one_query(flags, G, D, dtype, softcap, monkeypatch):
    """Of query heads and of blocks of tokens; few query heads and many, a pad, empty slots without numbers."""
    use(flags, monkeypatch)
    B, H, N = 3, 2, 192 + 64
    t = tokens(B, H, N, D, dtype, empty=0.2)
    t.pos[:, 0, 64:96] = -1  # blocks of nothing
    pos = torch.tensor([[N], [100], [-1]])
    t = t.slice(48, N)
    held = Tokens(t.k.masked_fill(~t.valid[..., None], float("nan")), t.v, t.pos)
    qs = Queries(torch.randn(B, H * G, 1, D).to(dtype), pos, D**-0.5, softcap)
    lse = attend(qs, t.k, t.v, t.pos)[1]
    said = logits(replace(qs, pos=torch.full_like(pos, N)), t.k, t.pos)[:, :, :, 0]  # as attention, which knows no pads
    heard = replace(held, k=t.k[..., :0])
    for group in ("mean", "max"):
        for block in (1, 16, 8):  # 8: not by the kernel
            assert cpu.pools(t, block) == (block != 8)
            want = ops.weights_in_torch(qs, lse, t, group, block)
            x = t if block == 8 else held
            torch.testing.assert_close(ops.weights(qs, lse, x, group, block), want, rtol=2e-5, atol=1e-6)
            before = t.pos <= pos[:, :, None]  # of the query, as all that attention asks is
            heard.logits = said.masked_fill(~before[:, :, None], float("-inf"))
            got = ops.weights(qs, lse, heard, group, block)
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_column_sums_of_what_the_kernel_does_not_read():
    t, qs = tokens(1, 2, 9, 24), queries(1, 2, 1, 24)
    masked = replace(queries(1, 2, 1, 64), visible=lambda q, k: (k >= 0)[:, :, None])
    assert not cpu.sums(qs, t) and not cpu.sums(masked, tokens(1, 2, 9, 64))
    assert ops.mass(qs, attend(qs, t.k, t.v, t.pos)[1], t).sum() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("G", "D", "Dv", "W", "dtype"),
    [
        (3, 64, 64, 200, torch.float32),
        (1, 80, 96, 65, torch.bfloat16),
        (7, 128, 32, 9, torch.float16),
        (30, 32, 256, 70, torch.float32),
        (2, 192, 128, 70, torch.float32),
    ],
)
def test_a_prompt_with_its_column_sums(flags, softcap, G, D, Dv, W, dtype, monkeypatch):
    """Left pads, a row of pads alone, more query heads than a tile has rows."""
    use(flags, monkeypatch)
    B, H = 3, 2
    pos = torch.arange(W, dtype=torch.int32).expand(B, W).clone()
    pos[1, : W // 3], pos[2] = -1, -1
    room = torch.randn(B, H, W + 9, D + Dv).to(dtype)
    t = Tokens(room[:, :, 4:-5, :D], room[:, :, 4:-5, D:], pos[:, None].expand(B, H, W))
    qs = Queries(torch.randn(B, H * G, W, D).to(dtype), pos, D**-0.5, softcap)
    assert cpu.sums(qs, t)
    (o, lse), sums = cpu.prompt(qs, t)
    want, norm = attend(qs, t.k, t.v, t.pos)
    torch.testing.assert_close(o, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, norm, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(sums, ops.mass_in_torch(qs, norm, t), rtol=2e-5, atol=2e-6)
    again = cpu.prompt(qs, t)[1]
    assert torch.equal(sums, again)


@pytest.mark.parametrize("pads", [0, 9])
def test_h2o_holds_the_same_with_sums_found_on_the_way(pads, monkeypatch):
    """One attention of the prompt and of every step, and none of `mass` after it."""
    qkv = random_qkv(2, 3, 2, 60, 64)
    asked: list[int] = []
    own = ops.mass
    monkeypatch.setattr(ops, "mass", lambda qs, lse, t: asked.append(len(qs)) or own(qs, lse, t))
    found = []
    for summed, heard in ((True, True), (False, True), (False, False)):
        if not summed:
            monkeypatch.setattr(cpu, "sums", lambda qs, t: False)
        if not heard:
            monkeypatch.setattr(Store, "listens", False)
        kv = run("h2o(budget=20, every=4)", qkv, 50, pads=[0, pads])
        found.append([(t.pos, t.stats["mass"]) for t in live(kv)])
        assert (50 in asked) == (not summed) and (1 in asked) == (not heard)
        asked.clear()
    for other in found[:2]:
        for (pos, mass), (want_pos, want) in zip(other, found[2], strict=True):
            assert torch.equal(pos, want_pos)
            torch.testing.assert_close(mass, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o(budget=24, every=4)+int4",
        "h2o(budget=24, every=4)+kivi(bits=4, group=8)",
        "h2o(budget=24, every=4)+think(keep=0.5, recent=1)",
        "h2o(budget=24, every=4)+think(keep=0.5, values=0.5, recent=1)",
        "h2o(budget=24, every=4)+mikv",
        "lazy_eviction(budget=40, window=4)",
        "lazy_eviction(budget=40, window=4)+fp8",
        "attention_predictor(budget=48, sinks=16, recent=2, skip=0, dense=3)",
        "attention_predictor(budget=48, sinks=16, recent=2, skip=0, dense=3)+int8",
    ],
)
def test_steps_heard_on_the_way(recipe, monkeypatch):
    check_steps_heard(recipe, monkeypatch)


def test_a_prompt_that_gradients_go_through_is_attended_by_torch():
    t, qs = tokens(1, 2, 9, 64), queries(1, 2, 9, 64)
    qs = replace(qs, pos=torch.arange(9)[None])
    assert ops.prompt_with_mass(qs, t)[1] is not None
    assert ops.prompt_with_mass(replace(qs, q=qs.q.clone().requires_grad_()), t)[1] is None


@pytest.mark.parametrize("flags", [variant for variant in VARIANTS if variant.id != "no amx"])
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(16, 1), (48, 3), (64, 16), (576, 130), (1536, 33), (96, 1025), (512, 640)])
def test_a_linear_layer(flags, width, out, dtype, threads, monkeypatch):
    """Between rows that are no numbers; what is said to a row does not depend on those beside it."""
    use(flags, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    room = torch.full((out + 2, width), float("nan"), dtype=dtype)
    weight, bias = room[1:-1], torch.randn(out).to(dtype)
    weight[:] = torch.randn(out, width)
    x = torch.randn(8, width).to(dtype)
    want = x.double() @ weight.double().T
    limit = 2e-5 * width**0.5
    for more in (None, bias):
        whole = want if more is None else want + more.double()
        said = cpu.linear(x, weight, more)
        assert said.dtype is dtype
        off = (said.double() - whole).abs()
        assert (off <= limit + (0 if dtype is torch.float32 else 2**-8 * whole.abs())).all()
        for rows in range(1, 8):
            assert cpu.multiplies(x[:rows], weight)
            assert torch.equal(cpu.linear(x[-rows:], weight, more), said[-rows:])


def test_linear_layers_that_the_kernel_does_not_take():
    x, w = torch.randn(8, 32), torch.randn(4, 32)
    assert cpu.multiplies(x, w) and cpu.multiplies(x[0], w) and cpu.multiplies(x.view(2, 4, 32), w)
    others = [(torch.randn(9, 32), w), (x[:0], w), (x[:, :8], w[:, :8].contiguous()), (x, torch.randn(32, 4).T)]
    others += [(x.bfloat16(), w), *((x.to(dtype), w.to(dtype)) for dtype in (torch.float16, torch.float64))]
    assert not any(cpu.multiplies(rows, weight) for rows, weight in others)


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("N", "D"), [(1, 64), (64, 16), (130, 80), (611, 128), (1100, 32)])
def test_the_last_key_that_is_alike(flags, N, D, later, monkeypatch):
    use(flags, monkeypatch)
    kinds = F.normalize(torch.randn(2, 3, 40, D), dim=-1)
    which = torch.randint(0, 40, (2, 3, N))
    k = F.normalize(kinds.gather(2, which[..., None].expand(-1, -1, -1, D)) + 0.02 * torch.randn(2, 3, N, D), dim=-1)
    k[:, 1, :5] = 0.0  # empty slots are like nothing
    k = k.half().float()  # products of neighbours differ by far more than the order of their sums does
    at = torch.arange(N)
    pairs = (k @ k.transpose(-1, -2) > 0.7) & ((at > at[:, None]) if later else (at != at[:, None]))
    want = torch.where(pairs, at, -1).amax(-1)
    assert cpu.compares(k)
    assert torch.equal(alike.last_alike(k, 0.7, later), want)
    assert torch.equal(alike.in_torch(k, 0.7, later), want)
    if N > 100:
        assert (want == -1).any() and (want >= 0).any()


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (2, 16), (3, 31), (4, 65), (6, 256)])
def test_the_network_of_attention_predictor(flags, N, C, newest, monkeypatch):
    """A view of a longer history, and rows that end at different blocks."""
    use(flags, monkeypatch)
    net, room = Predictor.fresh(0.5, 0.9), torch.full((N, 9, C), float("nan"))
    x = room[:, 2:7]
    x[:] = torch.rand(N, 5, C)
    ends = torch.arange(C) < (C - torch.arange(N) % 3 * C // 4)[:, None]
    for real in (None, ends):
        assert predicting.runs_networks(x)
        torch.testing.assert_close(
            net.edge(x, real, newest), net._some(x, real, (0, 1) if newest else (1, 0)), atol=1e-6, rtol=1e-5
        )
    assert not predicting.runs_networks(x.clone().requires_grad_())


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("power", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(("B", "H", "spans", "per"), [(1, 1, 1, 1), (2, 3, 33, 1), (3, 2, 5, 2), (1, 2, 256, 1)])
def test_a_step_of_attention_predictor(flags, B, H, spans, per, power, monkeypatch):
    """Against the same in torch: rows of what was fetched, one where nothing was, and those of everything."""
    use(flags, monkeypatch)
    net, C = Predictor.fresh(power, 0.7), spans * per
    rows = Rows(64, 16, lambda device: net)
    ends = (torch.arange(C) < torch.tensor([[C], [C // 2], [C - per]])[:B])[:, None]
    rows.history, rows._net = torch.rand(B, H, 64, C) * ends[:, :, None], net
    rows.there = None if B == 1 else ends[:, 0]
    rows.next_row()
    slow = rows.fork()
    slow._net = copy.copy(net)
    monkeypatch.setattr(slow.net, "follows", lambda history: False)
    qs = Queries(torch.zeros(B, 3 * H, 1, 8), torch.zeros(B, 1, dtype=torch.int32), 1.0)
    step = Observation(qs, torch.rand(B, 3 * H, 1), torch.ones(B).long(), torch.zeros(B).long())
    for i in range(6):
        before = rows.fork()
        kept = [x.clone() for x in tensors(before)]
        if i == 3:  # everything was asked
            peaks = torch.randn(B, H, 3, 1, C + 1).where(F.pad(ends, (0, 1))[:, :, None, None], float("-inf"))
            for each in (rows, slow):
                each.peaks = peaks
                each.push_peaks(step)
        else:
            ids = torch.stack([torch.randperm(spans) for _ in range(B * H)]).view(B, H, -1)[..., : 1 + spans // 2]
            ids = ids.masked_fill(torch.rand(ids.shape) < (1.0 if i == 4 else 0.2), -1)
            weights = torch.rand(B, H, 1, ids.shape[2] * per)
            weights = weights.masked_fill((ids < 0).repeat_interleave(per, 2)[:, :, None], float("nan"))
            for each in (rows, slow):
                each.push(step, weights, ids)
        assert rows.expected is not None
        assert slow.expected is None
        torch.testing.assert_close(rows.history, slow.history, rtol=0, atol=1e-6)
        torch.testing.assert_close(rows.next_row(), slow.next_row(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows.moving.sum, slow.moving.sum, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(x, y) for x, y in zip(tensors(before), kept, strict=True))
    assert rows.expected is None


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("apply", [0.5, 0.85])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("G", "D", "Dv", "dtype"), [(3, 64, 64, torch.float32), (1, 24, 80, torch.bfloat16)])
def test_what_heads_remember(flags, order, apply, G, D, Dv, dtype, monkeypatch):
    """Steps of CaliDrop in one call: lists of several lengths in two segments, one of nothing, queries near and far."""
    use(flags, monkeypatch)
    B, H = 3, 2

    def told(q):
        context = torch.full((B,), 500)
        return Observation(Queries(q, context[:, None], D**-0.5), torch.zeros(B, H * G, 1), context, context * 0)

    def some(N, lens):
        pos = torch.arange(N, dtype=torch.int32).expand(B, H, N).masked_fill(torch.arange(N) >= lens[..., None], -1)
        return Tokens(torch.randn(B, H, N, D).to(dtype), torch.randn(B, H, N, Dv).to(dtype), pos)

    first = torch.tensor([[300, 1], [0, 17], [299, 211]])
    near = torch.randn(B, H * G, 1, D).to(dtype)
    for heads in ([first, first // 20], [first * 0 + 300], []):
        store = Calibrated(order, 0.5, apply, "head", bool(heads), 0, HeadGroup())
        for lens in heads or [first]:
            store.add(some(int(lens.max()), lens), told(near))
        assert store.log is None or len(store.log.segments) == len(heads)
        asked, silent = 0, False
        for i in range(4):
            drift = torch.randn(B, H * G, 1, D) * torch.tensor([0.0, 0.5, 2.0])[:, None, None, None]
            qs = Queries((near + i * drift).to(dtype), torch.full((B, 1), 600), D**-0.5)
            other, before = store.fork(), (store.memories[0].q, *vars(store.memories[0].answer).values())
            kept = [x.clone() for x in before]
            assert store._in_kernel(store.memories[0], qs)
            ((o, lse),) = store.attend(qs)
            assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True))  # forks hold the same
            monkeypatch.setattr(Calibrated, "_in_kernel", lambda self, m, qs: False)
            ((want, total),) = other.attend(qs)
            monkeypatch.setattr(Calibrated, "_in_kernel", IN_KERNEL)
            torch.testing.assert_close(lse, total, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(o, want, atol=2e-5, rtol=1e-4)
            for x, y in zip(tensors(store), tensors(other), strict=True):
                torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)
            assert store.recomputed() == other.recomputed()
            asked += store.recomputed()[0]
            silent |= bool(lse.isinf().any())
            assert not lse.isinf().all()
        assert (asked > 0) == bool(heads)
        assert silent or (apply == 0.5 and heads)
