"""docs/configuration.md, which is made from the option classes."""

from __future__ import annotations

import re
from pathlib import Path

from svite_scale.config import reference
from svite_scale.config.load import field_names, flatten_config, to_dict
from svite_scale.config.plain_yaml import load
from svite_scale.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def rows() -> dict[str, list[str]]:
    """Returns the cells of the page's rows, by dotted name of the key."""
    found: dict[str, list[str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading = re.match(r"`(.+)`\n", part)
        for name, *cells in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", part, re.MULTILINE):
            found[f"{heading[1]}.{name}" if heading else name] = cells
    return found


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference.reference(), f"docs/configuration.md is out of date: {reference.COMMAND}"


def test_page_has_every_key_with_its_default() -> None:
    defaults = flatten_config(to_dict(Config(run_dir="a")))
    shown = {key: load(cells[0].strip("`")) for key, cells in rows().items()}
    assert shown.keys() == field_names()
    assert shown.pop("run_dir") == "none; it must be given"
    assert shown == {key: value for key, value in defaults.items() if key != "run_dir"}


def test_every_key_has_a_sentence_below_it() -> None:
    without = [key for key, (_, _, meaning) in rows().items() if not meaning.endswith(".")]
    assert not without, f"write a sentence below these fields in their options.py: {', '.join(without)}"


def test_pages_are_listed_for_sections_that_exist() -> None:
    assert set(reference.PAGES) <= {name for name, _ in reference.walk(Config)}


def test_row_shows_bounds_choices_and_code() -> None:
    assert rows()["sparsity.density"][:2] == ["`1.0`", "a number above 0.0 and up to 1.0"]
    assert rows()["parallel.backend"][1] == "one of single, ddp, fsdp2, deepspeed"
    assert rows()["sparsity.distribution"][2] == "The rule that spreads `density` over the layers."
    assert rows()["sparsity.grow_by"][2].startswith("\\|mean of the window's gradients\\|")
