"""Linear layers by the other library: the answers of nn.Linear, in whatever way a model is used."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import calidrop
from calidrop import linear
from calidrop.linear import FEW, Linear, fast_linear
from calidrop.models import load
from tiny import tiny

ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 33, 200)
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")), reason="no oneDNN"
)


def pair(width: int, out: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Linear]:
    plain = nn.Linear(width, out, bias=bias, dtype=dtype)
    ours = copy.deepcopy(plain)
    ours.__class__ = Linear
    return plain, ours  # type: ignore[return-value]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who multiplied."""
    seen: list[str] = []
    other = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda *a: (seen.append("torch"), other(*a))[1])
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a: (seen.append("mm"), mm(*a))[1])
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(64, 96), (37, 5), (1, 3), (130, 1)])
def test_answers_as_torch_does(width: int, out: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair(width, out, bias)
    inputs = [torch.randn(rows, width) for rows in ROWS] + [torch.randn(width), torch.randn(2, 3, 5, width)]
    wide = torch.randn(7, 4, 2 * width)
    inputs += [
        torch.randn(5, 4, width).transpose(0, 1),
        wide[..., :width],
        wide[:1, :3, ::2],
        torch.randn(1, width).expand(3, -1),
    ]
    with torch.no_grad():
        want = [plain(x) for x in inputs]
        seen = calls(monkeypatch)
        got = [ours(x) for x in inputs]
    for x, a, b in zip(inputs, want, got, strict=True):
        assert a.shape == b.shape and b.is_contiguous(), x.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert "torch" not in seen and len(seen) == sum(1 <= x.numel() // width <= FEW for x in inputs) > 0


@pytest.mark.filterwarnings("ignore:TF32")
def test_is_torchs_where_the_call_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair(32, 16)
    x = torch.randn(6, 32)
    seen = calls(monkeypatch)
    ours(x)  # its weights want gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        ours(x)
    assert seen == ["torch"] * 3
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        ours(torch.randn(6, 31))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        ours(x.double())
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        a, b = pair(32, 16, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(a(x.to(dtype)), b(x.to(dtype)))
    with torch.device("meta"):
        assert Linear(32, 16)(x.to("meta")).shape == (6, 16)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_gradients_are_torchs(rows: int) -> None:
    """Of the weights, and of what comes in where weights are frozen."""
    plain, ours = pair(24, 8)
    x, y = (torch.linspace(-1, 1, rows * 24).view(rows, 24).requires_grad_() for _ in range(2))
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


DERIVATIVES = {
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
    plain, ours = (m.requires_grad_(False) for m in pair(24, 8))
    x = torch.randn(rows, 24)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(DERIVATIVES[of](ours, x), DERIVATIVES[of](plain, x))


class Doubled(torch.Tensor):
    """A tensor with a product of its own, as quantized ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * 2 if func is nn.functional.linear else out


@pytest.mark.parametrize("rows", [3, 9])
def test_a_weights_own_product_is_respected(rows: int) -> None:
    plain, ours = pair(24, 8, bias=False)
    ours.weight = nn.Parameter(plain.weight.detach().as_subclass(Doubled), requires_grad=False)
    x = torch.randn(rows, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), 2 * plain(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_compiles_in_one_graph(rows: int) -> None:
    plain, ours = pair(24, 8)
    x = torch.randn(rows, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), plain(x))


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
    fast_linear(model, False)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear, Own}


@pytest.mark.parametrize(("vendor", "does"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_only_where_it_is_known_to_help(vendor: str, does: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    linear.helps.cache_clear()
    try:
        assert linear.helps() is does
        assert (type(fast_linear(nn.Sequential(nn.Linear(2, 2)))[0]) is Linear) is does
    finally:
        linear.helps.cache_clear()


def test_the_vendor_is_read_where_linux_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(linear, "CPUINFO", info)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert linear._vendor() == ""
    info.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: x: y\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n"
    )
    assert linear._vendor() == "AuthenticAMD"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert linear._vendor() == ""


def test_load_gives_such_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linear, "helps", lambda: True)
    model, tokenizer = tiny(), calidrop.load()[1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got, _ = load(str(tmp_path), device="cpu")
    assert type(got.lm_head) is Linear
