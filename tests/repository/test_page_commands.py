"""Every command of every page is run: here, by the test that RUN_ELSEWHERE names, or it says why by none.

A page is read from top to bottom in a folder of its own, with small stand-ins for what its commands name: a run of a second, a
few images. So a new command of ``launch/`` is run without a change here. If no test can run a command, write a comment before
its block::

    <!-- not run by the tests: needs two machines -->
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import timm
from PIL import Image

from svite_scale.config.load import read_config
from tests.command_line import run_command, run_here
from tests.repository.pages import PAGES, ROOT, Block, blocks

COMMANDS = {"", "sh", "bash", "console"}
"""Languages of blocks that hold commands, one a line; in ``console`` after ``$ ``, between what they print."""

RUN_HERE = {"python", "ls"}
"""Programs that are run as they stand on a page."""

RUN_ELSEWHERE = {
    ".venv/bin/python -m pytest tests/sparsity/test_update.py": "sparsity/test_update.py",
    "make quickstart": "repository/test_makefile.py::test_quickstart_sets_up_makes_shards_and_trains",
    "python launch/export.py * --int8 *": "export/test_onnx_form.py::test_card_has_the_accuracy_in_int8_beside_that_in_fp32",
    "python launch/make_shards.py --source glyphs *": "data/test_glyphs.py::"
    "test_the_command_writes_glyphs_and_lists_their_fonts",
    "python launch/train.py * --dry-run*": "cost/test_plan.py::test_dry_run_of_each_shipped_config_adds_up",
    "python launch/train.py * --profile *": "train/test_profile.py::test_command_traces_the_steps_that_it_names",
    "deepspeed *launch/train.py *": "launch/test_launchers.py::test_a_run_leaves_its_config_metrics_summary_and_checkpoints",
    "torchrun * launch/train.py * --resume *": "checkpoint/test_resume.py::test_a_run_resumes_on_another_engine",
    "torchrun * launch/evaluate.py *": "evaluation/test_evaluate_run.py::"
    "test_two_ranks_evaluate_a_run_of_sharded_units_and_tokens",
    "deepspeed * launch/evaluate.py *": "evaluation/test_evaluate_run.py::test_evaluate_gives_the_runs_own_last_evaluation",
    "python launch/evaluate.py --weights exported/*": "evaluation/test_evaluate_weights.py::test_export_evaluates_like_its_run",
    "python launch/evaluate.py * --model *": "evaluation/test_evaluate_weights.py::"
    "test_state_dict_evaluates_like_the_run_of_its_weights",
    "python launch/evaluate.py * --labels *": "evaluation/test_labels.py::"
    "test_several_labels_a_sample_give_the_numbers_by_hand",
    "python launch/evaluate.py * --label-map *": "evaluation/test_labels.py::test_label_map_gives_the_numbers_by_hand",
    "python launch/evaluate.py * --throughput *": "evaluation/test_throughput.py::"
    "test_throughput_times_dense_sparse_and_sliced_models",
    "python launch/submit.py *": "launch/test_submit.py::test_submit_writes_the_script_into_the_run_directory_and_submits_it",
}
"""By pattern of a command, the test that runs it, or one like it."""

PYTHON_RUN_ELSEWHERE = {
    "README.md": "engines/test_library_page.py::test_the_loop_of_the_readme_runs",
    "library.md": "engines/test_library_page.py::test_the_code_of_the_page_runs",
    "methods.md": "sparsity/test_methods_page.py::test_the_method_of_the_page_drops_by_sensitivity",
    "tracking.md": "tracking/test_publish.py::test_mlflow_loads_the_published_model",
    "tokens.md": "models/test_tokens_page.py::test_the_loop_of_the_page_runs_and_anneals",
}
"""By page, the test that runs its blocks of Python."""

RUNS = {"runs/structured": "single"}
"""By run directory that commands name, the run of tests/saved.py that stands in for it; ``weights`` for any other."""


def commands(block: Block) -> Iterator[str]:
    """Yields the commands of a block as a reader types them: without comments, and without options in square brackets."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = line.strip()
        if block.language == "console":
            if not command.startswith("$ "):
                continue
            command = command.removeprefix("$ ")
        command = re.sub(r"(^| )\[[^]]*\]", "", re.sub(r"(^|\s)#.*", "", command))
        if command.strip():
            yield " ".join(command.split())


def elsewhere(command: str) -> str | None:
    return next((test for pattern, test in RUN_ELSEWHERE.items() if fnmatchcase(command, pattern)), None)


def own_commands(block: Block) -> list[str]:
    """Returns the commands of a block that no other test runs."""
    if block.language not in COMMANDS or block.reason is not None:
        return []
    return [command for command in commands(block) if elsewhere(command) is None]


def runs_python(page: Path, block: Block) -> bool:
    return block.language == "python" and block.reason is None and page.name not in PYTHON_RUN_ELSEWHERE


def has_own_code(page: Path) -> bool:
    return any(own_commands(block) or runs_python(page, block) for block in blocks(page))


@pytest.fixture
def folder(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page's code runs: with the repository's scripts, shards of digits, images of two classes."""
    for name in ("launch", "configs", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.new("RGB", (16, 12), (100 * number, 80, 160))
                image.save(tmp_path / "imagenet" / split / name / f"{name}_{number}.JPEG")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist5k").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def add_runs(command: str, folder: Path, saved: Callable[[str], Path]) -> None:
    """Copies small runs to where a command names runs, unless they are there."""
    for name in re.findall(r"(?<![\w/-])(?<!run_dir=)runs/[\w-]+", command):
        if not (folder / name).exists():
            shutil.copytree(saved(RUNS.get(name, "weights")), folder / name)


def run_line(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command. One of ``launch/`` runs in this process, because its own would have to import torch again."""
    program = next((word for word in command.split() if "=" not in word), None)
    assert program in RUN_HERE, f"no test runs the command: {command}"
    command = re.sub(r"(?<![\w/.])/data\b", str(folder), command)
    if re.match(r"python launch/\w+\.py ", command) and not re.search(r"[|<>;&$`]", command):
        _, script, *arguments = shlex.split(command)
        answer = run_here(capsys, *arguments, script=folder / script)
    else:
        answer = run_command("bash", "-c", f"cd {folder}; {command}")
    assert answer.status == 0, f"failed: {command}\n{answer.out}{answer.err}"


@pytest.mark.parametrize("page", [page for page in PAGES if has_own_code(page)], ids=lambda page: page.name)
def test_code_of_a_page_runs_from_top_to_bottom(
    page: Path, folder: Path, saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=5)
    names: dict[str, Any] = {"model": model}
    for block in blocks(page):
        for command in own_commands(block):
            add_runs(command, folder, saved)
            run_line(command, folder, capsys)
        if runs_python(page, block):
            add_runs(block.text, folder, saved)
            exec(compile("\n" * block.line + dedent(block.text), page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_of_a_training_command_are_values_that_a_config_takes(page: Path) -> None:
    for command in (command for block in blocks(page) if block.language in COMMANDS for command in commands(block)):
        words = shlex.split(command.partition("launch/train.py")[2])
        if "--config" in words and (config := ROOT / words[words.index("--config") + 1]).exists():
            read_config(config, [word for word in words if "=" in word])


def test_each_test_that_runs_code_of_a_page_exists() -> None:
    for name in (*RUN_ELSEWHERE.values(), *PYTHON_RUN_ELSEWHERE.values()):
        file, _, function = name.partition("::")
        tests = {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not function or function in tests, name


def test_each_code_that_a_test_runs_elsewhere_is_on_a_page() -> None:
    shown = [command for page in PAGES for block in blocks(page) if block.language in COMMANDS for command in commands(block)]
    for pattern in RUN_ELSEWHERE:
        assert any(fnmatchcase(command, pattern) for command in shown), pattern
    for name in PYTHON_RUN_ELSEWHERE:
        assert any(block.language == "python" for page in PAGES if page.name == name for block in blocks(page)), name
