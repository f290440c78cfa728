"""The pages of the repository, and the blocks of code on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").glob("*.md"))]
BLOCK = re.compile(
    r"^(?: *<!-- not run by the tests: (?P<reason>[^>]+) -->\n+)? *```(?P<language>\w*)\n(?P<text>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code: its line on the page, the reason why no test runs it, its language and its text."""

    line: int
    reason: str | None
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of code of a page, from top to bottom."""
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start("language")) + 1, found["reason"], found["language"], found["text"])
        for found in BLOCK.finditer(text)
    ]
