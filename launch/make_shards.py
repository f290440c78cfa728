"""Writes the tar shards that svite_scale trains on, or indexes shards that exist.

python launch/make_shards.py --source mnist5k --out shards/mnist5k
python launch/make_shards.py --source photographs --count 2000 --out shards/photographs
python launch/make_shards.py --source imagenet/train --out shards/imagenet --prefix train
python launch/make_shards.py --index 'shards/other/train-*.tar'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from svite_scale.data.builtin import Source, image_folder, mnist5k, photographs
from svite_scale.data.index import write_missing_indexes
from svite_scale.data.shards import finished_shards, write_shards
from svite_scale.errors import SviteScaleError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", help="mnist5k, photographs, or a folder with one folder of images per class")
    what.add_argument(
        "--index", metavar="PATTERN", help="write the missing or stale indexes of these tars (glob, braces or folder)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write to")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--prefix", help="start of the shards' names; default: train (mnist5k always writes train and val)")
    parser.add_argument("--count", type=int, help="number of photographs; default: 1000")
    args = parser.parse_args(argv)
    if args.source and not args.out:
        parser.error("--source needs --out DIR")
    if args.prefix and (args.index or args.source == "mnist5k"):
        parser.error("--prefix is for photographs and image folders")
    if args.count is not None and args.source != "photographs":
        parser.error("--count is for --source photographs")
    return args


def sources(args: argparse.Namespace) -> dict[str, Source]:
    """What to write, by prefix."""
    if args.source == "mnist5k":
        return {"train": mnist5k("train"), "val": mnist5k("val")}
    prefix = args.prefix or "train"
    if args.source == "photographs":
        return {prefix: photographs(1000 if args.count is None else args.count, prefix)}
    return {prefix: image_folder(args.source)}


def write(source: Source, out: str, prefix: str, samples_per_shard: int) -> None:
    shards = finished_shards(out, prefix, source.keys, samples_per_shard)
    verb = "already complete"
    if not shards:
        with tqdm(source.samples, total=len(source.keys), desc=prefix, unit="image") as progress:
            shards = write_shards(progress, out, prefix, samples_per_shard)
        verb = "wrote"
    split = "val" if prefix == "val" else "train"
    print(f"{verb}: {len(source.keys)} images in {shards[0]} to {shards[-1].name}")
    print(f"for a config: data.{split}={out}/{prefix}-*.tar")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake in the command or the data."""
    args = parse(argv)
    try:
        if args.index:
            written = write_missing_indexes(args.index, "--index")
            print("\n".join(f"wrote {path}" for path in written) or "every shard has its index already")
            return 0
        for prefix, source in sources(args).items():
            write(source, args.out, prefix, args.samples_per_shard)
    except (SviteScaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
