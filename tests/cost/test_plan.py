"""``--dry-run``: the plan adds up, for every config that ships."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.models.options import StructuredConfig
from tests.command_line import ROOT, run_here
from tests.cost.costs import count

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROW = re.compile(
    r"(?P<name>\S.*?) +(?P<shape>[\dx]* )? +(?P<density>[01]\.\d{4}) +(?P<active>[\d,]+) +(?P<total>[\d,]+)(?P<rest>.*)"
)
BYTES = re.compile(r"  (?P<kind>[a-z ]*[a-z]) +(?P<packed>[\d,]+) +(?P<dense>[\d,]+) +(?P<ratio>[\d.]+|-)")


def number(text: str) -> int:
    return int(text.replace(",", ""))


def rows(plan: str, pattern: re.Pattern[str]) -> list[dict[str, str]]:
    return [match.groupdict() for match in map(pattern.fullmatch, plan.splitlines()) if match]


WIDTHS = {"tiny": 192, "small": 384, "base": 768}
"""Features of a DeiT's tokens."""


def absent_biases(config: Config) -> int:
    """Of queries, keys and values of absent heads, 64 features each, and of absent neurons, 4 times as many as features."""
    width = WIDTHS.get(config.model.name.split("_")[1], 0)
    heads, neurons, structured = width // 64, 4 * width, config.sparsity.structured
    return 12 * (3 * 64 * (heads - int(heads * structured.heads)) + neurons - int(neurons * structured.neurons))


def selector_parameters(config: Config) -> int:
    """Of four queries, of the 64 numbers that they keep of tokens, and of the logits of these."""
    width, classes = WIDTHS[config.model.name.split("_")[1]], config.model.num_classes
    return 4 * width + 64 * width + 64 * classes + classes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_of_each_shipped_config_adds_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = "model.weights=null"  # the files of weights aren't here
    answer = run_here(capsys, "--config", str(path), "--dry-run", "--ranks", "4", drawn)
    assert (answer.status, answer.err) == (0, "")
    config = read_config(path, [drawn])
    *layers, total = rows(answer.out, ROW)
    assert len(layers) == 4 * (config.model.depth or 12) + 2
    for layer in layers:
        numel = 1
        for size in layer["shape"].strip().split("x"):
            numel *= int(size)
        assert numel == number(layer["total"])
        assert float(layer["density"]) == pytest.approx(number(layer["active"]) / numel, abs=5e-5)
        assert ("stays dense" in layer["rest"]) == (layer["active"] == layer["total"])
    assert total["name"] == "all prunable"
    for column in ("active", "total"):
        assert sum(number(layer[column]) for layer in layers) == number(total[column])
    if config.sparsity.structured == StructuredConfig():
        error = abs(number(total["active"]) - config.sparsity.density * number(total["total"]))
        assert error <= math.prod(config.sparsity.block), "blocks and single weights are rounded each"

    parameters = re.search(r"parameters +([\d,]+) active of ([\d,]+)", answer.out)
    assert parameters is not None
    active, dense = map(number, parameters.groups())
    selecting = selector_parameters(config) if config.sparsity.tokens.keep else 0
    assert dense - active + selecting == number(total["total"]) - number(total["active"]) + absent_biases(config)
    cost = count(config)
    lines = {
        "forward, one image": cost.sparse_macs,
        "multiplied on cpu": cost.multiplied_macs,
        "multiplied on cuda": count(config, "cuda").multiplied_macs,
    }
    for label, count_of in lines.items():
        macs = re.search(rf"\n{label} +([\d.]+) of ([\d.]+) GMACs: ([\d.]+)% fewer\n", answer.out)
        assert macs is not None
        assert [float(group) for group in macs.groups()] == [
            pytest.approx(count_of / 1e9, abs=5e-5),
            pytest.approx(cost.dense_macs / 1e9, abs=5e-5),
            pytest.approx(100 * (1 - count_of / cost.dense_macs), abs=5e-3),
        ]
    assert f"{config.train.global_batch_size:,} samples" in answer.out

    *kinds, everything = rows(answer.out, BYTES)
    assert everything["kind"] == "all"
    for column in ("packed", "dense"):
        assert sum(number(kind[column]) for kind in kinds) == number(everything[column])
    for kind in (*kinds, everything):
        dense_bytes = number(kind["dense"])
        assert kind["ratio"] == (f"{number(kind['packed']) / dense_bytes:.3f}" if dense_bytes else "-")
    moments = next(kind for kind in kinds if kind["kind"] == "moments")
    assert (number(moments["packed"]), number(moments["dense"])) == (8 * -(-active // 4), 8 * -(-dense // 4))


def test_dry_run_divides_bytes_by_the_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    totals = []
    for arguments in ([], ["--ranks", "2"], ["--ranks", "4"]):
        answer = run_here(capsys, "--config", config, "--dry-run", *arguments)
        assert answer.status == 0
        assert f"deepspeed ZeRO-3, fp32, {arguments[-1] if arguments else 1} rank(s)" in answer.out
        totals.append(number(rows(answer.out, BYTES)[-1]["packed"]))
    assert totals[0] == pytest.approx(2 * totals[1], rel=1e-3)
    assert totals[0] == pytest.approx(4 * totals[2], rel=1e-3)


def test_dry_run_refuses_ranks_that_cannot_share_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    answer = run_here(capsys, "--config", config, "--dry-run", "--ranks", "3", "train.global_batch_size=128")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == (
        "config error: train.global_batch_size = 128: is not divisible by world size (3) x train.accumulation_steps (1); "
        "use a multiple of 3\n"
    )
    for ranks in ("0", "-2"):
        answer = run_here(capsys, "--config", config, "--dry-run", "--ranks", ranks)
        assert (answer.status, answer.out) == (2, "")
        assert answer.err == f"config error: --ranks = {ranks}: is no number of processes; use at least 1\n"


def test_dry_run_needs_no_shards_and_leaves_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "deit_tiny_s30.yaml")
    answer = run_here(capsys, "--config", config, "--dry-run", f"run_dir={tmp_path}/run", "parallel.backend=single")
    assert answer.status == 0
    assert "single, bf16, 1 rank(s)" in answer.out
    assert list(tmp_path.iterdir()) == []


QUICKSTART = ("--config", str(ROOT / "configs" / "quickstart.yaml"), "--dry-run", "parallel.backend=single")


def test_dry_run_marks_layers_kept_dense_and_leaves_them_out(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, *QUICKSTART, 'sparsity.keep_dense=["patch_embed.*", head]')
    assert (answer.status, answer.err) == (0, "")
    *layers, total = rows(answer.out, ROW)
    assert [layer["name"] for layer in layers if layer["rest"] == "  kept dense"] == ["patch_embed.proj", "head"]
    assert not [layer for layer in layers if "stays dense" in layer["rest"]]
    counted = [layer for layer in layers if not layer["rest"]]
    assert number(total["total"]) == sum(number(layer["total"]) for layer in counted)
    assert number(total["active"]) == round(0.3 * number(total["total"]))
    assert total["density"] == "0.3000"


def test_dry_run_marks_layers_whose_density_was_raised(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    raising = [*QUICKSTART, "sparsity.density=0.001", "sparsity.distribution=uniform"]
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    answer = run_here(capsys, *raising, "parallel.backend=ddp", launcher=launcher)
    assert (answer.status, answer.out) == (0, "")
    assert caplog.messages == [], "nor where it builds the model"
    answer = run_here(capsys, *raising)
    assert answer.status == 0
    raised = [layer for layer in rows(answer.out, ROW) if layer["rest"] == "  raised to one weight"]
    assert [(layer["name"], layer["active"]) for layer in raised] == [("head", "1")]
    assert caplog.messages == ["layers whose part of the density is below one weight or block keep one each (1): head"]
    assert number(rows(answer.out, ROW)[-1]["active"]) == round(0.001 * number(rows(answer.out, ROW)[-1]["total"]))


def test_dry_run_says_which_layers_are_in_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """The quick start's patches have 49 pixels, which 4 doesn't divide, and its head is kept dense by ERK."""
    answer = run_here(capsys, *QUICKSTART, "sparsity.block=[16, 4]")
    assert answer.status == 0
    *layers, _ = rows(answer.out, ROW)
    remarks = {layer["name"]: layer["rest"].strip() for layer in layers}
    assert remarks.pop("patch_embed.proj") == "single weights: 16 x 4 doesn't divide it"
    assert remarks.pop("head") == "stays dense"
    assert {*remarks.values()} == {"blocks of 16 x 4"}
    assert all(number(layer["active"]) % 64 == 0 for layer in layers if layer["name"].startswith("blocks."))

    large = ("sparsity.block=[32, 64]", "sparsity.density=0.2", "sparsity.distribution=uniform")
    answer = run_here(capsys, *QUICKSTART, *large)
    raised = [layer for layer in rows(answer.out, ROW) if layer["rest"] == "  blocks of 32 x 64  raised to one block"]
    assert [(layer["shape"].strip(), layer["active"]) for layer in raised] == [("64x64", "2,048")] * 4


def test_dry_run_shows_densities_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, *QUICKSTART, "sparsity.density=1.0", 'sparsity.densities={"*.mlp.*": 0.25, "*": 0.5}')
    assert answer.status == 0
    *layers, _ = rows(answer.out, ROW)
    assert {layer["density"] for layer in layers if ".mlp." in layer["name"]} == {"0.2500"}
    assert {layer["density"] for layer in layers if ".mlp." not in layer["name"]} == {"0.5000"}


def test_dry_run_shows_the_tokens_that_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """The quick start's model has 16 patches and a class token."""
    answer = run_here(capsys, *QUICKSTART, "sparsity.tokens.keep=0.7", "sparsity.tokens.blocks=[0, 2]")
    assert (answer.status, answer.err) == (0, "")
    assert "\ntokens              17, then 12, then 8\n" in answer.out
    assert "\ntokens" not in run_here(capsys, *QUICKSTART).out
    answer = run_here(capsys, *QUICKSTART, "sparsity.tokens.keep=0.05")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == (
        "config error: sparsity.tokens.keep = 0.05: keeps 1 of 17 tokens, and the 1 prefix tokens always stay, "
        "so no patch would; raise it\n"
    )
