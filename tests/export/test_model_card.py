"""Model cards: as a model hub reads them, and their numbers against the files of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from svite_scale.config.load import flatten_config, read_config, to_dict
from svite_scale.cost.flops import count_flops
from svite_scale.errors import ExportError, RunError
from svite_scale.export.model_card import last_accuracy, recipe, run_tables
from svite_scale.export.write import export_run
from svite_scale.saved_run import SavedRun, load_model, read_run
from tests.report.by_hand import tensors, unit_masks, unpacked
from tests.runs import metrics_of

Saved = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EVALUATION: dict[str, Any] = {
    "accuracy": 0.5,
    "top5": 0.75,
    "loss": 1.25,
    "samples": 1234,
    "calibration_error": 0.0625,
    "data": "/secret/folder/imagenet/val-*.tar",
    "labels": None,
    "label_map": None,
}


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = read_run(saved("weights"))
    return export_run(run, "timm", tmp_path_factory.mktemp("card") / "out", ema=True, license="apache-2.0")


def test_hub_reads_the_front_matter(saved: Saved, exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    (result,) = data.eval_results
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(metrics_of(saved("weights"))[-1]["eval_ema_accuracy"], abs=1e-6)
    assert data.model_name == "weights"


def test_card_shows_no_path_of_the_machine(saved: Saved, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert "digits/val-" in text
    assert str(saved("weights").parent) not in text


def tables_of(run: SavedRun) -> dict[str, dict[str, str]]:
    model = load_model(run)
    return run_tables(run, model, count_flops(model, run.config.model.image_size))


def test_densities_and_parameters_are_those_of_the_checkpoint(saved: Saved) -> None:
    run = read_run(saved("weights"))
    by_hand, tables = tensors(run.checkpoint), tables_of(run)
    masks = [f"blocks.{block}.mlp.fc1.mask" for block in (0, 1)]
    active = sum(int(unpacked(by_hand[name], 32 * 128).sum()) for name in masks)
    expected = f"{active / 8192:.4f}: {active:,} of 8,192 weights in 2 layers"
    assert tables["Density"]["blocks.*.mlp.fc1"] == expected
    parameters = sum(tensor.size for name, tensor in by_hand.items() if not name.endswith(".mask"))
    assert tables["Cost"]["parameters"].startswith(f"{parameters:,} active of 26,538 ")


def test_densities_count_blocks_and_the_cost_what_is_multiplied(saved: Saved) -> None:
    tables = tables_of(read_run(saved("blocks")))
    assert tables["Density"]["blocks.*.mlp.fc1"] == "0.5000: 64 of 128 blocks in 2 layers"
    assert tables["Density"]["head"] == "0.5000: 160 of 320 weights in 1 layer"
    needed, taken = (
        int(tables["Cost"][name].split(" of ")[0].replace(",", ""))
        for name in ("multiply-accumulates of an image", "multiplied by svite_scale on cpu")
    )
    assert taken == needed + 160, "the head is multiplied dense"


def test_densities_count_heads_and_neurons(saved: Saved) -> None:
    run = read_run(saved("single"))
    heads = sum(int(mask.sum()) for name, mask in unit_masks(run.checkpoint).items() if name.endswith("heads"))
    found = tables_of(run)["Density"]
    assert found["blocks.*.attn.heads"] == f"{heads / 16:.4f}: {heads} of 16 heads in 2 layers"
    assert found["blocks.*.mlp.neurons"].endswith(" of 256 neurons in 2 layers")


def test_accuracy_is_that_of_evaluate_where_it_ran(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("weights"), tmp_path / "run")
    run = read_run(tmp_path / "run")
    before, line = last_accuracy(run), metrics_of(tmp_path / "run")[-1]
    assert before is not None
    assert before.top1 == line["eval_accuracy"] != line["eval_ema_accuracy"]
    assert before.values["top-5"] == f"{100 * line['eval_top5']:.2f}%"
    assert before.source == "by the run itself, after step 16"
    folder = tmp_path / "run" / "evaluation" / "step-00000016"
    folder.mkdir(parents=True)

    def evaluated(**changes: Any) -> None:
        found = {**EVALUATION, "checkpoint_digest": run.digest, **changes}
        (folder / "evaluation.json").write_text(json.dumps(found))

    evaluated()
    after = last_accuracy(run)
    assert after is not None
    assert (after.top1, after.data, after.source) == (0.5, "imagenet/val-*.tar", "by launch/evaluate.py")
    assert after.values == {
        "top-1": "50.00%",
        "top-5": "75.00%",
        "loss": "1.2500",
        "calibration error": "0.0625",
        "images": "1,234",
    }
    assert last_accuracy(run, ema=True) != after, "the average was not evaluated"
    for changes in ({"labels": "real.json"}, {"label_map": "imagenet_r.txt"}, {"checkpoint_digest": "0" * 64}):
        evaluated(**changes)
        assert last_accuracy(run) == before, changes
    evaluated(accuracy="<b>high</b>")
    with pytest.raises(ExportError, match=rf"^{folder}/evaluation.json is damaged"):
        last_accuracy(run)
    (folder / "evaluation.json").write_text("[]")
    with pytest.raises(RunError, match=rf"^{folder}/evaluation.json can't be read"):
        last_accuracy(run)
    run.metrics[-1]["eval_ema_accuracy"] = "<b>high</b>"
    with pytest.raises(ExportError, match=rf"^{tmp_path}/run/metrics.jsonl is damaged"):
        last_accuracy(run, ema=True)
    run.metrics.clear()
    assert last_accuracy(run, ema=True) is None


def test_recipe_gives_the_config_again_but_for_the_machine(saved: Saved, tmp_path: Path) -> None:
    config = read_run(saved("single")).config
    values, hidden = recipe(config)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    again = read_config(tmp_path / "recipe.yaml", ["run_dir=x"])
    ours, theirs = (flatten_config(to_dict(each)) for each in (config, again))
    assert [name for name in ours if ours[name] != theirs[name]] == hidden
    assert hidden == ["run_dir", "data.train", "data.val", "data.workers", "tracking.mlflow"]


def test_recipe_says_that_zeros_of_the_weights_were_inactive(saved: Saved) -> None:
    given = ["model.weights=/secret", "sparsity.masks=from_weights", "sparsity.density=1.0"]
    values, hidden = recipe(read_config(saved("weights") / "config.yaml", given))
    assert values["sparsity"]["masks"] == "from_weights"
    assert "sparsity.masks" not in hidden


def test_recipe_has_no_path_of_the_config(saved: Saved) -> None:
    paths = (
        "model.weights",
        "sparsity.masks",
        "data.train",
        "data.val",
        "data.cache_dir",
        "distillation.checkpoint",
        "tracking.uri",
        "tracking.experiment",
    )
    given = [f"{name}=/secret" for name in paths] + ["distillation.teacher=deit_tiny_patch16_224"]
    values, hidden = recipe(read_config(saved("single") / "config.yaml", given))
    assert "/secret" not in str(values)
    assert {*paths} <= {*hidden}


def test_names_of_a_run_stay_text(saved: Saved, tmp_path: Path) -> None:
    run_dir = tmp_path / "a|b <script> *c*"
    shutil.copytree(saved("weights"), run_dir)
    folder = export_run(read_run(run_dir), "timm", tmp_path / "out")
    assert "# a\\|b \\<script\\> \\*c\\*\n" in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.model_name == "a|b <script> *c*"
