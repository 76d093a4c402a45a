"""Memory of the device that this process computes on, in bytes."""

from __future__ import annotations

import os
import resource

import torch

from workflow_scripts.models.checkpoint import default_device
from workflow_scripts.train.memory.ram import available_ram_bytes
from workflow_scripts.train.memory.shape import DeviceType


def kind() -> DeviceType:
    """Kind of the device, as the memory formulas distinguish it."""
    return "cuda" if default_device().type == "cuda" else "cpu"


def name() -> str:
    """Name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def available_bytes() -> int:
    """Free memory of this process's GPU; without a GPU, of the machine."""
    device = default_device()
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_ram_bytes()


def total_bytes() -> int:
    """All memory, used or not, of this process's GPU; without a GPU, of the machine."""
    device = default_device()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """Most GPU memory that this process allocated; without a GPU, its largest resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
