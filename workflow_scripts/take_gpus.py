"""Run a command with exclusive GPUs: set `CUDA_VISIBLE_DEVICES` to N GPUs that no other job has.

Snakemake counts GPUs but does not assign them, so two parallel jobs would both use the first one.
Here each GPU has a lock file. The command replaces this process and inherits the open locks; the
kernel releases them when the command ends, even if it crashes. If `CUDA_VISIBLE_DEVICES` is already
set, by the user or by a batch system, GPUs are taken from that list. On a machine without GPUs, or
with N = 0, the command runs unchanged.

python -m workflow_scripts.take_gpus 2 python -m workflow_scripts.train.train_adapter …
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.log import StageError

VARIABLE = "CUDA_VISIBLE_DEVICES"
# Slurm, PBS, LSF, SGE. They may renumber the GPUs inside a job: `0` in two jobs on one node may be
# two different GPUs.
BATCH_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
SECONDS_BETWEEN_TRIES = 1.0
logger = log.stage_logger("take_gpus")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("n_gpus", type=int, help="number of GPUs for the command")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="program and its arguments")
    arguments = parser.parse_args(argv)
    if not arguments.command:
        parser.error("expected a command after the number of GPUs")

    names = visible_gpus(os.environ) if arguments.n_gpus else []
    batch_job = next((os.environ[key] for key in BATCH_JOBS if key in os.environ), None)
    # A batch system's GPUs already belong to this job; on several nodes `n_gpus` counts them all.
    if names and not (batch_job and len(names) <= arguments.n_gpus):
        folder = Path(tempfile.gettempdir(), "-".join(filter(None, ["tramontane-gpus", batch_job])))
        taken = take(names, arguments.n_gpus, folder)
        os.environ[VARIABLE] = ",".join(taken)
        logger.info("took %s=%s", VARIABLE, os.environ[VARIABLE])
        for descriptor in taken.values():
            os.set_inheritable(descriptor, True)
    os.execvp(arguments.command[0], arguments.command)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the visible GPUs by their names in `CUDA_VISIBLE_DEVICES`."""
    if VARIABLE in environment:
        names = [name.strip() for name in environment[VARIABLE].split(",")]
        # CUDA ignores every name after an invalid one; −1 is the usual invalid name.
        return names[: names.index("-1")] if "-1" in names else list(filter(None, names))
    if not shutil.which("nvidia-smi"):
        return []
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed_gpus(shown.stdout)


def listed_gpus(listing: str) -> list[str]:
    """Return the GPUs in the output of `nvidia-smi -L`: numbers of whole GPUs, then MIG instances.

    CUDA cannot use a GPU that is partitioned by MIG, only its instances.
    """
    whole = re.findall(r"^GPU (\d+):", listing, re.MULTILINE)
    instances = re.findall(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)", listing, re.MULTILINE)
    partitioned = re.findall(r"^GPU (\d+):.*\n\s+MIG ", listing, re.MULTILINE)
    return [name for name in whole if name not in partitioned] + instances


def take(names: Sequence[str], n_gpus: int, folder: Path) -> dict[str, int]:
    """Wait until N of the GPUs are free, and lock them.

    Either all N or none are locked. Otherwise two jobs that each hold one of two GPUs would wait
    for each other forever.

    Args:
        names: GPUs to choose from, in order of preference.
        folder: folder of the lock files, shared by all jobs that use these GPUs.
    Returns:
        Name → descriptor of the open file that holds its lock.
    Raises:
        StageError: there are fewer than N GPUs.
    """
    if n_gpus > len(names):
        raise StageError(
            "there are fewer GPUs than the job requests",
            where=f"this machine ({VARIABLE} if it is set, else nvidia-smi -L)",
            found=f"{len(names)} ({','.join(names)})",
            expected=n_gpus,
            to_fix="set training.gpus to the number found, or run on another machine",
        )
    _make_shared(folder)
    is_told = False
    while True:
        # One job at a time, so that no two jobs each hold part of the GPUs.
        choosing = _open(folder / "choosing")
        try:
            fcntl.flock(choosing, fcntl.LOCK_EX)
            taken = _lock_free(names, n_gpus, folder)
        finally:
            os.close(choosing)
        if len(taken) == n_gpus:
            return taken
        for descriptor in taken.values():
            os.close(descriptor)
        if not is_told:
            logger.info("waited for gpus=%d of=%s: other jobs use them", n_gpus, ",".join(names))
            is_told = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def _lock_free(names: Sequence[str], n_gpus: int, folder: Path) -> dict[str, int]:
    taken: dict[str, int] = {}
    for name in names:
        if len(taken) == n_gpus:
            break
        descriptor = _open(folder / re.sub(r"[^\w.-]", "_", name))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            taken[name] = descriptor
    return taken


def _make_shared(folder: Path) -> None:
    """Make a folder that every user of the machine may write to, like /tmp."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        folder.chmod(0o1777)


def _open(path: Path) -> int:
    """Open a lock file, and create it if it is missing.

    It is opened for reading: that is enough to lock it, and a file of another user allows no more.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
        if os.fstat(descriptor).st_uid == os.getuid():
            os.fchmod(descriptor, 0o644)  # regardless of the umask
        return descriptor


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
