"""Packed products against dense masked ones: values, gradients, and what autograd keeps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from svite_scale.errors import TopologyError
from svite_scale.sparsity.kernels import compress, expand
from svite_scale.sparsity.layers import packed
from svite_scale.sparsity.layers.packed import PackedLinear
from tests.sparsity.packing import CASES, Twin, case_of, twin_of

BLOCKS_OF_EACH_PATH = ["linear, tall blocks", "linear, small blocks", "conv, tall blocks"]


def assert_exact(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_close_in_bf16(actual: Tensor | None, expected: Tensor | None) -> None:
    """Both are fp32, and close by the precision of bfloat16."""
    assert actual is not None
    assert expected is not None
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def listen(twin: Twin) -> list[Tensor]:
    """Collects what the packed layer hands to its gradient sink."""
    recorded: list[Tensor] = []
    twin.packed.gradient_hook = recorded.append
    return recorded


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves meanwhile."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_dense_masked_product(case: str) -> None:
    twin, x = case_of(case)
    recorded = listen(twin)
    x_packed, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = twin.packed(x_packed), twin.dense(x_dense)
    assert_exact(output, expected)
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    assert_exact(x_packed.grad, x_dense.grad)
    assert twin.dense.weight.grad is not None
    assert_exact(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))
    if twin.dense.bias is None:
        assert twin.packed.bias is None
    else:
        assert twin.packed.bias is not None
        assert_exact(twin.packed.bias.grad, twin.dense.bias.grad)
    assert len(recorded) == 1
    gradient = twin.recorded_weight(recorded[0])
    assert_exact(gradient, twin.dense.weight.grad)
    assert twin.packed.values.grad is not None
    assert torch.equal(twin.active_weights(gradient), twin.packed.values.grad), "the hook sees the very gradient that is packed"


@pytest.mark.parametrize("case", [case for case in CASES if "empty" not in case])
def test_products_pass_gradcheck(case: str) -> None:
    """Of first and of second derivatives."""
    twin, x = case_of(case)
    parameters = {name: parameter for name, parameter in twin.packed.named_parameters() if name != "mask"}

    def function(x: Tensor, *leaves: Tensor) -> Any:
        return functional_call(twin.packed, dict(zip(parameters, leaves, strict=True)), (x,))

    inputs = (x.requires_grad_(), *(parameter.detach().clone().requires_grad_() for parameter in parameters.values()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("case", ["linear, tokens", "conv, padding", *BLOCKS_OF_EACH_PATH])
def test_only_what_needs_a_gradient_gets_one(case: str) -> None:
    twin, x = case_of(case)
    recorded = listen(twin)
    twin.packed(x).sum().backward()
    assert x.grad is None
    assert twin.packed.values.grad is not None
    twin.packed.values.requires_grad_(False)
    x.requires_grad_()
    twin.packed(x).sum().backward()
    assert x.grad is not None
    assert len(recorded) == 1, "a frozen layer shows no gradient"
    assert twin.packed.mask.grad is None
    assert not twin.packed.mask.requires_grad


@pytest.mark.parametrize("case", ["linear, tokens", "conv, padding", *BLOCKS_OF_EACH_PATH])
def test_inputs_and_gradients_need_not_be_contiguous(case: str) -> None:
    twin, x = case_of(case)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    upstream = torch.randn_like(twin.dense(x)).transpose(0, 1).contiguous().transpose(0, 1)
    twin.packed(strided).backward(upstream)
    twin.dense(x).backward(upstream)
    assert twin.dense.weight.grad is not None
    assert_exact(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))


@pytest.mark.parametrize("case", ["linear, tokens", "conv, patches"])
def test_autograd_keeps_the_values_and_the_mask_but_no_dense_weight(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, x = case_of(case)
    x.requires_grad_()
    expanded: list[weakref.ref[Tensor]] = []

    def watched_expand(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
        dense = expand(values, mask, shape)
        expanded.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(packed, "expand", watched_expand)
    monkeypatch.setattr(packed, "expand_again", watched_expand)
    with saved_tensors() as saved:
        output = twin.packed(x)
    kept = (x, twin.packed.values, twin.packed.mask, twin.packed.handle)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in kept}
    assert len(expanded) == 1
    assert expanded[0]() is None, "the dense weight outlives the forward"
    output.sum().backward()
    assert len(expanded) == 2
    assert expanded[1]() is None, "the dense weight outlives the backward"


@pytest.mark.parametrize("case", ["linear, tokens", "conv, patches", *BLOCKS_OF_EACH_PATH])
def test_an_input_that_doesnt_fit_is_refused(case: str) -> None:
    twin, x = case_of(case)
    more_features = torch.cat([x, x], dim=1 if x.dim() == 4 else -1)
    with pytest.raises((RuntimeError, ValueError), match=r"multiplied|channels|doesn't have the . features of the weight"):
        twin.packed(more_features)
    if x.dim() == 4:
        with pytest.raises((RuntimeError, ValueError), match=r"Kernel size|is smaller than the kernel"):
            twin.packed(x[:, :, :0])


IN_PLACE = ["linear, tokens", "conv, padding", *BLOCKS_OF_EACH_PATH, "linear, tall blocks, no batch"]


@pytest.mark.parametrize("case", [*IN_PLACE, "conv, small blocks, one image"])
def test_what_follows_a_layer_may_change_its_output_in_place(case: str) -> None:
    """As ``nn.ReLU(inplace=True)`` does."""
    twin, x = case_of(case)
    for module in (twin.packed, twin.dense):
        module(x).relu_().square().sum().backward()
    assert twin.dense.weight.grad is not None
    assert_exact(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))


def test_autograd_keeps_the_input_of_blocks_once_and_no_dense_weight() -> None:
    twin, x = case_of("linear, tall blocks")
    x.requires_grad_()
    with saved_tensors() as saved:
        twin.packed(x)
    kept = (x, twin.packed.values, twin.packed.mask, twin.packed.handle)
    assert sorted(tensor.data_ptr() for tensor in saved) == sorted(tensor.data_ptr() for tensor in kept)


def test_a_row_of_blocks_without_active_ones_gives_the_bias() -> None:
    """Also where memory that wasn't written holds NaN, as torch's deterministic algorithms make it."""
    twin = twin_of(nn.Linear(2, 48), density=0.2, block=(16, 1))
    torch.use_deterministic_algorithms(True)
    try:
        output = twin.packed(torch.randn(3, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    inactive = (twin.dense.weight == 0).all(dim=1)
    assert inactive.sum() == 32
    assert torch.equal(output[:, inactive], twin.dense.bias[inactive].expand(3, -1))  # type: ignore[index]


def test_a_bfloat16_product_keeps_the_values_themselves() -> None:
    twin = twin_of(nn.Linear(9, 7))
    with saved_tensors() as saved, torch.autocast("cpu", dtype=torch.bfloat16):
        twin.packed(torch.randn(3, 9))
    assert any(tensor.data_ptr() == twin.packed.values.data_ptr() for tensor in saved), "no cast copy of them is saved"


@pytest.mark.parametrize(
    ("dense", "size", "block"),
    [
        (nn.Linear(33, 17), (5, 33), (1, 1)),
        (nn.Conv2d(3, 6, 4, stride=2), (2, 3, 12, 12), (1, 1)),
        (nn.Linear(36, 48), (5, 36), (16, 2)),
        (nn.Linear(36, 48), (5, 36), (4, 4)),
    ],
    ids=["linear", "conv", "tall blocks", "small blocks"],
)
def test_autocast_is_that_of_the_dense_product(
    dense: nn.Linear | nn.Conv2d, size: tuple[int, ...], block: tuple[int, int]
) -> None:
    torch.manual_seed(3)
    twin = twin_of(copy.deepcopy(dense), block=block)
    recorded = listen(twin)
    x = torch.randn(size)
    x_packed, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = twin.packed(x_packed), twin.dense(x_dense)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_close_in_bf16(output.float(), expected.float())
    assert torch.equal(output, expected) or block[0] >= 16, "of small blocks the product is the dense one"
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    assert twin.dense.weight.grad is not None
    assert_close_in_bf16(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))
    assert_close_in_bf16(twin.recorded_weight(recorded[0]).float(), twin.dense.weight.grad)
    assert_close_in_bf16(x_packed.grad, x_dense.grad)
    assert twin.packed.bias is not None
    assert twin.dense.bias is not None
    assert_close_in_bf16(twin.packed.bias.grad, twin.dense.bias.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["linear, tokens", "conv, groups", *BLOCKS_OF_EACH_PATH])
def test_activation_checkpointing_changes_nothing(case: str, reentrant: bool) -> None:
    twin, x = case_of(case)
    twin.packed(x).square().sum().backward()
    assert twin.packed.values.grad is not None
    expected = twin.packed.values.grad.clone()
    twin.packed.zero_grad()
    recorded = listen(twin)
    x.requires_grad_()
    output = checkpoint(lambda x: twin.packed(x).square(), x, use_reentrant=reentrant)
    output.sum().backward()
    assert_exact(twin.packed.values.grad, expected)
    assert len(recorded) == 1, "the gradient is shown once, not in the recomputation too"
    assert_exact(twin.active_weights(twin.recorded_weight(recorded[0])), expected)


@pytest.mark.parametrize("case", ["linear, tokens", "conv, same, even and dilated", *BLOCKS_OF_EACH_PATH])
def test_a_penalty_on_the_inputs_gradient_is_differentiated(case: str) -> None:
    twin, x = case_of(case)
    for module in (twin.packed, twin.dense):
        leaf = x.clone().requires_grad_()
        loss = module(leaf).pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + gradient.square().sum()).backward()
    assert twin.dense.weight.grad is not None
    assert_exact(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))


@pytest.mark.parametrize("case", ["linear, tokens", "conv, padding", *BLOCKS_OF_EACH_PATH])
def test_the_meta_device_carries_shapes_forward_and_back(case: str) -> None:
    twin, x = case_of(case)
    twin.packed.to("meta")
    x = x.to("meta").requires_grad_()
    output = twin.packed(x)
    assert output.is_meta
    assert output.shape == twin.dense.to("meta")(x).shape
    output.sum().backward()
    for tensor in (x, twin.packed.values, twin.packed.bias):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


def test_values_stand_in_ascending_flat_position() -> None:
    layer = PackedLinear(nn.Linear(3, 2, bias=False), 3, "layer")
    layer.set_weight(torch.arange(1.0, 7.0).view(2, 3), torch.tensor([False, True, False, True, False, True]))
    assert layer.values.tolist() == [2, 4, 6]
    assert layer.mask.tolist() == [0b101010]
    assert layer.dense_weight().tolist() == [[0, 2, 0], [4, 0, 6]]
    assert compress(layer.dense_weight() * 10, layer.mask, 3).tolist() == [20, 40, 60]


def test_a_mask_of_another_count_is_refused() -> None:
    layer = PackedLinear(nn.Linear(3, 2), 3, "blocks.0")
    with pytest.raises(TopologyError, match=r"blocks\.0: the mask has 2 active weights, the layer 3"):
        layer.set_weight(torch.ones(2, 3), torch.tensor([True, True, False, False, False, False]))


@pytest.mark.parametrize("num_active", [0, 7, -1])
def test_a_count_that_doesnt_fit_is_refused(num_active: int) -> None:
    with pytest.raises(TopologyError, match=rf"fc: {num_active} active weights don't fit a weight of shape \(2, 3\)"):
        PackedLinear(nn.Linear(3, 2), num_active, "fc")
