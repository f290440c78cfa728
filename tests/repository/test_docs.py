"""The pages name files, links, commands, config keys and Python names that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import svite_scale
from svite_scale.config.load import field_names, read_config
from svite_scale.config.validate import validate
from tests.repository.pages import BLOCK, DOCS, PAGES, ROOT, blocks

FILES = [
    f"/{path.relative_to(ROOT)}"
    for folder in ("svite_scale", "launch", "configs", "examples", "benchmarks", "tests", "docs")
    for path in (ROOT / folder).rglob("*.*")
]
KEYS = field_names()
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key} - {"model"}  # which is also a variable on the pages

each_page = pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)


def blocks_in(page: Path, language: str) -> list[str]:
    """Returns the code blocks in one language."""
    return [block.text for block in blocks(page) if block.language == language]


def prose(page: Path) -> str:
    """Returns the page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def code(page: Path) -> list[str]:
    """Returns each piece of code on the page: lines of code blocks, and inline code."""
    lines = [line for block in blocks(page) for line in block.text.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_index_has_every_page_once() -> None:
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^\| \[(\w+\.md)\]", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({path.name for path in DOCS} - {"index.md"} | {"CONTRIBUTING.md"})


@each_page
def test_yaml_blocks_are_configs(page: Path, tmp_path: Path) -> None:
    for block in blocks_in(page, "yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(f"run_dir: a\n{block}")
        config = read_config(path)
        if not (config.distillation.teacher or config.sparsity.masks or config.model.weights):  # their files aren't here
            validate(config, world_size=1)


@each_page
def test_files_that_a_page_mentions_exist(page: Path) -> None:
    for text in code(page):
        for name in re.findall(r"(?<![\w/.-])((?:[a-z_]+/)*\w+\.(?:py|sbatch)|configs/[\w/]+\.yaml)(?!\w)", text):
            assert any(path.endswith(f"/{name}") for path in FILES), name


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Yields the scripts that a page calls, each with its arguments."""
    for text in code(page):
        if found := re.search(r"\b((?:launch|benchmarks|examples)/\w+\.py) (.*)", text):
            yield found[1], found[2].partition(" # ")[0]


@each_page
def test_commands_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for script, arguments in commands(page):
        source = (ROOT / script).read_text()
        for option in re.findall(r"(?<!\S)\[?(--[a-z0-9-]+)", arguments):
            assert f'"{option}"' in source, f"{script} {option}"


@each_page
def test_config_keys_on_a_page_exist(page: Path) -> None:
    for text in code(page):
        for key in re.findall(r"(?<![\w./\"])([a-z_]+(?:\.[a-z_]+)+)=", text):
            assert key in KEYS or key.partition(".")[0] not in SECTIONS, key
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) and text.partition(".")[0] in SECTIONS:
            is_section = any(key.startswith(f"{text}.") for key in KEYS)
            assert text in KEYS or is_section or is_python_name(f"svite_scale.{text}"), text


@each_page
def test_python_names_on_a_page_exist(page: Path) -> None:
    for text in code(page):
        for name in re.findall(r"(?<![\w./-])svite_scale(?:\.\w+)+(?![\w/])", text):
            if not name.endswith((".py", ".sbatch")):
                assert is_python_name(name), name
    for block in blocks_in(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(is_python_name(f"{node.module}.{alias.name}") for alias in node.names), ast.unparse(node)


def is_python_name(name: str) -> bool:
    """Returns whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def rows(name: str, *starts: str, cells: int) -> list[list[str]]:
    """Returns the rows of a page's tables that have so many cells and begin with one of these texts."""
    lines = (ROOT / "docs" / name).read_text().replace("**", "").splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in split if len(row) == cells and row[0].startswith(starts)]


def accuracies(table: str) -> dict[str, float]:
    """Returns the mean accuracies of a table of docs/accuracy.md, in percent, by row."""
    page = (ROOT / "docs" / "accuracy.md").read_text().replace("**", "")
    lines = page.partition(f"<!-- evidence: {table} -->\n")[2].partition("<!-- end -->")[0].splitlines()[2:]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: float(row[5]) for row in split}


def test_readme_figures_are_those_of_the_pages() -> None:
    table = [line for line in (ROOT / "README.md").read_text().replace("**", "").splitlines() if line.startswith("|")]
    ends = "{:.2f} to {:.2f}".format
    held = rows("benchmarks.md", "single", "ddp", "fsdp2", "zero", cells=14)
    state = [float(row[10]) for row in held]
    wire = [float(row[13]) for row in held if row[13] != "-"]
    peak = {row[0]: float(row[6]) for row in rows("benchmarks.md", "ZeRO-3", "FSDP2", cells=7) if "/" not in row[1]}
    step = [float(row[3]) for row in rows("benchmarks.md", "DeiT-Small at 224 px, batch", cells=4)]
    (in_blocks,) = rows("blocks.md", "[32, 1]", cells=7)
    gpu = [row for row in rows("benchmarks.md", "DeiT-Base", cells=10) if row[2] == "0.3"]
    weights, in_16x16, tokens = (accuracies(table) for table in ("weights", "blocks", "tokens"))
    for row, figure in (
        ("memory: training state", ends(min(state), max(state))),
        ("peak of a step, above", f"{peak['FSDP2']:.2f}, {peak['ZeRO-3']:.2f}"),
        ("peak of a step on a GPU", ends(float(gpu[0][7]), float(gpu[-1][7]))),
        ("traffic", ends(min(wire), max(wire))),
        ("time of a step on the CPU", f"{step[0]:.2f}, {step[1]:.2f}"),
        ("time of a step in blocks", in_blocks[2]),
        ("time of a step on a GPU", ends(float(gpu[0][5]), float(gpu[-1][5]))),
        ("accuracy at density", f"{weights['90% absent, moving, drop fraction 0.1']:.1f}% / {weights['dense']:.1f}%"),
        ("accuracy in blocks", f"{in_16x16['90% absent, [16, 16], fixed']:.1f}% / {in_16x16['dense']:.1f}%"),
        ("accuracy on letters", f"{tokens['50%, `signal: paper`']:.1f}% | {tokens['50% of the tokens']:.1f}%"),
    ):
        (line,) = (line for line in table if line.startswith(f"| {row}"))
        assert f"| {figure} |" in line


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == svite_scale.__version__
    assert [each["value"] for each in citation["preferred-citation"]["identifiers"]] == ["arXiv:2106.04533"]
    assert len(citation["preferred-citation"]["authors"]) == 6


def test_changelog_has_this_version() -> None:
    assert f"## [{svite_scale.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
