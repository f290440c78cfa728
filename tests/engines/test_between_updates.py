"""Between updates the topology engine adds no collective, and no dense weight or gradient outlives its layer's work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from svite_scale.engines.backend import Backend
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from tests.engines.engines import SHARED, adamw, build_backend, small_vit
from tests.ranks import run_on_ranks
from tests.sparsity.packing import packed_layers

STEPS, UPDATE = 4, 3
"""Steps taken, and the one that an update follows."""

BATCH = 7
"""Samples; with so many no activation is as large as a dense weight."""

WARM_UP = TopologyOptions(grown_warmup_steps=2)


@dataclass
class Watch(TorchDispatchMode):
    """Sees every operation.

    Attributes:
        numels: sizes of the dense weights.
        collectives: how often each collective was called since the last look.
        dense: weak references to the storages of tensors as large as a dense weight.
    """

    numels: set[int]
    collectives: Counter[str] = field(default_factory=Counter)
    dense: list[StorageWeakRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            self.collectives[str(function)] += 1
        if isinstance(result, Tensor) and result.numel() in self.numels and result.is_floating_point():
            self.dense.append(StorageWeakRef(result.untyped_storage()))
        return result

    def alive(self) -> int:
        """Storages of dense size that are still there."""
        self.dense = list({ref.cdata: ref for ref in self.dense if not ref.expired()}.values())
        return len(self.dense)

    def look(self) -> dict[str, int]:
        seen, self.collectives = dict(self.collectives), Counter()
        return seen


@dataclass
class Seen:
    """What a rank saw in each step.

    Attributes:
        collectives: by step, how often each was called.
        created: by step, tensors of dense size that came and went.
        after_forward: by step, those alive after some layer's forward, at most.
        after_backward: by step, those alive once gradients are there.
    """

    collectives: list[dict[str, int]]
    created: list[int]
    after_forward: list[int]
    after_backward: list[int]


def watched(kind: str, with_topology: bool, spoil: Callable[[nn.Module], object] | None = None) -> Seen:
    """Runs on every rank: four steps, the third of which is an update step where there is a topology engine."""
    backend = build_backend(kind, small_vit(), adamw, micro_batch_size=BATCH)
    step_topology = stepping(backend) if with_topology else lambda: None
    # The head is smaller than some buffers of FSDP2.
    watch = Watch({layer.shape.numel() for name, layer in packed_layers(backend.model).items() if name != "head"})
    seen, highest = Seen([], [], [], []), [0]

    def check(*_: Any) -> None:
        highest[0] = max(highest[0], watch.alive())

    for layer in packed_layers(backend.model).values():
        layer.register_forward_hook(check)
    if spoil is not None:
        spoil(backend.model)
    for step in range(STEPS):
        images = torch.randn(BATCH, 1, 14, 14, generator=torch.Generator().manual_seed(step))
        highest[0] = 0
        with watch:
            loss = backend.forward(images).square().mean()
            created = len(watch.dense)
            check()
            backend.backward(loss)
            created += len(watch.dense)
            seen.after_backward.append(watch.alive())
            backend.step()
            step_topology()
        seen.created.append(created)
        seen.after_forward.append(highest[0])
        seen.collectives.append(watch.look())
        watch.dense.clear()
    return seen


def stepping(backend: Backend) -> Callable[[], object]:
    schedule = UpdateSchedule(total_steps=5, update_every=UPDATE)
    return TopologyEngine(backend.model, backend.access, schedule, WARM_UP, group=dist.group.WORLD).step


@pytest.mark.parametrize("kind", SHARED)
def test_no_collective_is_added_to_a_step_without_an_update(kind: str) -> None:
    for with_engine, without in zip(run_on_ranks(2, watched, kind, True), run_on_ranks(2, watched, kind, False), strict=True):
        assert sum(without.collectives[1].values()) > 0, "collectives are seen"
        for step in range(STEPS):
            if step == UPDATE - 1:
                assert sum(with_engine.collectives[step].values()) > sum(without.collectives[step].values()) + 20
            else:
                assert with_engine.collectives[step] == without.collectives[step], f"step {step + 1}"


@pytest.mark.parametrize("kind", SHARED)
def test_no_dense_weight_outlives_its_layers_forward_and_no_dense_gradient_its_backward(kind: str) -> None:
    for seen in run_on_ranks(2, watched, kind, True):
        assert min(seen.created) > 0, "dense tensors are seen while they are there"
        assert seen.after_forward == [0] * STEPS
        for step in range(STEPS):
            if step != UPDATE - 1:
                assert seen.after_backward[step] == 0, f"step {step + 1}"


def keep_dense(model: nn.Module) -> None:
    """What the test must notice: a layer whose dense weight stays."""
    layer = next(iter(packed_layers(model).values()))
    layer.register_forward_hook(lambda module, *_: setattr(module, "kept", module.dense_weight()))


def test_the_watch_notices_a_dense_weight_that_stays() -> None:
    (seen,) = run_on_ranks(1, watched, "single", True, keep_dense)
    assert seen.after_forward == [1] * STEPS
