"""Masks in the hands of code that takes every parameter for trained floats: freezing, vectors, averages, copies, files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from timm.utils import freeze, unfreeze
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from svite_scale.errors import MaskError, TopologyError
from svite_scale.sparsity.mask import Mask
from svite_scale.sparsity.packing import sparsify
from tests.sparsity.packing import packed_layers

REMEDY = r"a mask's bits can't be averaged; svite_scale\.Ema is an average that follows the topology"


def sparse(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 5))
    sparsify(model, 0.4, distribution="uniform", seed=seed)
    return model


def masks_of(model: nn.Module) -> list[list[int]]:
    return [layer.mask.tolist() for layer in packed_layers(model).values()]


def by_loop(model: nn.Module, trained: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = trained


def by_method(model: nn.Module, trained: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(trained)


WAYS: dict[str, Callable[[nn.Module, bool], object]] = {
    "module": lambda model, trained: model.requires_grad_(trained),
    "loop": by_loop,
    "method": by_method,
    "timm": lambda model, trained: (unfreeze if trained else freeze)(model),
}


@pytest.mark.parametrize("way", WAYS)
def test_models_are_frozen_and_thawed(way: str) -> None:
    model = sparse()
    before = masks_of(model)
    WAYS[way](model, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    WAYS[way](model, True)
    assert all(parameter.requires_grad != name.endswith("mask") for name, parameter in model.named_parameters())
    model(torch.randn(2, 2, 4, 4)).sum().backward()
    assert all((parameter.grad is None) == name.endswith("mask") for name, parameter in model.named_parameters())
    assert masks_of(model) == before


def test_parameters_go_through_a_vector_and_back() -> None:
    model = sparse()
    before, x = masks_of(model), torch.randn(2, 2, 4, 4)
    expected = model(x)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert masks_of(model) == before
    assert all(layer.mask.dtype == torch.uint8 for layer in packed_layers(model).values())
    assert torch.equal(model(x), expected)
    with pytest.raises(MaskError, match=REMEDY):
        nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


def momentum(average: nn.Module, model: nn.Module) -> None:
    """As MoCo's code has it."""
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.data = mean.data * 0.9 + parameter.data * 0.1


def averaged(**options: Callable[..., Tensor]) -> Callable[[nn.Module], tuple[nn.Module, Callable[[nn.Module], None]]]:
    def build(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
        average = AveragedModel(model, **options)  # type: ignore[arg-type]
        average.update_parameters(model)  # the first one copies
        return average.module, average.update_parameters

    return build


def momentum_teacher(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    teacher = copy.deepcopy(model)
    return teacher, lambda student: momentum(teacher, student)


AVERAGES = {
    "ema": averaged(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema by one": averaged(avg_fn=lambda mean, new, count: 0.9 * mean + 0.1 * new),
    "momentum": momentum_teacher,
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_one_topology_keep_it_and_those_of_two_are_refused(kind: str) -> None:
    model = sparse()
    average, update = AVERAGES[kind](model)
    before = masks_of(model)
    expected = {name: value.detach().double() for name, value in model.named_parameters() if not name.endswith("mask")}
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in expected:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
                    expected[name] = 0.9 * expected[name] + 0.1 * parameter.double()
        update(model)
    assert masks_of(average) == before
    for name, parameter in average.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    moved = sparse(seed=1)
    with pytest.raises(MaskError, match=REMEDY):
        update(moved)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.mul_(0.99),
        lambda mask: mask.data.mul_(0.99).add_(mask, alpha=0.01),
        lambda mask: mask.detach().lerp_(mask, 0.1),
        lambda mask: torch._foreach_mul_([mask], 0.9),
        lambda mask: torch._foreach_add_([mask.detach()], [mask], alpha=0.1),
        lambda mask: mask.copy_(torch.full((3,), -1.0)),
        lambda mask: mask.copy_(torch.full((3,), torch.nan)),
        lambda mask: setattr(mask, "data", torch.full((3,), 300.0)),
    ],
)
def test_computing_with_a_mask_is_refused_by_name(change: Callable[[Tensor], object]) -> None:
    mask = Mask(torch.tensor([1, 128, 255], dtype=torch.uint8))
    with torch.no_grad(), pytest.raises(MaskError, match=REMEDY) as raised:
        change(mask)
    assert isinstance(raised.value, TopologyError)
    assert mask.tolist() == [1, 128, 255]


def test_a_saved_model_is_the_same_and_its_state_dict_holds_plain_tensors() -> None:
    model, x = sparse(), torch.randn(2, 2, 4, 4)
    file, state_file = io.BytesIO(), io.BytesIO()
    torch.save(model, file)
    torch.save(model.state_dict(), state_file)
    file.seek(0)
    state_file.seek(0)
    whole = torch.load(file, weights_only=False)
    state = torch.load(state_file, weights_only=True)
    assert {type(tensor) for tensor in model.state_dict().values()} == {Tensor}
    other = sparse(seed=1)
    other.load_state_dict(state)
    for copied in (whole, other, copy.deepcopy(model)):
        assert torch.equal(copied(x), model(x))
        assert masks_of(copied) == masks_of(model)
        copied.requires_grad_(False).requires_grad_(True)
        assert {type(layer.mask) for layer in packed_layers(copied).values()} == {Mask}
    model[0].mask.zero_()
    assert whole[0].mask.any(), "copies share no memory"
    assert model.state_dict(keep_vars=True)["0.mask"] is model[0].mask


def test_moving_a_model_leaves_masks_bytes() -> None:
    model = sparse()
    before = masks_of(model)
    for moved in (model.double(), model.half(), model.to(torch.bfloat16), model.float()):
        assert masks_of(moved) == before
        assert {layer.mask.dtype for layer in packed_layers(moved).values()} == {torch.uint8}
        assert {type(layer.mask) for layer in packed_layers(moved).values()} == {Mask}
    assert model.to("meta")[0].mask.is_meta
