"""Kills training ranks at random instants of a save, and checks that no checkpoint is lost.

    python benchmarks/kills.py [--instants 200] [--seed 0]

Two real ranks save in a loop. One of them, chosen at random, is killed with SIGKILL at a random instant of a save; the other is
killed with it, or ends because of it. Then two new ranks load the newest valid checkpoint, check each number in it, and resume.
It must be the checkpoint whose save was last reported done, or the one that was being saved.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package, from any folder

from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.checkpoint.options import CheckpointConfig
from svite_scale.checkpoint.state import RunParts
from svite_scale.config.schema import Config
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.engines.torch_backend import TorchBackend
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule

RANKS, STEPS_PER_EPOCH = 2, 2
SAVING = CheckpointConfig(keep_last=2, on_error="stop")
ANSWER_S = 120
"""Longest time that ranks may take to load or save, so that this fails and doesn't hang."""


@dataclass
class Outcome:
    """The results of a series of kills.

    Attributes:
        during_save: kills between the beginning of a save and the report that it is done.
        between_saves: kills that came, by chance, after that report; they don't count.
        loaded_previous: loads, after a kill during a save, of the checkpoint before the save.
        loaded_new: loads of the checkpoint that was being saved: it was complete when the kill came.
        save_ms: milliseconds of each save that was reported done.
    """

    during_save: int = 0
    between_saves: int = 0
    loaded_previous: int = 0
    loaded_new: int = 0
    save_ms: list[float] = field(default_factory=list)

    def check(self, loaded: int, saved: int, attempted: int) -> None:
        """Counts what was loaded after a kill, which must be the step reported saved or the one attempted."""
        assert loaded in (saved, attempted), f"step {saved} was saved and {attempted} attempted, but {loaded} was loaded"
        if attempted > saved:
            self.loaded_new += loaded == attempted
            self.loaded_previous += loaded == saved


def kill_at_random(instants: int, folder: Path, seed: int = 0) -> Outcome:
    """Kills ranks until ``instants`` kills have hit a save.

    Args:
        instants: kills that must hit a save.
        folder: for checkpoints.
        seed: for choosing instants and ranks.

    Raises:
        AssertionError: a valid checkpoint was lost, or a number in it was wrong, or a rank failed by itself.
    """
    draw = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    # Imported once for all ranks; torch's optimizers and FSDP2 would import the second when they are first used.
    context.set_forkserver_preload(["benchmarks.kills", "torch._dynamo"])
    outcome = Outcome()
    saved = attempted = 0
    while outcome.during_save < instants:
        ranks = Pair(context, folder, outcome.during_save + outcome.between_saves)
        try:
            loaded = ranks.next_message("loaded")
            outcome.check(loaded, saved, attempted)
            # Some saves succeed first, so that there are old checkpoints to remove too.
            for _ in range(draw.randint(0, 2)):
                outcome.save_ms.append(ranks.save_duration())
            typical = sorted(outcome.save_ms)[len(outcome.save_ms) // 2] if outcome.save_ms else 50.0
            ranks.next_message("saving")
            time.sleep(draw.random() * 1.1 * typical / 1000)
            ranks.kill(draw.randrange(RANKS), both=draw.random() < 0.5)
        finally:
            ranks.end()
        saved, attempted = max(saved, loaded, ranks.saved), max(ranks.saving, loaded)
        outcome.during_save += attempted > saved
        outcome.between_saves += attempted == saved
    ranks = Pair(context, folder, -1)
    try:
        outcome.check(ranks.next_message("loaded"), saved, attempted)
    finally:
        ranks.end()
    return outcome


class Pair:
    """Two ranks of one process group, which report what they do."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, folder: Path, number: int) -> None:
        self.saving = self.saved = 0
        self._messages, theirs = context.Pipe(duplex=False)
        store = folder / f"store-{number}"
        self._errors = [folder / f"rank-{rank}.txt" for rank in range(RANKS)]
        self._processes: list[BaseProcess] = []
        for rank in range(RANKS):
            arguments = (rank, folder / "checkpoints", str(store), self._errors[rank], theirs)
            process = context.Process(target=save_for_ever, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
        theirs.close()

    def next_message(self, kind: str) -> int:
        """Returns the step of the next message of a kind."""
        while True:
            try:
                assert self._messages.poll(ANSWER_S), f"no {kind!r} in {ANSWER_S} s"
                found, step = self._messages.recv()
            except (AssertionError, EOFError) as error:
                said = "\n".join(path.read_text() for path in self._errors)
                raise AssertionError(f"ranks failed, or hang ({error}):\n{said}") from error
            self._note(found, step)
            if found == kind:
                return step

    def save_duration(self) -> float:
        """Waits for the next save, and returns its milliseconds."""
        self.next_message("saving")
        started = time.perf_counter()
        self.next_message("saved")
        return 1000 * (time.perf_counter() - started)

    def kill(self, victim: int, *, both: bool) -> None:
        """Kills one rank. Kills the other too, or lets it find out."""
        dying, survivor = self._processes[victim], self._processes[1 - victim]
        dying.kill()
        if both:
            survivor.kill()
        survivor.join(5)
        dying.join()

    def end(self) -> None:
        """Ends both, and reads their last messages."""
        for process in self._processes:
            # Another process may have the number of one that has ended.
            if process.is_alive():
                process.kill()
            process.join()
        try:
            while self._messages.poll():
                self._note(*self._messages.recv())
        except EOFError:
            pass
        self._messages.close()

    def _note(self, kind: str, step: int) -> None:
        self.saving = max(self.saving, step if kind == "saving" else 0)
        self.saved = max(self.saved, step if kind == "saved" else 0)


def save_for_ever(rank: int, directory: Path, store: str, errors: Path, messages: Connection) -> None:
    """Runs one rank: loads the newest checkpoint, checks it, and saves one step after another. Rank 0 reports."""
    # The errors are only shown if a rank fails that wasn't killed.
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.dump_traceback_later(ANSWER_S / 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)

    def report(kind: str, step: int) -> None:
        if rank == 0:
            messages.send((kind, step))

    backend, topology, checkpoint = small_run(directory)
    if checkpoint.newest_valid() is not None:
        checkpoint.load_newest()
        check_state(backend, topology.steps)
    report("loaded", topology.steps)
    while True:
        topology.step()
        write_state(backend, topology.steps)
        report("saving", topology.steps)
        checkpoint.save(topology.steps)
        if topology.steps % 2 == 0:
            checkpoint.wait()
        # Otherwise the save runs in the background, while this thread has collectives of its own, as training does.
        while "checkpoint_seconds" not in checkpoint.metrics():
            time.sleep(0.001)
        report("saved", topology.steps)


def small_run(
    directory: Path, saving: CheckpointConfig = SAVING, kind: str = "fsdp2"
) -> tuple[Backend, TopologyEngine, Checkpoint]:
    """Returns a sparse model on an engine of this kind, its topology, which doesn't change, and its checkpoints."""
    torch.manual_seed(0)
    # The first layer is large enough to be saved in chunks.
    model = nn.Sequential(nn.Linear(600, 300), nn.Linear(300, 11))
    sparsify(model, 0.4)
    options = EngineOptions(device=torch.device("cpu"), wrap_units=[], micro_batch_size=1)
    backend = TorchBackend(kind, model, adamw, options)
    backend.init_optimizer_state(torch.zeros(1, 600))
    schedule = UpdateSchedule(total_steps=10**9, update_every=10**9)
    topology = TopologyEngine(model, backend.access, schedule, TopologyOptions(method="static"), group=dist.group.WORLD)
    config = Config(run_dir=str(directory.parent), checkpoint=saving)
    every = saving.keep_every_epochs

    def keeps(step: int) -> bool:
        return every is not None and step % (every * STEPS_PER_EPOCH) == 0

    return backend, topology, Checkpoint(directory, config, RunParts(backend, topology), keeps)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)


@torch.no_grad()
def write_state(backend: Backend, step: int) -> None:
    """Sets every trained number to the step, and every moment to the step plus a half."""
    access = backend.access
    for parameter in trained(backend):
        access.write(parameter, torch.full_like(access.read(parameter), step))
        for name in access.moment_names(parameter):
            access.write_moment(parameter, name, torch.full_like(access.read_moment(parameter, name), step + 0.5))


@torch.no_grad()
def check_state(backend: Backend, step: int) -> None:
    """Checks all that :func:`write_state` wrote.

    Raises:
        AssertionError: a number is another one.
    """
    access = backend.access
    for parameter in trained(backend):
        assert (access.read(parameter) == step).all()
        for name in access.moment_names(parameter):
            assert (access.read_moment(parameter, name) == step + 0.5).all()


def trained(backend: Backend) -> list[nn.Parameter]:
    return [parameter for parameter in backend.model.parameters() if parameter.requires_grad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=200, help="kills during a save (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_at_random(arguments.instants, Path(folder), arguments.seed)
    from benchmarks.machine import describe_machine  # imports DeepSpeed, which ranks don't need

    print(describe_machine())
    print(f"{outcome.during_save} kills during a save, {outcome.between_saves} after one: nothing valid was lost")
    print(f"loaded then: {outcome.loaded_previous} the previous checkpoint, {outcome.loaded_new} the new one")
    median = sorted(outcome.save_ms)[len(outcome.save_ms) // 2]
    print(f"a save takes {median:.0f} ms, all took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
