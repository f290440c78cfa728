"""A function applied to many items in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from svite_scale.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yields ``work(item)`` for each item as it is ready, from at most ``workers`` forked processes.

    If one process is enough, it is this one. An error, closing the iterator, or the end of this process, even by a kill, ends
    the forked processes at once.

    Args:
        work: inherited by fork, not pickled, so it may hold large objects; its results are pickled.
        items: pickled one by one.
        workers: at least 1.

    Raises:
        DataError: ``work`` raised it, or a process was killed.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("fork"), initializer=start_worker, initargs=(work,)
    ) as pool:
        try:
            for future in as_completed([pool.submit(run_work, item) for item in items]):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError("a worker process was killed (out of memory?); run again with fewer --workers") from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_work: Callable[[Any], Any]
"""The function that a worker applies; set in workers only."""


def start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends its workers
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process after its parent has ended. After a kill -9, a pool's workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers"
    parent.join()
    os._exit(1)


def run_work(item: Any) -> Any:
    return _work(item)
