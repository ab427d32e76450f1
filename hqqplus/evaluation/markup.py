"""HTML and SVG in which nothing stands unescaped that was not made here, and a page that asks nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from hqqplus.evaluation.report import visible
from hqqplus.evaluation.style import STYLE

_WITHOUT_END = ("meta", "br", "hr")


class Html(str):
    """Text that is HTML already. Any other string becomes it by being escaped."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"


def element(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """`element("td", "a < b", class_="number")`: `<td class="number">a &lt; b</td>`.

    Children are strings, lists of them, or None, which is nothing; attributes that are None are left out. Of the names
    of attributes a trailing underscore is dropped and other ones become hyphens.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _WITHOUT_END:
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """Children one behind the other, escaped where they are not HTML."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escaped(child))
        elif child is not None:
            parts.append(joined(child))
    return Html("".join(parts))


def escaped(text: object) -> Html:
    """`text` as it reads, whatever is in it."""
    return Html(html.escape(visible(text), quote=True))


def table(header: Sequence[Child], rows: Iterable[Sequence[Child]], class_: str | None = None) -> Html:
    """A table in a box that scrolls by itself where it is wider than the page. The first column names its row."""
    named = [title if isinstance(title, str) and not isinstance(title, Html) else "" for title in header]
    head = element("tr", [element("th", title, scope="col") for title in header])
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [
                element("td", cell, data_label=label or None)
                for label, cell in zip(named[1:], row[1:], strict=True)
            ],
        )
        for row in rows
    ]  # fmt: skip
    whole = element("table", element("thead", head), element("tbody", body), class_=class_)
    # Who has no mouse scrolls it by the keyboard.
    return element("div", whole, class_="scrolls", tabindex=0, role="region", aria_label=named[0] or "table")


def section(title: str, *children: Child) -> Html:
    """A section of a page under its heading."""
    return element("section", element("h2", title), *children)


def document(title: str, *children: Child) -> str:
    """A whole page. It has no script, and a browser that reads its policy would run and fetch none."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', *children)), lang='en')}\n"
