"""Conversion of a sparse model to an ordinary dense one."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.module_names import is_of_deepspeed

Model = TypeVar("Model", bound=nn.Module)


def to_dense(model: Model) -> Model:
    """Returns a copy of a sparse model in which every sparse layer is an ordinary dense one again, with zeros where inactive.

    Parameter names, types of modules, and the state dict are those of the model before it was made sparse, so ``fuse()``,
    quantization, exporters and other libraries take it. Dtypes, devices, ``requires_grad``, training flags, and what modules
    share are kept; hooks of sparse layers aren't. The given model stays as it is. Not a collective.

    Args:
        model: for example a timm model after ``sparsify`` or with packed heads and neurons. A model without sparse layers is
            copied as it is.

    Raises:
        TopologyError: the model is a wrapper of an engine, or an engine holds only parts of its parameters here, or
            ``copy.deepcopy`` can't copy it.
    """
    _refuse_engines(model)
    replaced = {id(module): module.to_dense() for module in model.modules() if isinstance(module, SparseLayer)}
    return copied(model, replaced)


def copied(model: Model, replaced: dict[int, Any]) -> Model:
    """Returns a copy of a model with other things in the place of some, by ``id`` of these.

    Raises:
        TopologyError: ``copy.deepcopy`` can't copy the model.
    """
    try:
        return copy.deepcopy(model, replaced)
    except RuntimeError as error:  # for example timm's LeViT, which keeps tensors of a graph after a forward in evaluation
        raise TopologyError(f"{type(model).__name__} can't be copied, as copy.deepcopy says: {error}") from error


def _refuse_engines(model: nn.Module) -> None:
    is_wrapper = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if is_wrapper or is_of_deepspeed(model):
        raise TopologyError(f"to_dense copies a model without its engine; give it the module of the {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local") or not parameter.numel():
            raise TopologyError(
                f"an engine (FSDP2, ZeRO-3) holds only a part of {name} here, so the model can't be copied; load its full "
                "state dict (of get_model_state_dict in torch.distributed.checkpoint.state_dict, or zero_to_fp32 of DeepSpeed) "
                "into a model made sparse in the same way, and give that to to_dense"
            )
