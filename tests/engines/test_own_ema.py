"""The public average in a loop of one's own: on every engine, before or after the update, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from tests.engines.engines import adamw, build_backend
from tests.ranks import run_on_ranks
from tests.sparsity.packing import packed_layers, positions_of_units

STEPS, UPDATE_EVERY, DECAY = 8, 3, 0.8


class Net(nn.Sequential):
    """A layer in blocks and one of single weights, both of an odd count, and statistics between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 5))
        svite_scale.sparsify(self, density=0.37, block=(4, 1))


def images(step: int) -> Tensor:
    return torch.randn(16, 9, generator=torch.Generator().manual_seed(step))


class Loop:
    """What a user writes. ``kind`` is an engine's short name, or ``compiled`` for ``torch.compile`` around the model."""

    def __init__(self, kind: str) -> None:
        self.net = Net()
        self.backend: Any = None
        if kind.startswith("zero"):
            self.backend = build_backend(kind, self.net, adamw, micro_batch_size=16, clip=None)
            self.wrapped: nn.Module = self.backend.wrapped
            self.topology = svite_scale.attach(self.wrapped, total_steps=20, update_every=UPDATE_EVERY)
        else:
            wrap: Any = {
                "single": lambda net: net,
                "ddp": DistributedDataParallel,
                "fsdp2": fully_shard,
                "compiled": torch.compile,
            }
            self.wrapped = wrap[kind](self.net)
            self.optimizer = adamw(self.net)
            self.topology = svite_scale.attach(self.wrapped, self.optimizer, total_steps=20, update_every=UPDATE_EVERY)
        self.ema = svite_scale.Ema(self.wrapped, self.topology, decay=DECAY)

    def step(self, step: int) -> None:
        """One optimizer step, nothing else."""
        self.wrapped.train()
        loss = nn.functional.cross_entropy(self.wrapped(images(step)), torch.arange(16) % 5)
        if self.backend:
            self.backend.backward(loss)
            self.backend.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        self.wrapped.eval()
        return self.wrapped(images(0))


@torch.no_grad()
def dense(net: Net) -> dict[str, Tensor]:
    """Weights and statistics in float64, packed ones with zeros where inactive; of a model that isn't sharded."""
    found = {name: tensor.double().clone() for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    for name, layer in packed_layers(net).items():
        found[f"{name}.values"] = layer.dense_weight().double()
    return found


def active(net: Net) -> dict[str, Tensor]:
    """By name of values, where they are in the flat dense weight, int64, shaped like them."""
    found = {}
    for name, layer in packed_layers(net).items():
        units = bits.unpack(layer.mask, layer.shape.numel())
        positions = positions_of_units(layer.grid.shape, layer.grid.block)[units]
        found[f"{name}.values"] = positions.view(layer.values.shape)
    return found


def train(loop: Loop, *, before_topology: bool = True, steps: int = STEPS) -> None:
    for step in range(1, steps + 1):
        loop.step(step)
        if before_topology:
            loop.ema.update()
        loop.topology.step()
        if not before_topology:
            loop.ema.update()


@pytest.mark.parametrize("before_topology", [True, False])
def test_the_average_is_that_of_the_dense_weights_whichever_comes_first(before_topology: bool) -> None:
    loop = Loop("single")
    average = dense(loop.net)
    moved = 0
    for step in range(1, STEPS + 1):
        loop.step(step)
        if before_topology:
            loop.ema.update()
        for name, weight in dense(loop.net).items():
            average[name] = DECAY * average[name] + (1 - DECAY) * weight
        before = active(loop.net)
        loop.topology.step()
        for name, now in active(loop.net).items():
            moved += len(set(now.flatten().tolist()) - set(before[name].flatten().tolist()))
            kept = torch.zeros_like(average[name])
            kept.view(-1)[now] = 1
            average[name] *= kept  # what is dropped is forgotten, and what comes was 0
        if not before_topology:
            loop.ema.update()
    assert moved > 20
    found = loop.ema.state_dict()
    assert found.keys() == average.keys() - {"0.mask", "3.mask"}
    assert {"1.running_mean", "1.running_var"} <= found.keys()
    for name, tensor in found.items():
        positions = active(loop.net).get(name)
        expected = average[name] if positions is None else average[name].flatten()[positions]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)

    held, weights = loop.evaluated(), {name: tensor.clone() for name, tensor in loop.net.state_dict().items()}
    with loop.ema.in_place_of_weights():
        x = images(0).double() @ average["0.values"].T + average["0.bias"]
        x = (x - average["1.running_mean"]) / (average["1.running_var"] + 1e-5).sqrt()
        x = nn.functional.gelu(x * average["1.weight"] + average["1.bias"]) @ average["3.values"].T + average["3.bias"]
        torch.testing.assert_close(loop.evaluated().double(), x, rtol=1e-4, atol=1e-5)
        assert (x - held).abs().max() > 1e-3
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loop.net.state_dict().items())


def on_engine(kind: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The state after some steps, logits with averages in place, and those of training that went on; on every rank."""
    loop = Loop(kind)
    train(loop)
    loop.evaluated()  # after which FSDP2 keeps the root's weights gathered
    with loop.ema.in_place_of_weights():
        within = loop.evaluated()
    loop.wrapped.train()
    with torch.no_grad():
        after = loop.wrapped(images(3))
    state = loop.ema.state_dict()
    fresh = Loop(kind)
    fresh.ema.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.ema.state_dict().items())
    return state, within, after


def test_every_engine_averages_alike_and_under_the_same_names() -> None:
    state, within, after = on_engine("single")
    for kind in ("ddp", "fsdp2", "zero1", "zero3"):
        for found_state, *logits in run_on_ranks(2, on_engine, kind):
            assert found_state.keys() == state.keys(), kind
            for name, tensor in found_state.items():
                torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5, msg=f"{kind}: {name}")
            for found, expected in zip(logits, (within, after), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=kind)


def test_a_compiled_model_keeps_its_names() -> None:
    assert Loop("compiled").ema.state_dict().keys() == Loop("single").ema.state_dict().keys()


def test_training_resumes_with_a_saved_average(tmp_path: Path) -> None:
    straight, stopped = Loop("single"), Loop("single")
    train(straight)
    train(stopped, steps=4)
    torch.save(stopped.ema.state_dict(), tmp_path / "ema.pt")
    stopped.ema = svite_scale.Ema(stopped.wrapped, stopped.topology, DECAY)
    stopped.ema.load_state_dict(torch.load(tmp_path / "ema.pt"))
    for step in range(5, STEPS + 1):
        stopped.step(step)
        stopped.ema.update()
        stopped.topology.step()
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, stopped.ema.state_dict()[name]), name


def test_a_momentum_teacher_answers_with_the_average() -> None:
    """Its answers have no gradient, and the student's are its own, whether or not a teacher stood in its place meanwhile."""
    with_teacher, without = Loop("single"), Loop("single")
    train(with_teacher, steps=4)
    train(without, steps=4)
    with with_teacher.ema.in_place_of_weights(), torch.no_grad():
        targets = with_teacher.wrapped.train(False)(images(9)).softmax(dim=1)
    gradients = []
    for loop in (with_teacher, without):
        loop.wrapped.zero_grad()
        nn.functional.cross_entropy(loop.wrapped.train(False)(images(9)), targets).backward()
        gradients.append([parameter.grad for parameter in loop.net.parameters() if parameter.requires_grad])
    assert not targets.requires_grad
    assert all(map(torch.equal, *gradients))


class EvaluationFailedError(Exception):
    """Raised by a test amid an evaluation."""


def fail_within(loop: Loop) -> None:
    with loop.ema.in_place_of_weights():
        raise EvaluationFailedError


def test_an_error_in_an_evaluation_leaves_the_weights_in_their_place() -> None:
    loop = Loop("single")
    train(loop)
    before = loop.evaluated()
    with pytest.raises(EvaluationFailedError):
        fail_within(loop)
    assert torch.equal(loop.evaluated(), before)
    loop.ema.update()


def fail_on_ranks() -> None:
    loop = Loop("ddp")
    with pytest.raises(EvaluationFailedError):
        fail_within(loop)
    for use in (loop.ema.update, loop.ema.state_dict, lambda: fail_within(loop)):
        with pytest.raises(
            TopologyError, match=r"averages are in the place of the weights; leave in_place_of_weights\(\) first"
        ):
            use()


def test_an_error_on_several_ranks_is_remembered() -> None:
    """For the way back is a collective, and no rank knows whether the others come to it."""
    run_on_ranks(2, fail_on_ranks)


def test_what_cant_be_averaged_is_refused() -> None:
    loop = Loop("single")
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"decay \({decay}\) must be a number in \[0, 1\]"):
            svite_scale.Ema(loop.net, loop.topology, decay)
    extra = nn.Parameter(torch.zeros(3), requires_grad=False)
    loop.net.register_parameter("extra", extra)
    loop.ema.update()
    extra.requires_grad_()
    with pytest.raises(TopologyError, match="extra became trainable after Ema was made, so it has no average; make Ema after"):
        loop.ema.update()
    loop.net.bfloat16()
    with pytest.raises(TopologyError, match=r"extra is stepped in torch\.bfloat16, too coarse to be averaged; keep weights"):
        svite_scale.Ema(loop.net, loop.topology)


def test_a_state_of_another_model_is_refused() -> None:
    loop = Loop("single")
    state = loop.ema.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "1.running_var"}
    unknown = state | {"2.weight": torch.zeros(1)}
    other = state | {"3.values": torch.zeros(3)}
    for wrong, message in (
        (missing, r"the state has no average of 1\.running_var; load what Ema saved of this model"),
        (unknown, r"the state has an average that the model has no weight for: 2\.weight;"),
        (other, r"the average 3\.values is \(3,\), but the model's is \(\d+,\)"),
    ):
        with pytest.raises(TopologyError, match=message):
            loop.ema.load_state_dict(wrong)
