import json
import os
from dataclasses import replace

import pytest
from PIL import Image
from typer.testing import CliRunner

import runs
from calidrop.cli import app
from calidrop.eval.folder import rows_of
from calidrop.eval.rows import read
from calidrop.methods import METHODS
from calidrop.report.families import FAMILIES, family, parts
from calidrop.report.gather import gather
from calidrop.report.page import page
from calidrop.report.pictures import pictures

FAILS = "int8"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("run") / "a <run>", failing=FAILS)


@pytest.fixture(scope="module")
def html(run):
    file = run / "report.html"
    file.write_text(page(gather(run, rows_of(run))), "utf-8")
    return file


def told(run):
    return gather(run, rows_of(run))


def test_families():
    assert [family(r) for r in runs.FEW] == [
        *(
            "uncompressed",
            "storage",
            "storage",
            "eviction",
            "eviction + storage",
            "evicted still answer",
            "another library",
        )
    ]
    assert family("h2o(budget=0.2)+mikv(bits=2)") == "evicted still answer"
    assert family("think(keep=0.6)+kivi") == "storage"
    assert family("kvpress:SnapKVPress(0.9)") == family("some_day(3)") == family("((") == "another library"
    assert parts("recalkv('no/such/file')")[0].text == "recalkv('no/such/file')"  # nothing is built
    assert {family(name) for name in METHODS} <= {*FAMILIES}
    (one,) = parts("snapkv(budget=128)")
    assert one.role == "which tokens stay"
    assert "2404.14469" in one.says.partition(":")[0]


def test_fronts_by_hand(run):
    report = told(run)
    for cell in range(len(report.cells)):
        some = [(i, p) for i, p in enumerate(report.points) if p["cell"] == cell and p["n"]]
        assert len(some) == len(runs.FEW) - 1
        front = [i for equal in report.fronts[cell]["kl/total"] for i in equal]
        for i, p in some:
            held, kl = p["device_bytes"] + p["host_bytes"], p["kl"]
            beaten = [q for _, q in some if q["total_bytes"] <= held and q["kl"] <= kl and q is not p]
            assert (i in front) == (not beaten)
        cheapest = [report.points[i]["total_bytes"] for i in front]
        assert cheapest == sorted(cheapest)
        best = report.fronts[cell]["score/device"][-1]  # dearest on the front: the best score there is
        assert report.points[best[0]]["score"] == max(p["score"] for _, p in some)


def test_spots_and_failures(run):
    report = told(run)
    assert report.failures == [
        {"recipe": FAILS, "task": c[1], "length": c[2], "question": c[3], "error": "RuntimeError: out of <memory>",
         "times": 5} for c in runs.SIX
    ]  # fmt: skip
    assert len(report.spots) == 4 * 5 * (len(runs.FEW) - 1)  # of needle, at five depths
    row = next(r for r in read(run / "rows.jsonl") if r.recipe == "kivi(bits=2)" and r.sample == 3)
    (spot,) = [s for s in report.spots if (s["cell"], s["recipe"], s["depth"]) == (0, row.recipe, row.depth)]
    assert spot == {**spot, "n": 1, "score": row.score, "nll": pytest.approx(row.nll / row.answer_tokens)}


def test_no_number(run, tmp_path):
    """NaN is no result: neither on a front nor in the page, whose JSON has no such word."""
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        if row["recipe"] == "kivi(bits=2)":
            row["kl"] = row["score"] = float("nan")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = told(tmp_path)
    bad = [i for i, p in enumerate(report.points) if p["recipe"] == "kivi(bits=2)"]
    assert all(report.points[i]["kl"] is None for i in bad)
    assert not any({*equal} & {*bad} for front in report.fronts for equal in front["kl/device"])
    assert "NaN" not in page(report).partition('id="run-data"')[2].partition("</script>")[0]
    assert report.told == {}


def test_page_is_small(tmp_path):
    run = runs.write(tmp_path / "many", runs.MANY, samples=2)
    report = told(run)
    assert len({p["recipe"] for p in report.points}) >= 90
    assert len(page(report).encode()) < 1.25e6


def drawn(browser, file, **size):
    browser.open(file, **size)
    done(browser, 1)


def done(browser, times):
    browser.wait("return document.body.dataset.drawn >= arguments[0]", times)


def cells(browser, n):
    return browser.texts(f"#table tbody td:nth-child({n})")


def test_sort_and_filter(browser, html):
    drawn(browser, html)
    assert [o.text for o in browser.all("#cell option")][:2] == [
        *("needle, 1024 tokens, question seen", "needle, 1024 tokens, question later")
    ]
    assert cells(browser, 1) == [*runs.FEW]  # of the first task; columns that say the same in each row are hidden
    assert browser.one("#count").text == "7 of 42 lines"
    head = browser.texts("#table th:not([hidden])")
    assert head[:5] == ["recipe", "N", "score", "nll", "KL"]
    kl = head.index("KL") + 1
    browser.click("#table th[data-field=kl] button")
    assert browser.one("#table th[data-field=kl]").get_attribute("aria-sort") == "ascending"
    rising = cells(browser, kl)
    assert rising[0] == "0"
    assert [float(v) for v in rising[:-1]] == sorted(float(v) for v in rising[:-1])
    assert rising[-1] == ""  # what failed
    browser.click("#table th[data-field=kl] button")
    assert cells(browser, kl) == [*rising[-2::-1], ""]
    for name in ("task", "length", "question"):
        browser.choose(f"#{name}", "all")
    assert browser.one("#count").text == "42 of 42 lines"
    browser.choose("#task", "fidelity")
    browser.choose("#length", "4096")
    assert browser.one("#count").text == "7 of 42 lines"
    before = int(browser.run("return document.body.dataset.drawn"))
    browser.one("#search").send_keys("SNAPKV calidrop")
    done(browser, before + 1)
    assert cells(browser, 1) == ["snapkv(budget=128)+calidrop(summary=16)"]
    assert all(li.text == "" or "calidrop" in li.text for li in browser.all(".front li"))
    browser.one("#search").clear()
    browser.one("#search").send_keys("nothing like it")
    done(browser, before + 2)
    assert browser.one("#memory-chart").text == browser.one("#heat-chart").text == "Nothing to draw."
    assert cells(browser, 1) == []


def points(browser, chart="memory-chart"):
    """What the points say, to a screen reader: one for each that is drawn."""
    found = "#{} .mark-symbol [aria-label*='title: ']"
    return browser.run("return [...document.querySelectorAll(arguments[0])].map(x => x.ariaLabel)", found.format(chart))


def test_point(browser, html, run):
    """Hover tells, a click picks: in both charts, in the lists and in the table."""
    drawn(browser, html)
    assert len(points(browser)) == len(runs.FEW) - 1
    report = told(run)
    front = [report.points[i]["recipe"] for equal in report.fronts[0]["score/device"] for i in equal]
    assert browser.texts("#memory-front .mono") == front
    recipe = front[0]
    point = f"#memory-chart .mark-symbol [aria-label*='title: {recipe};']"
    browser.hover(point)
    said = browser.wait("return document.querySelector('#vg-tooltip-element.visible')?.innerText")
    line = next(p for p in report.points if p["recipe"] == recipe and p["cell"] == 0)
    assert recipe in said
    assert f"{line['score']:.3f} [{line['low']:.2f}, {line['high']:.2f}]" in said
    assert f"{line['device_bytes'] / 1e6:.4g} MB" in said.replace("\n", " ")
    browser.click(point)
    assert browser.wait("return document.querySelector('#picked h3')?.innerText").strip() == recipe
    assert "snapkv(budget=128)" not in recipe or "arXiv 2404.14469" in browser.one("#picked").text
    on = browser.run("return [...document.querySelectorAll('.on')].map(x => x.dataset.recipe)")
    assert set(on) == {recipe}
    assert len(on) >= 2
    rings = """return [...document.querySelectorAll("#speed-chart .mark-symbol path[fill=transparent]")]
        .filter(p => p.getAttribute("opacity") === "1").length"""
    assert browser.wait(rings) == 1
    browser.click(f"#memory-front li[data-recipe='{recipe}']")  # and again: nothing is picked
    assert not browser.all(".on")


def test_choices_of_the_charts(browser, html, run):
    drawn(browser, html)
    report = told(run)
    browser.choose("#cell", "fidelity, 4096 tokens")
    browser.choose("#quality", "KL to the uncompressed cache, nats")
    browser.choose("#memory", "device and host")
    done(browser, 4)
    front = [report.points[i]["recipe"] for equal in report.fronts[5]["kl/total"] for i in equal]
    assert browser.texts("#memory-front .mono") == front
    assert browser.one("#memory-x").text == "MB on device and host"
    browser.click("#families button:nth-child(2)")  # storage
    done(browser, 5)
    assert len(points(browser)) == len(runs.FEW) - 2
    assert not any("kivi" in one for one in points(browser) + browser.texts("#table td:first-child"))
    browser.choose("#heat-quality", "nll of the right answer")
    cells = "return document.querySelectorAll('#heat-chart .mark-rect [aria-label*=\"nll\"]').length"
    assert browser.wait(cells) == 2 * 5 * (len(runs.FEW) - 2)


@pytest.mark.parametrize(("recipes", "failing"), [(("full",), ""), (("full",), "full"), (("int8", "int4"), "int8")])
def test_thin_runs(browser, tmp_path, recipes, failing):
    """One sample has no interval, one recipe no spread, a failure no numbers, `fidelity` no depth."""
    run = runs.write(tmp_path / "thin", recipes, runs.SIX[4:5], 1, failing)
    (tmp_path / "page.html").write_text(page(told(run)), "utf-8")
    drawn(browser, tmp_path / "page.html")
    for n, quality in enumerate(("nll of the right answer, nats per token", "KL to the uncompressed cache, nats"), 2):
        browser.choose("#quality", quality)
        done(browser, n)
    assert len(points(browser)) == sum(recipe != failing for recipe in recipes)
    assert not browser.all("#heat-chart")
    assert len(cells(browser, 1)) == len(recipes)


@pytest.mark.parametrize("width", [1280, 390])
def test_looks(browser, html, width):
    """No scrolling to the side, in light and dark, which the button changes charts and all."""
    grounds = []
    for dark in (False, True):
        drawn(browser, html, width=width, height=844, dark=dark)
        assert browser.wide() == []
        path = browser.shoot(f"report-{width}-{'dark' if dark else 'light'}")
        grounds.append(Image.open(path).convert("L").getpixel((2, 300)))
        box = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.width, b.height]"
        for chart in ("#memory-chart svg", "#speed-chart svg", "#heat-chart svg"):
            w, h = browser.run(box, chart)
            assert w > 200
            assert h > 200
    assert grounds[0] > 240
    assert grounds[1] < 40
    fill = "return document.querySelector('#memory-chart .role-axis-title text').getAttribute('fill')"
    before = browser.run(fill)
    browser.click("#theme")
    done(browser, 2)
    assert browser.run(fill) != before
    browser.forget()


def test_words_are_no_markup(browser, html):
    drawn(browser, html)
    assert browser.one("h1").text == "a <run>"
    assert "needle <b>" in browser.one("pre").text
    assert browser.one(".errors td:last-child").text == "RuntimeError: out of <memory>"


def test_pictures(run, tmp_path, monkeypatch):
    report = told(run)
    monkeypatch.setattr("calidrop.report.pictures.QUALITIES", ("kl",))
    few = replace(report, cells=report.cells[:1], spots=[s for s in report.spots if s["cell"] == 0])
    made = pictures(few, tmp_path / "png")
    assert [p.name for p in made] == [
        *("front-needle-1024-seen-kl.png", "heat-needle-seen-score.png", "heat-needle-seen-nll.png")
    ]
    for path in made:
        image = Image.open(path).convert("RGB")
        assert image.width > 600
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert len(image.getcolors(1 << 24)) > 50  # something is drawn


def call(*args, code=0):
    result = CliRunner().invoke(app, ["report", *map(str, args)], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result


def test_command(run, tmp_path):
    out = tmp_path / "page.html"
    assert call(run, "-o", out).stdout.startswith(f"{out}: 7 recipes, 6 tables, ")
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "png").exists()


def test_command_errors(run, tmp_path, monkeypatch):
    monkeypatch.setattr("calidrop.report.gather.gather", lambda *_: pytest.fail("worked"))
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    lines = (run / "rows.jsonl").read_text().splitlines()

    def fails(*args):
        said = call(*args, code=2).stderr.strip()
        assert "\n" not in said
        return said

    assert "empty has no rows: no folder of a run, or an empty one" in fails(tmp_path / "empty")
    assert "no has no rows" in fails(tmp_path / "no")
    for line, what in (
        ('{"key": 3}', "missing"),
        ("[1]", "argument"),
        ("{", "Expecting"),
        (json.dumps({**json.loads(lines[0]), "kl": "x"}), "kl must be float | None, got 'x'"),
    ):
        (bad / "rows.jsonl").write_text("\n".join([*lines[:2], line, ""]))
        said = fails(bad)
        assert f"{bad / 'rows.jsonl'}, line 3 is no row: " in said
        assert what in said
    assert "cannot write" in fails(run, "-o", tmp_path / "no" / "page.html")
    assert "a folder" in fails(run, "-o", tmp_path)
    (tmp_path / "file").touch()
    assert "no folder" in fails(run, "--png", tmp_path / "file")
    assert "cannot write" in fails(run, "--png", tmp_path / "no" / "png")
    can = os.access  # tests may run as root, who can write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and can(path, mode))
    assert "no permission" in fails(run, "-o", tmp_path / "page.html")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "this needs altair and vl_convert and PIL: pip install 'calidrop[report]'" in fails(run)
    assert not (tmp_path / "page.html").exists()


def test_broken_settings(run, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes((run / "rows.jsonl").read_bytes())
    for text in ("{", "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is no run\.json: "):
            told(tmp_path)
