"""The weight that a packed layer shows: the public attributes of the layer it replaces, gradients of reads, and writes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.packing import sparsify
from tests.sparsity.packing import CASES, Twin, case_of, twin_of

SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
OTHERS = ("padding_mode", "transposed", "output_padding", "training")


@pytest.mark.parametrize("case", CASES)
def test_a_packed_layer_says_of_itself_what_the_dense_one_does(case: str) -> None:
    twin, _ = case_of(case)
    assert isinstance(twin.packed, type(twin.dense))
    names = [name for name in SIZES + OTHERS if hasattr(twin.dense, name)]
    assert len(names) > 2
    for name in names:
        assert getattr(twin.packed, name) == getattr(twin.dense, name), name
    assert torch.equal(twin.packed.weight, twin.dense.weight)
    assert twin.packed.weight.dtype == twin.dense.weight.dtype
    assert twin.packed.weight.requires_grad
    assert sorted(dict(twin.packed.named_parameters())) == sorted(
        {"values", "mask"} | ({"bias"} & {*dir(twin.dense)} if twin.dense.bias is not None else set())
    )


def test_a_convolution_follows_what_is_set_later() -> None:
    """As segmentation code does to dilate a backbone."""
    twin, x = case_of("conv, groups")
    for layer in (twin.packed, twin.dense):
        layer.stride, layer.dilation, layer.padding = (1, 1), (2, 2), (2, 2)  # type: ignore[assignment]
    assert torch.allclose(twin.packed(x), twin.dense(x), rtol=1e-12, atol=1e-12)


def several_reads(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight) * F.linear(x, 2 * layer.weight)


def a_read_beside_a_call(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x) * F.linear(x, layer.weight, layer.bias).sin()


def tied_products(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    return F.linear(F.linear(x, weight), weight.t())


def a_cast(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(torch.float64).view(-1).view_as(layer.weight))


def a_part(layer: nn.Linear, x: Tensor) -> Tensor:
    """As BEiT and MultiheadAttention cut query, key and value out of one weight."""
    first, second = layer.weight[:2], layer.weight.chunk(2)[1]
    return F.linear(x, torch.cat([first, second, layer.weight[-1:]]))


LINEAR = ["linear, tokens", "linear, small blocks"]


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("function", [several_reads, a_read_beside_a_call, tied_products, a_cast, a_part])
def test_reads_are_differentiated_as_the_product_is(function: Callable[[nn.Linear, Tensor], Tensor], case: str) -> None:
    twin, x = case_of(case)
    recorded: list[Tensor] = []
    twin.packed.gradient_hook = recorded.append
    function(twin.dense, x).square().sum().backward()  # type: ignore[arg-type]
    function(twin.packed, x).square().sum().backward()  # type: ignore[arg-type]
    assert twin.dense.weight.grad is not None
    torch.testing.assert_close(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad), rtol=1e-12, atol=1e-12)
    gradient = sum(twin.recorded_weight(each) for each in recorded)
    torch.testing.assert_close(gradient, twin.dense.weight.grad, rtol=1e-12, atol=1e-12)


def test_a_read_under_autocast_gives_the_gradient_of_a_dense_one() -> None:
    torch.manual_seed(0)
    twin, x = twin_of(nn.Linear(33, 17)), torch.randn(5, 33)
    for layer in (twin.dense, twin.packed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = F.linear(x, layer.weight, layer.bias)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    assert twin.dense.weight.grad is not None
    assert torch.equal(twin.packed.values.grad, twin.active_weights(twin.dense.weight.grad))  # type: ignore[arg-type]


def test_torchs_encoder_runs_in_evaluation_where_it_reads_its_layers_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    sparsify(model, 0.5)
    expected = model.train(False)(x).detach()
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, expected)
    assert type(model.self_attn.out_proj) is not nn.Linear, (
        "a subclass, which torch's attention reads and sparsify leaves dense"
    )
    assert not isinstance(model.self_attn.out_proj, PackedLayer)


def counting(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "init": lambda layer: nn.init.trunc_normal_(layer.weight, std=0.3),
    "xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "data": lambda layer: layer.weight.data.normal_(0, 2),
    "copy": lambda layer: layer.weight.copy_(counting(layer)),
    "set data": lambda layer: setattr(layer.weight, "data", counting(layer)),
    "row": lambda layer: layer.weight[2].fill_(7),
    "item": lambda layer: layer.weight.__setitem__((slice(None), 3), 4.0),
    "view": lambda layer: layer.weight.detach().t()[1:, :3].mul_(3),
    "in place": lambda layer: layer.weight.__imul__(3),
    "chunk": lambda layer: layer.weight.chunk(2)[1].fill_(2),
    "rows": lambda layer: [nn.init.constant_(row, number) for number, row in enumerate(layer.weight)],
    "several": lambda layer: torch._foreach_mul_([layer.weight], 0.5),
    "reset_parameters": lambda layer: layer.reset_parameters(),  # type: ignore[operator]
}


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_reaches_the_active_weights(write: str, case: str) -> None:
    """In the packed layer as in a dense one that is masked afterwards."""
    twin, _ = case_of(case)
    mask = twin.packed.mask.tolist()
    for layer in (twin.dense, twin.packed):
        torch.manual_seed(5)
        with torch.no_grad():
            WRITES[write](layer)
    expected = twin.masked(twin.dense.weight)
    assert not torch.equal(expected, case_of(case)[0].dense.weight)
    assert torch.equal(twin.packed.weight, expected)
    assert twin.packed.mask.tolist() == mask
    assert torch.equal(twin.packed.bias, twin.dense.bias)  # type: ignore[arg-type]


def test_reset_parameters_of_a_convolution_draws_as_torch_does() -> None:
    twin, _ = case_of("conv, groups")
    for layer in (twin.dense, twin.packed):
        torch.manual_seed(5)
        layer.reset_parameters()
    assert torch.equal(twin.packed.weight, twin.masked(twin.dense.weight))
    assert torch.equal(twin.packed.bias, twin.dense.bias)  # type: ignore[arg-type]


def refused(twin: Twin, action: Callable[[PackedLayer], object], message: str) -> None:
    values = twin.packed.values.detach().clone()
    with pytest.raises(TopologyError, match=message):
        action(twin.packed)
    assert torch.equal(twin.packed.values, values)


def test_what_would_be_lost_is_refused() -> None:
    twin, _ = case_of("linear, tokens")
    replaced = r"layer\.weight can't be replaced, for it is packed; write into it: weight\.copy_\(new\)"
    refused(twin, lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(5, 7))), replaced)
    refused(twin, lambda layer: setattr(layer, "weight", torch.ones(5, 7)), replaced)
    refused(twin, lambda layer: layer.register_parameter("weight", nn.Parameter(torch.ones(5, 7))), replaced)
    single = twin_of(nn.Linear(33, 17))  # in fp32, whose kernel autograd sees otherwise
    for other in (twin, single):
        refused(other, lambda layer: layer.weight.mul_(2), r"layer\.weight: write into it under torch\.no_grad\(\)")
    frozen = r"layer\.weight: freeze and thaw values instead: values\.requires_grad_\(\.\.\.\)"
    refused(twin, lambda layer: layer.weight.requires_grad_(False), frozen)
    refused(twin, lambda layer: setattr(layer.weight, "requires_grad", False), frozen)
    with pytest.raises(AttributeError, match="object has no attribute 'wieght'"):
        _ = twin.packed.wieght


def test_a_weight_of_which_only_a_part_is_here_is_refused() -> None:
    """As ZeRO-3 leaves it outside forwards."""
    twin, _ = case_of("linear, tokens")
    twin.packed.values.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(
        TopologyError, match=r"layer\.weight: an engine holds only a part of it here; read it inside the forward"
    ):
        _ = twin.packed.weight


@pytest.mark.parametrize("case", LINEAR)
def test_a_copy_has_a_weight_and_a_hook_of_its_own(case: str) -> None:
    twin, x = case_of(case)
    recorded: list[Tensor] = []
    twin.packed.gradient_hook = recorded.append
    other = copy.deepcopy(twin.packed)
    other(x).sum().backward()
    assert not recorded
    assert other.handle != twin.packed.handle
    pickled = io.BytesIO()
    torch.save(other, pickled)
    pickled.seek(0)
    assert torch.equal(torch.load(pickled, weights_only=False)(x), twin.dense(x))
    with torch.no_grad():
        other.weight.zero_()
    assert not other.weight.any()
    assert torch.equal(twin.packed.weight, twin.dense.weight)
