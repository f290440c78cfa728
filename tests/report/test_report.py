"""The command, its files, and its errors."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from svite_scale.saved_run import read_run
from tests.command_line import ROOT, Answer

Saved = Callable[[str], Path]
NO_SELECTOR = "The run has no token selector"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    script = ROOT / "launch" / "report.py"
    capsys.readouterr()
    with patch.object(sys, "argv", [str(script), *map(str, arguments)]), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return Answer(end.value.code, captured.out, captured.err)


class Page(HTMLParser):
    """The sources of a page's images, everything else it points to, and whether its elements are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                kind, _, content = (value or "").partition(",")
                assert kind == "data:image/png;base64"
                self.images.append(b64decode(content, validate=True))
            elif name in ("src", "href", "srcset", "data"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_png(content: bytes) -> None:
    """Of a size that a screen shows, and not blank."""
    image = Image.open(BytesIO(content))
    assert image.format == "PNG"
    assert 150 <= image.width <= 2000
    assert 150 <= image.height <= 2000
    assert np.asarray(image.convert("L")).std() > 5


EXPECTED = {
    "single": {"heads", "neurons", "densities", "curves"},
    "fsdp2": {"heads", "neurons", "densities", "curves"},
    "weights": {"densities", "curves"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_report_writes_pictures_and_one_page(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    answer = command(capsys, "--run", saved(name), "--out", tmp_path / "out")
    assert (answer.status, answer.out, answer.err) == (0, f"{tmp_path}/out/report.html\n", "")
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert pictures.keys() == EXPECTED[name]
    for content in pictures.values():
        check_png(content)
    page = Page(tmp_path / "out" / "report.html")
    assert sorted(page.images) == sorted(pictures.values())
    assert page.links == []
    assert "http" not in re.sub('base64,[^"]*', "", (tmp_path / "out" / "report.html").read_text())
    assert NO_SELECTOR in page.text
    assert ("topology.jsonl has no lines" in page.text) == (name == "weights")


def test_report_writes_to_the_run_directory_by_default(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("single"), tmp_path / "run")
    assert command(capsys, "--run", run_dir, "--checkpoint", "step-00000010").status == 0
    assert "step-00000010, after 10 optimizer steps" in Page(run_dir / "report" / "report.html").text


def test_report_has_a_picture_for_each_selector(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "--run", saved("tokens"), "--images", 10, "--out", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    page = Page(tmp_path / "report.html")
    for name in ("patches-selector0", "patches-selector1"):
        content = (tmp_path / f"{name}.png").read_bytes()
        check_png(content)
        assert content in page.images
    assert len(page.images) == 6
    assert NO_SELECTOR not in page.text
    assert "What block 0 and those after it get: 2 of 4 patches" in page.text
    assert "What block 1 and those after it get: 1 of 4 patches" in page.text


def test_report_names_shards_that_are_gone(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(saved("tokens"), tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace(f"{saved('tokens').parent}/digits/val", "/nowhere/val"))
    answer = command(capsys, "--run", run_dir)
    assert (answer.status, answer.err) == (
        2,
        "report error: data.val = '/nowhere/val-*.tar': no shard matches '/nowhere/val-*.tar'; "
        "correct it, or write shards with launch/make_shards.py\n",
    )
    assert not (run_dir / "report").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def change_mask(run_dir: Path, mask: object) -> None:
    """Of the first layer in the second line."""
    path = run_dir / "topology.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["masks"]["blocks.0.attn.heads"] = mask
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


NEWEST = "checkpoints/step-00000020"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run": (
        lambda run: (run / "config.yaml").unlink(),
        "{run} holds no run: it has no config.yaml; give the run_dir of a run",
    ),
    "no config": (lambda run: (run / "config.yaml").write_text("a: 1"), "a = 1: is no known key; "),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "{run}/checkpoints holds no complete checkpoint; train the run until it saves one",
    ),
    "another model": (
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("depth: 2", "depth: 1")),
        "{run}/checkpoints/step-00000020: model/blocks.1.attn.mask is only in the checkpoint; use the config",
    ),
    "half a line": (
        lambda run: (run / "topology.jsonl").open("a").write('{"step": 17, "ma'),
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
    "out is a file": (lambda run: (run / "report").write_text(""), "can't write to {run}/report ([Errno 17] File exists"),
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
    answer = command(capsys, "--run", saved("single"), "--images", 0)
    assert (answer.status, answer.err) == (2, "report error: --images = 0: is no number of images; use at least 1\n")
