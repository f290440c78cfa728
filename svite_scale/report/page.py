"""One HTML page that holds everything it shows."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body { font-family: sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; }
td { padding: 0.1em 1.5em 0.1em 0; }
figure { margin: 1em 0; }
figcaption { color: #555; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of its file, without the suffix.
        caption: a sentence or two.
        png: its bytes.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        pictures: what it shows.
        absence: why it has none; empty where it has.
    """

    title: str
    pictures: Sequence[Picture]
    absence: str = ""


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page's text: heading, a table of facts, and the sections with their pictures inside."""
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<table>
{rows}
</table>
{body}
</body>
</html>
"""


def _section(section: Section) -> str:
    absence = f"<p>{escape(section.absence)}</p>" if section.absence else ""
    figures = "\n".join(_figure(picture) for picture in section.pictures)
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{absence}{figures}\n</section>"


def _figure(picture: Picture) -> str:
    source = f"data:image/png;base64,{b64encode(picture.png).decode()}"
    caption = escape(picture.caption)
    return f'<figure><img src="{source}" alt="{escape(picture.name)}"><figcaption>{caption}</figcaption></figure>'
