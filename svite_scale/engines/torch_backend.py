"""One process, DDP and FSDP2: engines that leave the optimizer to torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from svite_scale.engines.backend import EngineOptions, OptimizerFactory, StepResult
from svite_scale.engines.torch_access import TorchAccess
from svite_scale.sparsity.access import ParameterAccess


def wrap_single(model: nn.Module, options: EngineOptions) -> nn.Module:
    """The model itself."""
    return model.to(options.device)


def wrap_ddp(model: nn.Module, options: EngineOptions) -> nn.Module:
    """The model replicated on every rank, gradients averaged bucket by bucket."""
    return DistributedDataParallel(model.to(options.device), device_ids=None, gradient_as_bucket_view=True)


def wrap_fsdp2(model: nn.Module, options: EngineOptions) -> nn.Module:
    """Every parameter sharded over all ranks; each unit is gathered for its forward and its backward, and freed after both."""
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else MixedPrecisionPolicy()
    )
    model.to(options.device)
    if options.bf16:
        # The policy leaves buffers alone; EVA's and BEiT's zero bias of keys would make the bias of queries and values fp32.
        for buffer in model.buffers():
            buffer.data = buffer.data.to(torch.bfloat16) if buffer.is_floating_point() else buffer.data
    for module in (*options.units, model):
        # The root too reshards after forward, so that parameters are sharded whenever no forward or backward runs.
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return model


WRAPPERS = {"single": wrap_single, "ddp": wrap_ddp, "fsdp2": wrap_fsdp2}


class TorchBackend:
    """A :class:`~svite_scale.engines.backend.Backend` for single, ddp and fsdp2."""

    def __init__(self, kind: str, model: nn.Module, build_optimizer: OptimizerFactory, options: EngineOptions) -> None:
        """A collective. ``kind`` is ``single``, ``ddp`` or ``fsdp2``."""
        self.model = model
        self.wrapped = WRAPPERS[kind](model, options)
        self.optimizer = build_optimizer(model)
        self.access: ParameterAccess = TorchAccess(self.wrapped, self.optimizer)
        self.options = options
        # FSDP2 casts by its own policy; the others compute under autocast and keep fp32 parameters.
        self.autocast = options.bf16 and kind != "fsdp2"
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.options.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.wrapped(images)

    def backward(self, loss: Tensor) -> None:
        # Every micro-batch is reduced at once: under FSDP2 a whole unreduced gradient would undo the sharding.
        (loss / self.options.accumulation_steps).backward()

    def step(self) -> StepResult:
        norm = self._clip()
        # The norm is the same on every rank, so all decide alike.
        applied = norm is None or not self.options.skip_nonfinite or bool(norm.isfinite())
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    def _clip(self) -> Tensor | None:
        """The gradient's norm, where somebody asks for it, and the gradient clipped."""
        if self.options.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._trainable, self.options.clip_grad_norm)
        elif self.options.skip_nonfinite:
            norm = nn.utils.get_total_norm([p.grad for p in self._trainable if p.grad is not None])
        else:
            return None
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
