"""AttentionPredictor: what it fetches, what it remembers, and that no token is out of reach."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import calidrop
from calidrop.attention import Queries, attend
from calidrop.cli import app
from calidrop.methods._predictor import SHAPES, Average, Predictor, load, save
from calidrop.methods._rows import Moving, newest
from calidrop.offload import HostLog
from calidrop.ops import cpu, predicting
from calidrop.recipe import parse
from calidrop.state import Shared, held_bytes, tensors
from calidrop.train import attention_predictor as training
from calidrop.train._text import windows as cut
from helpers import ALICE, feed, layer_of, predictor, random_qkv
from tiny import batch, generate, tiny, worst

D = 8


class Given(Shared):
    """In place of the network: says what it is told to, [B*H,blocks] by step."""

    def __init__(self, say):
        self.say = say

    def next_row(self, x, real=None):
        return self.say(x)

    def shares(self, rows, device):
        return torch.ones(rows)

    def follows(self, history):
        return False


def step_by_step(recipe, qkv, prompt, pads=None, net=None):
    """Yields (layer, output of the step) after a prompt, and after every token behind it."""
    kv = layer_of(recipe, qkv)
    if net is not None:
        kv.state.store.rows.network = lambda device: net
    feed(kv, tuple(x[:, :, :prompt] for x in qkv), None, pads)
    kv.settle()
    yield kv, None
    for i in range(prompt, qkv[0].shape[2]):
        yield kv, feed(kv, tuple(x[:, :, i : i + 1] for x in qkv), None, pads)


def on_device(kv):
    """[row][head] -> the columns that the next query is answered from, and whether that is all of them."""
    store = kv.state.store
    parts = [*store.first.tokens(), *store.waiting.tokens(), kv.state.window.tokens()]
    whole = store.whole and bool(store.log.segments)
    parts += store.tokens() if whole else [t for s in store._fetched() for t in s.tokens()]
    B, H = kv.state.window.tokens().pos.shape[:2]
    return [[{p for t in parts for p in t.pos[b, h].tolist() if p >= 0} for h in range(H)] for b in range(B)], whole


def true_rows(qkv, pads, block, last):
    """Brute force: softmax over everything, the largest over each block of a row's own grid, the mean over its group.
    -> [row] of [H, last, blocks]"""
    q, k, _ = qkv
    (B, Hq, N, _), H = q.shape, k.shape[1]
    out = []
    for b in range(B):
        q_b, k_b = q[b, :, pads[b] :], k[b, :, pads[b] :].repeat_interleave(Hq // H, 0)
        n = N - pads[b]
        s = (q_b @ k_b.transpose(-1, -2) * D**-0.5).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        w = s.softmax(-1)
        w = torch.nn.functional.pad(w, (0, -n % block)).unflatten(-1, (-1, block)).amax(-1)
        w = w.view(H, -1, *w.shape[1:]).mean(1)
        out.append(w[:, -last:])
    return out


def test_the_network():
    """4,833 parameters, and the same as the layers of torch that the paper draws."""
    net = Predictor.fresh()
    assert sum(x.numel() for x in net.weights.values()) == 4833
    w, x = net.weights, torch.rand(3, 64, 20)
    conv1, conv2 = torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, padding=1)
    head = torch.nn.Conv1d(32, 1, 1)
    for layer, name in ((conv1, "conv1"), (conv2, "conv2"), (head, "head")):
        layer.weight.data, layer.bias.data = w[f"{name}.weight"].view(layer.weight.shape), w[f"{name}.bias"]
    with torch.no_grad():
        want = head(conv2(conv1(x[:, None]).relu()).relu().mean(2))[:, 0]
        assert worst(net.next_row(x), want) < 1e-6
        root = Predictor.fresh(0.5, 0.5)
        terms = (conv2(conv1(x.sqrt()[:, None]).relu()).relu() * head.weight[..., None]).sum(1)
        age = 0.5 ** torch.arange(63, -1, -1)
        mean = (terms * age[:, None]).sum(1) / age.sum() + head.bias
        assert worst(root.next_row(x), mean) < 1e-6
        assert worst(net.next_row(torch.roll(x, 1, 2))[:, 3:-2], want[:, 2:-3]) < 1e-6  # away from the borders


def test_a_shorter_row_is_as_if_alone():
    net, x = Predictor.fresh(), torch.rand(2, 64, 20)
    x[1, :, 13:] = 0
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 13:] = False
    both = net.next_row(x, real)
    assert worst(both[1, :13], net.next_row(x[1:, :, :13])[0]) < 1e-6
    assert worst(both[0], net.next_row(x[:1])[0]) < 1e-6


@pytest.mark.parametrize(("rows", "power", "decay"), [(8, 1.0, 1.0), (10, 0.5, 0.9), (64, 1.0, 1.0), (64, 0.25, 0.7)])
@torch.no_grad()
def test_moving_by_a_row_is_the_network(rows, power, decay):
    net, moving = Predictor.fresh(power, decay), Moving()
    x = torch.rand(2, 3, rows + 40, 20)
    x[1, ..., 13:] = 0
    real = (torch.arange(20) < torch.tensor([[20], [13]])).repeat_interleave(3, 0)
    for i in range(40):
        history = x[:, :, i : i + rows]
        got = moving.next_row(net, history, real)
        want = net.next_row(history.flatten(0, 1), real).view(2, 3, 20)
        torch.testing.assert_close(got[0], want[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got[1, :, :13], want[1, :, :13], atol=1e-6, rtol=1e-5)
    moving.forget()
    for i in range(40):
        got = moving.next_row(Average(power, decay), x[:, :, i : i + rows], None)
        age = decay ** torch.arange(rows - 1, -1, -1.0)
        want = (x[:, :, i : i + rows] ** power * age[:, None]).sum(2) / age.sum()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    moving.forget()
    x = torch.rand(2, 3, rows, 23)
    torch.testing.assert_close(moving.next_row(net, x, None), net.next_row(x.flatten(0, 1)).view(2, 3, 23))


@pytest.mark.parametrize(("rows", "power", "decay"), [(12, 1.0, 1.0), (64, 0.25, 0.7)])
@torch.no_grad()
def test_new_blocks_are_the_network_too(rows, power, decay):
    """A history that moves by a row, and has new columns every third step, in one row more than in the other."""
    net, moving = Predictor.fresh(power, decay), Moving()
    x = torch.rand(2, 3, rows + 30, 31)
    had = 9
    for i in range(30):
        n = 9 + 2 * (i // 3)
        if n != had:
            moving.change(had - 1)  # the shorter row's new column is the other's old one
            had = n
        real = (torch.arange(n) < torch.tensor([[n], [n - 1]])).repeat_interleave(3, 0)
        history = x[:, :, i : i + rows, :n].clone()
        history[1, ..., n - 1 :] = 0
        got = moving.next_row(net, history, real)
        want = net.next_row(history.flatten(0, 1), real).view(2, 3, n)
        torch.testing.assert_close(got[0], want[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got[1, :, : n - 1], want[1, :, : n - 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["", "+fp8", "+kivi(bits=2, group=8)"])
@torch.no_grad()
def test_only_what_is_not_here_is_fetched(form, monkeypatch):
    """What is held is what the host has at `ids`, and a span that stays is not brought again."""
    monkeypatch.setattr(predicting, "exchanges", lambda row, held: False)
    draw, brought = torch.Generator().manual_seed(1), []

    def whim(x):  # a few of the blocks change from step to step
        return torch.rand(1, x.shape[-1], generator=torch.Generator().manual_seed(0)).repeat(4, 1) + 0.2 * torch.rand(
            4, x.shape[-1], generator=draw
        )

    gathered = HostLog._gathered
    monkeypatch.setattr(
        HostLog, "_gathered", lambda log, ids: brought.append(int((ids >= 0).sum())) or gathered(log, ids)
    )
    wanted = 0
    for kv, out in step_by_step(predictor(60, dense=5) + form, random_qkv(2, 2, 3, 130, D), 90, [0, 7], Given(whim)):
        store = kv.state.store
        if store.whole or out is None:
            continue
        store._arrived()
        wanted += int((store.ids >= 0).sum())
        want = store.log.take(store.ids)[0]
        brought.pop()
        assert torch.equal(store.held.lens, want.lens)
        for name, x in store.held.data.items():
            assert torch.equal(x, want.data[name])
    assert 0 < sum(brought) < 0.6 * wanted


@pytest.mark.skipif(bool(cpu.kernel().reason), reason=cpu.kernel().reason)
@pytest.mark.parametrize("form", ["", "+int4", "+kivi(bits=2, group=8)"])
@pytest.mark.parametrize(("budget", "pads"), [(60, [0, 7]), (40, [0, 0]), (60, [0, 50])])
@torch.no_grad()
def test_the_kernel_exchanges_as_torch_does(form, budget, pads, monkeypatch):
    """The same spans in the same places, their columns as the host has them, at every step; snapshots stay as they
    were. Of the numbers of blocks some are equal, and some are none."""

    def steps(kernel):
        draw = torch.Generator().manual_seed(1)

        def whim(x):
            row = torch.randint(12, (1, x.shape[-1]), generator=torch.Generator().manual_seed(0)).repeat(4, 1).float()
            row += torch.randint(4, row.shape, generator=draw)
            return row.masked_fill(torch.rand(row.shape, generator=draw) < 0.02, float("nan"))

        with monkeypatch.context() as patch:
            calls = []
            if kernel:
                whole = predicting.exchange
                patch.setattr(predicting, "exchange", lambda *given: calls.append(1) or whole(*given))
            else:
                patch.setattr(predicting, "exchanges", lambda row, held: False)
            given = predictor(budget, dense=5) + form, random_qkv(2, 2, 3, 130, D), 90, pads, Given(whim)
            found, snapshot, kept = [], None, []
            for kv, out in step_by_step(*given):
                store = kv.state.store
                store._arrived()
                assert all(torch.equal(x, y) for x, y in zip(tensors(snapshot), kept, strict=True))
                snapshot = store.held and store.held.fork()
                kept = [x.clone() for x in tensors(snapshot)]
                found.append((out, store.ids, store.held and store.held.data))
            assert bool(calls) == kernel
        return found

    for (out, ids, data), (want, want_ids, want_data) in zip(steps(True), steps(False), strict=True):
        assert (ids is None) == (want_ids is None)
        if ids is None:
            continue
        assert torch.equal(ids, want_ids)
        assert all(torch.equal(x, want_data[name]) for name, x in data.items())
        assert out is None or torch.equal(out, want)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("pads", [30, 80])
@torch.no_grad()
def test_the_shorter_row_goes_on_alone(pads, kernel, monkeypatch):
    """Where the longer row, which had more fetched, is dropped: exactly as if it had never been there."""
    if not kernel:
        monkeypatch.setattr(predicting, "exchanges", lambda row, held: False)
    qkv, recipe = random_qkv(2, 2, 3, 150, D), predictor(60, dense=5, history=16)
    both, alone = layer_of(recipe, qkv), layer_of(recipe, qkv)
    feed(both, tuple(x[:, :, :100] for x in qkv), None, [0, pads])
    feed(alone, tuple(x[1:, :, :100] for x in qkv), None, [pads])
    for i in range(100, 150):
        if i == 113:
            both.batch_select_indices(torch.tensor([1]))
        step = tuple(x[:, :, i : i + 1] for x in qkv)
        out = feed(both, step if i < 113 else tuple(x[1:] for x in step), None, [0, pads] if i < 113 else [pads])
        want = feed(alone, tuple(x[1:] for x in step), None, [pads])
        torch.testing.assert_close(out[-1:], want, rtol=1e-5, atol=1e-5)


def test_what_is_fetched_by_hand():
    """One head, 27 tokens, blocks of 4, 4 sinks and 3 recent: blocks 4-7 8-11 12-15 16-19 20-23 wait on the host, and
    24 25 26 in the window. A budget of 16 is 4 sinks, 4 recent with the token to come, and two blocks."""
    qkv = random_qkv(1, 1, 1, 29, D)
    says = [torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]]), torch.tensor([[0.5, 0.1, 0.2, 0.3, 0.9]])]
    net = Given(lambda x: says.pop(0))
    steps = step_by_step(predictor(16, recent=3, dense=99), qkv, 27, net=net)
    got, whole = on_device(next(steps)[0])
    assert not whole
    assert got == [[{*range(4), *range(8, 12), *range(16, 20), *range(24, 27)}]]
    # 5 recent with the token to come, and seven tokens left: one block
    assert on_device(next(steps)[0])[0] == [[{*range(4), *range(20, 24), *range(24, 28)}]]


@pytest.mark.parametrize("pads", [[0, 0], [0, 13]])
@pytest.mark.parametrize("budget", [24, 40, 0.4])
@torch.no_grad()
def test_budget_sinks_recent_and_no_hole(pads, budget):
    """At every step: within the budget, sinks and recent there, and the rest whole blocks of the row's own grid."""
    N, recent = 75, 6
    recipe = predictor(budget, recent=recent, dense=4)
    for i, (kv, _) in enumerate(step_by_step(recipe, random_qkv(2, 2, 3, N, D), 50, pads)):
        got, whole = on_device(kv)
        seen = 50 + i
        for b, heads in enumerate(got):
            real = set(range(pads[b], seen))
            for held in heads:
                if whole:
                    assert held == real
                    continue
                most = budget if isinstance(budget, int) else int(budget * (50 - pads[b]))
                assert len(held) + 1 <= max(most, 4 + recent + 4 + 3 + 1)  # what must be there comes first
                assert {*range(pads[b], pads[b] + 4), *range(seen - recent, seen)} <= held
                store = kv.state.store
                newest = [*store.waiting.tokens(), kv.state.window.tokens()]
                local = min(p for t in newest for p in t.pos[b, 0].tolist() if p >= 0)
                assert (local - pads[b]) % 4 == 0
                blocks = {(p - pads[b]) // 4 for p in held if p < local}
                assert held >= {pads[b] + 4 * j + c for j in blocks for c in range(4)}
                assert set(range(local, seen)) <= held
        assert {p for t in kv.state.store.tokens() for p in t.pos[1, 0].tolist() if p >= 0} | {
            p for p in kv.state.window.tokens().pos[1, 0].tolist() if p >= 0
        } == set(range(pads[1], seen))


@torch.no_grad()
def test_steps_answer_for_what_is_on_the_device_and_every_dense_step_for_all():
    qkv = random_qkv(2, 2, 3, 80, D, seed=2)
    full = feed(layer_of("full", qkv), qkv, [50] + [1] * 30, [0, 9])
    before, sparse = None, 0
    for i, (kv, out) in enumerate(step_by_step(predictor(24, dense=4), qkv, 50, [0, 9])):
        if out is not None:
            held, whole = before
            assert whole == (i % 4 == 0)
            if whole:
                torch.testing.assert_close(out, full[:, :, 49 + i : 50 + i], atol=1e-5, rtol=1e-4)
            else:
                sparse += 1
                pos = torch.full((2, 2, 80), -1)
                for b in range(2):
                    for h in range(2):
                        at = torch.tensor(sorted({*held[b][h], 49 + i}))
                        pos[b, h, at] = at
                qs = Queries(qkv[0][:, :, 49 + i : 50 + i], torch.full((2, 1), 49 + i), D**-0.5)
                want, _ = attend(qs, qkv[1], qkv[2], pos)
                torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
                assert worst(out, full[:, :, 49 + i : 50 + i]) > 1e-3
        before = on_device(kv)
    assert sparse == 23


@pytest.mark.parametrize("prompt", [61, 5])
@torch.no_grad()
def test_dense_at_every_step_remembers_the_true_rows(prompt):
    """To the last bit or so: blocks that were in the window, or half full, and a prompt shorter than the history."""
    qkv, pads = random_qkv(2, 2, 3, 90, D), [0, 3]
    for kv, _ in step_by_step(predictor(24, dense=1), qkv, prompt, pads):
        seen = kv.state.seen
        want = true_rows(tuple(x[:, :, :seen] for x in qkv), pads, 4, 8)
        for b, rows in enumerate(want):
            n = int(kv.state.store._spans()[b])
            got = kv.state.store.rows.history[b]
            assert got[..., n:].eq(0).all()
            torch.testing.assert_close(got[:, 8 - rows.shape[1] :, :n], rows[..., 1 : n + 1], atol=1e-6, rtol=1e-5)
            assert got[:, : 8 - rows.shape[1]].eq(0).all()
    assert n == 19


@torch.no_grad()
def test_a_sparse_row_is_zero_elsewhere_and_sums_to_what_was_kept():
    qkv = random_qkv(1, 2, 3, 70, D)
    before = None
    for kv, out in step_by_step(predictor(24, dense=99), qkv, 60):
        store, seen = kv.state.store, kv.state.seen
        if out is not None:
            pos = torch.tensor([[p if p in {*held, seen - 1} else -1 for p in range(seen)] for held in before[0]])
            qs = Queries(qkv[0][:, :, seen - 1 : seen], torch.tensor([[seen - 1]]), D**-0.5)
            s = qs.q[0, :, 0].view(2, 3, D) @ qkv[1][0, :, :seen].transpose(-1, -2) * D**-0.5
            w = s.masked_fill(pos[:, None] < 0, float("-inf")).softmax(-1)
            n = store.rows.history.shape[-1]
            torch.testing.assert_close(
                store.rows.history[0, :, -1], w[..., 4 : 4 + 4 * n].unflatten(-1, (-1, 4)).amax(-1).mean(1)
            )
        before = on_device(kv)[0]


@torch.no_grad()
def test_an_oracle_fetches_the_blocks_that_are_attended_most():
    """Recall 1 where the network is replaced by the true next row."""
    qkv, pads = random_qkv(2, 2, 3, 90, D, seed=3), [0, 7]
    at = [61]

    def truth(x):
        rows = true_rows(tuple(y[:, :, : at[0]] for y in qkv), pads, 4, 1)
        out = x.new_zeros(4, x.shape[-1])
        for b, row in enumerate(rows):
            n = min(x.shape[-1], row.shape[-1] - 1)
            out[2 * b : 2 * b + 2, :n] = row[:, 0, 1 : n + 1]
        return out

    for kv, _ in step_by_step(predictor(32, dense=99), qkv, 60, pads, Given(truth)):
        store, at[0] = kv.state.store, kv.state.seen + 2  # asked at the next step
        rows = true_rows(tuple(x[:, :, : kv.state.seen + 1] for x in qkv), pads, 4, 1)
        if kv.state.seen == 90 or store.since == 0:  # behind a flush, what the window gave up is there too
            continue
        for b, row in enumerate(rows):
            n = int(store._spans()[b])
            for h in range(2):
                got = [i for i in store.ids[b, h].tolist() if i >= 0]
                assert got
                assert set(got) == set(row[h, 0, 1 : n + 1].topk(len(got)).indices.tolist())


@torch.no_grad()
def test_everything_selected_is_full_attention():
    model, inputs = tiny(), batch()
    want, logits = generate(model, inputs, calidrop.KVCache(model))
    cache = calidrop.KVCache(model, predictor(4096, dense=7, skip=1))
    tokens, ours = generate(model, inputs, cache)
    assert torch.equal(tokens, want)
    assert worst(ours, logits) < 2e-4
    assert not cache.layers[1].state.store.whole
    # and with the network that comes with the package
    tokens, ours = generate(
        model, inputs, calidrop.KVCache(model, "attention_predictor(4096, sinks=16, recent=5, skip=0)")
    )
    assert worst(ours, logits) < 2e-4


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_every_kind_of_layer(family):
    """Sliding layers, softcap and sinks: asking the host at every step is full attention; the rows sum to the rest."""
    model, inputs = tiny(family), batch()
    want, logits = generate(model, inputs, calidrop.KVCache(model))
    tokens, ours = generate(model, inputs, calidrop.KVCache(model, predictor(24, dense=1)))
    assert torch.equal(tokens, want)
    assert worst(ours, logits) < 2e-4
    _, sparse = generate(model, inputs, calidrop.KVCache(model, predictor(24, dense=99)))
    assert worst(sparse, logits) > 1e-2


@torch.no_grad()
def test_bytes_on_either_side():
    """Host: every token that is in a full block. Device: what is fetched, waits, or is first or recent, and rows."""
    qkv = random_qkv(1, 2, 3, 203, D)
    for kv, _ in step_by_step(predictor(64, dense=99), qkv, 203):
        store, slot = kv.state.store, 2 * (2 * D * 4 + 4)
        assert store.log.lens.tolist() == [[48, 48]]  # 203 less 4 sinks, 4 recent and 3 that wait
        assert held_bytes(store, host=True) == 48 * 4 * slot + 2 * 8  # and how long the two lists are
        fetched = store.ids.shape[2] * 4
        assert 36 <= fetched <= 64 - 8
        least = (4 + 3 + fetched) * slot + 4 * 2 * 8 * 48 + 4 * 4833
        assert least <= held_bytes(store) <= least + 4 * store.ids.numel() * 2 + 200
    model = tiny()
    both = calidrop.KVCache(model, predictor(24))
    generate(model, batch(), both, new=2)
    nets = {id(x) for layer in both.layers for x in layer.state.store.rows.net.weights.values()}
    assert len(nets) == 6  # one network for all layers


@torch.no_grad()
def test_formats_hold_codes_on_the_host_and_fetch_codes():
    qkv = random_qkv(1, 2, 2, 203, 16)
    sizes = {}
    for form in ("", "+int8", "+int4", "+kivi(bits=2, group=8)", "+think(keep=0.5, values=0.5)+int4"):
        kv = layer_of(predictor(104, dense=99) + form, qkv)
        feed(kv, qkv)
        kv.settle()
        store = kv.state.store
        sizes[form] = held_bytes(store, host=True), held_bytes(store.held)
        assert store.ids.shape[2] * store.sizes.span in (88, 92)
    host, device = zip(*sizes.values(), strict=True)
    assert sorted(host, reverse=True)[:3] == list(host[:3])
    assert sorted(device, reverse=True)[:3] == list(device[:3])
    assert host[2] < 0.3 * host[0]
    assert device[2] < 0.3 * device[0]


def test_rows_of_pads_do_not_count():
    rows = torch.arange(10.0).view(1, 1, 10, 1).expand(2, 1, 10, 3)
    real = torch.ones(2, 10, dtype=torch.bool)
    real[1, [0, 1, 7]] = False
    got = newest(rows, real, 8)
    assert got[0, 0, :, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert got[1, 0, :, 0].tolist() == [0, 2, 3, 4, 5, 6, 8, 9]
    assert newest(rows[:, :, :3], real[:, :3], 5)[1, 0, :, 0].tolist() == [0, 0, 0, 0, 2]


def test_a_host_log_by_index():
    """Lists of different lengths, over several segments."""
    draw, log = torch.Generator().manual_seed(0), HostLog()
    whole = [[[] for _ in range(3)] for _ in range(2)]
    for n in (40, 9, 7, 1, 1):
        x, keep = torch.randn(2, 3, n, 4, generator=draw), torch.rand(2, 3, n, generator=draw) < (0.7 if n > 1 else 2)
        log.append({"x": x, "n": x[..., 0]}, keep)
        for b in range(2):
            for h in range(3):
                whole[b][h] += list(x[b, h, keep[b, h]])
    assert len(log.segments) > 1
    assert log.lens.tolist() == [[len(x) for x in row] for row in whole]
    index = torch.tensor([[[5, 0, -1], [30, 2, 3], [-1, -1, -1]], [[1, 20, 33], [9, -1, -1], [34, 0, 1]]])
    held, arrival = log.take(index)
    assert arrival.event is None
    data, valid = held.padded()
    for b in range(2):
        for h in range(3):
            want = [whole[b][h][i] for i in index[b, h].tolist() if i >= 0]
            assert int(valid[b, h].sum()) == len(want)
            for i, x in enumerate(want):
                assert torch.equal(data["x"][b, h, i], x) and data["n"][b, h, i] == x[0]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("attention_predictor(budget=64)", "recent must be smaller than budget"),
        ("attention_predictor(budget=1.5)", "fraction of the prompt"),
        ("attention_predictor(sinks=10)", "multiple of block"),
        ("attention_predictor(block=8)", "trained with block=16"),
        ("attention_predictor(history=32)", "trained with history=64"),
        ("attention_predictor(dense=0)", "whole number >= 1"),
        ("attention_predictor(file='no.safetensors')", "calidrop train attention-predictor"),
        ("attention_predictor(file=3)", "path in quotes"),
        ("attention_predictor(network=1)", "one of True, False"),
        ("attention_predictor(network=False, file='x')", "takes no file"),
        ("attention_predictor+kvcrush", "evicts nothing"),
        ("attention_predictor+calidrop", "evicts nothing"),
        ("attention_predictor+mikv", "evicts nothing"),
        ("attention_predictor+snapkv(budget=64)", "same role"),
        ("attention_predictor+int4(residual=8)", "recent tokens"),
    ],
)
def test_wrong_use_is_refused(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        parse(recipe)


def test_files_of_another_kind_are_refused(tmp_path):
    from calidrop.methods import _artefact

    other, wrong, junk = (str(tmp_path / f"{n}.safetensors") for n in ("other", "wrong", "junk"))
    _artefact.save("recalkv", Path(other), {}, {})
    save(Path(wrong), Predictor({"x": torch.zeros(1)}), {})
    Path(junk).write_bytes(b"junk")
    for file, reason in ((other, "was not written by"), (junk, "was not written by"), (wrong, "expected tensors")):
        with pytest.raises(ValueError, match=reason):
            parse(f"attention_predictor(file={file!r})")


def test_the_file_in_the_package():
    net, meta = load(None)
    assert {n: tuple(x.shape) for n, x in net.weights.items()} == SHAPES
    assert (meta["block"], meta["history"], meta["model"]) == (16, 64, "smollm2")
    assert meta["command"].startswith("calidrop train attention-predictor")


# ---- training


@pytest.fixture(scope="module")
def model():
    return tiny(max_position_embeddings=1024)


def windows(n: int = 2, length: int = 320) -> torch.Tensor:
    return torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(0))


SMALL = {"block": 8, "history": 8, "rows": 40, "steps": 12, "name": "tiny"}


def test_rows_are_those_of_the_model(model):
    """Against the model's own attention weights."""
    ids = windows(1, 64)[0]
    rows = training.rows_of(model, ids, 20, 8)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.cat(model(ids[None], output_attentions=True).attentions)  # [layers,Hq,N,N]
    want = weights[:, :, -20:].unflatten(-1, (8, 8)).amax(-1).unflatten(1, (2, 3)).mean(2)
    assert worst(rows, want.flatten(0, 1)) < 1e-5


def test_training_learns_and_goes_on_where_it_was_killed(model, tmp_path):
    losses, files = [], [tmp_path / f"{n}.safetensors" for n in ("whole", "killed")]
    whole, meta = training.train(model, windows(), files[0], **SMALL)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "network" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(model, windows(), files[1], every=0.0, progress=kill, **SMALL)
    with pytest.raises(ValueError, match="another run: steps was 12, now 13"):
        training.train(model, windows(), files[1], **{**SMALL, "steps": 13})
    seen = []
    again, _ = training.train(model, windows(), files[1], progress=lambda s, d, t: seen.append((s, d)), **SMALL)
    assert ("network", 7) not in seen
    assert ("network", 12) in seen
    assert all(torch.equal(x, again.weights[n]) for n, x in whole.weights.items())
    assert not list(tmp_path.glob("*.part*"))
    with safe_open(files[0], "pt") as f:
        assert json.loads(f.metadata()["calidrop.attention_predictor"]) == meta
    loaded, _ = load(str(files[0]))
    assert all(torch.equal(x, loaded.weights[n]) for n, x in whole.weights.items())
    data = [training.rows_of(model, w, 40, 8) for w in windows()]
    for net in (Predictor.fresh(0.25, 0.7), whole):
        at = training.candidates(320, 40, 20, 8)
        x = torch.cat(data)[:, 12:21, at]
        losses.append(torch.nn.functional.mse_loss(net.next_row(x[:, :-1]), x[:, -1] ** 0.25).item())
    assert losses[1] < 0.3 * losses[0]


def test_what_is_too_short_is_refused_before_any_work(model, tmp_path):
    for ids, rows in ((windows(1, 180), 40), (windows(1, 320), 8)):
        with pytest.raises(ValueError, match="too short"):
            training.train(
                model, ids, tmp_path / "x", **{**SMALL, "rows": rows}, progress=lambda *_: pytest.fail("worked")
            )


def test_hits():
    truth = torch.tensor([[9.0, 8, 7, 1, 0], [0, 1, 2, 3, 4]])
    score = torch.tensor([[9.0, 0, 7, 8, 1], [4, 3, 2, 1, 0]])
    assert training.hit(score, truth, 1) == 0.5
    assert training.hit(score, truth, 3) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert training.hit(score, truth, 99) == 1


def test_candidates_are_what_a_cache_has_on_its_host():
    at = training.candidates(1024, 100, 30, 16)  # the token in column 954
    assert (at.start, at.stop) == (4, (954 - 64) // 16)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--out", "no/such/x.safetensors"], "in a folder that does not exist"),
        (["--text", "no.txt"], "No such file or directory: no.txt"),
        (["--evaluate", "no.txt"], "No such file or directory: no.txt"),
    ],
)
def test_wrong_commands_are_told_before_any_work(args, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "attention-predictor", *args])
    assert result.exit_code == 2
    assert why in result.stderr
    assert not list(tmp_path.iterdir())


# ---- the real model


@pytest.mark.slow
def test_the_network_finds_more_than_the_last_row_and_snapkv(smollm2):
    """On text that neither the network nor its settings were made on."""
    model, tokenizer = smollm2
    ids = cut(tokenizer, ALICE.read_text(), 2, 1536)
    found = training.recall(model, ids, *load(None))
    mine, last, once = (found[way].mean(0) for way in ("attention_predictor", "last row", "snapkv once"))
    assert bool((mine > last).all()), (mine, last)
    assert bool((mine > once + 0.02).all()), (mine, once)


@pytest.mark.slow
def test_real_padded_rows_and_lookup_decoding(smollm2):
    model, tokenizer = smollm2
    text = ALICE.read_text()
    texts, recipe = [text[9000:10200], text[30000:31900]], "attention_predictor(budget=128, sinks=16, recent=16)"
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    _, logits = generate(model, inputs, calidrop.KVCache(model, recipe), new=12)
    for i, one in enumerate(texts):
        alone = dict(tokenizer(one, return_tensors="pt"))
        plain, row_logits = generate(model, alone, calidrop.KVCache(model, recipe), new=12)
        assert worst(logits[i : i + 1], row_logits) < 5e-3
    lookup = {"prompt_lookup_num_tokens": 3, "output_logits": False}
    assert torch.equal(plain, generate(model, alone, calidrop.KVCache(model, recipe), new=12, **lookup)[0])
