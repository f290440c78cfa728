"""The cost of a config's model."""

from __future__ import annotations

from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, model_cost
from svite_scale.models.sparse import plan_sparse


def count(config: Config) -> ModelCost:
    return model_cost(config.model, *plan_sparse(config.model, config.sparsity))
