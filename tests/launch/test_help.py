"""Commands answer ``--help`` at once."""

from __future__ import annotations

import resource
import sys

from tests.command_line import ROOT, run_command

HEAVY = {"torch", "timm", "numpy", "PIL", "webdataset", "deepspeed", "accelerate", "mlflow", "matplotlib", "onnx"}

SCRIPT = f"""
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(path, end.code, out.getvalue().partition(" ")[0], *sorted({HEAVY} & set(sys.modules)))
"""


def processor_time() -> float:
    """Seconds of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_commands_answer_help_without_heavy_imports() -> None:
    commands = sorted(str(path) for path in (ROOT / "launch").glob("*.py"))
    assert len(commands) > 5
    before = processor_time()
    answer = run_command(sys.executable, "-c", SCRIPT, *commands)
    assert answer.out.splitlines() == [f"{path} 0 usage:" for path in commands], answer.err
    assert processor_time() - before < 2.0 * len(commands)
