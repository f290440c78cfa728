"""Scores of heads and neurons, computed from the dense twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svite_scale.sparsity.layers.base import SparseLayer
from tests.models.unit_twins import active_units, block_of


def column_gradients(block: nn.Module, unit: str) -> Tensor:
    """L1 norm of the gradient of each unit's outgoing weights."""
    if unit == "neurons":
        return block.mlp.fc2.weight.grad.abs().sum(dim=0)
    return block.attn.proj.weight.grad.view(-1, block.attn.num_heads, block.attn.head_dim).abs().sum(dim=(0, 2))


class HeadOutputs:
    """What every head of a dense model puts out, with gradients, ``[B, tokens, heads, d]`` by block."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[Tensor] = []
        for block in model.blocks:
            block.attn.proj.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        self.found.append(inputs[0])

    def slopes(self, index: int, heads: int) -> tuple[Tensor, Tensor]:
        """A and dL/dA of a block."""
        output = self.found[index]
        assert output.grad is not None
        shape = (*output.shape[:2], heads, -1)
        return output.detach().view(shape), output.grad.view(shape)


def naive_scores(twin: nn.Module, outputs: HeadOutputs, layer: SparseLayer, grow: str) -> tuple[Tensor, Tensor]:
    """What units are dropped for, and grown for, from the twin's gradients; ``[N]`` each."""
    block = block_of(twin, layer)
    growth = column_gradients(block, layer.unit)
    if layer.unit == "neurons":
        drop = block.mlp.fc1.weight.abs().sum(dim=1) + block.mlp.fc2.weight.abs().sum(dim=0)
        return drop.detach(), growth * active_units(layer) if grow == "paper" else growth
    output, slope = outputs.slopes(int(layer.name.split(".")[1]), 6)
    taylor = (output * slope).sum(dim=(1, 3)).abs().sum(dim=0)
    if grow == "paper":
        return taylor, slope.abs().sum(dim=(0, 1, 3))
    squares = torch.stack([head.pow(2).mean() for head in output.unbind(dim=2)])
    return taylor, growth * (squares.mean() / squares).sqrt()
