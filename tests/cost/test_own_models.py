"""What a model of a user's own costs: of any family of timm, on a real device, wrapped or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import svite_scale
from tests.models.test_timm_families import MODELS
from tests.ranks import run_on_ranks


@pytest.fixture
def unfused_attention() -> Iterator[None]:
    """Attention as two plain products, which torch's counter knows on every device."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


def counted_by_torch(model: nn.Module, channels: int, size: int) -> int:
    """Multiply-accumulates of one image; torch counts a multiply and an add as two operations."""
    # CaiT's class token is a module's input, and then torch's tracker of modules fails on parameters that are trained.
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, channels, size, size))
    return counter.get_total_flops() // 2


@pytest.mark.usefixtures("unfused_attention")
@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_any_family_costs_what_torch_counts(family: str) -> None:
    name, size, options = MODELS[family]
    model = timm.create_model(name, num_classes=5, **options)
    expected, num_parameters = counted_by_torch(model, 3, size), sum(p.numel() for p in model.parameters())
    model.train().requires_grad_(True)
    dense = svite_scale.count_flops(model, size)
    assert dense.dense_macs == dense.sparse_macs == pytest.approx(expected, rel=1e-3)
    assert dense.params_dense == dense.params_active == num_parameters
    plan = svite_scale.sparsify(model, density=0.3)
    sparse = svite_scale.count_flops(model, size)
    assert (sparse.dense_macs, sparse.params_dense) == (dense.dense_macs, num_parameters)
    assert sparse.params_active == num_parameters - sum(layer.numel - layer.num_active for layer in plan)
    assert 0.1 < sparse.saving < 0.9


def test_counting_leaves_the_model_as_it_is() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, in_chans=1)
    model.set_grad_checkpointing(True)
    svite_scale.pack_units(model, heads=0.7, neurons=0.5)
    svite_scale.insert_token_selectors(model, keep=3)
    model.head.weight.requires_grad_(False)
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    cost = svite_scale.count_flops(model, 32)
    assert 0.3 < cost.saving < 0.9
    assert model.training
    assert model.grad_checkpointing
    assert [name for name, _ in model.blocks.named_children()] == ["selector0", "0", "1"]
    for name, tensor in model.named_parameters():
        assert tensor.requires_grad == before[name][1]
        assert torch.equal(tensor, before[name][0])


@pytest.mark.parametrize("size", [40, 33, 0, (32, 32)])
def test_images_that_the_model_cannot_take_are_refused(size: object) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1)
    with pytest.raises(svite_scale.OptionError, match=r"^image_size = .*: Vision.* can't take such images \(.*\); use"):
        svite_scale.count_flops(model, size)  # type: ignore[arg-type]


def wrapped() -> tuple[int, str]:
    """The count of a model in DDP, and the error of a sharded one. Runs on every rank."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1)
    svite_scale.sparsify(model, density=0.5)
    macs = svite_scale.count_flops(DistributedDataParallel(model), 32).sparse_macs
    with pytest.raises(svite_scale.TopologyError) as error:
        svite_scale.count_flops(fully_shard(model), 32)
    return macs, str(error.value)


def test_a_replicated_model_is_counted_and_a_sharded_one_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1)
    svite_scale.sparsify(model, density=0.5)
    expected = svite_scale.count_flops(model, 32).sparse_macs
    for macs, error in run_on_ranks(2, wrapped):
        assert macs == expected
        assert error.endswith("; count before an engine wraps the model")
