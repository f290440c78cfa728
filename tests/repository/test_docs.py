"""What the README shows is what is there."""

from __future__ import annotations

from pathlib import Path

from svite_scale.config.load import read_config
from svite_scale.config.validate import validate

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


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
        validate(read_config(path), world_size=1)
