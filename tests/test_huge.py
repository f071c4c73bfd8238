"""Memory in huge pages: the same numbers as torch's, the bytes it says, and huge pages where Linux has them."""

import platform
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calidrop import huge
from calidrop.state import Buffer, Ragged, held_bytes

MEGABYTE = 1 << 20
needs_pages = pytest.mark.skipif(not huge.there(), reason="this system gives programs no huge pages")


def memory() -> tuple[int, int]:
    """kB of this process that are in memory, and in huge pages."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return tuple(int(re.search(rf"^{name}: +(\d+) kB", told, re.M)[1]) for name in ("Rss", "AnonHugePages"))  # type: ignore


SLACK = 700  # kB that a process may take or give back meanwhile; a huge page too many would be 1024 below


@pytest.fixture
def free_pages():
    """Skips what failed where Linux found no huge page free."""

    def fallbacks() -> int:
        return int(re.search(r"thp_fault_fallback (\d+)", Path("/proc/vmstat").read_text())[1])  # type: ignore[index]

    before = fallbacks()

    def check(found: int, want: int) -> None:
        if found != want and fallbacks() > before:
            pytest.skip("no huge page was free")
        assert found == want

    return check


@needs_pages
def test_pages_are_huge_and_nothing_is_larger(free_pages):
    huge.empty(torch.empty(0), (MEGABYTE,)).fill_(1.0)  # what this needs itself
    memory()
    before = memory()
    x = huge.empty(torch.empty(0), (5 * MEGABYTE // 4 + 5,))  # 5 MB and 20 bytes
    assert abs(memory()[0] - before[0]) < SLACK
    x.fill_(1.0)
    after = memory()
    assert x.data_ptr() % huge.PAGE == 0
    assert x.untyped_storage().nbytes() == x.nbytes == 5 * MEGABYTE + 20
    free_pages(after[1] - before[1], 4 * 1024)
    assert abs(after[0] - before[0] - 5 * 1024) < SLACK
    del x
    assert memory()[1] == before[1] and abs(memory()[0] - before[0]) < SLACK


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64, torch.bool]
)
def test_every_dtype(dtype):
    x = huge.empty(torch.empty(0, dtype=dtype), (3, 1, MEGABYTE)).fill_(1)
    assert x.dtype == dtype and x.shape == (3, 1, MEGABYTE) and x.is_contiguous() and bool((x == 1).all())
    assert held_bytes(x) == 3 * MEGABYTE * x.element_size()


def test_small_ones_and_those_elsewhere_are_torch_s():
    assert huge.empty(torch.empty(0), (7, 3)).shape == (7, 3)
    assert huge.empty(torch.empty(0, device="meta"), (5, MEGABYTE)).device.type == "meta"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n", [5, 9000])
def test_the_same_numbers_as_torch_s(n, turned):
    x, keep = torch.randn(2, 3, n, 64), torch.rand(2, 3, n) > 0.5
    if turned:
        x, keep = torch.randn(2, n, 3, 64).transpose(1, 2), torch.rand(2, n, 3).transpose(1, 2) > 0.5
    index = torch.randint(0, n, (2, 3, n, 64))
    for got, want in (
        (huge.copy(x), x),
        (huge.cat([x, x[:, :, :2]], 2), torch.cat([x, x[:, :, :2]], 2)),
        (huge.gather(x, 2, index), x.gather(2, index)),
        (huge.marked(x, keep), x[keep]),
    ):
        assert torch.equal(got, want) and got.is_contiguous()


def test_gradients_go_through():
    x = torch.randn(1, 2, 9000, 64, requires_grad=True)
    keep = torch.ones(1, 2, 9000, dtype=torch.bool)
    total = huge.copy(x).sum() + huge.cat([x, x], 2).sum() + huge.marked(x, keep).sum()
    (total + huge.gather(x, 2, torch.zeros(1, 2, 9000, 64, dtype=torch.long)).sum()).backward()
    assert x.grad is not None and float(x.grad[0, 0, 1, 0]) == 4.0


@needs_pages
@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_stored_and_what_grows_has_them(uneven, free_pages):
    x = torch.randn(1, 2, 9000, 64)
    keep = torch.rand(1, 2, 9000) > 0.01 if uneven else torch.ones(1, 2, 9000, dtype=torch.bool)
    found = []

    def made(data: Tensor | None) -> None:
        nonlocal before
        assert data is not None
        now = memory()[1]
        free_pages(now - before, data.nbytes // huge.PAGE * 2048)
        before = now
        found.append(data)

    before = memory()[1]
    held = Ragged({"k": x}, keep)
    made(held.data["k"])
    more = Ragged({"k": x[:, :, :5]}, keep[:, :, :5]).append({"k": x}, keep)
    made(more.data["k"])
    buffer = Buffer()
    buffer.append(x)
    made(buffer.data)
    assert torch.equal(held.padded()[0]["k"][0, 1, :100], x[0, 1][keep[0, 1]][:100])
    many = int(keep[0, 1, :5].sum())
    assert torch.equal(more.padded()[0]["k"][0, 1, many : many + 100], x[0, 1][keep[0, 1]][:100])


@needs_pages
def test_what_lies_there_is_moved_as_it_is():
    """Together tensors fill pages that none of them fills; what is mapped from a file is left alone."""
    whole = torch.empty(17 * MEGABYTE // 4).normal_()
    held = list(whole.split(MEGABYTE // 4))
    want, before = [x.clone() for x in held], memory()
    n = huge.moved(held) or huge.moved(held)  # Linux may be busy with a page
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 1):
        assert n == 0
        return
    pages = len(range(-(-whole.data_ptr() // huge.PAGE), (whole.data_ptr() + whole.nbytes) // huge.PAGE))
    assert n == pages * huge.PAGE and memory()[1] - before[1] == n // 1024
    assert abs(memory()[0] - before[0]) < SLACK
    assert all(torch.equal(x, y) for x, y in zip(held, want, strict=True))
    assert huge.moved([torch.ones(3), torch.ones(5)]) == 0


@needs_pages
def test_memory_of_a_file_is_left_alone(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * (32 * 1024))
    x = torch.from_file(str(tmp_path / "x"), shared=False, size=8 * MEGABYTE, dtype=torch.uint8)
    assert huge.moved([x]) == 0 and x[-3:].tolist() == [253, 254, 255]
