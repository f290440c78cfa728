"""One process, DDP and FSDP2: the engines of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from svite_scale.engines.backend import Backend, EngineOptions, OptimizerFactory, StepResult
from svite_scale.engines.torch_access import TorchAccess
from svite_scale.sparsity.access import ParameterAccess


def wrap_single(model: nn.Module, options: EngineOptions) -> nn.Module:
    """Moves the model to the device and returns it."""
    return model.to(options.device)


def wrap_ddp(model: nn.Module, options: EngineOptions) -> nn.Module:
    """Replicates the model on every rank; gradients are averaged bucket by bucket. A collective."""
    return DistributedDataParallel(model.to(options.device), device_ids=None, gradient_as_bucket_view=True)


def wrap_fsdp2(model: nn.Module, options: EngineOptions) -> nn.Module:
    """Shards every parameter over all ranks. A collective.

    Each wrap unit is gathered for its forward and its backward, and freed after both.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else MixedPrecisionPolicy()
    )
    model.to(options.device)
    if options.bf16:
        # The policy doesn't cast buffers. EVA and BEiT keep a zero bias for keys, which would make their other biases fp32.
        for buffer in model.buffers():
            buffer.data = buffer.data.to(torch.bfloat16) if buffer.is_floating_point() else buffer.data
    for module in (*options.wrap_units, model):
        # The root reshards after forward too, so parameters are sharded whenever no forward or backward runs.
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return model


WRAPPERS = {"single": wrap_single, "ddp": wrap_ddp, "fsdp2": wrap_fsdp2}


class TorchBackend(Backend):
    """The backend for ``single``, ``ddp`` and ``fsdp2``."""

    def __init__(self, kind: str, model: nn.Module, build_optimizer: OptimizerFactory, options: EngineOptions) -> None:
        """Wraps a model. A collective: all ranks call it. ``kind`` is ``single``, ``ddp`` or ``fsdp2``."""
        self.model = model
        self.wrapped = WRAPPERS[kind](model, options)
        self.optimizer = build_optimizer(model)
        self.access: ParameterAccess = TorchAccess(self.wrapped, self.optimizer)
        self.options = options
        # FSDP2 casts by its own policy. The others keep fp32 parameters and compute under autocast.
        self.autocast = options.bf16 and kind != "fsdp2"
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.options.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.wrapped(images)

    def backward(self, loss: Tensor) -> None:
        # Each micro-batch is reduced at once. Under FSDP2, a gradient that waits to be reduced isn't sharded.
        (loss / self.options.accumulation_steps).backward()

    def step(self) -> StepResult:
        norm = self._clip()
        # The norm is the same on every rank, so all ranks take the same decision.
        applied = norm is None or not self.options.skip_nonfinite or bool(norm.isfinite())
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    def _clip(self) -> Tensor | None:
        """Clips the gradient if the options say so, and returns its norm before that; None if no option needs the norm."""
        if self.options.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._trainable, self.options.clip_grad_norm)
        elif self.options.skip_nonfinite:
            norm = nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None])
        else:
            return None
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
