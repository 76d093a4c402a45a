"""The origin of a release: hashes, versions, machine.

A release may be published, so nothing here names a folder of the machine that it was made on.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from workflow_scripts import files
from workflow_scripts.handover.facts import FileFacts
from workflow_scripts.handover.provenance import Hardware

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "mistral-common", "llama-cpp-python")
REPOSITORY = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Package → version, for the packages that determine a release's figures."""
    return {package: metadata.version(package) for package in PACKAGES}


def git_revision() -> str | None:
    """Commit of the workflow, with `-dirty` if tracked files differ from it; None outside git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def hardware() -> Hardware:
    """This machine. The machine of the training is in its manifest."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), None)
    return Hardware(
        architecture=platform.machine(),
        cpu=model,
        n_cpus=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def hashes(paths: Sequence[Path]) -> dict[str, FileFacts]:
    """File name → hash and size."""
    return {
        path.name: FileFacts(sha256=files.sha256(path), size_bytes=path.stat().st_size)
        for path in paths
    }


def without_folders(value: Any) -> Any:
    """A JSON value in which absolute paths are reduced to file names."""
    match value:
        case dict():
            return {key: without_folders(inner) for key, inner in value.items()}
        case list():
            return [without_folders(inner) for inner in value]
        case str() if value.startswith(("/", "~")):
            return Path(value).name
    return value
