"""The batch script of one run, made from ``launch/slurm/train.sbatch``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

DIRECTIVE = "#SBATCH --"


def fill(template: str, options: Mapping[str, str], arguments: Sequence[str]) -> str:
    """A script that needs no arguments and no options to ``sbatch``.

    Args:
        template: a batch script whose ``#SBATCH`` lines are one block of ``--name=value``.
        options: replace or follow the template's, by name without dashes.
        arguments: what the template is to be called with.
    """
    lines = template.splitlines()
    block = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    first, end = block[0], block[-1] + 1
    assert block == list(range(first, end)), "the template's #SBATCH lines aren't one block"
    merged = dict(line.removeprefix(DIRECTIVE).partition("=")[::2] for line in lines[first:end]) | dict(options)
    filled = [f"{DIRECTIVE}{name}={_quoted(value)}" if value else f"{DIRECTIVE}{name}" for name, value in merged.items()]
    return "\n".join([*lines[:first], *filled, "", f"set -- {shlex.join(arguments)}", *lines[end:]]) + "\n"


def _quoted(value: str) -> str:
    """As ``sbatch`` reads it in a script."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if set(value) & set(" \t\"'\\#") else value
