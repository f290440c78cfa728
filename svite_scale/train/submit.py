"""The submit command: checks a config, fills in ``launch/slurm/train.sbatch``, and hands it to Slurm."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from svite_scale.checkpoint.directory import CHECKPOINTS
from svite_scale.checkpoint.load import counts_of_run
from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.config.validate import check_world_size, validate
from svite_scale.errors import ConfigError, RunError, SviteScaleError
from svite_scale.runtime.ending import EXIT_CONFIG, EXIT_FAILED

TEMPLATE = "launch/slurm/train.sbatch"
SCRIPT, LOGS = "train.sbatch", "logs"
"""Names in the run directory."""

DIRECTIVE = "#SBATCH --"


def main(arguments: argparse.Namespace, root: Path) -> int:
    """Runs ``launch/submit.py``: checks the config for every number of ranks that the job may get, writes ``train.sbatch`` into
    the run directory, and submits it.

    Args:
        arguments: ``config``, ``overrides``, ``nodes``, ``gpus_per_node``, ``cpus_per_gpu``, ``launcher``, ``time``,
            ``warn_before``, ``partition``, ``sbatch``, ``dry_run``.
        root: of the repository, where the job runs.

    Returns:
        The exit status: 0, 2 after a mistake in the config or the arguments, 1 after another error.
    """
    try:
        config = read_config(arguments.config, arguments.overrides)
        check(config, arguments, root)
        script = render_script(config, arguments, root)
        if arguments.dry_run:
            print(script, end="")
        else:
            print(submit(script, root / config.run_dir))
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except SviteScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def check(config: Config, arguments: argparse.Namespace, root: Path) -> None:
    """Refuses what would fail later, when the job runs.

    Raises:
        ConfigError: an option or a field of the config is wrong.
    """
    for name in ("gpus_per_node", "cpus_per_gpu"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(arguments, name), "is none", "use at least 1")
    for num_nodes in node_counts(arguments.nodes):
        num_ranks = num_nodes * arguments.gpus_per_node
        try:
            check_world_size(config, num_ranks)
        except ConfigError as error:
            problem = f"{error.problem}, on {num_nodes} of --nodes {arguments.nodes}"
            raise ConfigError(error.field, error.value, problem, error.remedy) from error
    # A job resumes where the run has a checkpoint, and then needs no file of weights.
    validate(config, world_size=None, saved=counts_of_run(root / config.run_dir / CHECKPOINTS))


def node_counts(nodes: str) -> range:
    """Returns every number of nodes that ``N`` or ``MIN-MAX`` allows.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError("--nodes", nodes, "is no number of nodes", "write one such as 4, or two such as 2-4")
    return range(least, most + 1)


def render_script(config: Config, arguments: argparse.Namespace, root: Path) -> str:
    """Returns the batch script of a run.

    Raises:
        ConfigError: an option of ``--sbatch`` isn't ``NAME=VALUE``.
    """
    logs = str(root / config.run_dir / LOGS)
    options = {
        "job-name": Path(config.run_dir).name,
        "chdir": str(root),
        "nodes": arguments.nodes,
        "gpus-per-node": str(arguments.gpus_per_node),
        "cpus-per-task": str(arguments.gpus_per_node * arguments.cpus_per_gpu),
        "output": f"{logs}/%j.out",
    }
    if arguments.time is not None:
        options["time"] = arguments.time
    if arguments.warn_before is not None:
        options["signal"] = f"B:USR1@{arguments.warn_before}"
    if arguments.partition is not None:
        options["partition"] = arguments.partition
    for option in arguments.sbatch:
        name, equals, value = option.partition("=")
        if not equals or not re.fullmatch("[a-z][a-z-]*", name) or "\n" in value:
            raise ConfigError("--sbatch", option, "is no option of sbatch", "write NAME=VALUE, such as account=vision")
        options[name] = value
    words = ["--launcher", arguments.launcher, "--logs", logs, str(arguments.config.resolve()), *arguments.overrides]
    return fill((root / TEMPLATE).read_text(), options, words)


def fill(template: str, options: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Returns a script that needs no arguments, and no options to ``sbatch``.

    Args:
        template: a batch script whose ``#SBATCH`` lines are one block of ``--name=value``.
        options: replace or follow the template's, by name without dashes.
        arguments: of the template.
    """
    lines = template.splitlines()
    block = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    first, end = block[0], block[-1] + 1
    assert block == list(range(first, end)), "the template's #SBATCH lines aren't one block"
    merged = dict(line.removeprefix(DIRECTIVE).partition("=")[::2] for line in lines[first:end]) | dict(options)
    filled = [f"{DIRECTIVE}{name}={_quoted(value)}" if value else f"{DIRECTIVE}{name}" for name, value in merged.items()]
    return "\n".join([*lines[:first], *filled, "", f"set -- {shlex.join(arguments)}", *lines[end:]]) + "\n"


def _quoted(value: str) -> str:
    """Quotes a value as ``sbatch`` reads it in a script."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if set(value) & set(" \t\"'\\#") else value


def submit(script: str, run_dir: Path) -> str:
    """Writes a script into the run directory and hands it to ``sbatch``.

    Returns:
        Two lines for the user: the job's number, and the commands to watch it and to submit it again.

    Raises:
        RunError: it can't be written, or ``sbatch`` isn't there or refuses it.
    """
    path = run_dir / SCRIPT
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise RunError(f"can't write {path}: {error}; name another run_dir") from error
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RunError("sbatch isn't there; submit from a machine of the cluster, or add --dry-run") from error
    if done.returncode:
        raise RunError(f"sbatch refused {path}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    return f"job {job}: squeue --job {job}; tail --follow {run_dir / LOGS / job}/rank-0.log\nagain: sbatch {path}"
