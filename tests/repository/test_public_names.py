"""The names that ``import svite_scale`` gives, and what that import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import svite_scale

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    *("sparsify", "pack_units", "insert_token_selectors", "attach", "to_dense", "parameter_groups", "count_flops", "Ema"),
    *("load_weights", "selector_loss"),
    *("Method", "TopologyOptions", "SviteScaleError", "OptionError", "SparsifyError", "TopologyError", "MaskError"),
    "__version__",
}


def run_python(script: str) -> list[str]:
    """The lines that a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_package_gives_exactly_the_public_names() -> None:
    assert set(svite_scale.__all__) == NAMES
    assert set(dir(svite_scale)) >= NAMES
    for name in NAMES:
        assert getattr(svite_scale, name) is not None


def test_an_unknown_name_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'svite_scale' has no attribute 'sparsifi'$"):
        _ = svite_scale.sparsifi


def test_type_checkers_see_the_homes_that_names_are_imported_from() -> None:
    """The block that only type checkers read can't drift from the table that Python reads."""
    tree = ast.parse((ROOT / "svite_scale" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: f"{node.module}".removeprefix("svite_scale.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == svite_scale._HOMES
    assert {*seen, "__version__"} == NAMES


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = {"torch", "timm", "deepspeed", "pydantic", "numpy"}
    script = f"import sys, svite_scale; print(svite_scale.__version__, *sorted({heavy} & set(sys.modules)))"
    assert run_python(script) == [svite_scale.__version__]


def test_public_names_import_no_engine_and_leave_cuda_alone() -> None:
    heavy = {"deepspeed", "mlflow", "accelerate", "matplotlib"}
    script = (
        "import sys, svite_scale, torch\n"
        "assert all(getattr(svite_scale, name) for name in svite_scale.__all__)\n"
        f"print(*sorted({heavy} & set(sys.modules)))\n"
        "print(torch.cuda.is_initialized())"
    )
    assert run_python(script) == ["", "False"]


def test_reading_a_config_imports_no_heavy_library() -> None:
    heavy = {"torch", "timm", "numpy", "deepspeed", "mlflow"}
    script = (
        "import sys\n"
        "from svite_scale.config.load import read_config\n"
        "read_config('configs/quickstart.yaml')\n"
        f"print(*sorted({heavy} & set(sys.modules)))"
    )
    assert run_python(script) == [""]


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_a_name_is_the_same_at_each_use(name: str) -> None:
    """A function in a module of its own name would be replaced by the module."""
    assert getattr(svite_scale, name) is getattr(svite_scale, name)
    assert getattr(svite_scale, name).__name__ == name


def test_the_version_is_defined_once() -> None:
    assert "version = attr: svite_scale.__version__\n" in (ROOT / "setup.cfg").read_text()
