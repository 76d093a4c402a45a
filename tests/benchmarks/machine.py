"""Where and with what a benchmark ran: processor, versions, commit; it goes into every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from workflow_scripts import log

REPOSITORY = Path(__file__).resolve().parents[2]


def circumstances() -> dict[str, Any]:
    """The top of a result: date, commit, machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str:
    """Of the checkout; `-dirty` where files differ from it, `unknown` of a copy without Git."""
    if not (REPOSITORY / ".git").exists():
        return "unknown"
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


def version_in(folder: Path, package: str) -> str:
    """Of a package that was installed into a folder (`pip install --target`).

    Raises:
        StageError: it is not there.
    """
    for found in metadata.distributions(name=package, path=[str(folder)]):
        return found.version
    raise log.StageError(
        f"{package} is not installed there",
        where=folder,
        to_fix=f"pip install --no-deps --target {folder} {package}",
    )
