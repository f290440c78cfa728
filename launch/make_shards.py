"""Writes the tar shards that svite_scale trains on, indexes shards that exist, or verifies them.

python launch/make_shards.py --source mnist5k --out shards/mnist5k
python launch/make_shards.py --source photographs --count 2000 --out shards/photographs
python launch/make_shards.py --source glyphs --out shards/glyphs
python launch/make_shards.py --source imagenet/train --classes synsets.txt --out shards/imagenet --prefix train
python launch/make_shards.py --source imagenet/val --labels val.txt --classes synsets.txt --out shards/imagenet --prefix val
python launch/make_shards.py --index 'shards/other/train-*.tar' --label-key label
python launch/make_shards.py --verify 'shards/imagenet/*.tar'

After an interruption, the same command resumes where it stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from svite_scale.data.make.processes import num_cores

BUILT_IN = ("mnist5k", "photographs", "glyphs")
PREFIX = re.compile(r"[\w.-]+")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", help="mnist5k, photographs, glyphs, or a folder with one folder of images per class")
    what.add_argument(
        "--index", metavar="PATTERN", help="write missing or stale indexes of these tars (glob, braces or folder)"
    )
    what.add_argument("--verify", metavar="PATTERN", help="compare these tars with the checksums in their indexes")
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes; default: one per core")
    parser.add_argument("--out", metavar="DIR", help="folder to write to")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="default: 1000")
    parser.add_argument(
        "--prefix", help="start of the shards' names; default: train (mnist5k and glyphs always write train and val)"
    )
    parser.add_argument("--count", type=int, help="number of photographs; default: 1000")
    parser.add_argument("--fonts", nargs="+", metavar="DIR", help="folders of fonts for glyphs; default: the machine's fonts")
    parser.add_argument("--image-size", type=int, metavar="PX", help="side of a glyph's picture; default: 28")
    parser.add_argument("--canvas", type=int, metavar="PX", help="side of a black image with the picture at a random place")
    parser.add_argument(
        "--classes", metavar="FILE", help="class folders, one a line; the first is label 0; others are left out"
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="lines of a file and its class, for a flat folder; others are left out"
    )
    parser.add_argument("--label-key", metavar="KEY", help="with --index: field of the .json members that holds the label")
    args = parser.parse_args(argv)
    folder = args.source is not None and args.source not in BUILT_IN
    if args.source is not None and args.out is None:
        parser.error("--source needs --out DIR")
    if args.source is None and args.out is not None:
        parser.error("--out is for --source")
    if args.source is None and args.samples_per_shard is not None:
        parser.error("--samples-per-shard is for --source")
    if args.prefix is not None and not (folder or args.source == "photographs"):
        parser.error("--prefix is for photographs and image folders")
    if args.prefix is not None and not PREFIX.fullmatch(args.prefix):
        parser.error(f"--prefix is {args.prefix!r}; use letters, digits, '-', '_' and '.'")
    if args.count is not None and args.source != "photographs":
        parser.error("--count is for --source photographs")
    for name in ("fonts", "image_size", "canvas"):
        if getattr(args, name) is not None and args.source != "glyphs":
            parser.error(f"--{name.replace('_', '-')} is for --source glyphs")
    if args.classes is not None and not folder and args.index is None:
        parser.error("--classes is for image folders and --index")
    if args.labels is not None and not folder:
        parser.error("--labels is for image folders")
    if args.label_key is not None and args.index is None:
        parser.error("--label-key is for --index")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns the exit status: 2 for a mistake in the command or the data."""
    arguments = parse(argv)
    from svite_scale.data.make import command  # takes seconds, which --help needn't

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
