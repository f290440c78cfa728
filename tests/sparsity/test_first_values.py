"""First values of active weights: their spread, and when they stay as they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import svite_scale
from svite_scale.errors import OptionError
from tests.sparsity.packing import packed_layers

BLOCK = (4, 2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 24, 2, stride=2), nn.Flatten(), nn.Linear(24, 40), nn.Linear(40, 16, dtype=torch.float64))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model[int(name)].weight.detach().clone() for name in ("0", "2", "3")}  # type: ignore[index]


def factors(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The factor of every weight by its definition, from the places of a sparse weight's zeros."""
    active = (weight != 0).flatten(1)
    if block == (1, 1):
        return torch.full_like(weight, math.sqrt(active.numel() / int(active.sum())))
    rows = [math.sqrt(active.shape[1] / int(row.sum())) if row.any() else 1.0 for row in active]
    return torch.tensor(rows, dtype=weight.dtype).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)


@pytest.mark.parametrize("block", [(1, 1), BLOCK])
def test_values_are_raised_by_the_root_of_inputs_over_active_inputs(block: tuple[int, int]) -> None:
    model, dense = net(), weights_of(net())
    svite_scale.sparsify(model, 0.3, block=block)
    assert packed_layers(model).keys() == dense.keys()
    for name, sparse in weights_of(model).items():
        expected = dense[name] * (sparse != 0) * factors(sparse, block)
        torch.testing.assert_close(sparse, expected, rtol=3e-7, atol=0.0)
    rows_of_blocks = {int(row.sum()) for row in (weights_of(model)["2"] != 0).flatten(1)}
    assert len(rows_of_blocks) > 1, "rows differ in their active inputs, and so in their factors"


def test_a_row_of_blocks_without_any_active_one_is_no_problem() -> None:
    model = nn.Sequential(nn.Linear(8, 64))
    svite_scale.sparsify(model, 0.1, block=BLOCK)
    weight: Tensor = model[0].weight  # type: ignore[assignment]
    assert not weight.any(dim=1).all()
    assert weight.isfinite().all()


@pytest.mark.parametrize("block", [(1, 1), (16, 4)])
def test_outputs_have_the_spread_of_the_dense_layers(block: tuple[int, int]) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(dense.weight, std=0.02)
    x = torch.randn(256, 1024)
    expected = float(dense(x).detach().var())
    for init, spread in (("fan_in", 1.0), ("dense", 0.1)):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        model[0].load_state_dict(dense.state_dict())
        svite_scale.sparsify(model, 0.1, init=init, block=block)
        assert float(model(x).detach().var()) == pytest.approx(spread * expected, rel=0.03)


def test_init_dense_keeps_the_values() -> None:
    model, dense = net(), weights_of(net())
    svite_scale.sparsify(model, 0.3, init="dense")
    for name, sparse in weights_of(model).items():
        assert torch.equal(sparse, dense[name] * (sparse != 0))


def test_dense_layers_and_biases_stay_as_they_are() -> None:
    model, before = net(), net()
    svite_scale.sparsify(model, densities={"2": 0.5, "*": 1.0})
    assert all(torch.equal(model[index].weight, before[index].weight) for index in (0, 3))
    assert all(torch.equal(model[index].bias, before[index].bias) for index in (0, 2, 3))


@pytest.mark.parametrize("block", [(1, 1), BLOCK])
def test_trained_weights_keep_their_values(block: tuple[int, int]) -> None:
    model, dense = net(), weights_of(net())
    svite_scale.sparsify(model, 0.3, by_magnitude=True, block=block)
    pruned = net()
    for name, sparse in weights_of(model).items():
        assert torch.equal(sparse, dense[name] * (sparse != 0))
        pruned[int(name)].weight.data.copy_(sparse)
    svite_scale.sparsify(pruned, masks="from_weights", block=block)
    assert packed_layers(pruned)
    assert all(torch.equal(weight, weights_of(pruned)[name]) for name, weight in weights_of(model).items())


def test_weights_are_raised_under_masks_from_a_file(tmp_path: Path) -> None:
    path, mask = tmp_path / "masks", torch.arange(24 * 40).view(40, 24) % 3 == 0
    save_file({"2.weight": mask}, path)
    model, dense = net(), weights_of(net())
    svite_scale.sparsify(model, masks=path, keep_dense=["0", "3"])
    torch.testing.assert_close(weights_of(model)["2"], dense["2"] * mask * math.sqrt(3))


def test_an_unknown_init_is_refused_in_one_line() -> None:
    with pytest.raises(OptionError, match=r"^init = 'he': is not one of fan_in, dense; use one of fan_in, dense$"):
        svite_scale.sparsify(net(), 0.3, init="he")
