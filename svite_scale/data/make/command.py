"""The command that writes, indexes and verifies shards."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from svite_scale.data.format.index import build_index, confirm_index, find_damage, has_index, is_indexed, save_index
from svite_scale.data.format.info import check_classes, write_info
from svite_scale.data.format.labels import LabelRule, read_classes, read_labels
from svite_scale.data.format.patterns import find_shards
from svite_scale.data.format.rule import summarize
from svite_scale.data.make.builtin import Digits, Photographs
from svite_scale.data.make.folder import describe_text_order, image_folder, labelled_files
from svite_scale.data.make.glyphs import IMAGE_SIZE, Glyphs, find_glyphs
from svite_scale.data.make.processes import in_processes
from svite_scale.data.make.shards import Output, Source, shard_pattern
from svite_scale.errors import DataError, SviteScaleError
from svite_scale.tracking.progress import Progress, track

EXIT_FAILED, EXIT_STOPPED = 2, 130
OUT_REMEDY = "make room or repair it and give the same command again, which keeps what is finished; or give another folder"
Result = TypeVar("Result")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/make_shards.py``, in one process that forks its workers.

    Args:
        arguments: one of ``source``, ``index`` and ``verify``, and their options.

    Returns:
        The exit status: 0, 2 after an error, which is one line on stderr, or 130 when it was interrupted.
    """
    try:
        for name in ("workers", "count", "samples_per_shard", "image_size"):
            number = getattr(arguments, name)
            if number is not None and number < 1:
                raise DataError(f"--{name.replace('_', '-')} is {number}; use at least 1")
        if arguments.verify is not None:
            verify_shards(arguments.verify, arguments.workers)
        elif arguments.index is not None:
            index_shards(arguments)
        else:
            for prefix, source in sources(arguments).items():
                try:
                    write(source, arguments, prefix)
                except BrokenPipeError:
                    raise  # the reader of stdout has ended; the folder is fine
                except OSError as error:
                    raise DataError(f"--out {arguments.out} can't be written to ({error}); {OUT_REMEDY}") from error
    except (SviteScaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        all_again = arguments.index is not None and (arguments.classes, arguments.label_key) != (None, None)
        again = "starts again" if all_again or arguments.verify is not None else "resumes where it stopped"
        print(f"interrupted; the same command {again}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


def sources(arguments: argparse.Namespace) -> dict[str, Source]:
    """Returns the sources to write, by prefix."""
    if arguments.source == "mnist5k":
        return {"train": Digits("train"), "val": Digits("val")}
    if arguments.source == "glyphs":
        return glyph_sources(arguments)
    prefix = arguments.prefix or "train"
    if arguments.source == "photographs":
        return {prefix: Photographs(arguments.count or 1000, prefix)}
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    if arguments.labels is None:
        source = image_folder(arguments.source, classes)
        if classes is None and (note := describe_text_order(list(source.classes or ()))):
            print(f"warning: {note}", file=sys.stderr)
        return {prefix: source}
    names = None if classes is None else list(classes)
    return {prefix: labelled_files(arguments.source, read_labels(arguments.labels, classes), names)}


def glyph_sources(arguments: argparse.Namespace) -> dict[str, Source]:
    image_size = arguments.image_size or IMAGE_SIZE
    canvas = arguments.canvas or image_size
    if canvas < image_size:
        raise DataError(f"--canvas is {canvas}; use at least the image size, {image_size}")
    splits, left_out = find_glyphs(arguments.fonts, arguments.workers)
    families = {glyph.font.family for glyphs in splits.values() for glyph in glyphs}
    fonts = {glyph.font.digest for glyphs in splits.values() for glyph in glyphs}
    print(f"{len(fonts)} fonts of {len(families)} families{left_out_suffix(left_out)}")
    return {split: Glyphs(glyphs, image_size, canvas) for split, glyphs in splits.items()}


def write(source: Source, arguments: argparse.Namespace, prefix: str) -> None:
    """Writes the unfinished shards of one prefix."""
    out = Path(arguments.out)
    check_classes(out, prefix, source.classes)
    output = Output(source, out, prefix, arguments.samples_per_shard or 1000)
    missing = output.missing(arguments.workers)
    total = len(source.keys)
    left = sum(output.counts[number] for number in missing)
    if missing:
        with Progress(prefix, total, "images", done=total - left) as progress:
            for count in output.write(missing, arguments.workers):
                progress.advance(count)
    write_info(output.shards, output.counts, prefix, source.classes, source.details)
    done = f"wrote {len(missing)} of {len(output.shards)} shards" if missing else "already complete"
    split = "val" if prefix == "val" else "train"
    print(
        printable(f"{done}: {total} images in {output.shards[0]} to {output.shards[-1].name}{left_out_suffix(source.left_out)}")
    )
    print(printable(f"for a config: data.{split}='{out / shard_pattern(prefix, len(output.shards))}'"))


def index_shards(arguments: argparse.Namespace) -> None:
    """Indexes the shards without a valid index; all shards if a rule for labels is given.

    If times don't show whether an index is stale, as after a copy without times, the tar is compared with its checksum.
    """
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    rule = LabelRule(arguments.label_key, classes)
    shards = find_shards(arguments.index, "--index")
    if rule == LabelRule():
        shards = [shard for shard in shards if not is_indexed(shard)]
    done = map_with_progress(partial(index_shard, rule=rule), shards, arguments.workers, "index") if shards else []
    written = [shard for shard in done if not shard.problem and not shard.is_kept]
    if not written and not any(shard.problem for shard in done):
        print("every shard has its index already")
        return
    left_out = sum((shard.left_out for shard in written), Counter[str]())
    print(
        f"{len(written)} indexes are written: {sum(shard.num_samples for shard in written)} samples{left_out_suffix(left_out)}"
    )
    changed = [name for shard in written if (name := shard.changed)]
    if changed:
        print(f"{len(changed)} of them had an index of the same size but another content, {printable(changed[0])} the first")
    report_problems([shard.problem for shard in done], "can't be indexed")


class Indexed(NamedTuple):
    """The result of indexing a shard."""

    problem: str
    """Why the shard couldn't be indexed; empty if it was."""
    num_samples: int
    left_out: Counter[str]
    """Its members that are no samples, counted by kind."""
    changed: str = ""
    """The shard's name, if it had an index of the right size but with another checksum."""
    is_kept: bool = False
    """True if the shard had a valid index already."""


def index_shard(shard: Path, rule: LabelRule) -> Indexed:
    """Indexes one shard, unless its index is valid."""
    try:
        if rule == LabelRule() and confirm_index(shard):
            return Indexed("", 0, Counter(), is_kept=True)
        changed = shard.name if rule == LabelRule() and has_index(shard) else ""
        index, left_out = build_index(shard, rule)
        save_index(index)
    except DataError as error:
        return Indexed(str(error), 0, Counter())
    except OSError as error:
        problem = f"{shard} can't be read, or its index can't be written beside it ({error}); correct that"
        return Indexed(problem, 0, Counter())
    return Indexed("", index.count, left_out, changed)


def printable(text: str) -> str:
    """Returns a text that stdout can print, whatever bytes the names in it have."""
    return text.encode(errors="backslashreplace").decode()


def left_out_suffix(left_out: Mapping[str, int]) -> str:
    """Returns the end of a message that counts samples."""
    return f"; left out: {summarize(left_out)}" if left_out else ""


def verify_shards(pattern: str, workers: int) -> None:
    """Compares shards with the sizes and checksums in their indexes."""
    shards = find_shards(pattern, "--verify")
    found = map_with_progress(find_damage, shards, workers, "verify")
    report_problems(found, "can't be used as they are")
    print(f"{len(shards)} shards are as they were when they were indexed")


def report_problems(found: Sequence[str], failure: str) -> None:
    """Prints the problem of each shard that has one.

    Args:
        found: each shard's problem; empty if it has none.
        failure: end of the error, after the number of shards with a problem.

    Raises:
        DataError: a shard has a problem.
    """
    problems = sorted(text for text in found if text)
    for text in problems:
        print(printable(text))
    if problems:
        raise DataError(f"{len(problems)} of {len(found)} shards {failure}; see above")


def map_with_progress(work: Callable[[Path], Result], shards: Sequence[Path], workers: int, name: str) -> list[Result]:
    """Returns ``work(shard)`` for each shard, in any order, and shows progress under ``name``."""
    return list(track(in_processes(work, shards, workers), name, len(shards), "shards"))
