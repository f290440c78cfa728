"""Builds the engine that a config names."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import nn

from svite_scale.engines.backend import Backend, EngineOptions, OptimizerFactory
from svite_scale.engines.options import ParallelConfig
from svite_scale.engines.torch_backend import TorchBackend
from svite_scale.errors import ConfigError


def check_parallel(config: ParallelConfig, device: torch.device, *, bf16: bool, compile: bool) -> None:
    """Checks that this machine can run the backend, in bf16 or compiled, before anything starts. Local.

    Raises:
        ConfigError: names what is missing.
    """
    if config.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("parallel.backend", "deepspeed", "is not installed here", "pip install deepspeed, or use fsdp2")
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError("train.precision", "bf16", f"is not supported by this GPU ({name})", "use fp32")
    compiler = os.environ.get("CXX") or "g++"  # as inductor looks for it
    if compile and device.type == "cpu" and shutil.which(compiler) is None:
        problem = f"needs a C++ compiler, and there is no {compiler}"
        raise ConfigError("train.compile", True, problem, "install g++ (build-essential), or name another in CXX")


def build_backend(
    config: ParallelConfig, model: nn.Module, build_optimizer: OptimizerFactory, options: EngineOptions
) -> Backend:
    """Wraps a model in the engine of the config, and returns the backend. A collective: all ranks call it."""
    if options.compile:
        for module in options.wrap_units:
            # Blocks share one limit, torch's is 8, and blocks that differ in a count or in drop path are compiled each.
            module.compile(recompile_limit=8 * len(options.wrap_units))
    if config.backend == "deepspeed":
        # Imported here because importing DeepSpeed takes seconds and looks for a GPU.
        from svite_scale.engines.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(config.zero_stage, model, build_optimizer, options)
    return TorchBackend(config.backend, model, build_optimizer, options)
