"""Sparse-from-scratch training of vision transformers, whose memory and traffic fall with density on any number of nodes.

Three lines in a training loop of your own::

    svite_scale.sparsify(model, density=0.3)                                            # before an engine wraps the model
    topology = svite_scale.attach(model, optimizer, total_steps=100_000, update_every=1_000)  # after
    topology.step()                                                                     # after each optimizer step

and ``svite_scale.to_dense(model)`` for an ordinary dense model of equal output; or a whole run from a config:
``deepspeed launch/train.py --config configs/deit_base_s70.yaml``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svite_scale.attach import attach
    from svite_scale.sparsity.dense import to_dense
    from svite_scale.sparsity.options import TopologyOptions
    from svite_scale.sparsity.sparsify import sparsify
    from svite_scale.train.ema import Ema

__all__ = ["Ema", "TopologyOptions", "attach", "sparsify", "to_dense"]

# Imported when they are asked for: a config is read, and a command's --help answered, without torch.
_HOMES = {
    "Ema": "svite_scale.train.ema",
    "TopologyOptions": "svite_scale.sparsity.options",
    "attach": "svite_scale.attach",
    "sparsify": "svite_scale.sparsity.sparsify",
    "to_dense": "svite_scale.sparsity.dense",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
