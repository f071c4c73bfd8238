"""The page of `calidrop show` in a browser: what it shades, marks and says, against the tables it was made of."""

import itertools
import re

import pytest
import torch

import calidrop
from calidrop.holding import FORMS
from calidrop.models import load
from tiny import tiny
from words import byte_model

TEXT = "A <script>window.pwned = 1</script> & &amp; <b>x</b>\r\n\n\tnaïve 🦜🏽 日本 العربية\n" + "of the rabbit, " * 7
RECIPES = [
    "adakv(budget=40, recent=8)",
    "snapkv(budget=40, recent=8)+int4+calidrop",
    "h2o(budget=40)+calidrop(offload=False, summary=3)",
    "kivi(bits=2, group=16, residual=16)",
]
DEVICE = ("exact", "coded")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return calidrop.show(*load(byte_model(tmp_path_factory.mktemp("bytes"))), TEXT, RECIPES, generate=20)


@pytest.fixture
def page(shown, tmp_path):
    file = tmp_path / "show.html"
    file.write_text(shown.page(), "utf-8")
    return file


def ready(browser, page, **options):
    browser.open(page, **options)
    browser.wait("return document.body.dataset.ready")


def slide(browser, control, value):
    browser.run(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event('input'))",
        *(control, value),
    )


def pick(browser, recipe):
    browser.choose("#recipe", RECIPES[recipe])


def share(held, layer=None, head=None):
    """Per token, the part of the chosen heads, of those that can see it at all, that hold it on the device."""
    table = held.table if layer is None else held.table[layer : layer + 1]
    table = (table if head is None else table[:, head : head + 1]).long()
    there, sees = (torch.tensor([form in of for form, _ in held.kinds])[table] for of in (DEVICE, {*FORMS} - {"blind"}))
    return there.sum((0, 1)).double() / sees.sum((0, 1)).clamp(min=1)


def shades(browser):
    return torch.tensor(browser.run("return [...document.querySelectorAll('#text .t, #made .t')].map(x => "
                                    "Number(x.style.getPropertyValue('--f')))"), dtype=torch.double)  # fmt: skip


def expected(part):
    return torch.where(part > 0, 0.15 + 0.85 * part, part)


def test_shading_follows_the_controls(browser, page, shown):
    ready(browser, page)
    for recipe, held in enumerate(shown.held):
        pick(browser, recipe)
        for layer in (None, 0, 1):
            slide(browser, "layer", -1 if layer is None else layer)
            for head in (None, 1):
                slide(browser, "head", -1 if head is None else head)
                torch.testing.assert_close(shades(browser), expected(share(held, layer, head)), atol=1e-3, rtol=0)
        slide(browser, "head", -1)
    assert shades(browser).min() == 1  # kivi drops nothing
    browser.click("#recipes tr:nth-child(1)")
    slide(browser, "layer", -1)
    torch.testing.assert_close(shades(browser), expected(share(shown.held[0])), atol=1e-3, rtol=0)
    assert browser.texts("#recipes tr[aria-current=true] .name") == [RECIPES[0]]


def test_layers_that_cannot_see_a_token_do_not_count(browser, tmp_path):
    """One of three layers sees all; of the others only the last 24 tokens."""
    _, tokenizer = load(byte_model(tmp_path))
    shown = calidrop.show(tiny("gemma2", vocab_size=258), tokenizer, TEXT[-100:], ["full", "tova(budget=30)"])
    (tmp_path / "show.html").write_text(shown.page(), "utf-8")
    ready(browser, tmp_path / "show.html")
    assert [form for form, _ in shown.held[0].kinds] == ["exact", "blind"]
    assert shades(browser).min() == 1  # full keeps all that can be seen
    assert "100 are held on the device by every head" in browser.one("#sum").text
    slide(browser, "layer", 0)
    assert "76 of these are out of the layer's sight" in browser.one("#sum").text
    slide(browser, "layer", -1)
    browser.choose("#recipe", "tova(budget=30)")
    torch.testing.assert_close(shades(browser), expected(share(shown.held[1])), atol=1e-3, rtol=0)


def test_marks_say_the_form(browser, page, shown):
    """A mark where some head has the token in that form and none, or fewer heads, in another that has a mark."""
    ready(browser, page)
    for recipe, held in enumerate(shown.held):
        pick(browser, recipe)
        n = torch.stack([
            sum(((held.table == k).sum((0, 1)) for k, kind in enumerate(held.kinds) if kind[0] == form),
                torch.zeros(held.table.shape[2], dtype=torch.long))
            for form in ("coded", "host", "summary")
        ])  # fmt: skip
        want = [("m-coded", "m-host", "m-summary")[i] if most else "" for most, i in zip(*n.max(0), strict=True)]
        found = browser.run("return [...document.querySelectorAll('#text .t, #made .t')].map(x => "
                            "[...x.classList].find(c => c.startsWith('m-')) || '')")  # fmt: skip
        assert found == want
        assert set(want) - {""} == ({"m-coded", "m-host"}, {"m-coded", "m-host"}, {"m-summary"}, {"m-coded"})[
            recipe
        ] - ({"m-coded", "m-host"} if recipe == 0 else set())
    assert len({browser.run("return getComputedStyle(arguments[0]).textDecorationStyle", x)
                for x in browser.all("#legend .t")}) == 4  # fmt: skip


def test_text_stays_text(browser, page, shown):
    ready(browser, page)
    assert browser.run("return document.getElementById('text').textContent") == TEXT
    assert browser.run("return window.pwned ?? null") is None
    assert not browser.all("#text script, #text b")
    made = "".join(p.text for p in shown.held[0].made)
    assert browser.run("return document.getElementById('made').textContent") == made
    assert browser.run("return document.querySelectorAll('#text .part').length") == sum(
        not p.text for p in shown.context
    )
    assert browser.run("return getComputedStyle(document.getElementById('text')).whiteSpaceCollapse") == "preserve"


def counts(browser):
    return {text.partition(":")[0]: int(n) for n, text in zip(
        browser.texts("#tip td:first-child"), browser.texts("#tip td:last-child"), strict=True)}  # fmt: skip


def test_a_token_tells_its_counts(browser, page, shown):
    ready(browser, page)
    pick(browser, 1)
    held, token = shown.held[1], 12
    browser.hover(f"#text .t:nth-child({token + 1})")
    kinds = [held.kinds[k] for k in held.table[:, :, token].flatten().tolist()]
    names = {"exact": "held exactly", "coded": "held in fewer bits", "host": "in host memory, can be asked again"}
    want = {name: sum(form == kind for kind, _ in kinds) for form, name in names.items()}
    assert counts(browser) == {name: n for name, n in want.items() if n}
    assert len(browser.all("#tip .cell")) == 4
    assert f"token {token + 1} of" in browser.one("#tip").text
    slide(browser, "layer", 1)
    slide(browser, "head", 0)
    ((form, how),) = {held.kinds[int(held.table[1, 0, token])]}
    assert browser.texts("#tip td:last-child")[0].startswith(names[form])
    assert how in browser.texts("#tip td:last-child")[0]
    browser.hover("h1")
    assert not browser.one("#tip").is_displayed()


def test_keys_go_from_token_to_token(browser, page):
    ready(browser, page)
    text = browser.one("#text")
    for key in "\ue014\ue014\ue012\ue014":  # right, right, left, right
        text.send_keys(key)
    assert browser.run("return [...document.querySelectorAll('.on')].map(x => x.dataset.i)") == ["1"]
    text.send_keys("\ue00c")  # escape
    assert not browser.all(".on")


def test_chart_is_the_share_by_place(browser, page, shown):
    ready(browser, page)
    pick(browser, 0)
    path = browser.one("#chart path.exact").get_attribute("d").split("L")
    end = shown.held[0].table.shape[2]
    tops = [float(point.split()[1]) for point in path[: 2 * end : 2]]
    want = 96 * (1 - share(shown.held[0]))
    torch.testing.assert_close(torch.tensor(tops, dtype=torch.double), want, atol=0.01, rtol=0)
    browser.run("document.getElementById('chart').scrollIntoView()")
    browser.click("#chart")  # in its middle
    assert abs(int(browser.one(".on").get_attribute("data-i")) - end // 2) <= 1


def test_rows_and_words_are_the_measured_numbers(browser, page, shown):
    ready(browser, page)
    for i, held in enumerate(shown.held):
        pick(browser, i)
        cells = browser.texts(f"#recipes tr:nth-child({i + 1}) td")
        assert cells[2] == f"{held.device_bytes / 1e6:.2f}"
        assert float(cells[4][:-1]) == pytest.approx(held.full_bytes / held.device_bytes, abs=0.051)
        n = [int(x.replace(",", "")) for x in re.findall(r"[\d,]+(?= are| by)", browser.one("#sum").text)]
        part = share(held)
        assert n == [int((part == 1).sum()), int(((part > 0) & (part < 1)).sum()), int((part == 0).sum())]
    low, high = int(shown.held[0].per_head.min()), int(shown.held[0].per_head.max())
    assert browser.texts("#recipes tr:nth-child(1) td")[5].startswith(f"{low} – {high}, mean")


CONTRAST = """
const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const light = (colour) => {
  pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return Math.min(...[...document.querySelectorAll(".t")].map((it) => {
  const style = getComputedStyle(it), [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => x - y);
  return (b + 0.05) / (a + 0.05);
}));"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_shade(browser, page, dark):
    ready(browser, page, dark=dark)
    assert browser.run(CONTRAST) > 4.5
    browser.click("#theme")
    assert browser.run(CONTRAST) > 4.5
    browser.forget()


def test_a_darker_token_is_held_by_more(browser, page):
    """The scale is one of lightness: it falls (or rises, in the dark) with every step."""
    for dark in (False, True):
        ready(browser, page, dark=dark)
        lightness = browser.run("""
            const it = document.querySelector(".t"), out = [];
            for (let f = 0; f <= 1; f += 0.1) {
              it.style.setProperty("--f", f);
              out.push(Number(getComputedStyle(it).backgroundColor.match(/[\\d.]+/)[0]));
            }
            return out;""")
        steps = [b - a for a, b in itertools.pairwise(lightness)]
        assert all(step > 0 for step in steps) if dark else all(step < 0 for step in steps)
        assert max(map(abs, steps)) < 1.2 * min(map(abs, steps))


def test_on_a_phone(browser, page):
    ready(browser, page, width=390, height=844)
    assert browser.wide() == []
    for recipe in range(len(RECIPES)):
        pick(browser, recipe)
        assert browser.wide() == []
    browser.run("document.querySelector('#made .t').scrollIntoView({block: 'center'})")
    browser.click("#made .t")
    box = browser.run("return document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert box["x"] == 0
    assert box["width"] == 390
    assert box["bottom"] == 844
    browser.shoot("show-phone", whole=False)


def test_for_the_eye(browser, page):
    for dark in (False, True):
        ready(browser, page, dark=dark)
        pick(browser, 1)
        browser.hover("#text .t:nth-child(12)")
        assert browser.wide() == []
        browser.shoot(f"show-{'dark' if dark else 'light'}")
