"""Names of the modules of a model, whatever wraps them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Names that torch.compile, activation checkpointing and FSDP1 give to the module that they wrap."""


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yields ``model.named_modules()`` without those parts of names that engines' wrappers add.

    So ``0.fc`` is what ``module._orig_mod.0.fc`` is in a DDP of a compiled model. A user's own wrapper is part of the model.
    """
    names: dict[str, tuple[str, nn.Module]] = {"": ("", model)}
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if path:
            parent_path, _, child = path.rpartition(".")
            parent_name, parent = names[parent_path]
            is_wrapped = child in WRAPPED or (child == "module" and is_engine(parent))
            names[path] = parent_name if is_wrapped else f"{parent_name}.{child}".lstrip("."), module
        yield names[path]


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model that the user built, whatever engines wrap it as a whole."""
    *_, inner = (module for name, module in named_modules(model) if not name)
    return inner


def is_engine(module: nn.Module) -> bool:
    """Returns whether a module is the wrapper of an engine that knows the model's parameters by now."""
    is_fsdp1 = "_fsdp_wrapped_module" in dict(module.named_children())
    return isinstance(module, DistributedDataParallel) or is_fsdp1 or (is_of_deepspeed(module) and hasattr(module, "module"))


def is_of_deepspeed(module: object) -> bool:
    """Returns whether an object's class is DeepSpeed's. By name, so that DeepSpeed needn't be installed."""
    return type(module).__module__.partition(".")[0] == "deepspeed"
