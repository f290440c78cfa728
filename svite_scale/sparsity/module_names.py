"""Where the modules of a model are, whatever wraps them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What torch.compile, activation checkpointing and FSDP1 call the module that they wrap."""


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names of ``model.named_modules()``, each module once, without those parts that engines' wrappers add to them.

    So ``0.fc`` is what ``module._orig_mod.0.fc`` is in a DDP of a compiled model. A user's own wrapper is part of the model.
    """
    yield from _walk(model, "", set())


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        is_wrapped = child_name in WRAPPED or (child_name == "module" and _is_engine(module))
        yield from _walk(child, name if is_wrapped else f"{name}.{child_name}".lstrip("."), seen)


def _is_engine(module: nn.Module) -> bool:
    # By name, for this part of the package knows nothing of DeepSpeed.
    return isinstance(module, (DataParallel, DistributedDataParallel)) or type(module).__module__.startswith("deepspeed.")
