"""The command, its files, and its errors."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from base64 import b64decode
from collections.abc import Callable
from errno import ENOSPC
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from svite_scale.saved_run import read_run
from tests.command_line import ROOT, Answer
from tests.runs import json_lines

Saved = Callable[[str], Path]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    script = ROOT / "launch" / "report.py"
    capsys.readouterr()
    with patch.object(sys, "argv", [str(script), *map(str, arguments)]), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return Answer(end.value.code, captured.out, captured.err)


class Page(HTMLParser):
    """What is on a page, whose elements must be closed in order, and which must hold all it shows."""

    VOID = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = self.title = self.policy = ""
        self.feed(path.read_text())
        self.close()
        assert not self.open
        assert {f"#{name}" for name in self.ids} == {*self.links}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)
        given = {name: value or "" for name, value in attrs}
        assert not [name for name in given if name.startswith("on") or name in ("srcset", "data")]
        if "src" in given:
            kind, _, content = given["src"].partition(",")
            assert (tag, kind) in (("img", "data:image/png;base64"), ("img", "data:image/webp;base64"))
            self.images.append(b64decode(content, validate=True))
        if "id" in given:
            self.ids.append(given["id"])
        if "href" in given:
            self.links.append(given["href"])
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "title":
            self.title = data


BASE = ["summary", "training", "topology", "layers", "cost", "configuration"]
UNITS = [f"run1-blocks.{block}.{unit}.png" for block in (0, 1) for unit in ("attn.heads", "mlp.neurons")]
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "single": ([*BASE[:4], "heads-and-neurons", *BASE[4:]], UNITS),
    "fsdp2": ([*BASE[:4], "heads-and-neurons", *BASE[4:]], UNITS),
    "weights": (BASE, []),
    "blocks": (BASE, []),
}
"""By run, the sections of its page and the pictures."""


@pytest.mark.parametrize("name", EXPECTED)
def test_report_has_the_sections_that_the_run_can_fill(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    answer = command(capsys, "--run", saved(name), "--out", tmp_path / "out")
    assert (answer.status, answer.out, answer.err) == (0, f"{tmp_path}/out/report.html\n", "")
    sections, pictures = EXPECTED[name]
    page = Page(tmp_path / "out" / "report.html")
    assert (page.title, page.ids) == (name, sections)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "pictures").glob("*")}
    assert files.keys() == {*pictures}
    assert sorted(page.images) == sorted(files.values())
    assert ("Sent by a rank in a step" in page.text) == ("2 ranks" in page.text) == (name == "fsdp2")
    assert "Training state of a rank" in page.text
    assert "http:" not in page.text
    assert "https:" not in page.text


def test_report_writes_to_the_run_directory_by_default(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("single"), tmp_path / "run")
    assert command(capsys, "--run", run_dir, "--checkpoint", "step-00000010").status == 0
    page = Page(run_dir / "report" / "report.html")
    assert "step-00000010" in page.text
    assert "not finished, 50% done" in page.text


def test_report_shows_the_numbers_of_the_run(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "--run", saved("weights"), "--out", tmp_path).status == 0
    text = Page(tmp_path / "report.html").text
    last = json_lines(saved("weights") / "metrics.jsonl")[-1]
    for metric, places in (("accuracy", 2), ("eval_accuracy", 1), ("eval_ema_accuracy", 2)):
        assert text.count(f"{100 * last[metric]:.1f}".removesuffix(".0") + "%") >= places, metric
    assert f"evaluation {last['eval_loss']:.3g}" in text
    # 8 x 8 pixels in patches of 4: 5 tokens, width 32. Linear layers of 2 blocks, patches, head; two products of attention.
    macs = 2 * 5 * 12 * 32**2 + 4 * 16 * 32 + 10 * 32 + 2 * 2 * 5 * 5 * 32
    assert f"of {macs / 1000:.0f} k, forward" in text


def test_report_shows_how_blocks_and_single_weights_moved_and_what_is_multiplied(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "--run", saved("blocks"), "--out", tmp_path).status == 0
    text = Page(tmp_path / "report.html").text
    for words in ("svite, density 0.5, blocks of 16 x 4", "Blocks moved", "Weights moved", "of the dense ones, on cpu"):
        assert words in text
    assert "Active part of each layer's blocks and weights." in text
    # Half of each layer's weights are active, the head's inactive ones are multiplied too, and attention's products are whole.
    half, rest = (2 * 5 * 12 * 32**2 + 4 * 16 * 32) // 2, 2 * 2 * 5 * 5 * 32
    dense = 2 * half + 10 * 32 + rest
    assert f"{(half + 10 * 32 // 2 + rest) / 1000:.3g} k{100 * (half + 10 * 32 // 2 + rest) / dense:.1f}%" in text
    assert f"MACs multiplied{(half + 10 * 32 + rest) / 1000:.3g} k" in text


def test_report_has_a_picture_for_each_image_and_selector(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, "--run", saved("tokens"), "--images", 10, "--out", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    page = Page(tmp_path / "report.html")
    for selector in (0, 1):
        shown = [path.read_bytes() for path in (tmp_path / "pictures").glob(f"run1-selector{selector}-sample*.webp")]
        assert len(shown) == 10
        assert {*shown} <= {*page.images}
    assert len(page.images) == 2 * 10 + len(UNITS)
    assert "What block 0 and those after it get: 2 of 4 patches" in page.text
    assert "What block 1 and those after it get: 1 of 4 patches" in page.text


def test_report_says_which_shards_are_gone(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(saved("tokens"), tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace(f"{saved('tokens').parent}/digits/val", "/nowhere/val"))
    assert command(capsys, "--run", run_dir).status == 0
    page = Page(run_dir / "report" / "report.html")
    assert "kept-patches" not in page.ids
    assert "Kept patches are left out: data.val = '/nowhere/val-*.tar': no shard matches '/nowhere/val-*.tar'; " in page.text


def going(saved: Saved, run_dir: Path) -> Path:
    """Leaves of a run what there is after 6 of its 20 steps, before its first checkpoint, while it writes a line."""
    run_dir.mkdir()
    shutil.copy(saved("fsdp2") / "config.yaml", run_dir)
    for name, lines in (("metrics.jsonl", 6), ("topology.jsonl", 2)):
        text = (saved("fsdp2") / name).read_text().splitlines(keepends=True)
        (run_dir / name).write_text("".join(text[:lines]) + text[lines][:20])
    return run_dir


def test_report_shows_a_run_that_is_still_going(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = going(saved, tmp_path / "run")
    answer = command(capsys, "--run", run_dir)
    assert (answer.status, answer.err) == (0, "")
    page = Page(run_dir / "report" / "report.html")
    assert page.ids == EXPECTED["fsdp2"][0]
    assert "not finished, 30% done" in page.text
    assert "6of 20, epoch 1.2 of 4" in page.text
    assert "none yet" in page.text
    assert "2 ranks" in page.text
    assert "Training state of a rank" in page.text
    assert len(page.images) == len(UNITS)


def test_report_shows_a_run_that_has_logged_nothing_yet(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = going(saved, tmp_path / "run")
    for name in ("metrics.jsonl", "topology.jsonl"):
        (run_dir / name).unlink()
    assert command(capsys, "--run", run_dir).status == 0
    page = Page(run_dir / "report" / "report.html")
    assert page.ids == ["summary", "layers", "cost", "configuration"]
    assert "0 steps done" in page.text


def test_report_compares_runs_on_one_page(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [shutil.copytree(saved(name), tmp_path / folder / "run") for name, folder in (("weights", "a"), ("single", "b"))]
    answer = command(capsys, "--run", runs[0], "--run", runs[1])
    assert (answer.status, answer.out) == (0, f"{runs[0]}/comparison/report.html\n")
    page = Page(runs[0] / "comparison" / "report.html")
    assert page.title == f"{runs[0]} and {runs[1]}"
    assert page.ids == EXPECTED["single"][0]
    for option in ("sparsity.density", "sparsity.structured.heads", "train.ema_decay"):
        assert option in page.text
    assert "sparsity.update_everytrain" not in page.text
    assert {path.name for path in (runs[0] / "comparison" / "pictures").iterdir()} == {
        name.replace("run1", "run2") for name in UNITS
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def change_mask(run_dir: Path, mask: object) -> None:
    """Of the first layer in the second line."""
    path = run_dir / "topology.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["masks"]["blocks.0.attn.heads"] = mask
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def remove_manifests(run_dir: Path) -> None:
    for path in run_dir.glob("checkpoints/*/manifest.json"):
        path.unlink()


NEWEST = "checkpoints/step-00000020"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run": (
        lambda run: (run / "config.yaml").unlink(),
        "{run} holds no run: it has no config.yaml; give the run_dir of a run",
    ),
    "no config": (lambda run: (run / "config.yaml").write_text("a: 1"), "a = 1: is no known key; "),
    "no complete checkpoint": (
        remove_manifests,
        "{run}/checkpoints holds no complete checkpoint; train the run until it saves one",
    ),
    "another model": (
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("depth: 2", "depth: 1")),
        "{run}/checkpoints/step-00000020: model/blocks.1.attn.mask is only in the checkpoint; use the config",
    ),
    "half a line": (
        lambda run: (run / "topology.jsonl").open("a").write('{"step": 17, "ma\n'),
        "{run}/topology.jsonl: line 6 is damaged (JSONDecodeError",
    ),
    "no hexadecimal": (
        lambda run: change_mask(run, "xy"),
        "{run}/topology.jsonl: the line of step 4, layer blocks.0.attn.heads, is damaged (ValueError",
    ),
    "short mask": (
        lambda run: change_mask(run, ""),
        "{run}/topology.jsonl: the line of step 4, layer blocks.0.attn.heads, is damaged (ValueError",
    ),
    "no object": (lambda run: (run / "metrics.jsonl").write_text("3\n"), "{run}/metrics.jsonl: line 1 is damaged (TypeError"),
    "out is a file": (lambda run: (run / "report").write_text(""), "can't write to {run}/report ([Errno 20] Not a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_report_fails_in_one_line_when_a_file_cannot_be_read(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run_dir = shutil.copytree(saved("single"), tmp_path / "run")
    do, message = DAMAGE[damage]
    do(run_dir)
    answer = command(capsys, "--run", run_dir)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("report error: " + message.format(run=run_dir)), answer.err
    assert len(answer.err.splitlines()) == 1, answer.err
    assert not (run_dir / "report").is_dir()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", "manifest.json"])
def test_an_incomplete_or_corrupt_checkpoint_is_skipped_unless_it_is_named(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run_dir = shutil.copytree(saved("single"), tmp_path / "run")
    truncate(run_dir / NEWEST / name)
    assert read_run(run_dir).checkpoint.name == "step-00000010"
    answer = command(capsys, "--run", run_dir, "--checkpoint", "step-00000020")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith(f"report error: {run_dir}/{NEWEST} is incomplete or corrupt: ")
    assert name in answer.err
    assert answer.err.endswith("; restore it, or give another --checkpoint\n")


def test_report_refuses_wrong_arguments_in_one_line(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "--run", saved("single"), "--checkpoint", "step-00000011")
    assert answer.status == 2
    assert "holds no checkpoint 'step-00000011'; give --checkpoint one of step-00000010, step-00000020\n" in answer.err
    answer = command(capsys, "--run", saved("single"), "--run", saved("weights"), "--checkpoint", "step-00000010")
    assert (answer.status, answer.err) == (
        2,
        "report error: --checkpoint = 'step-00000010': names a checkpoint of one run, not of 2; leave it out\n",
    )
    answer = command(capsys, "--run", saved("single"), "--images", 0)
    assert (answer.status, answer.err) == (2, "report error: --images = 0: is no number of images; use at least 1\n")


def test_report_of_a_run_without_checkpoints_needs_no_file_of_first_weights(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = going(saved, tmp_path / "run")
    text = (run_dir / "config.yaml").read_text()
    assert "  weights: null\n" in text
    (run_dir / "config.yaml").write_text(text.replace("  weights: null\n", "  weights: /nowhere/vit.safetensors\n"))
    answer = command(capsys, "--run", run_dir)
    assert (answer.status, answer.err) == (0, "")
    assert Page(run_dir / "report" / "report.html").ids == EXPECTED["fsdp2"][0]


def test_report_removes_its_former_pictures_only(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("single", "weights"):
        assert command(capsys, "--run", saved(name), "--out", tmp_path).status == 0
        (tmp_path / "pictures" / "mine.png").touch()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["mine.png"]


def test_report_keeps_the_former_page_when_the_disk_is_full(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("former")

    def fill_disk(path: Path, *_: object, **__: object) -> int:
        path.touch()
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_disk)
    answer = command(capsys, "--run", saved("weights"), "--out", tmp_path)
    assert (answer.status, answer.out) == (2, "")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "former")]


def write_evaluation(run_dir: Path) -> None:
    """What ``launch/evaluate.py`` writes, of numbers that are no run's own."""
    folder = run_dir / "evaluation" / "step-00000016"
    folder.mkdir(parents=True)
    found = {"accuracy": 0.8125, "top5": 0.9375, "loss": 0.71828, "calibration_error": 0.0625, "samples": 1234, "data": "x"}
    found |= {"labels": None, "label_map": None, "checkpoint_digest": read_run(run_dir).digest}
    (folder / "evaluation.json").write_text(json.dumps(found))
    classes = [("zebra", 0.75, 8), ("ant", 0.25, 4), (None, 1.0, 2), ("yak", None, 0)]
    rows = [{"label": row, "name": name, "accuracy": acc, "samples": n} for row, (name, acc, n) in enumerate(classes)]
    (folder / "per_class.json").write_text(json.dumps(rows))
    Image.new("RGB", (30, 20)).save(folder / "confusion.png")


def test_report_shows_what_evaluate_has_found(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    write_evaluation(run_dir)
    assert command(capsys, "--run", run_dir).status == 0
    page = Page(run_dir / "report" / "report.html")
    assert page.ids == [*BASE[:2], "evaluation", *BASE[2:]]
    assert page.images == [(run_dir / "evaluation" / "step-00000016" / "confusion.png").read_bytes()]
    for text in ("accuracy81.2%", "top 593.8%", "calibration error6.2%", "loss0.718", "samples1,234"):
        assert text in page.text, text
    assert "ant25%4\nzebra75%8\n2100%2" in page.text, "the hardest first"
    assert "yak" not in page.text
    assert "Measured on x, with the labels of the shards." in page.text


def test_report_shows_an_evaluation_by_labels_of_its_own_whose_loss_is_not_finite(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    write_evaluation(run_dir)
    path = run_dir / "evaluation" / "step-00000016" / "evaluation.json"
    found = json.loads(path.read_text()) | {"loss": None, "calibration_error": None}
    for labels, places in (({}, 2), ({"labels": "own.json", "label_map": "map.json"}, 1)):
        path.write_text(json.dumps(found | labels))
        answer = command(capsys, "--run", run_dir)
        assert (answer.status, answer.err) == (0, "")
        text = Page(run_dir / "report" / "report.html").text
        assert text.count("lossnot finite") == places, "in the section, and on the card for the data's own labels"
        assert text.count("calibration errornot finite") == places
    assert "Measured on x, with the labels of own.json and the label map map.json." in text


def test_report_leaves_out_the_evaluation_of_a_former_checkpoint(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was trained again has checkpoints of the same names."""
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    write_evaluation(run_dir)
    manifest = run_dir / "checkpoints" / "step-00000016" / "manifest.json"
    manifest.write_text(f"{manifest.read_text()} ")
    assert command(capsys, "--run", run_dir).status == 0
    page = Page(run_dir / "report" / "report.html")
    assert "evaluation" not in page.ids
    assert "81.2" not in page.text


def test_report_has_the_model_card_of_the_checkpoint(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "--run", saved("weights"), "--out", tmp_path).status == 0
    text = Page(tmp_path / "report.html").text
    assert "Model card" in text
    assert "An image classifier: vit_tiny_patch16_224 with 10 classes" in text
    assert "blocks.*.attn.qkv" in text
    assert f"torch{version('torch')}" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("per_class.json", "3"),
        ("per_class.json", '[{"samples": 1}]'),
        ("evaluation.json", '{"accuracy": "<b>", "checkpoint_digest": "DIGEST"}'),
        ("evaluation.json", "3"),
        ("confusion.png", "GIF"),
    ],
)
def test_report_refuses_a_damaged_evaluation_in_one_line(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    write_evaluation(run_dir)
    path = run_dir / "evaluation" / "step-00000016" / name
    path.write_text(content.replace("DIGEST", read_run(run_dir).digest))
    answer = command(capsys, "--run", run_dir)
    assert answer.status == 2
    assert re.fullmatch(rf"report error: {path} (can't be read|is damaged) \(.*\n", answer.err), answer.err
