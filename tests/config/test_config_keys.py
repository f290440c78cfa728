"""Which keys and files the config reader refuses, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.config.config_text import MINIMAL, error_of, written

UNKNOWN = [
    ("sparsity.densty", "sparsity.density"),
    ("sparsity.Density", "sparsity.density"),
    ("density", "sparsity.density"),
    ("train.lr", "optimizer.lr"),
    ("train.weight_decay", "optimizer.weight_decay"),
    ("optimizer.epochs", "train.epochs"),
    ("optimiser.lr", "optimizer.lr"),
    ("parallel.zero-stage", "parallel.zero_stage"),
    ("data.mixup", "data.augment.mixup"),
    ("augment.cutmix", "data.augment.cutmix"),
    ("data.augmentation.repeats", "data.augment.repeats"),
    ("rundir", "run_dir"),
    ("train.run_dir", "run_dir"),
]

KNOWN = "known are checkpoint, data, distillation, guard, model, optimizer, parallel, run_dir, seed, sparsity, tracking, train"


@pytest.mark.parametrize(("key", "nearest"), UNKNOWN)
def test_an_unknown_key_in_an_override_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    error = error_of(written(tmp_path, MINIMAL), (f"{key}=0.5",))
    assert (error.field, error.value, error.problem) == (key, "0.5", "is no known key")
    assert error.remedy == f"the nearest is {nearest}"


@pytest.mark.parametrize(("key", "nearest"), UNKNOWN)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    nested: object = 0.5
    for name in reversed(key.split(".")):
        nested = {name: nested}
    error = error_of(written(tmp_path, MINIMAL + yaml.safe_dump(nested)))
    assert (error.field, error.value, error.problem) == (key, 0.5, "is no known key")
    assert error.remedy == f"the nearest is {nearest}"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("tracking.zzz=1", "known are tracking.mlflow, tracking.publish, tracking.uri, tracking.experiment"),
        (
            "qqqq=1",
            KNOWN,
        ),
        (
            "=1",
            KNOWN,
        ),
    ],
)
def test_a_far_off_key_gets_the_known_ones(tmp_path: Path, override: str, remedy: str) -> None:
    assert error_of(written(tmp_path, MINIMAL), (override,)).remedy == remedy


@pytest.mark.parametrize("text", ["true: 1\n", "7: 1\n", "~: 1\n"])
def test_a_key_that_is_no_text_is_unknown(tmp_path: Path, text: str) -> None:
    assert error_of(written(tmp_path, MINIMAL + text)).problem == "is no known key"


@pytest.mark.parametrize(("text", "value"), [("parallel: deepspeed", "deepspeed"), ("parallel:", None), ("parallel: [1]", [1])])
def test_a_section_takes_no_value(tmp_path: Path, text: str, value: object) -> None:
    error = error_of(written(tmp_path, MINIMAL + text))
    assert (error.field, error.value, error.problem) == ("parallel", value, "is a section and takes no value")
    assert error.remedy == "set its fields: parallel.backend, parallel.zero_stage"


def test_an_override_sets_fields_not_sections(tmp_path: Path) -> None:
    error = error_of(written(tmp_path, MINIMAL), ("parallel={backend: ddp}",))
    assert (error.field, error.value) == ("parallel", "{backend: ddp}")
    assert error.remedy == "set its fields: parallel.backend, parallel.zero_stage"


def test_an_override_sets_a_mapping_as_a_whole(tmp_path: Path) -> None:
    error = error_of(written(tmp_path, MINIMAL), ("sparsity.densities.blocks.*=0.3",))
    assert (error.field, error.value, error.problem) == ("sparsity.densities.blocks.*", "0.3", "is one entry of a mapping")
    assert error.remedy == "give all of it: sparsity.densities='{KEY: VALUE, ...}'"


@pytest.mark.parametrize("override", ["sparsity.density", "--sparsity.density", "sparsity.density:0.5", ""])
def test_an_override_needs_an_equals_sign(tmp_path: Path, override: str) -> None:
    error = error_of(written(tmp_path, MINIMAL), (override,))
    assert (error.field, error.value, error.problem) == ("override", override, "has no '='")
    assert error.remedy == "write dotted.key=value"


def test_an_override_must_be_yaml(tmp_path: Path) -> None:
    error = error_of(written(tmp_path, MINIMAL), ("data.mean=[0.5",))
    assert (error.field, error.value) == ("data.mean", "[0.5")
    assert error.problem.startswith("is no valid YAML: line 1, ")
    assert error.remedy == "put text with special characters in quotes"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nsparsity:\n  density: 0.3\n  density: 0.4\n", "sparsity.density stands on line 3 and again on line 4"),
        ("seed: 1\nseed: 1\n", "seed stands on line 1 and again on line 2"),
        ("seed: 1\n'seed': 1\n", "seed stands on line 1 and again on line 2"),
        ("data:\n  augment: {mixup: 1,\n    mixup: 2}\n", "data.augment.mixup stands on line 2 and again on line 3"),
        ("data: {}\nseed: 1\ndata: {}\n", "data stands on line 1 and again on line 3"),
        ("x:\n- {a: 1, a: 2}\n", "x.a stands on line 2 and again on line 2"),
        ("seed: 1\n  lr: 2\n", "line 2, mapping values are not allowed here"),
        ("seed: [1\n", "line 2, while parsing a flow sequence: "),
        ("seed: 1\n\tlr: 2\n", "line 2, while scanning for the next token: "),
        ("seed: *x\n", "line 1, found undefined alias 'x'"),
        ("a: &a {b: *a}\n", "line 1, found unconstructable recursive node"),
        ("[1]: 2\n", "line 1, while constructing a mapping: found unhashable key"),
        ("seed: !!python/object/apply:os.getpid []\n", "line 1, could not determine a constructor"),
        ("seed: 1\n---\nseed: 2\n", "line 2, expected a single document in the stream: "),
        (b"seed: \xff\n", "unacceptable character #x00ff: invalid start byte"),
        ("seed: \x07\n", "unacceptable character #x0007"),
    ],
)
def test_invalid_yaml_tells_the_place(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = written(tmp_path, text)
    error = error_of(path)
    assert (error.field, error.value, error.remedy) == ("config", str(path), "mend the file there")
    assert error.problem.startswith(f"is no valid YAML: {problem}")


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment alone\n", "---\n", "null\n"])
def test_an_empty_file_says_what_to_write(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    error = error_of(path)
    assert (error.field, error.value, error.problem) == ("config", str(path), "is empty")
    assert error.remedy == "write at least run_dir: FOLDER"


@pytest.mark.parametrize(("text", "found"), [("a word\n", "'a word'"), ("- 1\n", "[1]"), ("run_dir=a\n", "'run_dir=a'")])
def test_a_file_holds_keys(tmp_path: Path, text: str, found: str) -> None:
    error = error_of(written(tmp_path, text))
    assert (error.field, error.problem) == ("config", f"holds {found} and no keys")
    assert error.remedy == "write key: value lines"


def test_a_missing_file_names_the_nearest_of_its_folder(tmp_path: Path) -> None:
    for name in ("deit_base_s70.yaml", "deit_tiny_s30.yaml", "quickstart.yaml", "quikstart.txt"):
        (tmp_path / name).write_text(MINIMAL)
    error = error_of(tmp_path / "quikstart.yaml")
    assert (error.field, error.value, error.problem) == ("config", str(tmp_path / "quikstart.yaml"), "is no file")
    assert error.remedy == f"the nearest is {tmp_path / 'quickstart.yaml'}"


def test_a_missing_file_in_a_folder_without_configs(tmp_path: Path) -> None:
    assert error_of(tmp_path / "a.yaml").remedy == f"no YAML file is in {tmp_path}, check the path"


def test_a_missing_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "b" / "a.yaml").remedy == f"there is no folder {tmp_path / 'b'} either, check the path"


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    error = error_of(tmp_path)
    assert (error.field, error.value, error.problem) == ("config", str(tmp_path), "can't be read (Is a directory)")
    assert error.remedy == "name a readable YAML file"
