"""Where and with what a benchmark ran: processor, versions, commit; it goes into every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def circumstances() -> dict[str, Any]:
    """The top of a result: date, commit, machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str:
    """Of the checkout; `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(
        command, cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, memory, system, and how busy it was before."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "n_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average_1_minute": os.getloadavg()[0],
    }


def versions(python: str | Path, packages: Sequence[str]) -> dict[str, str]:
    """Of an interpreter, and of packages in its environment."""
    code = (
        "import json, platform, sys; from importlib.metadata import version;"
        "found = {package: version(package) for package in sys.argv[1:]};"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    command = [str(python), "-c", code, *packages]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
