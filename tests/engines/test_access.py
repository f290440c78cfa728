"""Reading and writing one parameter and its optimizer state in full, on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svite_scale.engines.backend import Backend
from svite_scale.engines.moments import elementwise
from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.packing import random_mask
from tests.engines.engines import SHARED, adamw, build_backend, small_vit
from tests.ranks import run_on_ranks
from tests.sparsity.packing import packed_layers

LR = 1e-3
Snapshot = dict[str, np.ndarray[Any, Any]]


def mixed_vit() -> nn.Module:
    """With values of blocks, ``[k, 1, 16]``, and of single weights in its head, ``[k]``."""
    return small_vit(block=(16, 1))


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 14, 14, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def train_step(backend: Backend, seed: int) -> None:
    inputs, labels = images(seed)
    backend.backward(nn.functional.cross_entropy(backend.forward(inputs).float(), labels))
    backend.step()


def drawn_values(twin: nn.Module) -> dict[str, Tensor]:
    """New values far from the initial ones, and new masks, for every parameter by name."""
    generator = torch.Generator().manual_seed(1)
    values = {name: 0.3 * torch.randn(parameter.shape, generator=generator) for name, parameter in twin.named_parameters()}
    for name, layer in packed_layers(twin).items():
        values[f"{name}.mask"] = bits.pack(random_mask(layer.shape.numel(), layer.num_active, 1, name))
    return values


def drawn_moments(twin: nn.Module) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: {
            "exp_avg": torch.randn(parameter.shape, generator=generator),
            "exp_avg_sq": torch.rand(parameter.shape, generator=generator),
        }
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }


def read_all(backend: Backend, parameters: dict[str, nn.Parameter]) -> Snapshot:
    return {name: backend.access.read(parameter).numpy().copy() for name, parameter in parameters.items()}


def read_all_moments(backend: Backend, parameters: dict[str, nn.Parameter]) -> dict[str, Snapshot]:
    return {
        name: {key: backend.access.read_moment(parameter, key).numpy().copy() for key in backend.access.moment_names(parameter)}
        for name, parameter in parameters.items()
        if parameter.requires_grad
    }


def write_all(backend: Backend, parameters: dict[str, nn.Parameter], twin: nn.Module) -> None:
    values, moments = drawn_values(twin), drawn_moments(twin)
    for name, parameter in parameters.items():
        backend.access.write(parameter, values[name])
        if parameter.requires_grad:
            for key, moment in moments[name].items():
                backend.access.write_moment(parameter, key, moment)


def exercise(kind: str, bf16: bool) -> dict[str, Any]:
    """Runs on every rank: a step, then writes, then a forward and another step."""
    backend = build_backend(kind, mixed_vit(), adamw, micro_batch_size=4, bf16=bf16, clip=None)
    parameters = dict(backend.model.named_parameters())
    found: dict[str, Any] = {"initial": read_all(backend, parameters)}
    found["initial moments"] = read_all_moments(backend, parameters)
    train_step(backend, seed=0)
    found["trained"] = read_all(backend, parameters)
    found["trained moments"] = read_all_moments(backend, parameters)
    with torch.no_grad():
        found["old logits"] = backend.forward(images(1)[0]).float().numpy()
    write_all(backend, parameters, mixed_vit())
    found["written"] = read_all(backend, parameters)
    found["written moments"] = read_all_moments(backend, parameters)
    with torch.no_grad():
        found["logits"] = backend.forward(images(1)[0]).float().numpy()
    train_step(backend, seed=1)
    found["stepped"] = read_all(backend, parameters)
    packed = {name: parameter for name, parameter in parameters.items() if name.endswith(".values")}
    found["own parts"] = negate_own_parts(backend, packed)
    found["negated"] = read_all(backend, packed)
    return found


@torch.no_grad()
def negate_own_parts(backend: Backend, parameters: dict[str, nn.Parameter]) -> dict[str, tuple[np.ndarray[Any, Any], int]]:
    """What ``local_values`` says on this rank, which it then negates in place."""
    parts = {}
    for name, parameter in parameters.items():
        local, offset = backend.access.local_values(parameter)
        parts[name] = local.numpy().copy(), offset
        local.neg_()
    return parts


ENGINES = [(kind, size, bf16) for size, bf16 in ((2, False), (3, False), (3, True)) for kind in SHARED]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda e: f"{e[0]}_on_{e[1]}{'_in_bf16' if e[2] else ''}")
def engine(request: pytest.FixtureRequest) -> tuple[bool, list[dict[str, Any]]]:
    """Whether in bf16, and what each rank found."""
    kind, world_size, bf16 = request.param
    return bf16, run_on_ranks(world_size, exercise, kind, bf16)


def assert_same(found: Snapshot, expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy(), err_msg=name, strict=True)


def assert_near(found: Snapshot, expected: Mapping[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), atol=tolerance, rtol=0, err_msg=name, strict=True)


def trained_twin() -> tuple[nn.Module, torch.optim.Optimizer]:
    """One process, after the first step."""
    twin = mixed_vit()
    optimizer = adamw(twin)
    plain_step(twin, optimizer, seed=0)
    return twin, optimizer


def plain_step(twin: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs, labels = images(seed)
    optimizer.zero_grad()
    nn.functional.cross_entropy(twin(inputs), labels).backward()
    optimizer.step()


@torch.no_grad()
def write_twin(twin: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    values, moments = drawn_values(twin), drawn_moments(twin)
    for name, parameter in twin.named_parameters():
        parameter.copy_(values[name])
        for key, moment in moments.get(name, {}).items():
            optimizer.state[parameter][key].copy_(moment)


def test_the_initial_values_are_read_and_no_moments(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    for found in engine[1]:
        assert_same(found["initial"], dict(mixed_vit().named_parameters()))
        assert not any(found["initial moments"].values())


def test_what_a_step_changed_is_read(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    bf16, ranks = engine
    twin, optimizer = trained_twin()
    parameters = dict(twin.named_parameters())
    for found in ranks:
        # In bf16 a gradient near 0 may change its sign, and so AdamW's first step its direction.
        assert_near(found["trained"], parameters, 2.1 * LR if bf16 else 1e-5)
        assert any((found["trained"][name] != found["initial"][name]).any() for name in found["trained"])
        for name, moments in found["trained moments"].items():
            assert moments.keys() == {"exp_avg", "exp_avg_sq"}
            expected = {key: optimizer.state[parameters[name]][key] for key in moments}
            assert_near(moments, expected, 5e-2 if bf16 else 1e-5)


def test_what_is_written_is_read(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    """In fp32 to the last bit, in bf16 training too: it is the master values that are written."""
    twin = mixed_vit()
    for found in engine[1]:
        assert_same(found["written"], drawn_values(twin))
        moments = drawn_moments(twin)
        assert found["written moments"].keys() == moments.keys()
        for name, expected in moments.items():
            assert_same(found["written moments"][name], expected)


def test_the_next_forward_computes_with_what_is_written(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    bf16, ranks = engine
    twin, optimizer = trained_twin()
    write_twin(twin, optimizer)
    with torch.no_grad():
        expected = twin(images(1)[0]).numpy()
    for found in ranks:
        tolerance = (0.05 if bf16 else 1e-5) * np.abs(expected).max()
        np.testing.assert_allclose(found["logits"], expected, atol=tolerance, rtol=0)
        assert np.abs(found["old logits"] - expected).max() > 0.5 * np.abs(expected).max(), "the old values are far off"


def test_the_next_step_starts_from_what_is_written(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    bf16, ranks = engine
    twin, optimizer = trained_twin()
    write_twin(twin, optimizer)
    plain_step(twin, optimizer, seed=1)
    for found in ranks:
        assert_near(found["stepped"], dict(twin.named_parameters()), 5e-4 if bf16 else 1e-5)
        assert found["stepped"].keys() == ranks[0]["stepped"].keys()
        for name, value in found["stepped"].items():
            np.testing.assert_array_equal(value, ranks[0]["stepped"][name], err_msg=f"ranks disagree on {name}")
            assert name.endswith(".mask") or (value != found["written"][name]).any(), f"{name} took no step"


def test_the_ranks_own_parts_make_up_the_values_that_the_optimizer_steps(engine: tuple[bool, list[dict[str, Any]]]) -> None:
    ranks = engine[1]
    for name in ranks[0]["own parts"]:
        stepped = ranks[0]["stepped"][name].reshape(-1)
        whole = np.full_like(stepped, np.nan)
        for found in ranks:
            part, offset = found["own parts"][name]
            assert part.dtype == np.float32
            end = min(offset + part.size, whole.size)  # what lies past it is padding
            whole[offset:end] = part[: max(end - offset, 0)]
        np.testing.assert_array_equal(whole, stepped, err_msg=name)
        for found in ranks:
            np.testing.assert_array_equal(found["negated"][name].reshape(-1), -whole, err_msg=f"{name} isn't written in place")


def test_moments_are_the_tensors_with_an_entry_per_weight() -> None:
    state = {"step": torch.tensor(3.0), "mu_product": torch.tensor(0.5), "count": 3, "exp_avg": torch.ones(5)}
    assert list(elementwise(state, torch.Size((5,)))) == ["exp_avg"]
    assert elementwise({}, torch.Size((5,))) == {}


@pytest.mark.parametrize("shape", [(1,), (5, 1), (4,)])
def test_optimizer_state_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TopologyError, match=r"'row' of shape .* for a parameter of shape \(5,\) can't follow moving weights"):
        elementwise({"exp_avg": torch.ones(5), "row": torch.ones(shape)}, torch.Size((5,)))


def initialised(kind: str) -> tuple[Snapshot, Snapshot, list[float], list[bool]]:
    """Parameters before and after, learning rates, and whether all moments are there and zero. A collective."""
    backend = build_backend(kind, mixed_vit(), adamw, micro_batch_size=4, accumulation_steps=2)
    parameters = dict(backend.model.named_parameters())
    before = read_all(backend, parameters)
    backend.init_optimizer_state(images(0)[0])
    zero = []
    for parameter in parameters.values():
        if parameter.requires_grad:
            moments = [backend.access.read_moment(parameter, name) for name in ("exp_avg", "exp_avg_sq")]
            zero.append(all(moment.shape == moments[0].shape and not moment.any() for moment in moments))
    return before, read_all(backend, parameters), [group["lr"] for group in backend.optimizer.param_groups], zero


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)])
def test_init_optimizer_state_creates_moments_of_zero_and_changes_no_weight(kind: str, world_size: int) -> None:
    for before, after, rates, zero in run_on_ranks(world_size, initialised, kind):
        assert len(zero) > 20
        assert all(zero)
        assert rates == [LR, LR]
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
