"""Configs of earlier versions, which have fewer fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.checkpoint.compatibility import check_same_run
from svite_scale.config import earlier
from svite_scale.config.earlier import EARLIER, Earlier, complete, read_saved_config
from svite_scale.config.load import field_names, flatten_config, to_dict, to_yaml
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.errors import CheckpointError, ConfigError
from svite_scale.models.options import StructuredConfig, TokensConfig

FIELD = "sparsity.structured.grow"
CONFIG = Config(run_dir="runs/a", sparsity=SparsityConfig(structured=StructuredConfig(heads=0.5)))
DENSE = Config(run_dir="runs/a")


@pytest.fixture(autouse=True)
def _entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if earlier versions hadn't a field yet, and did what ``paper`` means."""
    entry = Earlier("paper", lambda values: values["sparsity.structured.heads"] != 1.0)
    monkeypatch.setattr(earlier, "EARLIER", {FIELD: entry})


def text_of(config: Config) -> str:
    """The config's YAML as a version wrote it that hadn't the field."""
    return "".join(line for line in to_yaml(config).splitlines(keepends=True) if line.split(":")[0].strip() != "grow")


def test_complete_gives_a_field_that_was_not_there_its_earlier_meaning() -> None:
    values = {name: value for name, value in flatten_config(to_dict(CONFIG)).items() if name != FIELD}
    assert complete(values) == values | {FIELD: "paper"}
    assert complete(values | {FIELD: "candidate"}) == values | {FIELD: "candidate"}


def test_complete_leaves_out_the_earlier_meaning_where_the_field_may_not_be_set() -> None:
    assert complete({"run_dir": "runs/a"}) == flatten_config(to_dict(DENSE))


def test_a_saved_config_is_read_with_the_earlier_meaning(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text_of(CONFIG))
    assert read_saved_config(path).sparsity.structured == StructuredConfig(heads=0.5, grow="paper")
    assert read_saved_config(path, [f"{FIELD}=candidate"]) == CONFIG
    path.write_text(to_yaml(CONFIG))
    assert read_saved_config(path) == CONFIG
    path.write_text(text_of(DENSE))
    assert read_saved_config(path) == DENSE


def test_a_saved_config_without_run_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="run_dir = None: is missing"):
        read_saved_config(tmp_path / "config.yaml")


def test_a_resume_is_refused_when_the_default_is_not_the_earlier_meaning() -> None:
    saved = to_dict(CONFIG)
    del saved["sparsity"]["structured"]["grow"]
    with pytest.raises(CheckpointError, match=f"saved with {FIELD} = 'paper', not 'candidate'"):
        check_same_run(saved, CONFIG, Path("step-1"))
    paper = Config(run_dir="runs/a", sparsity=SparsityConfig(structured=StructuredConfig(heads=0.5, grow="paper")))
    check_same_run(saved, paper, Path("step-1"))


def test_every_entry_is_of_a_field_and_differs_from_its_default() -> None:
    defaults = flatten_config(to_dict(DENSE))
    assert EARLIER.keys() <= field_names()
    assert all(entry.value != defaults[name] for name, entry in EARLIER.items())


def test_a_run_without_a_signal_of_its_tokens_has_that_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "EARLIER", EARLIER)
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: runs/a\nsparsity: {tokens: {keep: 0.5}}\n")
    assert read_saved_config(path).sparsity.tokens == TokensConfig(keep=0.5, signal="paper")
    path.write_text("run_dir: runs/a\n")
    assert read_saved_config(path).sparsity.tokens == TokensConfig()
