import json

import pytest

from calidrop.pages import code, data, render


def test_a_script_cannot_end_its_element():
    assert code("a = '</script>'").count("</script") == 1
    told = str(data("x", ["</script><b>", "é"]))
    assert told.count("</script") == 1
    assert json.loads(told.partition(">")[2].rpartition("<")[0]) == ["</script><b>", "é"]


def test_light_and_dark(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(render("pages/base.html"), "utf-8")
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    seen = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        seen.append(browser.run(ground))
        browser.run("window.told = 0; document.addEventListener('theme', () => window.told++)")
        browser.click("#theme")
        seen.append(browser.run(ground))
        assert browser.run("return window.told") == 1
        assert browser.run("return colour('ground')") == seen[-1]
        for _ in range(50):  # the choice is kept; the browser hands it from page to page in its own time
            browser.open(page, dark=dark)
            if browser.run(ground) == seen[-1]:
                break
        assert browser.run(ground) == seen[-1]
        browser.forget()
    light, dark = seen[:2]
    assert light != dark
    assert seen == [light, dark, dark, light]


def test_pages_ask_nothing_of_a_network(browser, tmp_path):
    """Neither can they, nor would it go unseen."""
    page = tmp_path / "page.html"
    page.write_text(render("pages/base.html").replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'))
    browser.open(page)
    browser.wait("return document.images[0].complete")  # images may be asked for after a page counts as loaded
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browser.check()
    page.write_text('<script>fetch("http://127.0.0.1:9/x").catch(() => 0)</script>')
    browser.open(page)
    browser.run("return fetch('http://127.0.0.1:9/y').catch(() => 0)")
    with pytest.raises(AssertionError):
        browser.check()
