"""Linear layers that are not torch's: the answers of nn.Linear, in whatever way a model is used."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import prune

import calidrop
from calidrop import huge, linear
from calidrop.linear import Linear, fast_linear
from calidrop.models import load
from calidrop.ops import build, cpu
from tiny import tiny

DTYPES = torch.float32, torch.bfloat16


def pair(width: int, out: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Linear]:
    plain = nn.Linear(width, out, bias=bias, dtype=dtype)
    ours = copy.deepcopy(plain)
    ours.__class__ = Linear
    return plain, ours  # type: ignore[return-value]


@pytest.fixture(params=["kernel", "none"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is one for few rows."""
    if request.param == "none":
        monkeypatch.setattr(cpu, "kernel", lambda: type("None", (), {"reason": "not here"}))
    elif cpu.kernel().reason:
        pytest.skip(cpu.kernel().reason)
    return request.param == "kernel"


@pytest.fixture(params=["onednn", "torch"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it is asked about many rows in fp32."""
    if request.param == "onednn" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("no oneDNN")
    monkeypatch.setattr(linear, "onednn_leads", lambda: request.param == "onednn")
    return request.param == "onednn"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who multiplied; nobody where it was oneDNN."""
    who: list[str] = []
    other, own = nn.Linear.forward, cpu.linear
    monkeypatch.setattr(nn.Linear, "forward", lambda *a: (who.append("torch"), other(*a))[1])
    monkeypatch.setattr(cpu, "linear", lambda *a: (who.append("kernel"), own(*a))[1])
    return who


def inputs_of(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of any number of rows and dims, and not all of them in one piece of memory."""
    wide = torch.randn(7, 4, 2 * width)
    made = [torch.randn(rows, width) for rows in (0, 1, 2, 3, 4, 5, 8, 9, 33, 200)]
    made += [torch.randn(width), torch.randn(2, 3, 5, width), torch.randn(2, 1, 3, width), torch.randn(0, 4, width)]
    made += [
        torch.randn(5, 4, width).transpose(0, 1),
        wide[..., :width],
        wide[:1, :3, ::2],
        torch.randn(1, width).expand(3, -1),
    ]
    return [x.to(dtype) for x in made]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(64, 96), (48, 5), (37, 5), (1, 3), (144, 1)])
def test_answers_as_torch_does(
    width: int, out: int, bias: bool, dtype: torch.dtype, kernel: bool, onednn: bool, seen: list[str]
) -> None:
    plain, ours = pair(width, out, bias, dtype)
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for x in inputs_of(width, dtype):
        with torch.no_grad():
            want = plain(x)
            del seen[:]
            got = ours(x)
        assert got.shape == want.shape and got.dtype is dtype and got.is_contiguous()
        torch.testing.assert_close(got, want, **limit)
        few = 1 <= x.numel() // width <= 8 and width % 16 == 0 and kernel
        many = [] if onednn and dtype is torch.float32 else ["torch"]
        assert seen == (["kernel"] if few else many), x.shape


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("rows", [3, 9])
def test_is_torchs_where_neither_would_do(rows: int, onednn: bool, seen: list[str]) -> None:
    ours = pair(32, 16)[1]
    x = torch.randn(rows, 32)
    ours(x)  # its weights want gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16
    assert seen == ["torch"] * 2
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        ours(torch.randn(9, 32))
    assert seen == ["torch"] * 3
    with torch.no_grad():
        for wrong, said in ((torch.randn(rows, 31), "shape"), (x.double(), "dtype"), (x.bfloat16(), "dtype")):
            with pytest.raises(RuntimeError, match=said):
                ours(wrong)
        for dtype in (torch.float64, torch.float16):
            a, b = pair(32, 16, dtype=dtype)
            assert torch.equal(a(x.to(dtype)), b(x.to(dtype)))
        ours.bias = nn.Parameter(ours.bias.double())
        with pytest.raises(RuntimeError, match="dtype"):
            ours(x)
    with torch.device("meta"):
        assert Linear(32, 16)(x.to("meta")).shape == (rows, 16)
    with torch.inference_mode(), FakeTensorMode() as fake:
        made = Linear(32, 16)
        assert made(fake.from_tensor(x)).shape == (rows, 16)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_gradients_are_torchs(rows: int) -> None:
    """Of the weights, and of what comes in where weights are frozen."""
    plain, ours = pair(32, 8)
    x, y = (torch.linspace(-1, 1, rows * 32).view(rows, 32).requires_grad_() for _ in range(2))
    plain(x).square().sum().backward()
    ours(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(plain.weight.grad, ours.weight.grad)
    ours.requires_grad_(False)
    y.grad = None
    ours(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    ours.bias.requires_grad_().grad = None
    ours(y.detach()).sum().backward()
    assert torch.equal(ours.bias.grad, torch.full([8], float(rows)))


def forward_mode(m: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(x, x.flip(0)))).tangent


DERIVATIVES = {
    "dual": forward_mode,
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x.flip(0),))[1],
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(lambda y: m(y).pow(3).sum())(x),
    "vmap": lambda m, x: torch.vmap(m)(x.expand(3, -1, -1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("of", DERIVATIVES)
def test_derivatives_of_functions(of: str, rows: int, grad: bool) -> None:
    plain, ours = (m.requires_grad_(False) for m in pair(32, 8))
    x = torch.randn(rows, 32)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(DERIVATIVES[of](ours, x), DERIVATIVES[of](plain, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 9])
def test_traces_as_torchs_does(rows: int, dtype: torch.dtype) -> None:
    plain, ours = pair(32, 8, dtype=dtype)
    x, other = torch.randn(2, rows, 32).to(dtype)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(ours, x)(other), plain(other))
        exported = torch.export.export(nn.Sequential(ours), (x,)).module()
        torch.testing.assert_close(exported(other), plain(other))


class Doubled(torch.Tensor):
    """A tensor with a product of its own, as quantized ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * 2 if func is nn.functional.linear else out


@pytest.mark.parametrize("rows", [3, 9])
def test_a_tensors_own_product_is_respected(rows: int) -> None:
    plain, ours = pair(32, 8, bias=False)
    x = torch.randn(rows, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.as_subclass(Doubled)), 2 * plain(x))
        ours.weight = nn.Parameter(plain.weight.detach().as_subclass(Doubled), requires_grad=False)
        torch.testing.assert_close(ours(x), 2 * plain(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_parameter_that_is_made_from_others(rows: int, name: str) -> None:
    """As pruning does: what the module has under that name is no parameter then."""
    pairs = pair(32, 8)
    for layer in pairs:
        prune.l1_unstructured(layer, name, amount=4)
    x = torch.randn(rows, 32)
    with torch.no_grad():
        torch.testing.assert_close(pairs[1](x), pairs[0](x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_compiles_in_one_graph(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain, ours), behind = pair(32, 8), nn.Linear(8, 4)  # it needs the right shape
    plain, ours = nn.Sequential(plain, behind), nn.Sequential(ours, behind)
    x, own, asked = torch.randn(rows, 32), cpu.linear, []
    monkeypatch.setattr(cpu, "linear", lambda *a: (asked.append(len(a[0])), own(*a))[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), plain(x))
    assert asked == ([rows] if rows <= 8 and not cpu.kernel().reason else [])


def test_a_models_layers_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linear, "helps", lambda: True)

    class Own(nn.Linear):
        pass

    model = tiny()
    model.model.layers[0].mlp.up_proj.__class__ = Own
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, 97, (3, 40))
    with torch.no_grad():
        want = model(ids).logits
    assert fast_linear(model) is model
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Linear, Own} and type(model.model.layers[0].mlp.up_proj) is Own
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear and torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert type(copy.deepcopy(model).lm_head) is Linear
    monkeypatch.setattr(linear, "helps", lambda: False)
    fast_linear(model, False)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear, Own}


@pytest.mark.parametrize(
    ("machine", "flags", "swaps", "leads"),
    [("x86_64", "fpu sse4a avx2", True, True), ("x86_64", "fpu avx2", True, False), ("aarch64", "asimd", False, False)],
)
def test_only_where_it_was_measured(
    machine: str, flags: str, swaps: bool, leads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(build, "features", lambda: flags)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    linear.onednn_leads.cache_clear()
    try:
        assert linear.onednn_leads() is (leads and torch.backends.mkldnn.is_available())
        assert (type(fast_linear(nn.Sequential(nn.Linear(2, 2)))[0]) is Linear) is swaps
    finally:
        linear.onednn_leads.cache_clear()


def test_weights_are_moved_to_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "helps", lambda: True)
    model, moved = tiny(), []
    monkeypatch.setattr(huge, "moved", lambda held: moved.extend(held))
    fast_linear(model)
    assert {id(x) for x in moved} == {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    del moved[:]
    fast_linear(model, False)
    assert not moved


def test_load_gives_such_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linear, "helps", lambda: True)
    model, tokenizer = tiny(), calidrop.load()[1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got, _ = load(str(tmp_path), device="cpu")
    assert type(got.lm_head) is Linear
