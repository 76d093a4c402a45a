"""Memory of this process as Linux counts it, for programs that measure themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

KIB = 1024


def resident_bytes(key: Literal["VmRSS", "VmHWM"]) -> int:
    """What is resident now, or was at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, text = line.partition(":")
        if name == key:
            return int(text.split()[0]) * KIB
    raise AssertionError(key)


def reset_peak() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
