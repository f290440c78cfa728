"""Training is the same on every engine: the same losses, gradient norms and masks through topology updates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.parameter_groups import parameter_groups
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests.engines.engines import SHARED, build_backend, mask_digests, small_vit
from tests.ranks import run_on_ranks_once

STEPS, BATCH = 20, 24
DEFAULTS = TopologyOptions()


@dataclass(frozen=True)
class Run:
    """One training of 20 steps with three topology updates.

    Attributes:
        split: the ranks share the global batch; else every rank sees all of it.
    """

    kind: str = "single"
    world_size: int = 1
    split: bool = False
    accumulation: int = 1
    bf16: bool = False
    clip: float | None = 0.3
    checkpointing: bool = False
    optimizer: str = "AdamW"
    options: TopologyOptions = DEFAULTS
    device: str = "cpu"
    block: tuple[int, int] = (1, 1)

    @property
    def on_one_process(self) -> Run:
        """What the run must equal."""
        return Run(clip=self.clip, optimizer=self.optimizer, options=self.options, block=self.block)


@dataclass
class Result:
    """What a rank saw: the mean loss over ranks and the gradient's norm of each step, weights moved in each update, masks."""

    losses: list[float]
    norms: list[float]
    moved: dict[int, int]
    masks: dict[str, str]


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    options = {} if name == "AdamW" else {"decoupled_weight_decay": True}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameter_groups(model, 0.05), lr=1e-2, **options)
    return optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A pattern per class under noise, so that the loss falls."""
    patterns = torch.randn(10, 1, 14, 14, generator=torch.Generator().manual_seed(1000))
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    return patterns[labels] + 0.3 * torch.randn(BATCH, 1, 14, 14, generator=generator), labels


def train(run: Run) -> Result:
    """Runs on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, convolutions in fp32 are in TF32 by default
    backend = build_backend(
        run.kind,
        small_vit(checkpointing=run.checkpointing, block=run.block),
        lambda model: optimizer_of(model, run.optimizer),
        micro_batch_size=BATCH // (world_size if run.split else 1) // run.accumulation,
        accumulation_steps=run.accumulation,
        bf16=run.bf16,
        clip=run.clip,
        device=run.device,
    )
    schedule = UpdateSchedule(total_steps=STEPS, update_every=5)
    topology = TopologyEngine(backend.model, backend.access, schedule, run.options, group=dist.group.WORLD)
    result = Result([], [], {}, {})
    for step in range(STEPS):
        images, labels = batch(step)
        if run.split:
            images, labels = images[rank::world_size], labels[rank::world_size]
        images, labels = images.to(run.device), labels.to(run.device)
        mean_loss = torch.zeros((), device=run.device)
        for micro_images, micro_labels in zip(images.chunk(run.accumulation), labels.chunk(run.accumulation), strict=True):
            loss = nn.functional.cross_entropy(backend.forward(micro_images).float(), micro_labels)
            mean_loss += loss.detach() / run.accumulation / world_size
            backend.backward(loss)
        norm = backend.step().grad_norm
        result.norms.append(float("nan") if norm is None else float(norm))
        update = topology.step()
        if update is not None:
            result.moved[update.step] = sum(layer.dropped - layer.regrown for layer in update.layers.values())
        dist.all_reduce(mean_loss)
        result.losses.append(float(mean_loss))
    result.masks = mask_digests(backend)
    return result


def results_of(run: Run) -> list[Result]:
    return run_on_ranks_once(run.world_size, train, run)


def assert_parity(run: Run, tolerance: float) -> None:
    """The run's losses are within ``tolerance`` of one process's; in fp32 norms and masks agree too."""
    single, results = results_of(run.on_one_process)[0], results_of(run)
    for result in results:
        assert result.losses == pytest.approx(single.losses, abs=tolerance)
        assert result.masks == results[0].masks, "ranks disagree on the topology"
        assert result.moved.keys() == single.moved.keys()
        if run.bf16:
            continue
        assert result.masks == single.masks
        assert result.moved == single.moved
        if run.clip is not None:
            assert result.norms == pytest.approx(single.norms, rel=max(tolerance, 1e-4))


def test_one_process_trains_clips_and_moves_weights() -> None:
    """The run that all others are measured by is no idle one."""
    (clipped,) = results_of(Run())
    assert list(clipped.moved) == [5, 10, 15]
    assert all(moved > 20 for moved in clipped.moved.values())
    assert min(clipped.norms) > 0.3, "clipping is at work in every step"
    assert clipped.losses[-1] < 0.9 * clipped.losses[0]
    (unclipped,) = results_of(Run(clip=None))
    assert unclipped.losses != pytest.approx(clipped.losses, abs=1e-3)


@pytest.mark.parametrize("kind", SHARED)
def test_two_ranks_that_see_the_same_samples(kind: str) -> None:
    assert_parity(Run(kind, 2), 1e-5)


SPLIT = [("fsdp2", 1), ("zero3", 1), ("ddp", 2), ("fsdp2", 4), ("zero1", 3), ("zero2", 2), ("zero3", 4)]
"""Each engine on several ranks, those that shard on one; split further below, over two and three, in micro-batches."""


@pytest.mark.parametrize(("kind", "world_size"), SPLIT)
def test_ranks_with_a_split_batch_train_like_one(kind: str, world_size: int) -> None:
    assert_parity(Run(kind, world_size, split=True), 1e-3)


@pytest.mark.parametrize("kind", SHARED)
def test_ranks_with_micro_batches_train_like_one(kind: str) -> None:
    assert_parity(Run(kind, 2, split=True, accumulation=3), 1e-3)


@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero3"])
def test_another_optimizer_without_clipping(kind: str) -> None:
    assert_parity(Run(kind, 2, clip=None, optimizer="NAdam"), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_activation_checkpointing_trains_alike(kind: str) -> None:
    assert_parity(Run(kind, 2, checkpointing=True), 1e-5)


def assert_bf16_is_close(run: Run) -> None:
    """Rounding decides some of the weights that move, so the losses after the first update differ more than those before."""
    before_update = slice(0, 5)
    single, result = results_of(run.on_one_process)[0], results_of(run)[0]
    assert result.losses[before_update] == pytest.approx(single.losses[before_update], abs=1e-3)
    assert_parity(run, 5e-2)


MIXED = TopologyOptions(method="mixed", seed=1, grow_window=3, grow_by="magnitude", grown_warmup_steps=4, grown_moments="zero")


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_a_mixed_method_over_a_window_with_warm_up(kind: str) -> None:
    assert_parity(Run(kind, 2, options=MIXED), 1e-5)


@pytest.mark.parametrize("kind", SHARED)
def test_three_ranks_with_micro_batches_train_like_one(kind: str) -> None:
    assert_parity(Run(kind, 3, split=True, accumulation=2, options=MIXED), 1e-3)


BF16 = {"ddp": DEFAULTS, "fsdp2": MIXED, "zero1": MIXED, "zero2": DEFAULTS, "zero3": MIXED}
"""With a warm-up on each kind of sharding."""


@pytest.mark.parametrize("kind", SHARED)
def test_bf16_is_close_to_fp32(kind: str) -> None:
    assert_bf16_is_close(Run(kind, 2, bf16=True, options=BF16[kind]))


TALL, SQUARE = (16, 1), (16, 16)
"""With blocks of 16 x 16 the smallest layers have one active block, which is less than one for each rank."""


@pytest.mark.parametrize(("kind", "checkpointing"), [("ddp", False), ("fsdp2", True), ("zero1", False), ("zero3", True)])
def test_two_ranks_train_blocks_like_one(kind: str, checkpointing: bool) -> None:
    assert_parity(Run(kind, 2, checkpointing=checkpointing, options=MIXED, block=TALL), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_fewer_blocks_than_ranks_train_like_one(kind: str) -> None:
    run = Run(kind, 3, split=True, accumulation=2, options=MIXED, block=SQUARE)
    assert min(results_of(run.on_one_process)[0].moved.values()) > 2
    assert_parity(run, 1e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_blocks_in_bf16_are_close_to_fp32(kind: str) -> None:
    assert_bf16_is_close(Run(kind, 2, bf16=True, options=MIXED, block=TALL))


def test_window_random_share_and_warm_up_each_make_a_difference() -> None:
    """So that the parity of a run with all of them says something about each."""
    results = [results_of(Run(options=MIXED))[0]]
    for change in ({"grow_window": 1}, {"grow_by": "gradient"}, {"grown_warmup_steps": 0}, {"random_share": 0.2}):
        results += results_of(Run(options=replace(MIXED, **change)))  # type: ignore[arg-type]
    for result in results[1:]:
        assert result.losses != pytest.approx(results[0].losses, abs=1e-5)


def test_bf16_computes_in_bf16() -> None:
    for kind in ("single", "fsdp2", "zero1"):
        run = Run(kind, 1 if kind == "single" else 2, bf16=True, options=MIXED)
        assert results_of(run)[0].losses != pytest.approx(results_of(run.on_one_process)[0].losses, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["single", *SHARED])
def test_a_gpu_trains_like_the_cpu(kind: str, bf16: bool) -> None:
    """But for rounding, and for the few weights whose scores it puts on the other side of the threshold."""
    on_cpu, on_gpu = results_of(Run())[0], results_of(Run(kind, bf16=bf16, device="cuda"))[0]
    assert on_gpu.losses == pytest.approx(on_cpu.losses, abs=0.05 if bf16 else 0.005)
    assert on_gpu.losses != on_cpu.losses
    assert on_gpu.moved == pytest.approx(on_cpu.moved, rel=0.1)
