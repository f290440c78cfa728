"""The run directory may be somebody else's: a report runs nothing in it, and shows nothing of it as HTML."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.test_checkpoint_choice import rewrite_manifest
from tests.checkpoint.test_hostile_checkpoints import PROOF, Code
from tests.report.test_report import Page, Saved, command


def poison_metadata(run: Path) -> None:
    step = run / "checkpoints" / "step-00000016"
    content = pickle.loads((step / ".metadata").read_bytes())
    (step / ".metadata").write_bytes(pickle.dumps((content, Code())))
    (step / "manifest.json").unlink()
    rewrite_manifest(step)


def edit_config(old: str, new: str) -> Callable[[Path], object]:
    def edit(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))

    return edit


def make_directory_of(name: str) -> Callable[[Path], object]:
    def make(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return make


def make_pipe_of(name: str) -> Callable[[Path], object]:
    def make(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return make


def link_to_victim(name: str) -> Callable[[Path], object]:
    """Puts a link to the folder ``victim`` beside the run."""

    def link(run: Path) -> None:
        (run.parent / "victim").mkdir()
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(run.parent / "victim")

    return link


def add_metrics(line: str) -> Callable[[Path], object]:
    return lambda run: (run / "metrics.jsonl").open("a").write(line + "\n")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code in a checkpoint": (
        poison_metadata,
        "{run}/checkpoints/step-00000016/.metadata can't be read: it names 'posix.mkdir'",
    ),
    "code in the config": (
        edit_config("method: ", f"method: !!python/object/apply:os.mkdir ['{PROOF}'] # "),
        "config = '{run}/config.yaml': is no valid YAML: line ",
    ),
    "a deep config": (
        lambda run: (run / "config.yaml").write_text("a: " + "[" * 10_000),
        "config = '{run}/config.yaml': is no",
    ),
    "text as a number": (
        add_metrics('{"step": 16, "drop_fraction": "<script>"}'),
        "metrics.jsonl: drop_fraction of step 16 is damaged",
    ),
    "a step below 0": (add_metrics(f'{{"step": -1{"0" * 400}}}'), "{run}/metrics.jsonl: line "),
    "a step that is none": (add_metrics('{"step": 1e999}'), "{run}/metrics.jsonl: line "),
    "a summary of text": (lambda run: (run / "summary.json").write_text("[]"), "{run}/summary.json can't be read (TypeError"),
    "no ranks": (
        lambda run: (run / "summary.json").write_text('{"steps": 1, "seconds": 1, "world_size": 0, "device": "cpu"}'),
        "{run}/summary.json can't be read (TypeError(\"world_size is '0'\"",
    ),
    "a deep line": (add_metrics("[" * 10**5), "{run}/metrics.jsonl: line "),
    "no file": (
        make_directory_of("metrics.jsonl"),
        "{run}/metrics.jsonl can't be read ({run}/metrics.jsonl is no ordinary file",
    ),
    "metrics in a pipe": (
        make_pipe_of("metrics.jsonl"),
        "{run}/metrics.jsonl can't be read ({run}/metrics.jsonl is no ordinary",
    ),
    "a summary in a pipe": (make_pipe_of("summary.json"), "{run}/summary.json can't be read (OSError("),
    "a report that is a link": (link_to_victim("report"), "{run}/report is a link, which a report doesn't follow; remove it"),
    "pictures that are a link": (link_to_victim("report/pictures"), "{run}/report/pictures is a link, which a report doesn't"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_report_refuses_a_hostile_run_without_running_it(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    poison, message = HOSTILE[kind]
    poison(run_dir)
    answer = command(capsys, "--run", run_dir)
    assert not PROOF.exists()
    assert not [*(tmp_path / "victim").glob("*")]
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("report error: " + message.format(run=run_dir)), answer.err
    assert len(answer.err.splitlines()) == 1, answer.err


def test_a_report_leaves_out_shards_of_a_command_in_the_config(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("tokens"), tmp_path / "run")
    shards = f"{saved('tokens').parent}/digits/val-*.tar"
    edit_config(shards, f"'pipe:mkdir {PROOF} #a.tar'")(run_dir)
    arguments = ("--run", run_dir, "--images", 2, "--out", tmp_path / "out")
    assert command(capsys, *arguments).status == 0
    assert not PROOF.exists()
    page = Page(tmp_path / "out" / "report.html")
    assert (
        f"Kept patches are left out: {run_dir}/config.yaml: data.val = 'pipe:mkdir {PROOF} #a.tar' is a command, and commands "
        "in a run directory are not run; give other shards (--val, or data.val=SHARDS), or that command if you trust it"
    ) in page.text
    assert len(page.images) == 4
    answer = command(capsys, *arguments, "--val", shards)
    assert (answer.status, answer.err) == (0, "")
    assert len(Page(tmp_path / "out" / "report.html").images) == 4 + 2 * 2


def test_a_report_replaces_links_to_files_and_leaves_their_targets(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("single"), tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run_dir / "report" / "pictures").mkdir(parents=True)
    for name in ("report.html", f".report.html.{os.getpid()}.tmp", "pictures/run1-blocks.0.attn.heads.png"):
        (run_dir / "report" / name).symlink_to(victim)
    assert command(capsys, "--run", run_dir).status == 0
    assert victim.read_text() == "precious"
    assert Page(run_dir / "report" / "report.html").title == "run"


def test_a_page_shows_names_as_text(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "<script>alert(1)<script>")
    answer = command(capsys, "--run", run_dir, "--out", tmp_path / "out")
    assert (answer.status, answer.err) == (0, "")
    page = Page(tmp_path / "out" / "report.html")  # which lets no script in
    assert page.title == "<script>alert(1)<script>"
    assert "style-src 'unsafe-inline'; img-src data:" in page.policy


def test_a_report_leaves_out_values_that_no_chart_can_show(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    huge = "1" + "0" * 400
    add_metrics(f'{{"step": 16, "loss": {huge}, "accuracy": -1e308, "lr": NaN, "layers/ever_active/head": Infinity}}')(run_dir)
    add_metrics(f'{{"step": {huge}, "loss": 1}}')(run_dir)
    answer = command(capsys, "--run", run_dir, "--out", tmp_path / "out")
    assert (answer.status, answer.err) == (0, "")
    text = Page(tmp_path / "out" / "report.html").text
    assert "nan" not in text.lower()
    assert "inf%" not in text


def test_a_report_draws_values_that_are_very_small_or_far_below_0(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    line = '{"step": 16, "samples_per_second": 5e-324, "data_wait": -1e-320, "lr": -1e25, "epoch": 5e-324}\n'
    (run_dir / "metrics.jsonl").write_text(line)
    answer = command(capsys, "--run", run_dir, "--out", tmp_path / "out")
    assert (answer.status, answer.err) == (0, "")
    assert "Images per second" in Page(tmp_path / "out" / "report.html").text
