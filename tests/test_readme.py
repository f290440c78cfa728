"""What the README shows is what is there."""

from __future__ import annotations

from pathlib import Path

from svite_scale.config_checks import check_config
from svite_scale.config_reader import read_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_module_stands_in_the_tree() -> None:
    modules = [path for folder in ("svite_scale", "launch", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    missing = {path.name for path in modules if path.name != "__init__.py"} - set(README.replace(",", " ").split())
    assert not missing, f"give each a line in README.md: {sorted(missing)}"


def test_its_links_lead_somewhere() -> None:
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]


def test_its_configs_are_configs(tmp_path: Path) -> None:
    blocks = [part.split("```")[0] for part in README.split("```yaml")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        path = tmp_path / "config.yaml"
        path.write_text(f"run_dir: a\n{block}")
        check_config(read_config(path), world_size=1)
