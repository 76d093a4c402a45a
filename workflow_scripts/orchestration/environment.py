"""The environment that jobs inherit: interpreter, path of our code, behaviour of threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prepare(workflow_folder: Path) -> None:
    """Set the environment variables of this process and of the jobs that it starts.

    Stages are called as `python -m workflow_scripts…`. They run with Snakemake's own interpreter
    (with `--sdm conda`, the activated environment precedes it) and from any working directory.

    Args:
        workflow_folder: folder of the Snakefile.
    """
    _put_first("PATH", str(Path(sys.executable).parent))
    _put_first("PYTHONPATH", str(workflow_folder))
    # Threads that spin at a barrier occupy the core that the last thread needs. Scoring on a busy
    # machine with 2 cores took 44 s with two threads and 14 s with one, probably because of this.
    # On an idle machine, passive waiting costs nothing (8.3 s, spinning 8.2 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _put_first(variable: str, entry: str) -> None:
    entries = os.environ.get(variable, "").split(os.pathsep)
    if entries[0] != entry:
        os.environ[variable] = os.pathsep.join(filter(None, [entry, *entries]))
