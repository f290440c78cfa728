"""What the ranks of tests import, for the server that forks them: no threads start and no device is touched by it."""

import os

# Importing DeepSpeed looks for GPUs, and asked in the usual way CUDA would refuse to work in forked processes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import accelerate
import deepspeed
import timm.data
import timm.models
import torch.distributed.checkpoint
import torch.distributed.fsdp

import svite_scale.train.run
import tests.tiny

__all__ = ["accelerate", "deepspeed", "svite_scale", "tests", "timm", "torch"]
