"""Ragged columns against lists of lists, buffers and their forks, and the counting of bytes."""

import copy
import pickle
import random
import weakref

import pytest
import torch

from calidrop.state import Buffer, Host, Note, Ragged, State, held_bytes

uniform_or_not = pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "ragged"])


def draw(B, H, N, uniform, first=0):
    """Columns a [B,H,N], b [B,H,N,3] whose entries are all different, marks [B,H,N], and the marked ones as lists."""
    a = first + torch.arange(B * H * N).view(B, H, N)
    b = torch.stack([a, -a, a * 7], -1).double()
    if uniform:
        n = random.randint(0, N)
        keep = torch.stack([torch.randperm(N) < n for _ in range(B * H)]).view(B, H, N)
    else:
        keep = torch.rand(B, H, N) < random.random()
    return {"a": a, "b": b}, keep, [[a[i, j][keep[i, j]].tolist() for j in range(H)] for i in range(B)]


def check(ragged, model):
    """Both columns hold what the lists do, in a rectangle and as the layout says; no more memory than that."""
    columns, valid = ragged.padded()
    lens = [[len(head) for head in row] for row in model]
    assert ragged.lens.tolist() == lens
    assert ragged.longest == max(map(max, lens))
    total = sum(map(sum, lens))
    assert ragged.uniform == (valid is None) == (total == ragged.longest * ragged.lens.numel())
    if valid is None:
        valid = torch.ones(*ragged.lens.shape, ragged.longest, dtype=torch.bool)
    assert valid.tolist() == [[[i < n for i in range(ragged.longest)] for n in row] for row in lens]
    for i, row in enumerate(model):
        for j, head in enumerate(row):
            assert columns["a"][i, j][valid[i, j]].tolist() == head
            assert columns["b"][i, j][valid[i, j]].tolist() == [[x, -x, 7 * x] for x in head]
    flat = [x for row in model for head in row for x in head]
    assert ragged.data["a"].flatten().tolist() == flat
    assert held_bytes(ragged) == total * (8 + 3 * 8) + ragged.lens.numel() * 8


@uniform_or_not
def test_ragged_holds_what_was_marked(uniform):
    for seed in range(20):
        random.seed(seed)
        columns, keep, model = draw(random.randint(1, 3), random.randint(1, 4), random.randint(1, 9), uniform)
        check(Ragged(columns, keep), model)


@uniform_or_not
def test_ragged_append(uniform):
    for seed in range(20):
        random.seed(seed)
        B, H = random.randint(1, 3), random.randint(1, 4)
        columns, keep, model = draw(B, H, random.randint(1, 9), uniform)
        ragged = Ragged(columns, keep)
        for step in range(4):
            before = model
            columns, keep, more = draw(B, H, random.randint(1, 9), random.random() < 0.5, 1000 * (step + 1))
            longer = ragged.append(columns, keep)
            model = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(before, more, strict=True)]
            check(longer, model)
            check(ragged, before)  # a new one: a fork that shares the old one is safe
            ragged = longer


@uniform_or_not
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1, 0], [2], [0, 1, 2]])
def test_ragged_take_rows(uniform, rows):
    for seed in range(10):
        random.seed(seed)
        columns, keep, model = draw(3, 2, 7, uniform)
        ragged = Ragged(columns, keep)
        fork = ragged.fork()
        ragged.take_rows(torch.tensor(rows))
        check(ragged, [model[i] for i in rows])
        check(fork, model)


@uniform_or_not
def test_ragged_replace(uniform):
    for seed in range(20):
        random.seed(seed)
        columns, keep, model = draw(2, 3, 8, uniform)
        ragged = Ragged(columns, keep)
        padded, _ = ragged.padded()
        moved = padded["a"] + 5000
        changed = ragged.replace({"a": moved, "b": torch.stack([moved, -moved, moved * 7], -1).double()})
        check(ragged, model)
        check(changed, [[[x + 5000 for x in head] for head in row] for row in model])


def test_ragged_of_everything_is_a_copy():
    """Not a view that keeps something larger alive or changes with it."""
    large = torch.arange(60.0).view(1, 2, 30)
    ragged = Ragged({"x": large[:, :, 5:9]}, torch.ones(1, 2, 4, dtype=torch.bool))
    large.zero_()
    assert ragged.data["x"].tolist() == [[[5, 6, 7, 8], [35, 36, 37, 38]]]
    assert held_bytes(ragged) == 8 * 4 + 2 * 8


def test_buffer_grows_to_what_was_appended():
    for seed in range(10):
        random.seed(seed)
        buffer, parts = Buffer(), []
        for _ in range(12):
            parts.append(torch.randn(2, 3, random.randint(1, 90), 5))
            buffer.append(parts[-1])
            assert torch.equal(buffer.value, torch.cat(parts, 2))
            assert buffer.len == sum(x.shape[2] for x in parts)


def test_buffer_is_little_larger_than_what_it_holds_and_rarely_copies():
    buffer, copied, was = Buffer(), 0, None
    for n in range(1, 3001):
        buffer.append(torch.zeros(1, 1, 1, 2))
        copied += n - 1 if buffer.data is not was else 0
        was = buffer.data
        assert held_bytes(buffer) <= 8 * (n + max(16, n // 32))
        assert copied <= 33 * n


@pytest.mark.parametrize("held", [1, 3, 17, 18, 40])
def test_fork_of_a_buffer_keeps_its_content(held):
    """Whether or not the original had room left behind its length."""
    first = torch.randn(2, 1, held, 3)
    buffer = Buffer()
    buffer.append(first)
    fork, data = buffer.fork(), buffer.data
    assert fork.data is data  # a fork costs no memory
    for _ in range(40):
        buffer.append(torch.full((2, 1, 1, 3), 9.0))
    assert torch.equal(fork.value, first)
    assert torch.equal(buffer.value[:, :, :held], first)
    fork.append(-first)  # going back: the fork goes on instead
    assert torch.equal(fork.value, torch.cat([first, -first], 2))


def test_a_note_is_good_for_the_same_tensors_alone():
    note, (a, b, c) = Note(), torch.randn(3, 5)
    assert note.get([a, b], 1) is None
    note.put([a, b], 1, "said")
    assert note.get([a, b], 1) == "said"
    assert note.get([a, b], 2) is note.get([a, c], 1) is note.get([b, a], 1) is note.get([a], 1) is None
    assert note.get([a.clone(), b], 1) is note.get([a, b[:]], 1) is None
    assert copy.deepcopy(note).get([a, b], 1) is pickle.loads(pickle.dumps(note)).get([a, b], 1) is None
    gone = weakref.ref(a)
    del a
    assert gone() is None  # it was not kept alive


class Node(State):
    def __init__(self, **items):
        vars(self).update(items)


class HostNode(Node, Host):
    pass


def test_fork_of_nested_states_shares_tensors_and_nothing_else():
    x = torch.zeros(2, 3)
    node = Node(inner=Node(x=x), many=[Node(x=x)], named={"x": x})
    fork = node.fork()
    assert fork.inner.x is fork.many[0].x is fork.named["x"] is x
    node.inner.x, node.many[0].x, node.named["x"] = None, None, None
    node.many.append(Node())
    assert fork.inner.x is fork.many[0].x is fork.named["x"] is x
    assert len(fork.many) == 1


def test_take_rows_reaches_every_tensor():
    x = torch.arange(3.0)
    node = Node(x=x, inner=Node(x=x), many=[x, Node(x=x)], named={"x": x}, other="text")
    fork = node.fork()
    node.take_rows(torch.tensor([2, 2, 0, 1]))
    for y in (node.x, node.inner.x, node.many[0], node.many[1].x, node.named["x"]):
        assert y.tolist() == [2, 2, 0, 1]
    assert fork.inner.x.tolist() == fork.many[1].x.tolist() == [0, 1, 2]


def test_held_bytes_counts_a_storage_once_and_whole():
    x, y = torch.zeros(10, dtype=torch.int16), torch.zeros(3, dtype=torch.float64)
    assert held_bytes(Node(x=x, again=x, view=x[2:4], named={"x": x.view(2, 5)})) == 20
    assert held_bytes([Node(x=x), Node(x=x, y=(y, y))]) == 20 + 24
    assert held_bytes(Node(part=x[:1])) == 20  # a view keeps all of it alive
    assert held_bytes(Node(x=torch.zeros(0), other="text", none=None, number=5)) == 0


def test_held_bytes_separates_the_host():
    x, y = torch.zeros(10), torch.zeros(7)
    node = Node(x=x, log=HostNode(y=y, deep=[Node(y=y[:2])]), many=[HostNode(y=y)])
    assert held_bytes(node) == 40
    assert held_bytes(node, host=True) == 28
    assert held_bytes(Node(x=x), host=True) == 0
