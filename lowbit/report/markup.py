"""Markup that is safe by construction: every string put into a tag is escaped, unless it came out of one."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = ("meta", "br")


class Html(str):
    """Markup; any other string is text."""


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """<name attributes>children</name>. class_ is class, aria_label is aria-label; None leaves an attribute out, True writes it bare."""
    head = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{join(*children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{escape(str(value))}"'


def join(*children: Child) -> Html:
    """Children one after the other; lists are flattened, None is nothing, strings that are no Html are escaped."""
    made = []
    for child in children:
        if isinstance(child, str):
            made.append(child if isinstance(child, Html) else escape(child))
        elif child is not None:
            made.append(join(*child))
    return Html("".join(made))


def svg(width: float, height: float, title: str, *children: Child, class_: str) -> Html:
    """A drawing that scales with its container and says what it shows."""
    return tag("svg", tag("title", title), *children, viewBox=f"0 0 {width:g} {height:g}", role="img", class_=class_)


def scroll(label: str, *children: Child) -> Html:
    """A wide thing in its own container, which can be scrolled by keyboard."""
    return tag("div", *children, class_="scroll", role="region", tabindex="0", aria_label=label)
