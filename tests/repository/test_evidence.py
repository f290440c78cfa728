"""docs/accuracy.md has the numbers of docs/evidence.json, and its runs can be made."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.evidence import PAGE, RESULTS, Results, config_of, key_of, replace_marked, run_missing
from benchmarks.evidence_tables import TABLES, Row, Table
from svite_scale.config.validate import validate
from tests.tiny import write_config_file

each_table = pytest.mark.parametrize("name", TABLES)


@each_table
def test_rows_are_configs_and_none_stands_twice(name: str) -> None:
    table = TABLES[name]
    for row in table.rows:
        validate(config_of(table, row), world_size=1)
    assert len({key_of(table, row, 0) for row in table.rows}) == len(table.rows)


@each_table
def test_page_has_the_numbers_of_the_results(name: str) -> None:
    content = re.search(rf"<!-- evidence: {name} -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert content, f"no place for {name}"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in content[1].splitlines()[2:]]
    saved = {tuple(run["key"]): run["accuracy"] for run in json.loads(RESULTS.read_text())["runs"]}
    for row in TABLES[name].rows:
        expected = [saved[key] for seed in range(10) if (key := key_of(TABLES[name], row, seed)) in saved]
        found = [line for line in lines if line[0] == row.label]
        assert len(found) == bool(expected)
        for line in found:
            each = [float(value) for value in line[7].split()]
            assert each == expected
            assert float(line[5].strip("*")) == pytest.approx(statistics.fmean(each), abs=0.0051)
            assert line[6] == "-" if len(each) == 1 else float(line[6]) == pytest.approx(statistics.stdev(each), abs=0.0051)


@pytest.mark.slow
def test_finished_runs_are_not_run_again(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").symlink_to(digits)
    config = write_config_file(digits, tmp_path / "run", tmp_path / "config.yaml")
    rows = (
        Row("dense", ("sparsity.density=1.0",)),
        Row("half of the tokens", ("sparsity.density=1.0", "sparsity.tokens.keep=3")),
    )
    monkeypatch.setattr(evidence, "TABLES", {"tiny": Table(rows, config=str(config), shards="tiny")})
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "evidence.json")
    run_missing(["tiny"], [], [0], tmp_path, processes=2)
    found = [Results().of(evidence.TABLES["tiny"], row) for row in rows]
    assert [len(runs) for runs in found] == [1, 1]
    assert found[0][0].ink_kept is None
    assert 0 <= found[1][0].ink_kept <= 1

    monkeypatch.setattr(evidence, "train", lambda *_: pytest.fail("run again"))
    run_missing(["tiny"], [], [0], tmp_path, processes=2)


def test_page_without_a_place_for_a_table_is_refused() -> None:
    assert replace_marked("a\n<!-- evidence: x -->\nold\n<!-- end -->\nb", "x", "new") == (
        "a\n<!-- evidence: x -->\nnew\n<!-- end -->\nb"
    )
    with pytest.raises(ValueError, match="no place for the table x"):
        replace_marked("a", "x", "new")
