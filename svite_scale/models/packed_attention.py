"""timm's attention with the active heads only."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from svite_scale.sparsity.layers.base import LayerContext, UnitParameter
from svite_scale.sparsity.layers.units import RowLinear, TransposedLinear, UnitLayer
from svite_scale.sparsity.transition import TopologyTransition

QKV = 3
"""Queries, keys and values, one after another in the rows of ``qkv``."""


class PackedAttention(UnitLayer):
    """Self-attention whose products run at the size of its active heads.

    ``qkv`` holds the query, key and value rows of the k active heads, ``[3 * k * d, in]``, ``proj`` their columns, stored as
    rows, ``[k * d, out]``. Heads of a small Taylor score are dropped: |sum(A * dL/dA)|, where A is the head's output for one
    image, averaged over images. Heads are grown by the L1 norm of the gradient of their candidate's columns, divided by the
    root mean square of A. The output of a trained head, and so this gradient, is many times that of a fresh candidate: without
    the division the heads just dropped would come back.

    With ``grow: paper`` all is as in the paper's code: ``proj`` keeps the columns of absent heads, so that dL/dA of an absent
    head isn't 0; its L1 norm, averaged over images, is the growth score, and a grown head's rows begin at 0.

    Source: the paper's section 3.2; Michel et al., "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650).
    """

    unit = "heads"
    max_moved = 1  # of few heads, two are much

    def __init__(self, dense: Attention, active: Tensor, name: str, *, seed: int, grow: str) -> None:
        """Replaces ``dense``, with its weights.

        Args:
            dense: without gate, dropout, or norm before its projection.
            active: bool ``[N]``, the active heads.
            name: of the layer.
            seed: of the run.
            grow: ``candidate`` or ``paper``.
        """
        super().__init__()
        self.set_up(name, active, seed, dense.qkv.weight, dense.proj.out_features)
        self.grow, self.head_dim = grow, dense.head_dim
        heads = self.initial_units(active)
        rows = torch.arange(dense.qkv.out_features, device=heads.device).view(QKV, -1, dense.head_dim)[:, heads].flatten()
        self.qkv = RowLinear(dense.qkv, rows)
        self.q_norm, self.k_norm = dense.q_norm, dense.k_norm
        columns = dense.proj.weight.detach().t().view(active.numel(), dense.head_dim, -1)
        self.proj = TransposedLinear((columns if self.keeps_columns else columns[heads]).flatten(0, 1), dense.proj.bias)
        self.train(dense.training)

    @property
    def outgoing(self) -> TransposedLinear:
        return self.proj

    @property
    def keeps_columns(self) -> bool:
        """True if ``proj`` has the columns of absent heads too."""
        return self.grow == "paper"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, tokens, in]`` to ``[B, tokens, out]``."""
        context = self._context(self.qkv(x), attn_mask, is_causal).transpose(1, 2).flatten(2)
        if self.keeps_columns:
            # The size is known, so a GPU's host needn't wait for it, and a compiled graph needn't be broken.
            heads = torch.nonzero_static(self.active_units(), size=self.num_active).squeeze(1)
            columns = self._by_head(self.proj.weight)[heads].flatten(0, 1)
            output = F.linear(context, columns.to(context.dtype).t(), self.proj.bias)
        else:
            output = self.proj(context)
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.recorded(output, x, attn_mask)

    def to_dense(self) -> Attention:
        bias = self.qkv.bias
        if bias is not None:
            bias = nn.Parameter(self.all_units(bias, QKV), requires_grad=bias.requires_grad)
        columns = self.proj.weight.detach().clone() if self.keeps_columns else self.all_units(self.proj.weight)
        dense = Attention(self.shape.numel(), self.shape.numel(), self.head_dim, device="meta")
        dense.qkv = self.dense_linear(self.all_units(self.qkv.weight, QKV), bias, self.qkv.weight)
        dense.proj = self.dense_linear(columns.t(), self.proj.bias, self.proj.weight)
        dense.q_norm, dense.k_norm = copy.deepcopy((self.q_norm, self.k_norm))
        return dense.train(self.training)

    def _context(self, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Returns the heads' outputs, ``[B, heads, tokens, d]``, from ``[B, tokens, 3 * heads * d]``."""
        batch, tokens, _ = qkv.shape
        query, key, value = qkv.view(batch, tokens, QKV, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(
            self.q_norm(query), self.k_norm(key), value, attn_mask=attn_mask, is_causal=is_causal
        )

    def _by_head(self, rows: Tensor) -> Tensor:
        """Returns ``[heads * d, ...]`` as ``[heads, d, ...]``."""
        return rows.view(-1, self.head_dim, *rows.shape[1:])

    @property
    def growth_numel(self) -> int:
        return self.shape.numel() * (2 if self.keeps_columns else self.head_dim * self.out_features + 2)

    def record_gradient(self, gradient: Tensor, *inputs: Tensor) -> None:
        """Records for each head its :meth:`_growth_terms`, or the paper's growth score ``[N, 1]``, and its Taylor score."""
        assert self.gradient_hook is not None
        x, attn_mask = inputs[0], inputs[1] if len(inputs) > 1 else None
        active = self.active_units()
        bias = None if self.qkv.bias is None else self.qkv.bias.to(x.dtype)
        context = self._context(F.linear(x, self.qkv.weight.to(x.dtype), bias), attn_mask).to(gradient.dtype)
        columns = self._by_head(self.proj.weight).to(gradient.dtype)
        # dL/dA: of the active heads, or of all whose columns there are.
        slopes = torch.einsum("bno,hdo->bhnd", gradient, columns)
        taylor = gradient.new_zeros(active.numel(), 1)
        own = slopes[:, active] if self.keeps_columns else slopes
        taylor[active, 0] = torch.einsum("bhnd,bhnd->bh", context, own).abs().sum(dim=0)
        if self.keeps_columns:
            growth = slopes.abs().sum(dim=(0, 2, 3)).unsqueeze(1)
        else:
            growth = gradient.new_zeros(active.numel(), self.head_dim * self.out_features + 1)
            growth[active] = self._growth_terms(context, gradient)
            rows = self.candidates(~active).view(-1, QKV, self.head_dim, x.shape[-1]).transpose(0, 1).flatten(0, 2)
            fresh = self._context(F.linear(x, rows.to(x.dtype)), attn_mask).to(gradient.dtype)
            growth[~active] = self._growth_terms(fresh, gradient)
        self.gradient_hook(torch.cat([growth, taylor], dim=1))

    def _growth_terms(self, context: Tensor, gradient: Tensor) -> Tensor:
        """Returns, by head, the gradient of its columns and the mean square of its output: ``[heads, d * out + 1]``."""
        columns = torch.einsum("bhnd,bno->hdo", context, gradient).flatten(1)
        return torch.cat([columns, context.square().mean(dim=(0, 2, 3)).unsqueeze(1)], dim=1)

    def unit_parameters(self) -> dict[str, UnitParameter]:
        parameters = {"qkv.weight": UnitParameter(self.qkv.weight, QKV, self.candidate_numel // QKV)}
        if self.qkv.bias is not None:
            parameters["qkv.bias"] = UnitParameter(self.qkv.bias, QKV, self.head_dim)
        if not self.keeps_columns:
            parameters["proj.weight"] = UnitParameter(self.proj.weight, row_numel=self.head_dim * self.out_features)
        return parameters

    def importance(self, context: LayerContext) -> Tensor:
        return context.gather().view(self.shape.numel(), -1)[:, -1].clone()

    def growth_scores(self, context: LayerContext) -> Tensor:
        terms = context.gather().view(self.shape.numel(), -1)[:, :-1]
        if self.keeps_columns:
            return terms[:, 0].clone()
        norms, squares = terms[:, :-1].sum(dim=1), terms[:, -1]
        # Relative to the layer's mean, so that the number of micro-batches over which squares are summed has no part in it.
        return norms / (squares / squares.mean()).sqrt().clamp_min(torch.finfo(norms.dtype).tiny)

    def initial_rows(self, transition: TopologyTransition) -> Mapping[str, Tensor]:
        if self.keeps_columns:
            return {}
        rows = self.candidates(transition.grown_units()).view(-1, QKV, self.candidate_numel // QKV)
        return {"qkv.weight": rows.transpose(0, 1)}
