"""Give a command GPUs of its own: `CUDA_VISIBLE_DEVICES` names as many free ones as it asks for.

Snakemake counts GPUs and assigns none: two jobs at once would both take the first. Here each GPU
has a lock file, and the command, which replaces this process, keeps its locks open: the kernel
frees them when it ends, however it ends. Where `CUDA_VISIBLE_DEVICES` is set already, by the user
or by a batch system, GPUs are taken from that list. Without a GPU, or for 0 of them, the command
runs as it is.

python -m workflow_scripts.take_gpus 2 python -m workflow_scripts.train.train_adapter …
"""

from __future__ import annotations

import argparse
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
# Slurm, PBS, LSF, SGE. Inside a job of theirs the GPUs may be numbered anew: `0` of two jobs on a
# node may be two GPUs.
BATCH_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
SECONDS_BETWEEN_TRIES = 1.0
logger = log.stage_logger("take_gpus")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("n_gpus", type=int, help="GPUs that the command is to have")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="program and its arguments")
    arguments = parser.parse_args(argv)
    if not arguments.command:
        parser.error("a command is expected after the number of GPUs")

    names = visible_gpus(os.environ) if arguments.n_gpus else []
    batch_job = next((os.environ[key] for key in BATCH_JOBS if key in os.environ), None)
    # What a batch system gave is the job's own; on several nodes `n_gpus` counts all of theirs.
    if names and not (batch_job and len(names) <= arguments.n_gpus):
        folder = Path(tempfile.gettempdir(), "-".join(filter(None, ["tramontane-gpus", batch_job])))
        taken = take(names, arguments.n_gpus, folder)
        os.environ[VARIABLE] = ",".join(taken)
        logger.info("took %s=%s", VARIABLE, os.environ[VARIABLE])
        for descriptor in taken.values():
            os.set_inheritable(descriptor, True)
    os.execvp(arguments.command[0], arguments.command)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a program here would see, as `CUDA_VISIBLE_DEVICES` takes them."""
    if VARIABLE in environment:
        names = [name.strip() for name in environment[VARIABLE].split(",")]
        # CUDA sees none from an invalid name on, of which −1 is the usual one.
        return names[: names.index("-1")] if "-1" in names else list(filter(None, names))
    if not shutil.which("nvidia-smi"):
        return []
    shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed_gpus(shown.stdout)


def listed_gpus(listing: str) -> list[str]:
    """The GPUs of `nvidia-smi -L`: by number; by the names of its instances where one is
    partitioned (MIG), as CUDA computes on nothing else of it."""
    whole = re.findall(r"^GPU (\d+):", listing, re.MULTILINE)
    instances = re.findall(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)", listing, re.MULTILINE)
    if not instances:
        return whole
    partitioned = re.findall(r"^GPU (\d+):.*\n\s+MIG ", listing, re.MULTILINE)
    return [name for name in whole if name not in partitioned] + instances


def take(names: Sequence[str], n_gpus: int, folder: Path) -> dict[str, int]:
    """Wait until so many of some GPUs are free, and lock them.

    All or none: two jobs that each held one of two and waited for the other would wait for ever.

    Args:
        names: to choose from, the first ones first.
        folder: of the lock files, shared by all who choose from these GPUs.
    Returns:
        Name → open file that holds its lock.
    Raises:
        StageError: there are not that many.
    """
    if n_gpus > len(names):
        raise StageError(
            "there are not as many GPUs as the job asks for",
            where=f"this machine ({VARIABLE}, or else nvidia-smi -L)",
            found=f"{len(names)} ({','.join(names)})",
            expected=n_gpus,
            to_fix="set training.gpus to as many as there are, or run it elsewhere",
        )
    _make_shared(folder)
    is_told = False
    while True:
        # One at a time, so that two jobs never hold a part each.
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
            logger.info("waited for gpus=%d of=%s: other jobs have them", n_gpus, ",".join(names))
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
    """For every user of the machine, as its temporary folder is."""
    try:
        folder.mkdir(parents=True)
        folder.chmod(0o1777)
    except FileExistsError:
        pass


def _open(path: Path) -> int:
    """A lock file, made where it is missing. Reading is enough to lock, and all that another
    user's file allows."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
        if os.fstat(descriptor).st_uid == os.getuid():
            os.fchmod(descriptor, 0o644)  # whatever the umask
        return descriptor


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
