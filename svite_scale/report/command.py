"""The report command: from arguments to an exit status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svite_scale.errors import ConfigError, SviteScaleError

EXIT_FAILED = 2


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/report.py``, in one process.

    Args:
        arguments: ``run``, ``checkpoint``, ``images``, ``val``, ``out``.

    Returns:
        The exit status: 0, or 2 after an error, which is one line on stderr.
    """
    # What reads models and draws takes seconds to import; --help needn't wait for it.
    from svite_scale.report.report import write_report
    from svite_scale.report.saved_run import read_run

    try:
        if arguments.images < 1:
            raise ConfigError("--images", arguments.images, "is no number of images", "use at least 1")
        run_dir = Path(arguments.run)
        out = run_dir / "report" if arguments.out is None else Path(arguments.out)
        print(write_report(read_run(run_dir, arguments.checkpoint, arguments.val), arguments.images, out))
    except SviteScaleError as error:
        print(f"report error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0
