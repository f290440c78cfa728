"""What the config reader reads, and which values it refuses in which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from svite_scale.config.load import read_config, to_yaml
from svite_scale.config.schema import Config
from svite_scale.options import describe
from tests.config.config_text import MINIMAL, as_file, error_of, hints_of, written


def value_at(config: Config, key: str) -> object:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_a_file_with_the_required_key_alone_gives_the_defaults(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, MINIMAL)) == Config(run_dir="runs/a")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optimizer.lr", "5e-4", 5e-4),
        ("optimizer.lr", "1e-5", 1e-5),
        ("optimizer.lr", "1E-5", 1e-5),
        ("optimizer.lr", "+5.e-4", 5e-4),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.lr", "1e3", 1000.0),
        ("optimizer.weight_decay", "0", 0.0),
        ("optimizer.betas", "[9e-1, 0.95]", (0.9, 0.95)),
        ("data.mean", "[0]", (0.0,)),
        ("data.std", "[0.1, 2e-1, 1]", (0.1, 0.2, 1.0)),
        ("train.epochs", "1_000", 1000),
        ("seed", "0", 0),
        ("train.max_steps", "null", None),
        ("train.max_steps", "~", None),
        ("train.max_steps", "", None),
        ("train.max_steps", "7", 7),
        ("train.clip_grad_norm", "1", 1.0),
        ("tracking.mlflow", "false", False),
        ("tracking.mlflow", "True", True),
        ("tracking.uri", "sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("tracking.experiment", "2026-01-31", "2026-01-31"),
        ("tracking.experiment", "no", "no"),
        ("tracking.experiment", "010", "010"),
        ("tracking.experiment", "'7'", "7"),
        ("parallel.zero_stage", "2", 2),
        ("model.in_channels", "1", 1),
        ("optimizer.name", "radam", "radam"),
        ("sparsity.densities", '{"blocks.*": 0.3, "*": 1}', {"blocks.*": 0.3, "*": 1.0}),
        ("sparsity.densities", "{}", {}),
        ("sparsity.densities", "{head: 5e-1, sparsity.density: 0.2}", {"head": 0.5, "sparsity.density": 0.2}),
        ("sparsity.keep_dense", '["head", "blocks.0.*"]', ("head", "blocks.0.*")),
        ("sparsity.masks", "masks/a.safetensors", "masks/a.safetensors"),
        ("sparsity.distribution", "er", "er"),
        ("data.train", "data/train-{000..003}.tar", "data/train-{000..003}.tar"),
        ("run_dir", "runs/ü", "runs/ü"),
    ],
)
def test_files_and_overrides_read_alike(tmp_path: Path, key: str, text: str, expected: object) -> None:
    from_file = value_at(read_config(written(tmp_path, as_file(key, text))), key)
    from_override = value_at(read_config(written(tmp_path, MINIMAL), [f"{key}={text}"]), key)
    assert from_file == from_override == expected
    assert type(from_file) is type(from_override) is type(expected)


def test_patterns_keep_their_order_and_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "sparsity:\n  densities:\n    z.*: 0.3\n    a.b: 0.5\n    '*': 1\n")
    config = read_config(path)
    assert list(config.sparsity.densities.items()) == [("z.*", 0.3), ("a.b", 0.5), ("*", 1.0)]
    path.write_text(to_yaml(config))
    assert list(read_config(path).sparsity.densities) == ["z.*", "a.b", "*"]
    assert read_config(path, ['sparsity.densities={"*": 0.5}']).sparsity.densities == {"*": 0.5}


def test_an_override_wins_over_the_file_and_over_an_earlier_one(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "sparsity: {density: 0.2, update_every: 7}\n")
    config = read_config(path, ["sparsity.density=0.3", "sparsity.density=0.4"])
    assert (config.sparsity.density, config.sparsity.update_every) == (0.4, 7)


def test_an_override_can_mend_a_value_of_the_file_and_give_the_required_key(tmp_path: Path) -> None:
    path = written(tmp_path, "sparsity: {density: 5}\n")
    assert read_config(path, ["sparsity.density=0.5", "run_dir=b"]).run_dir == "b"


def test_an_override_value_keeps_its_own_equals_signs(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, MINIMAL), ["tracking.uri=http://h/?a=b"]).tracking.uri == "http://h/?a=b"


def test_the_path_may_be_text(tmp_path: Path) -> None:
    assert read_config(str(written(tmp_path, MINIMAL))).run_dir == "runs/a"


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = MINIMAL + "data:\n  mean: &one [0.5, 0.5, 0.5]\n  std: *one\n"
    assert read_config(written(tmp_path, text)).data.std == (0.5, 0.5, 0.5)
    text = MINIMAL + "sparsity: &base {density: 0.3, update_every: 7}\n"
    merged = read_config(written(tmp_path, text.replace("{", "{<<: {density: 0.9, stop_fraction: 0.5}, ")))
    assert (merged.sparsity.density, merged.sparsity.stop_fraction) == (0.3, 0.5)


WHOLE, NUMBER, BOOL, TEXT = "is not a whole number", "is not a number", "is not true or false", "is not text"

PAIR = "is not a list of 2, each entry a number"

BETAS = "a list of 2, each entry a number of at least 0.0 and below 1.0"

MAPPING = "a mapping of text, each entry a number"

WRONG_VALUES = [
    ("train.epochs", "3.0", 3.0, WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "true", True, WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "'3'", "3", WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "[3]", [3], WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "null", None, WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "0", 0, "is below 1", "use a whole number of at least 1"),
    ("train.epochs", "010", "010", WHOLE, "use a whole number of at least 1"),
    ("train.epochs", "1:30", "1:30", WHOLE, "use a whole number of at least 1"),
    ("train.max_steps", "1.5", 1.5, WHOLE + " or null", "use a whole number of at least 1 or null"),
    ("train.max_steps", "-1", -1, "is below 1", "use a whole number of at least 1 or null"),
    ("seed", "2147483648", 2**31, "is above 2147483647", "use a whole number of at least 0 and up to 2147483647"),
    ("sparsity.density", "0", 0, "is not above 0.0", "use a number above 0.0 and up to 1.0"),
    ("sparsity.density", "1.01", 1.01, "is above 1.0", "use a number above 0.0 and up to 1.0"),
    ("sparsity.density", "-.inf", -math.inf, "is not finite", "use a number above 0.0 and up to 1.0"),
    ("sparsity.density", "true", True, NUMBER, "use a number above 0.0 and up to 1.0"),
    ("sparsity.density", "50%", "50%", NUMBER, "use a number above 0.0 and up to 1.0"),
    ("sparsity.density", "{a: 1}", {"a": 1}, NUMBER, "use a number above 0.0 and up to 1.0"),
    ("data.augment.mixup", "-0.1", -0.1, "is below 0.0", "use a number of at least 0.0"),
    ("optimizer.lr", ".inf", math.inf, "is not finite", "use a number above 0.0"),
    ("optimizer.lr", "1e400", math.inf, "is not finite", "use a number above 0.0"),
    ("optimizer.lr", "9" * 400, int("9" * 400), "is not finite", "use a number above 0.0"),
    ("optimizer.lr", "5e", "5e", NUMBER, "use a number above 0.0"),
    (
        "optimizer.betas",
        "0.9",
        0.9,
        PAIR,
        "use " + BETAS,
    ),
    (
        "optimizer.betas",
        "[0.9]",
        [0.9],
        PAIR,
        "use " + BETAS,
    ),
    (
        "optimizer.betas",
        "[1, 2, 3]",
        [1, 2, 3],
        PAIR,
        "use " + BETAS,
    ),
    ("data.mean", "[0.5, a]", [0.5, "a"], "is not a list, each entry a number", "use a list, each entry a number"),
    ("data.mean", "[0.5, true]", [0.5, True], "is not a list, each entry a number", "use a list, each entry a number"),
    ("data.mean", "[0.5, .inf]", [0.5, math.inf], "is not finite", "use a list, each entry a number"),
    ("sparsity.densities", "0.3", 0.3, f"is not {MAPPING}", f"use {MAPPING} above 0.0 and up to 1.0"),
    ("sparsity.densities", "null", None, f"is not {MAPPING}", f"use {MAPPING} above 0.0 and up to 1.0"),
    ("sparsity.densities", "{a: 0.5, 7: 0.3}", {"a": 0.5, 7: 0.3}, "has a key that is not text, 7", "put it in quotes"),
    ("sparsity.keep_dense", "head", "head", "is not a list, each entry text", "use a list, each entry text"),
    ("sparsity.keep_dense", "[1]", [1], "is not a list, each entry text", "use a list, each entry text"),
    ("sparsity.masks", "7", 7, "is not text or null", "use text or null, in quotes if need be"),
    ("sparsity.power_scale", "0", 0, "is not above 0.0", "use a number above 0.0"),
    ("tracking.mlflow", "no", "no", BOOL, "use true or false"),
    ("tracking.mlflow", "1", 1, BOOL, "use true or false"),
    ("tracking.mlflow", "null", None, BOOL, "use true or false"),
    ("tracking.experiment", "7", 7, f"{TEXT} or null", "use text or null, in quotes if need be"),
    ("run_dir", "null", None, TEXT, "use text, in quotes if need be"),
    ("parallel.zero_stage", "4", 4, "is not one of 1, 2, 3", "use one of 1, 2, 3"),
    ("parallel.zero_stage", "true", True, "is not one of 1, 2, 3", "use one of 1, 2, 3"),
    ("parallel.zero_stage", "3.0", 3.0, "is not one of 1, 2, 3", "use one of 1, 2, 3"),
    (
        "optimizer.name",
        "sgd",
        "sgd",
        "is not one of adamw, adam, nadam, radam",
        "use one of adamw, adam, nadam, radam",
    ),
]


@pytest.mark.parametrize(
    ("key", "text", "value", "problem", "remedy"), WRONG_VALUES, ids=[f"{w[0]}={w[1][:9]}" for w in WRONG_VALUES]
)
def test_a_wrong_value_is_named_alike_in_files_and_overrides(
    tmp_path: Path, key: str, text: str, value: object, problem: str, remedy: str
) -> None:
    from_file = error_of(written(tmp_path, as_file(key, text)))
    from_override = error_of(written(tmp_path, MINIMAL), (f"{key}={text}",))
    for error in (from_file, from_override):
        assert (error.field, error.value, error.problem, error.remedy) == (key, value, problem, remedy)
        assert str(error).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("text", "entry", "value", "problem"),
    [
        ('{"*": 1, "blocks.*": 1.5}', "blocks.*", 1.5, "is above 1.0"),
        ("{head: 0}", "head", 0, "is not above 0.0"),
        ("{head: .nan}", "head", None, "is not finite"),
        ("{head: 30%}", "head", "30%", "is not a number"),
        ("{head: {weight: 1}}", "head", {"weight": 1}, "is not a number"),
    ],
)
def test_a_wrong_entry_of_a_mapping_is_named(tmp_path: Path, text: str, entry: str, value: object, problem: str) -> None:
    from_file = error_of(written(tmp_path, as_file("sparsity.densities", text)))
    from_override = error_of(written(tmp_path, MINIMAL), (f"sparsity.densities={text}",))
    for error in (from_file, from_override):
        assert (error.field, error.problem) == (f"sparsity.densities['{entry}']", problem)
        assert error.remedy == "use a number above 0.0 and up to 1.0"
        assert value is None or error.value == value


def test_nan_is_refused(tmp_path: Path) -> None:
    error = error_of(written(tmp_path, as_file("train.clip_grad_norm", ".nan")))
    assert (error.field, error.problem, error.remedy) == (
        "train.clip_grad_norm",
        "is not finite",
        "use a number above 0.0 or null",
    )


def test_a_missing_required_key_says_where_to_put_it(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 3\n")
    error = error_of(path)
    assert (error.field, error.value, error.problem) == ("run_dir", None, "is missing and has no default")
    assert error.remedy == f"add it to {path} or give run_dir=VALUE"


def test_every_field_of_the_config_has_a_description() -> None:
    for key, hint in hints_of(Config).items():
        assert describe(hint), key


@pytest.mark.parametrize(
    ("key", "described"),
    [
        ("guard.spike_factor", "a number above 1.0 or null"),
        ("seed", "a whole number of at least 0 and up to 2147483647"),
        ("sparsity.tokens.blocks", "a list, each entry a whole number of at least 0"),
        ("optimizer.betas", BETAS),
        ("distillation.std", "a list, each entry a number above 0.0 or null"),
    ],
)
def test_a_description_says_type_bounds_and_null(key: str, described: str) -> None:
    assert describe(hints_of(Config)[key]) == described
