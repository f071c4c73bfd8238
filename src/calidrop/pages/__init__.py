"""Pages: one file each, with style, scripts and data inside, so that they need no server and no network."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup


def render(template: str, **context: Any) -> str:
    """A page. template: a file of the package that extends pages/base.html, like report/page.html. Text is escaped;
    `{{ style("report/page.css") }}` and `{{ script("report/page.js") }}` put files of the package in, and
    `{{ data("run", run) }}` a value that scripts read with `data("run")`."""
    pages = Environment(loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.globals |= {"style": style, "script": script, "data": data}
    return pages.get_template(template).render(**context)


def style(name: str) -> Markup:
    return Markup("<style>\n{}</style>").format(Markup(_read(name)))


def script(name: str) -> Markup:
    return code(_read(name))


def code(text: str) -> Markup:
    """A script element with this text, which cannot end the element early."""
    safe = text.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    return Markup("<script>\n{}</script>").format(Markup(safe))


def data(name: str, value: Any) -> Markup:
    told = htmlsafe_json_dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup('<script type="application/json" id="{}">{}</script>').format(name, told)


def _read(name: str) -> str:
    return (resources.files("calidrop") / name).read_text("utf-8")
