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
    # Threads that spin while they wait for each other cost a job on shared cores many times its
    # work: 44 s were measured for 9 s on a busy machine with 2 cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _put_first(variable: str, entry: str) -> None:
    entries = os.environ.get(variable, "").split(os.pathsep)
    if entries[0] != entry:
        os.environ[variable] = os.pathsep.join(filter(None, [entry, *entries]))
