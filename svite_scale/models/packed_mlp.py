"""timm's MLP with the active hidden neurons only."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.base import LayerContext, UnitParameter
from svite_scale.sparsity.layers.units import RowLinear, TransposedLinear, UnitLayer
from svite_scale.sparsity.transition import TopologyTransition


class PackedMlp(UnitLayer, Mlp):
    """An MLP whose matrix products run at the size of its active neurons.

    ``fc1`` holds the rows of the k active neurons, ``[k, in]``, ``fc2`` their columns, stored as rows, ``[k, out]``. Neurons
    of a small L1 norm of row and column are dropped. Neurons are grown by the L1 norm of the gradient of their candidate's
    column.

    Source: the paper's section 3.2, after its code, which scores an absent neuron by its own gradient.
    """

    unit = "neurons"
    fc1: RowLinear
    fc2: TransposedLinear

    def __init__(self, dense: Mlp, active: Tensor, name: str, *, seed: int, grow: str) -> None:
        """Replaces ``dense``, with its weights.

        Args:
            dense: of linear layers, with neither dropout nor a norm between them.
            active: bool ``[N]``, the active neurons.
            name: of the layer.
            seed: of the run.
            grow: ``candidate``; or ``paper``, an absent neuron's own gradient, which is 0.
        """
        nn.Module.__init__(self)
        self.set_up(name, active, seed, dense.fc1.weight, dense.fc2.out_features)
        self.grow = grow
        self.fc1 = RowLinear(dense.fc1, self.initial_units(active))
        self.fc2 = TransposedLinear(dense.fc2.weight.detach().t()[self.initial_units(active)], dense.fc2.bias)
        self.act, self.drop1, self.norm, self.drop2 = dense.act, dense.drop1, dense.norm, dense.drop2
        self.train(dense.training)

    @property
    def outgoing(self) -> TransposedLinear:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.recorded(super().forward(x), x)

    def to_dense(self) -> Mlp:
        bias = self.fc1.bias
        if bias is not None:
            bias = nn.Parameter(self.all_units(bias), requires_grad=bias.requires_grad)
        dense = Mlp(1, device="meta")
        dense.fc1 = self.dense_linear(self.all_units(self.fc1.weight), bias, self.fc1.weight)
        dense.fc2 = self.dense_linear(self.all_units(self.fc2.weight).t(), self.fc2.bias, self.fc2.weight)
        dense.act, dense.drop1, dense.norm, dense.drop2 = copy.deepcopy((self.act, self.drop1, self.norm, self.drop2))
        return dense.train(self.training)

    @property
    def growth_numel(self) -> int:
        return self.shape.numel() * self.out_features

    def record_gradient(self, gradient: Tensor, *inputs: Tensor) -> None:
        """Records the gradient of each neuron's column, ``[N, out]``; for absent neurons that of their candidates' columns."""
        assert self.gradient_hook is not None
        active = self.active_units()
        x, gradient = inputs[0].flatten(0, -2), gradient.flatten(0, -2)
        columns = gradient.new_zeros(active.numel(), self.out_features)
        bias = None if self.fc1.bias is None else self.fc1.bias.to(x.dtype)
        hidden = self.act(F.linear(x, self.fc1.weight.to(x.dtype), bias))
        columns[active] = hidden.t().to(gradient.dtype) @ gradient
        if self.grow == "candidate":
            hidden = self.act(F.linear(x, self.candidates(~active).to(x.dtype)))
            columns[~active] = hidden.t().to(gradient.dtype) @ gradient
        self.gradient_hook(columns)

    def unit_parameters(self) -> dict[str, UnitParameter]:
        parameters = {
            "fc1.weight": UnitParameter(self.fc1.weight, row_numel=self.candidate_numel),
            "fc2.weight": UnitParameter(self.fc2.weight, row_numel=self.out_features),
        }
        return parameters if self.fc1.bias is None else parameters | {"fc1.bias": UnitParameter(self.fc1.bias)}

    def importance(self, context: LayerContext) -> Tensor:
        norms = context.read(self.fc1.weight).abs().sum(dim=1) + context.read(self.fc2.weight).abs().sum(dim=1)
        return norms.new_zeros(self.shape).masked_scatter_(bits.unpack(context.mask, self.shape.numel()), norms)

    def growth_scores(self, context: LayerContext) -> Tensor:
        return context.gather().view(self.shape.numel(), -1).sum(dim=1)

    def initial_rows(self, transition: TopologyTransition) -> Mapping[str, Tensor]:
        return {"fc1.weight": self.candidates(transition.grown_units()).unsqueeze(0)} if self.grow == "candidate" else {}
