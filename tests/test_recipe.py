"""Recipes: what a string means, and that everything else is refused with what would be valid."""

import math
import re

import pytest

import calidrop
from calidrop import methods
from calidrop.methods import METHODS, adakv, expected_attention, full, h2o, kivi, pyramidkv, snapkv, streaming_llm, tova
from calidrop.parts import Evictor, Rest, Storage
from calidrop.recipe import Recipe, outline, parse
from tiny import tiny

SAME = {
    "full": full(),
    "snapkv(budget=512)": snapkv(512),
    "snapkv(budget=0.25, every=None)": snapkv(budget=0.25, every=None),
    "streaming_llm(budget=64, sinks=0)": streaming_llm(64, sinks=0),
    "h2o(budget=0.2, recent=0.5)+kivi": h2o(0.2, 0.5) + kivi(),
    "tova(budget=9)+calidrop(decide='layer', offload=True)": tova(9) + methods.calidrop(decide="layer", offload=True),
    "kivi(bits=4, group=16, residual=7)": kivi(4, 16, 7),
    "adakv(budget=99)+kivi(bits=8)+calidrop(apply=-0.5)": adakv(99) + kivi(bits=8) + methods.calidrop(apply=-0.5),
    "expected_attention(budget=64)+calidrop": expected_attention(64) + Recipe((methods.calidrop(),)),
    "kivi+calidrop+tova(budget=5)": kivi() + methods.calidrop() + tova(5),
    "pyramidkv(budget=64, beta=4.5)": Recipe((pyramidkv(64, beta=4.5),)),
}
ODD_WAYS = {
    "full()": "full",
    " snapkv ( 512 ) + calidrop( ) ": "snapkv(budget=512)+calidrop",
    "(snapkv(every=8, budget=512))": "snapkv(budget=512, every=8)",
    'tova(budget=9)+calidrop(decide="layer")': "tova(budget=9)+calidrop(decide='layer')",
    "kivi+(tova(budget=9)+calidrop)": "kivi+tova(budget=9)+calidrop",
    "snapkv(budget=1_000)": "snapkv(budget=1000)",
}
EVICTORS = ["streaming_llm", "h2o", "tova", "snapkv", "expected_attention", "pyramidkv", "adakv", "g_kv", "r_kv"]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("text", SAME)
def test_string_form_is_the_python_form(text):
    assert str(parse(text)) == str(parse(SAME[text])) == text
    assert [type(p) for p in parse(text).parts] == [type(p) for p in parse(SAME[text]).parts]


@pytest.mark.parametrize("text", ODD_WAYS)
def test_canonical_text(text):
    assert str(parse(text)) == ODD_WAYS[text]
    assert str(parse(str(parse(text)))) == ODD_WAYS[text]


def test_a_string_may_be_added_to_parts():
    for recipe in (snapkv(64) + "kivi+calidrop", snapkv(64) + "kivi" + "calidrop"):
        assert str(recipe) == "snapkv(budget=64)+kivi+calidrop"
    with pytest.raises(ValueError, match="got int"):
        snapkv(64) + 1


def test_arguments_reach_the_parts():
    recipe = parse("snapkv(budget=512, recent=17, every=9)+kivi(group=16)+calidrop(summary=3)")
    evict, storage, rest = recipe.part(Evictor), recipe.part(Storage), recipe.part(Rest)
    assert (evict.recent, evict.every, evict.observe) == (17, 9, 17)
    assert (storage.every, storage.chose_recent) == (16, False)
    assert rest.observe == 32


@pytest.mark.parametrize("text", ["snapkv2(budget=5)", "full+foo", "tova(budget=5)+Kivi", "METHODS"])
def test_unknown_part_lists_the_valid_ones(text):
    with pytest.raises(ValueError, match="unknown method") as e:
        parse(text)
    assert all(name in str(e.value) for name in METHODS)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("snapkv(budget=64, windows=3)", "windows"),
        ("snapkv(64, 8, 5, None, 1)", "too many"),
        ("snapkv", "budget"),
        ("snapkv()", "budget"),
        ("full(1)", "too many"),
        ("tova(recent=2)", "budget"),
    ],
)
def test_unknown_or_missing_argument_lists_the_valid_ones(text, wrong):
    with pytest.raises(ValueError, match=wrong) as e:
        parse(text)
    takes = {"snapkv": "snapkv(budget, recent=32, kernel=5, every=None)", "full": "full()", "tova": "tova(budget, "}
    assert takes[re.split(r"\W", text)[0]] in str(e.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("snapkv(budget=64)", "h2o(budget=64)"),
        ("snapkv(budget=64)", "snapkv(budget=64)"),
        ("kivi(bits=2)", "kivi(bits=4)"),
        ("full", "full"),
        ("full", "snapkv(budget=64)"),
        ("kivi", "full"),
        ("full", "calidrop"),
        ("snapkv(budget=64)", "kivi(residual=64)"),
    ],
)
def test_parts_that_exclude_each_other_are_both_named(one, other):
    for text in (f"{one}+{other}", f"{other}+{one}"):
        with pytest.raises(ValueError) as e:  # noqa: PT011 the names follow
            parse(text)
        assert one in str(e.value)
        assert other in str(e.value)


def test_two_of_a_role_beside_a_third_part():
    with pytest.raises(ValueError, match=r"tova\(budget=9\) and h2o\(budget=9\) fill the same role"):
        parse("tova(budget=9)+calidrop+h2o(budget=9)")


ALONE = methods.calidrop(summary=2)


@pytest.mark.parametrize("recipe", [str(ALONE), f"kivi+{ALONE}", ALONE, kivi() + ALONE, Recipe((ALONE,))], ids=str)
def test_calidrop_needs_an_evictor(recipe):
    with pytest.raises(ValueError, match=r"calidrop\(summary=2\) needs a part that says which tokens stay"):
        calidrop.KVCache(tiny(), recipe)


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("budget", [0, -1, -0.5, 0.0, 1.0, 1.5, 64.0, True, False, NAN, INF, None, "64", [64], 2j])
def test_budget(name, budget):
    with pytest.raises(ValueError, match="budget") as e:
        METHODS[name](budget=budget)
    assert name in str(e.value)
    assert repr(budget) in str(e.value)


@pytest.mark.parametrize(
    "name", ["streaming_llm", "tova", "snapkv", "expected_attention", "pyramidkv", "adakv", "g_kv", "r_kv"]
)
def test_recent_is_smaller_than_budget(name):
    for recent in (40, 41):
        with pytest.raises(ValueError, match=f"{name}.*recent={recent} and budget=40"):
            METHODS[name](budget=40, recent=recent)
    METHODS[name](budget=48, recent=40)
    METHODS[name](budget=0.1, recent=40)


@pytest.mark.parametrize("name", ["streaming_llm", "expected_attention"])
def test_sinks_and_recent_fit_in_the_budget(name):
    with pytest.raises(ValueError, match="sinks"):
        METHODS[name](budget=20, sinks=11, recent=10)
    METHODS[name](budget=20, sinks=10, recent=10)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        *((f"{name}(budget=64, kernel={n})", "odd") for name in ("snapkv", "pyramidkv", "adakv") for n in (2, 6)),
        *((f"{name}(budget=64, every={n})", "whole number >= 1") for name in EVICTORS for n in (0, -1, 1.5, True)),
        ("snapkv(budget=64, kernel=0)", "whole number >= 1"),
        ("snapkv(budget=64, kernel=5.0)", "whole number >= 1"),
        ("snapkv(budget=64, recent=0)", "whole number >= 1"),
        ("snapkv(budget=64, recent=True)", "whole number"),
        ("tova(budget=64, recent=-1)", "whole number >= 0"),
        ("h2o(budget=64, recent=1.1)", r"in \[0, 1\]"),
        ("h2o(budget=64, recent=-0.1)", r"in \[0, 1\]"),
        ("adakv(budget=64, floor=1.1)", r"in \[0, 1\]"),
        ("adakv(budget=64, floor='a')", r"in \[0, 1\]"),
        ("pyramidkv(budget=64, beta=0.9)", r"in \[1, inf\]"),
        ("expected_attention(budget=64, future=0)", "whole number >= 1"),
        ("streaming_llm(budget=64, sinks=-1)", "whole number >= 0"),
        ("kivi(bits=3)", "2, 4, 8"),
        ("kivi(bits=16)", "2, 4, 8"),
        ("kivi(bits=4.0)", "2, 4, 8"),
        ("kivi(bits='4')", "2, 4, 8"),
        ("kivi(bits=True)", "2, 4, 8"),
        ("kivi(group=0)", "whole number >= 8"),
        ("kivi(group=32.0)", "whole number >= 8"),
        ("kivi(bits=2, group=10)", "whole bytes"),
        ("kivi(residual=0)", "whole number >= 1"),
        ("calidrop(order=2)", "0, 1"),
        ("calidrop(order=True)", "0, 1"),
        ("calidrop(decide='row')", "'head', 'layer'"),
        ("calidrop(offload=1)", "True, False"),
        ("calidrop(summary=-1)", "whole number >= 0"),
        ("calidrop(recompute=2.1)", r"in \[-2, 2\]"),
        ("calidrop(apply=-3)", r"in \[-2, 2\]"),
        ("calidrop(apply='0.7')", r"in \[-2, 2\]"),
    ],
)
def test_wrong_values_say_what_is_valid(text, valid):
    text = "snapkv(budget=64)+" * text.startswith("calidrop") + text
    with pytest.raises(ValueError, match=valid) as e:
        parse(text)
    value = text.rpartition("=")[2].rstrip(")")
    assert value in str(e.value)


@pytest.mark.parametrize(
    ("build", "argument"),
    [("calidrop", "recompute"), ("calidrop", "apply"), ("h2o", "recent"), ("adakv", "floor"), ("pyramidkv", "beta")],
)
def test_nan_thresholds(build, argument):
    budget = {} if build == "calidrop" else {"budget": 64}
    with pytest.raises(ValueError, match=f"{argument}.*nan"):
        METHODS[build](**budget, **{argument: NAN})


@pytest.mark.parametrize(
    "text",
    ["snapkv(", "1+2", "", "  ", "snapkv(budget=x)", "snapkv(budget=64", "snapkv budget=64", "snapkv(budget=64)+", "+",
     "a.b(budget=64)", "snapkv(budget=64)-calidrop", "snapkv(budget=64)*2", "snapkv(budget=2+2)", "'full'", "[full]",
     "snapkv(budget=64)(1)", "lambda: full", "snapkv(*[64])", "snapkv(budget={[]: 1})", "snapkv(budget=6, budget=6)",
     "snapkv(budget=__import__('os'))", "snapkv(**{'budget': 64})", "full;full", "full\nfull", "\0", "…"],
)  # fmt: skip
def test_garbage(text):
    with pytest.raises(ValueError) as e:  # noqa: PT011 only that it is one line for people
        parse(text)
    assert type(e.value) is ValueError
    assert "\n" not in str(e.value).replace(text, "")


@pytest.mark.parametrize("wrong", [None, 5, b"full", ["full"], snapkv, {"budget": 5}, Recipe])
def test_wrong_types(wrong):
    with pytest.raises(ValueError, match="expected a recipe string or parts"):
        parse(wrong)


@pytest.mark.parametrize("recipe", ["kivi(group=32)", "snapkv(budget=64)+kivi(group=32)", "kivi(group=12)", "nothing"])
def test_a_model_whose_cache_could_not_be_built_is_unchanged(recipe):
    """16 dims per head."""
    model = tiny()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="nothing" if recipe == "nothing" else "divide head_dim.*head_dim=16"):
        calidrop.KVCache(model, recipe)
    assert model.config._attn_implementation == "eager"
    calidrop.KVCache(model, "kivi(group=16)")
    assert model.config._attn_implementation == "calidrop"


def test_public_names():
    assert calidrop.__all__ == ["KVCache", "Recipe", "adapt", "fast_linear", "load", "plan", "show"]
    assert all(hasattr(calidrop, name) for name in calidrop.__all__)
    for name, build in METHODS.items():
        assert build is getattr(methods, name)
        assert build.__name__ == name


@pytest.mark.parametrize("name", METHODS)
def test_docstring_cites_its_paper_first(name):
    first = METHODS[name].__doc__.splitlines()[0]
    number = re.search(r"arXiv \d{4}\.\d{5}$", METHODS[name].paper)
    assert first
    if name not in ("full", "int8", "fp8"):  # nobody's paper
        assert number
        assert number[0] in first


@pytest.mark.parametrize(
    "text",
    [
        "+".join(["full"] * 3000),
        "(" * 3000 + "full" + ")" * 3000,
        f"snapkv(budget={'-' * 3000}1)",
        "-" * 400 + "1",
    ],
)
def test_what_is_nested_too_deeply_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"write it like|fill the same role") as error:  # Python 3.13 reads long sums
        parse(text)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert isinstance(outline(text), list)


@pytest.mark.parametrize("wish", [10**20, 10**400, 2**31])
def test_whole_numbers_are_below_those_of_positions(wish):
    for text in (f"snapkv(budget={wish})", f"streaming_llm(budget=64, sinks={wish})", f"kivi(residual={wish})"):
        with pytest.raises(ValueError, match=rf"(at most|<=) {2**31 - 1}\b.*, got {wish}"):
            parse(text)
    assert str(parse(f"snapkv(budget={2**31 - 1})")) == f"snapkv(budget={2**31 - 1})"
