"""The command that makes shards: from arguments to an exit status."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from svite_scale.data.format.index import build_index, confirm, damage, has_index, is_indexed, save_index
from svite_scale.data.format.info import check_classes, write_info
from svite_scale.data.format.labels import LabelRule, read_classes, read_labels
from svite_scale.data.format.patterns import find_shards
from svite_scale.data.format.rule import in_words
from svite_scale.data.make.builtin import mnist5k, photographs
from svite_scale.data.make.folder import image_folder, labelled_files, numbered_as_text
from svite_scale.data.make.processes import in_processes
from svite_scale.data.make.shards import Output, Source, shard_pattern
from svite_scale.errors import DataError, SviteScaleError

EXIT_FAILED, EXIT_STOPPED = 2, 130
OUT_REMEDY = "make room or mend it and give the same command again, which keeps what is finished; or give another folder"
Result = TypeVar("Result")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``launch/make_shards.py``, in one process that forks its workers.

    Args:
        arguments: one of ``source``, ``index`` and ``verify``, and what each takes.

    Returns:
        The exit status: 0, 2 after an error, which is one line on stderr, or 130 when it was interrupted.
    """
    try:
        for name in ("workers", "count", "samples_per_shard"):
            number = getattr(arguments, name)
            if number is not None and number < 1:
                raise DataError(f"--{name.replace('_', '-')} is {number}; use at least 1")
        if arguments.verify is not None:
            verify(arguments.verify, arguments.workers)
        elif arguments.index is not None:
            index(arguments)
        else:
            for prefix, source in sources(arguments).items():
                try:
                    write(source, arguments, prefix)
                except BrokenPipeError:
                    raise  # nobody reads what is printed; that is no fault of the folder's
                except OSError as error:
                    raise DataError(f"--out {arguments.out} can't be written to ({error}); {OUT_REMEDY}") from error
    except (SviteScaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        all_again = arguments.index is not None and (arguments.classes, arguments.label_key) != (None, None)
        again = "begins anew" if all_again or arguments.verify is not None else "goes on where it stopped"
        print(f"interrupted; the same command {again}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


def sources(arguments: argparse.Namespace) -> dict[str, Source]:
    """What to write, by prefix."""
    if arguments.source == "mnist5k":
        return {"train": mnist5k("train"), "val": mnist5k("val")}
    prefix = arguments.prefix or "train"
    if arguments.source == "photographs":
        return {prefix: photographs(arguments.count or 1000, prefix)}
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    if arguments.labels is None:
        source = image_folder(arguments.source, classes)
        if classes is None and (note := numbered_as_text(list(source.classes or ()))):
            print(f"warning: {note}", file=sys.stderr)
        return {prefix: source}
    names = None if classes is None else list(classes)
    return {prefix: labelled_files(arguments.source, read_labels(arguments.labels, classes), names)}


def write(source: Source, arguments: argparse.Namespace, prefix: str) -> None:
    """Writes the shards of one prefix that aren't finished."""
    out = Path(arguments.out)
    check_classes(out, prefix, source.classes)
    output = Output(source, out, prefix, arguments.samples_per_shard or 1000)
    missing = output.missing(arguments.workers)
    total = len(source.keys)
    left = sum(output.counts[number] for number in missing)
    if missing:
        with tqdm(total=total, initial=total - left, desc=prefix, unit="image") as progress:
            for count in output.write(missing, arguments.workers):
                progress.update(count)
    write_info(output.shards, output.counts, prefix, source.classes)
    done = f"wrote {len(missing)} of {len(output.shards)} shards" if missing else "already complete"
    split = "val" if prefix == "val" else "train"
    print(printable(f"{done}: {total} images in {output.shards[0]} to {output.shards[-1].name}{but(source.left_out)}"))
    print(printable(f"for a config: data.{split}='{out / shard_pattern(prefix, len(output.shards))}'"))


def index(arguments: argparse.Namespace) -> None:
    """Indexes the shards that have no index, or a stale or unreadable one; all of them, where a rule for labels is given.

    Where times don't tell whether an index is stale, as after a copy without them, the tar is compared with its checksum.
    """
    classes = None if arguments.classes is None else read_classes(arguments.classes)
    rule = LabelRule(arguments.label_key, classes)
    shards = find_shards(arguments.index, "--index")
    if rule == LabelRule():
        indexed = dict(zip(shards, map(is_indexed, shards), strict=True))
        shards = [shard for shard in shards if not indexed[shard]]
    if not shards:
        print("every shard has its index already")
        return
    done = with_bar(partial(index_shard, rule=rule), shards, arguments.workers, "index")
    written = [shard for shard in done if not shard.problem and not shard.is_kept]
    if not written and not any(shard.problem for shard in done):
        print("every shard has its index already")
        return
    left_out = sum((shard.left_out for shard in written), Counter[str]())
    print(f"{len(written)} indexes are written: {sum(shard.num_samples for shard in written)} samples{but(left_out)}")
    changed = [name for shard in written if (name := shard.changed)]
    if changed:
        print(f"{len(changed)} of them had an index of the same size but another content, {printable(changed[0])} the first")
    refuse([shard.problem for shard in done], "can't be indexed")


class Indexed(NamedTuple):
    """A shard that was to be indexed."""

    problem: str
    """Empty if it was."""
    num_samples: int
    left_out: Counter[str]
    """Its other members, by kind."""
    changed: str = ""
    """Its name, where it had an index that fitted but for the checksum."""
    is_kept: bool = False
    """It had an index that is right."""


def index_shard(shard: Path, rule: LabelRule) -> Indexed:
    """Indexes one shard."""
    try:
        if rule == LabelRule() and confirm(shard):
            return Indexed("", 0, Counter(), is_kept=True)
        changed = shard.name if rule == LabelRule() and has_index(shard) else ""
        index, left_out = build_index(shard, rule)
        save_index(index)
    except DataError as error:
        return Indexed(str(error), 0, Counter())
    except OSError as error:
        problem = f"{shard} can't be read, or its index can't be written beside it ({error}); mend that"
        return Indexed(problem, 0, Counter())
    return Indexed("", index.count, left_out, changed)


def printable(text: str) -> str:
    """A text whose names may be of any bytes, as stdout takes it."""
    return text.encode(errors="backslashreplace").decode()


def but(left_out: Mapping[str, int]) -> str:
    """The end of a message on samples."""
    return f"; left out: {in_words(left_out)}" if left_out else ""


def verify(pattern: str, workers: int) -> None:
    """Compares shards with the sizes and checksums in their indexes."""
    shards = find_shards(pattern, "--verify")
    found = with_bar(damage, shards, workers, "verify")
    refuse(found, "can't be used as they are")
    print(f"{len(shards)} shards are as they were when they were indexed")


def refuse(found: Sequence[str], failure: str) -> None:
    """Prints what is wrong with each shard.

    Args:
        found: of each shard, what is wrong; empty if nothing is.
        failure: what to say after the number of those with which something is.

    Raises:
        DataError: something is wrong.
    """
    problems = sorted(text for text in found if text)
    for text in problems:
        print(printable(text))
    if problems:
        raise DataError(f"{len(problems)} of {len(found)} shards {failure}; see above")


def with_bar(work: Callable[[Path], Result], shards: Sequence[Path], workers: int, name: str) -> list[Result]:
    return list(tqdm(in_processes(work, shards, workers), total=len(shards), desc=name, unit="shard"))
