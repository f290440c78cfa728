"""``launch/plan.py``: the shipped configs beside the paper's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from svite_scale.cost.paper_table import paper_table
from svite_scale.errors import ConfigError
from tests.command_line import ROOT, run_here

SCRIPT = ROOT / "launch" / "plan.py"


def test_paper_table_has_every_config_and_agrees_with_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, "--paper", script=SCRIPT)
    assert (answer.status, answer.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines()[1:]}
    assert set(rows) == {path.stem for path in (ROOT / "configs").glob("deit_*.yaml")}

    sparse, dense, saved, published, multiplied, params, dense_params, published_params = rows["deit_tiny_s30"]
    assert (published, published_params) == ("25.56%", "4.02")
    assert float(saved.rstrip("%")) == pytest.approx(25.56, abs=0.05)
    assert float(params) == pytest.approx(4.02, abs=0.005)
    assert (float(dense), float(dense_params)) == (pytest.approx(1.254, abs=1e-3), pytest.approx(5.72, abs=0.01))
    assert 1 - float(sparse) / float(dense) == pytest.approx(0.2556, abs=1e-3)
    assert multiplied == dense, "single weights are multiplied dense"
    sparse, dense, _, _, multiplied, *_ = rows["deit_small_block_s70"]
    assert float(sparse) <= float(multiplied) < float(sparse) + 0.01 * float(dense), "the head has single weights"

    _, _, saved, published, *_ = rows["deit_small_t95_s50"]
    assert published == "49.32%"
    assert float(saved.rstrip("%")) == pytest.approx(49.32, abs=0.15)


def test_paper_table_names_a_config_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, "configs/nothing.yaml", script=SCRIPT)
    assert answer.status == 2
    assert answer.err.startswith("config error: ")
    assert "configs/nothing.yaml" in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{masks: a, densities: {'*': 0.5}}", r"^sparsity.masks = 'a': also says where the weights are"),
        ("{densities: {'*': 0.5}, power_scale: 2}", r"^sparsity.power_scale = 2.0: is only for"),
        ("{tokens: {keep: 120.7}}", r"^sparsity.tokens.keep = 120.7: is no whole number of tokens"),
        ("{method: rigl}", r"^sparsity.method = 'rigl': is no method"),
    ],
)
def test_paper_table_refuses_a_config_that_no_run_takes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(f"run_dir: r\nsparsity: {text}\n")
    with pytest.raises(ConfigError, match=message):
        paper_table([tmp_path / "own.yaml"])
