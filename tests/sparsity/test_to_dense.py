"""The way back to an ordinary dense model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.packed import PackedLayer
from tests.ranks import run_on_ranks
from tests.sparsity.packing import CASES, case_of, packed_layers

TINY = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 4, "num_classes": 10}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TINY)


def contents(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_becomes_the_one_that_it_replaced(case: str) -> None:
    twin, x = case_of(case)
    twin.packed.eval()
    twin.packed.values.requires_grad_(False)
    dense = svite_scale.to_dense(twin.packed)
    assert type(dense) is type(twin.dense)
    assert repr(dense) == repr(twin.dense)
    assert torch.equal(dense.weight, twin.dense.weight)
    assert (dense.weight.dtype, dense.weight.requires_grad, dense.training) == (torch.float64, False, False)
    assert torch.equal(dense(x), twin.dense(x))


def test_a_timm_model_becomes_the_ordinary_one() -> None:
    torch.manual_seed(0)
    model, x = vit(), torch.randn(2, 3, 32, 32)
    svite_scale.sparsify(model, density=0.3)
    model.cls_token.requires_grad_(False)
    model.blocks[0].eval()
    before = contents(model)
    dense = svite_scale.to_dense(model)
    fresh = vit()
    assert [(name, type(module)) for name, module in dense.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    fresh.load_state_dict(dense.state_dict(), strict=True)
    expected = model.eval()(x)
    torch.testing.assert_close(fresh.eval()(x), expected)
    assert [n for n, p in dense.named_parameters() if not p.requires_grad] == ["cls_token"]
    assert (dense.training, dense.blocks[0].training, dense.norm.training) == (True, False, True)
    for name, layer in packed_layers(model).items():
        weight = dense.get_submodule(name).weight
        assert int(weight.count_nonzero()) == layer.num_active
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(0)
    assert all(before[name][0] == id(p) and torch.equal(before[name][1], p) for name, p in model.named_parameters())


def test_a_dense_model_is_copied_and_what_modules_share_stays_shared() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.norms = nn.ModuleList([nn.LayerNorm(8)] * 2)
            self.aside = [self.first]

    model = Shares()
    dense = svite_scale.to_dense(model)
    assert dense.first is not model.first
    svite_scale.sparsify(model, density=0.5)
    model.aside = model.again = model.first  # type: ignore[assignment]
    dense = svite_scale.to_dense(model)
    assert dense.norms[0] is dense.norms[1]
    assert type(dense.first) is nn.Linear
    assert dense.again is dense.first


def test_other_libraries_take_the_dense_model() -> None:
    """timm's own fusing of norms into layers, torch's dynamic quantization, and torch's pruning."""
    torch.manual_seed(0)
    model = timm.create_model(
        "levit_128s", num_classes=10, embed_dim=(32, 32, 32), num_heads=(2, 2, 2), depth=(1, 1, 1), key_dim=8
    )
    x = torch.randn(2, 3, 224, 224)
    svite_scale.sparsify(model, density=0.3)
    model.eval()
    dense = timm.utils.reparameterize_model(svite_scale.to_dense(model))
    assert not any(isinstance(module, (PackedLayer, nn.BatchNorm2d, nn.BatchNorm1d)) for module in dense.modules())
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)
        packed = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
        svite_scale.sparsify(packed, density=0.5)
        quantized = torch.ao.quantization.quantize_dynamic(svite_scale.to_dense(packed), {nn.Linear})
        inputs = torch.randn(8, 16)
        assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.Linear
        torch.testing.assert_close(quantized(inputs), packed(inputs), rtol=0.1, atol=0.05)
    prune.l1_unstructured(svite_scale.to_dense(packed)[0], "weight", amount=0.9)


def test_a_dense_copy_can_be_saved_and_reset() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    svite_scale.sparsify(model, density=0.5)
    dense, file = svite_scale.to_dense(model), io.BytesIO()
    torch.save(dense, file)
    assert b"svite_scale" not in file.getvalue()
    torch.manual_seed(4)
    expected = nn.Linear(8, 8).weight
    torch.manual_seed(4)
    dense[0].reset_parameters()
    assert torch.equal(dense[0].weight, expected)


def refusals_of_engines() -> list[str]:
    """What to_dense says to models in the hands of engines."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    said = []
    for wrap in (DistributedDataParallel, fully_shard):
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        svite_scale.sparsify(model, density=0.5)
        model = wrap(model)
        try:
            svite_scale.to_dense(model)
        except TopologyError as error:
            said.append(str(error))
    return said


def test_models_in_the_hands_of_an_engine_are_refused_with_a_remedy() -> None:
    for said in run_on_ranks(2, refusals_of_engines):
        assert said[0] == "to_dense copies a model without its engine; give it the module of the DistributedDataParallel"
        assert said[1].startswith("an engine (FSDP2, ZeRO-3) holds only a part of 0.values here")
        assert "get_model_state_dict" in said[1]


def test_a_part_of_a_copied_model_is_no_part_of_the_original() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    svite_scale.sparsify(model, density=0.5)
    dense = svite_scale.to_dense(copy.deepcopy(model))
    assert torch.equal(dense[0].weight, model[0].weight)
    assert dense[0].bias is not model[0].bias
