"""Exports the model of a run: ``python launch/export.py --run runs/quickstart --out exported --format timm``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svite_scale.errors import SviteScaleError
from svite_scale.export.formats import FORMATS, OnnxOptions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; it mustn't hold anything yet")
    forms = "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
    parser.add_argument("--format", required=True, choices=FORMATS, help=forms)
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step-00001240; default: the newest")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    parser.add_argument("--license", metavar="TEXT", help="licence of the model, such as apache-2.0, for its card")
    parser.add_argument("--onnx-form", choices=("dense", "sliced"), help="onnx: default: sliced where anything is absent")
    parser.add_argument("--int8", type=int, metavar="N", help="onnx: quantize to 8 bits, calibrated on N evaluation images")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    onnx = None if given.onnx_form is given.int8 is None else OnnxOptions(given.onnx_form, given.int8)
    # These take seconds to import, and --help needn't wait for them.
    from svite_scale.export.write import export_run
    from svite_scale.saved_run import read_run

    try:
        run = read_run(given.run, given.checkpoint)
        out = export_run(run, given.format, given.out, ema=given.ema, license=given.license, onnx=onnx, show_progress=True)
        print(out)
    except SviteScaleError as error:
        print(f"export error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
