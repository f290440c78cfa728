"""What an installation that isn't editable carries."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_package_data_names_every_file_beside_the_modules() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split()
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    there = [path for path in (ROOT / "svite_scale").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path for path in there if path.suffix != ".py"} == data
