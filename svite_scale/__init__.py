"""Sparse-from-scratch training of vision transformers, whose memory and traffic fall with density on any number of nodes.

Three lines in a training loop of your own::

    svite_scale.sparsify(model, density=0.3)                                            # before an engine wraps the model
    topology = svite_scale.attach(model, optimizer, total_steps=100_000, update_every=1_000)  # after
    topology.step()                                                                     # after each optimizer step

:func:`pack_units` and :func:`insert_token_selectors` make heads, neurons and tokens sparse, also before an engine wraps the
model. :func:`to_dense` returns an ordinary dense model of equal output. A whole run starts from a config:
``deepspeed launch/train.py --config configs/deit_base_s70.yaml``.

The names below are imported at their first use, so ``import svite_scale`` needs neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svite_scale.cost.flops import count_flops
    from svite_scale.engines.attach import attach
    from svite_scale.errors import MaskError, OptionError, SparsifyError, SviteScaleError, TopologyError
    from svite_scale.models.structure import pack_units
    from svite_scale.models.token_insertion import insert_token_selectors
    from svite_scale.models.token_selector import selector_loss
    from svite_scale.models.weights import load_weights
    from svite_scale.sparsity.dense import to_dense
    from svite_scale.sparsity.options import Method, TopologyOptions
    from svite_scale.sparsity.packing import sparsify
    from svite_scale.sparsity.parameter_groups import parameter_groups
    from svite_scale.train.ema import Ema

__version__ = "0.1.0"

__all__ = [
    "Ema",
    "MaskError",
    "Method",
    "OptionError",
    "SparsifyError",
    "SviteScaleError",
    "TopologyError",
    "TopologyOptions",
    "__version__",
    "attach",
    "count_flops",
    "insert_token_selectors",
    "load_weights",
    "pack_units",
    "parameter_groups",
    "selector_loss",
    "sparsify",
    "to_dense",
]

_HOMES = {
    "Ema": "train.ema",
    "MaskError": "errors",
    "Method": "sparsity.options",
    "OptionError": "errors",
    "SparsifyError": "errors",
    "SviteScaleError": "errors",
    "TopologyError": "errors",
    "TopologyOptions": "sparsity.options",
    "attach": "engines.attach",
    "count_flops": "cost.flops",
    "insert_token_selectors": "models.token_insertion",
    "load_weights": "models.weights",
    "pack_units": "models.structure",
    "parameter_groups": "sparsity.parameter_groups",
    "selector_loss": "models.token_selector",
    "sparsify": "sparsity.packing",
    "to_dense": "sparsity.dense",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
