"""The token selector under every engine: the same losses and the same selectors as on one process, from the same noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from svite_scale.models.token_insertion import insert_token_selectors
from svite_scale.models.token_selector import selector_loss
from tests.engines.engines import SHARED, adamw, build_backend, small_vit
from tests.engines.test_parity import batch
from tests.ranks import run_on_ranks, run_on_ranks_once

STEPS = 8


@dataclass(frozen=True)
class Run:
    """One training of 8 steps in which every rank sees the same samples and draws the same noise."""

    kind: str = "single"
    world_size: int = 1
    mode: str = "gather"
    signal: str = "classifier"
    checkpointing: bool = False
    bf16: bool = False


@dataclass
class Result:
    """What a rank saw.

    Attributes:
        losses: of each step.
        selectors: weights of the selectors by name, after the last step.
        moved: how far each selector's weights went, by name.
        evaluated: loss of the trained model in evaluation.
        shapes: of the tokens that each block got, at the last step.
    """

    losses: list[float]
    selectors: dict[str, list[float]]
    moved: dict[str, float]
    evaluated: float
    shapes: list[tuple[int, ...]]


def train(run: Run) -> Result:
    """Runs on every rank."""
    # With the paper's signal, a selector before the last block would learn nothing: see docs/tokens.md.
    model = small_vit(checkpointing=run.checkpointing, depth=3)
    # Of 5 tokens 4, and of these 3.
    selectors = insert_token_selectors(model, keep=0.8, blocks=(0, 1), mode=run.mode, signal=run.signal, keep_warmup=0.5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            # At timm's initial size the selectors' gradients are as small as Adam's eps.
            parameter.detach().mul_(10)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "selector" in name}
    backend = build_backend(run.kind, model, adamw, micro_batch_size=24, bf16=run.bf16)
    shapes: dict[int, tuple[int, ...]] = {}
    for index, attention in enumerate(module for name, module in model.named_modules() if name.endswith(".attn")):
        attention.register_forward_pre_hook(lambda _, inputs, index=index: shapes.update({index: tuple(inputs[0].shape)}))
    losses = []
    for step in range(STEPS):
        for selector in selectors:
            selector.anneal(step / STEPS)
        images, labels = batch(step)
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(backend.forward(images).float(), labels)
        backend.backward(loss + selector_loss(backend.model, labels))
        backend.step()
        losses.append(float(loss.detach()))
    seen = [shapes[index] for index in sorted(shapes)]
    backend.wrapped.eval()
    with torch.no_grad():
        images, labels = batch(100)
        evaluated = float(nn.functional.cross_entropy(backend.forward(images).float(), labels))
    parameters = {name: parameter for name, parameter in backend.model.named_parameters() if "selector" in name}
    weights = {name: backend.access.read(parameter).detach().cpu() for name, parameter in parameters.items()}
    moved = {name: float((weight - start[name]).norm()) for name, weight in weights.items()}
    return Result(losses, {name: weight.flatten().tolist() for name, weight in weights.items()}, moved, evaluated, seen)


def results_of(run: Run) -> list[Result]:
    return run_on_ranks_once(run.world_size, train, run)


def assert_parity(run: Run, tolerance: float) -> None:
    (single,) = results_of(replace(run, kind="single", world_size=1, checkpointing=False, bf16=False))
    for result in results_of(run):
        assert result.losses == pytest.approx(single.losses, abs=tolerance)
        assert result.evaluated == pytest.approx(single.evaluated, abs=tolerance)
        assert result.selectors.keys() == single.selectors.keys()
        assert result.shapes == single.shapes
        for name, weight in result.selectors.items():
            assert weight == pytest.approx(single.selectors[name], abs=tolerance)


def test_one_process_trains_its_selectors_on_shorter_sequences() -> None:
    """The run that all others are measured by is no idle one."""
    (result,) = results_of(Run())
    parameters = "attention.queries", "classifier.projection", "classifier.weight", "classifier.bias"
    assert result.selectors.keys() == {f"blocks.selector{index}.{name}" for index in (0, 1) for name in parameters}
    assert min(result.moved.values()) > 1e-3
    assert result.shapes == [(24, 4, 20), (24, 3, 20), (24, 3, 20)]
    assert len(set(result.losses)) == STEPS
    (masked,) = results_of(Run(mode="mask"))
    assert masked.shapes == [(24, 5, 20)] * 3
    assert masked.losses != pytest.approx(result.losses, abs=1e-3)


@pytest.mark.parametrize("kind", SHARED)
def test_two_ranks_train_like_one(kind: str) -> None:
    assert_parity(Run(kind, 2), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_two_ranks_train_like_one_with_the_signal_of_the_paper(kind: str) -> None:
    assert_parity(Run(kind, 2, signal="paper"), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_two_ranks_train_like_one_in_mask_mode(kind: str) -> None:
    assert_parity(Run(kind, 2, mode="mask"), 1e-5)


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 2)])
def test_activation_checkpointing_changes_nothing(kind: str, world_size: int) -> None:
    assert_parity(Run(kind, world_size, checkpointing=True), 1e-5)


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("zero3", 2)])
def test_activation_checkpointing_repeats_the_noise_of_the_paper(kind: str, world_size: int) -> None:
    assert_parity(Run(kind, world_size, checkpointing=True, signal="paper"), 1e-5)


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_bf16_is_close_to_fp32(kind: str, world_size: int) -> None:
    assert_parity(Run(kind, world_size, bf16=True), 3e-2)


def fsdp2_units() -> set[str]:
    """Runs on every rank."""
    model = small_vit()
    insert_token_selectors(model, keep=0.8)
    build_backend("fsdp2", model, adamw)
    return {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def test_blocks_stay_the_units_that_fsdp2_gathers() -> None:
    for units in run_on_ranks(2, fsdp2_units):
        assert units == {"", "blocks.0", "blocks.1"}


def gradients(sharded: bool) -> dict[str, list[float]]:
    """Runs on every rank: the selectors' gradients of one batch, in a loop that may shard every item of ``model.blocks``."""
    model = small_vit(checkpointing=True, depth=3)
    insert_token_selectors(model, keep=0.8, blocks=(0, 1))
    if sharded:
        for module in (*model.blocks, model):
            fully_shard(module)
    images, labels = batch(0)
    torch.manual_seed(0)
    (nn.functional.cross_entropy(model(images), labels) + selector_loss(model, labels)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if "selector" in name}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    return {name: grad.flatten().tolist() for name, grad in whole.items() if grad is not None}


def test_a_loop_of_ones_own_may_make_selectors_units() -> None:
    expected, _ = run_on_ranks(2, gradients, False)
    assert len(expected) == 8
    for found in run_on_ranks(2, gradients, True):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient == pytest.approx(expected[name], rel=1e-4, abs=1e-12)
