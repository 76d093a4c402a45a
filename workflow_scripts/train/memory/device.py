"""Memory of the device this process computes on, in bytes."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from workflow_scripts.models.checkpoint import default_device


def available_bytes() -> int:
    """Memory that is free now: of this process's GPU, else of the machine."""
    device = default_device()
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return available_ram_bytes()


def available_ram_bytes() -> int:
    """What Linux could give without swapping, less where a control group allows less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group of version 2
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def total_bytes() -> int:
    """Of this process's GPU, else of the machine, used or not."""
    device = default_device()
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """Most memory this process took: of the GPU where there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
