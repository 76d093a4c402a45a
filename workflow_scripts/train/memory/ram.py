"""Memory of the machine that is free, in bytes; needs no torch."""

from __future__ import annotations

from pathlib import Path


def available_ram_bytes() -> int:
    """Memory that Linux could give without swapping, or less where a control group allows less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group of version 2
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))
