"""The cost of a config's model."""

from __future__ import annotations

from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, count_flops
from svite_scale.models.sparse import plan_sparse


def count(config: Config, device: str | None = None) -> ModelCost:
    return count_flops(plan_sparse(config.model, config.sparsity).model, config.model.image_size, device=device)
