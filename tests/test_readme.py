"""What the README shows is what is there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_module_stands_in_the_tree() -> None:
    modules = [path for folder in ("svite_scale", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    missing = {path.name for path in modules if path.name != "__init__.py"} - set(README.replace(",", " ").split())
    assert not missing, f"give each a line in README.md: {sorted(missing)}"


def test_its_links_lead_somewhere() -> None:
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
