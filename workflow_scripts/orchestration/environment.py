"""The environment that jobs inherit: which interpreter, where our code is, how threads wait."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prepare(workflow_folder: Path) -> None:
    """Set it for this process and the jobs it starts.

    Stages are `python -m workflow_scripts…`: run by the interpreter that runs Snakemake (with
    `--sdm conda` the activated environment goes before it) and found from any working directory.

    Args:
        workflow_folder: where the Snakefile lies.
    """
    _put_first("PATH", str(Path(sys.executable).parent))
    _put_first("PYTHONPATH", str(workflow_folder))
    # Threads that spin at a barrier burn the core its last thread waits for. Scoring on a busy
    # machine with 2 cores took 44 s with two threads and 14 s with one; spinning is the likely
    # cause. Idle, passive waiting costs nothing there (8.3 s against 8.2 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _put_first(variable: str, entry: str) -> None:
    entries = os.environ.get(variable, "").split(os.pathsep)
    if entries[0] != entry:
        os.environ[variable] = os.pathsep.join(filter(None, [entry, *entries]))
