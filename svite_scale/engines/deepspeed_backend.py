"""DeepSpeed ZeRO, stages 1 to 3."""

from __future__ import annotations

import logging
import os
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger, set_z3_leaf_module
from torch import Tensor, nn

from svite_scale.engines.access import access_for
from svite_scale.engines.backend import Backend, EngineOptions, OptimizerFactory, StepResult
from svite_scale.sparsity.access import ParameterAccess

SMALLEST_BUCKET = 2**18
"""Elements. In a smaller collective, the latency costs more than the size."""

BUCKET_ALIGNMENT = 64
"""Elements. DeepSpeed wants bucket sizes that are multiples of the alignment of its partitions."""


class DeepSpeedBackend(Backend):
    """The backend for ``deepspeed``."""

    def __init__(self, stage: int, model: nn.Module, build_optimizer: OptimizerFactory, options: EngineOptions) -> None:
        """Wraps a model. A collective: all ranks call it. ``stage`` is 1, 2 or 3."""
        self.model, self.options = model, options
        self.optimizer = build_optimizer(model)
        # At its default level, DeepSpeed logs every step of its set-up.
        logger.setLevel(logging.WARNING)
        join_process_group()
        for module in options.wrap_units:
            # ZeRO-3 then gathers the parameters of a module in one go, not those of each of its submodules.
            set_z3_leaf_module(module, True)
        config = deepspeed_config(stage, model, options)
        initial = [(p, p.detach().clone()) for p in model.parameters() if options.bf16 and p.requires_grad]
        self.wrapped, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        for module in options.wrap_units if options.compile else ():
            exclude_hooks(module)
        self.access: ParameterAccess = access_for(self.wrapped, self.optimizer)
        # DeepSpeed rounds the parameters to bf16 before it copies them to the fp32 master values.
        for parameter, value in initial:
            self.access.write(parameter, value.to(options.device))
        self.dtype = torch.bfloat16 if options.bf16 else torch.float32

    def forward(self, images: Tensor) -> Tensor:
        return self.wrapped(images.to(self.dtype))

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)
        if not self.wrapped.is_gradient_accumulation_boundary():
            # The engine counts micro-batches by calls of step(). Before the last micro-batch, step() changes nothing.
            self.wrapped.step()

    def step(self) -> StepResult:
        # DeepSpeed always computes the norm, and skips the step if the norm isn't finite.
        self.wrapped.step()
        return StepResult(torch.as_tensor(self.wrapped.get_global_grad_norm()), self.wrapped.was_step_applied())


def exclude_hooks(module: nn.Module) -> None:
    """Keeps ``torch.compile`` from compiling the hooks of a module, by which ZeRO-3 gathers and frees its parameters.

    There is no public way to change the hooks of a module.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            hooks[number] = torch.compiler.disable(hook)


def join_process_group() -> None:
    """Makes DeepSpeed use the process group that is already there. A collective: all ranks call it."""
    # On the CPU, if this is the world size, each rank makes a buffer of 69 MB for inference in /dev/shm. A killed rank leaves
    # its buffer there, and a rank that finds less room crashes.
    local_size = os.environ.pop("LOCAL_SIZE", None)
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for; a process that no launcher started hasn't one
    deepspeed.init_distributed(verbose=False)
    # On the CPU, DeepSpeed counts devices by running numactl, many times a step, unless this variable gives the number.
    os.environ["LOCAL_SIZE"] = local_size or os.environ.get("LOCAL_WORLD_SIZE", "1")


def deepspeed_config(stage: int, model: nn.Module, options: EngineOptions) -> dict[str, Any]:
    """Returns the config for ``deepspeed.initialize``. The size of buckets follows the model, so it falls with the density."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    bucket = max(SMALLEST_BUCKET, *sizes, sum(sizes) // 8)
    bucket = -(-bucket // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.accumulation_steps,
        # Stated even if off, because DeepSpeed clips by default.
        "gradient_clipping": options.clip_grad_norm or 0.0,
        "bf16": {"enabled": options.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # By default, small parameters stay whole on every rank. Within a wrap unit they need no collective of their own.
            "stage3_param_persistence_threshold": 0,
        },
    }
