"""Training on several GPUs: starts torchrun for the job's GPUs and passes signals on to it.

One process per GPU. On one node torchrun chooses a port; on several, under Slurm, `srun` starts one
torchrun per node, and they meet at the first node of the allocation. Without GPUs the processes
communicate with gloo on the CPU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.settings import TrainingSettings

logger = log.stage_logger("processes")


def is_worker() -> bool:
    """True in a process that torchrun started."""
    return "LOCAL_RANK" in os.environ


def n_processes() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the one process that writes shared files."""
    return os.environ.get("RANK", "0") == "0"


def sharding(
    training: TrainingSettings, model: Any
) -> dict[str, Any]:  # untyped: arguments of transformers
    """transformers' arguments for sharded weights (FSDP2); none for DDP."""
    if training.parallelism == "ddp" or n_processes() == 1:
        return {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": [type(base.model.layers[0]).__name__],
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
        },
    }


def run(module: str, argv: Sequence[str], training: TrainingSettings) -> None:
    """Run a program in one process per GPU, and wait for it.

    A signal to end is passed on to the workers only: torchrun would give them 30 s, but a step of
    long rows may take longer.

    Raises:
        StageError: the processes failed; their own messages are above.
    """
    command = launch_command(module, argv, training, os.environ)
    logger.info("launched command=%s", " ".join(command))
    process = subprocess.Popen(
        command,
        start_new_session=True,
        # One thread per process: torchrun's default, set here to avoid its warning.
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )

    def hand_on(number: int, _: FrameType | None) -> None:
        # torchrun starts each worker in a new session, so a signal to its group reaches no worker.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.send_signal(number)

    with handled_signals(hand_on):
        code = process.wait()
    if code:
        raise StageError(
            "training failed",
            found=f"exit code {code} of torchrun; the first error is above",
        )


@contextmanager
def handled_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that end a job with `handler` within the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def launch_command(
    module: str, argv: Sequence[str], training: TrainingSettings, environment: Mapping[str, str]
) -> list[str]:
    """The command line that starts every process.

    Args:
        module: name of the program's module.
        environment: environment variables, for the number of the Slurm job.
    Raises:
        StageError: Slurm allocated fewer nodes than `training.nodes`.
    """
    # torchrun and the workers inherit that the signals are ignored, so torchrun stays. The workers
    # then install handlers.
    torchrun = [
        *("env", "--ignore-signal=TERM", "--ignore-signal=INT"),
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(training.gpus), "--signals-to-handle", "SIGUSR2"),
    ]
    program = ["--module", module, *argv]
    if training.nodes == 1:
        # --standalone chooses a free port, so that two jobs on one machine do not collide.
        return [*torchrun, "--standalone", *program]
    hosts = _hosts(environment)
    if len(hosts) < training.nodes:
        raise StageError(
            "the job has fewer nodes than training needs",
            where="training.nodes",
            found=f"{len(hosts)} ({', '.join(hosts) or 'not a Slurm job'})",
            expected=training.nodes,
            to_fix="run with profiles/slurm-sharded, which requests them, or set nodes: 1",
        )
    # A different port for each job, as two jobs may share a node.
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000
    return [
        *("srun", "--nodes", str(training.nodes), "--ntasks-per-node", "1", "--kill-on-bad-exit"),
        *torchrun,
        *("--nnodes", str(training.nodes), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{_address(hosts[0])}:{port}"),
        *("--rdzv-id", environment["SLURM_JOB_ID"]),
        *program,
    ]


def _hosts(environment: Mapping[str, str]) -> list[str]:
    """Nodes of this Slurm job, in order; none outside a Slurm job.

    Slurm is queried because Snakemake's Slurm executor leaves only the job's number in the
    environment.
    """
    if "SLURM_JOB_ID" not in environment:
        return []
    job = environment["SLURM_JOB_ID"]
    nodes = _answer("squeue", "--noheader", "--jobs", job, "--format", "%N")
    return _answer("scontrol", "show", "hostnames", nodes.strip()).split()


def _address(host: str) -> str:
    """Address at which other nodes reach a node; its name in Slurm may not be a host name."""
    found = re.search(r"\bNodeAddr=(\S+)", _answer("scontrol", "show", "node", host))
    return found[1] if found else host


def _answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
