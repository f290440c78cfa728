"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import deepspeed
import torch


def describe_machine() -> str:
    """Returns one line: processor, cores, memory, GPU, versions, settings of glibc's allocator."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    tunables = f"; GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}" if "GLIBC_TUNABLES" in os.environ else ""
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}; {versions}{tunables}"
