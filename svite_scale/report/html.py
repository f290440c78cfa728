"""HTML and SVG that can't be broken by what stands in it: text is escaped, and only what was made here isn't."""

from __future__ import annotations

from html import escape


class Html(str):
    """Markup. Every other string is text."""

    __slots__ = ()


VOID = {"img", "meta"}
"""Elements without content and end."""


def tag(name: str, *content: str, **attributes: object) -> Html:
    """Returns an element, on one line if its content is.

    Args:
        name: such as ``div``.
        content: its children in order; what isn't :class:`Html` is text, and escaped.
        attributes: an underscore stands for a hyphen, and one at the end is for Python's sake (``class_``). None leaves the
            attribute out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = f"<{name}" + "".join(f' {key}="{escape(str(value))}"' for key, value in given.items()) + ">"
    return Html(start) if name in VOID else Html(f"{start}{join(*content)}</{name}>")


def join(*content: str, by: str = "") -> Html:
    """Returns pieces of markup in a row; what isn't :class:`Html` is text, and escaped."""
    return Html(by.join(piece if isinstance(piece, Html) else escape(piece) for piece in content))
