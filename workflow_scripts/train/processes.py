"""Several GPUs: torchrun started from what the job was given, and signals handed on to it.

One process a GPU. On one node torchrun finds its own port; on several, under Slurm, `srun` starts
one torchrun a node and the first node of the allocation is the meeting point. Without a GPU the
processes speak over gloo on the CPU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.settings import TrainingSettings

logger = log.stage_logger("processes")


def is_worker() -> bool:
    """This process was started by torchrun."""
    return "LOCAL_RANK" in os.environ


def n_processes() -> int:
    """Processes that train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """The one process that writes what all share."""
    return os.environ.get("RANK", "0") == "0"


def sharding(
    training: TrainingSettings, model: Any
) -> dict[str, Any]:  # untyped: arguments of transformers
    """transformers' arguments for weights that are shared out (FSDP2); none for DDP."""
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
    """Run a program in one process a GPU, and wait for it.

    A signal to end goes to the workers alone: torchrun itself would give them 30 s, and a step of
    long rows takes longer.

    Raises:
        StageError: they failed; their own messages stand above.
    """
    command = launch_command(module, argv, training, os.environ)
    logger.info("launched command=%s", " ".join(command))
    process = subprocess.Popen(
        command,
        start_new_session=True,
        # One thread a process where there is no GPU: torchrun's own default, without its warning.
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )

    def hand_on(number: int, _: FrameType | None) -> None:
        # torchrun gives each worker a session of its own: a signal to its group would reach none.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise StageError(
            "training did not end well",
            found=f"exit code {code} of torchrun; the first error stands above",
        )


def launch_command(
    module: str, argv: Sequence[str], training: TrainingSettings, environment: Mapping[str, str]
) -> list[str]:
    """The command line that starts every process.

    Args:
        module: name of the program's module.
        environment: variables, for the number of Slurm's job.
    Raises:
        StageError: more nodes are asked for than Slurm gave.
    """
    # Ignored signals are inherited: by torchrun, which stays, and by the workers, whose own
    # handlers replace it.
    torchrun = ["env", "--ignore-signal=TERM", "--ignore-signal=INT"]
    torchrun += [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nproc-per-node", str(training.gpus), "--signals-to-handle", "SIGUSR2"]
    program = ["--module", module, *argv]
    if training.nodes == 1:
        # --standalone: a free port of its own, so that two jobs on a machine do not meet.
        return [*torchrun, "--standalone", *program]
    hosts = _hosts(environment)
    if len(hosts) < training.nodes:
        raise StageError(
            "there are not as many nodes as training asks for",
            where="training.nodes",
            found=f"{len(hosts)} ({', '.join(hosts) or 'not a job of Slurm'})",
            expected=training.nodes,
            to_fix="run under profiles/slurm-sharded, whose jobs ask for them; or set nodes: 1",
        )
    # Two jobs that share a node must not meet.
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000
    meeting = ["--nnodes", str(training.nodes), "--rdzv-backend", "c10d"]
    meeting += ["--rdzv-endpoint", f"{_address(hosts[0])}:{port}"]
    meeting += ["--rdzv-id", environment["SLURM_JOB_ID"]]
    spread = ["srun", "--nodes", str(training.nodes), "--ntasks-per-node", "1"]
    spread.append("--kill-on-bad-exit")
    return [*spread, *torchrun, *meeting, *program]


def _hosts(environment: Mapping[str, str]) -> list[str]:
    """Nodes of the Slurm job that this runs in, the first one first; none outside of one.

    Slurm is asked, as its Snakemake executor leaves a job no variable but the job's number.
    """
    if "SLURM_JOB_ID" not in environment:
        return []
    job = environment["SLURM_JOB_ID"]
    nodes = _answer("squeue", "--noheader", "--jobs", job, "--format", "%N")
    return _answer("scontrol", "show", "hostnames", nodes.strip()).split()


def _address(host: str) -> str:
    """Where other nodes reach a node: Slurm's name of it need not be one of the network."""
    found = re.search(r"\bNodeAddr=(\S+)", _answer("scontrol", "show", "node", host))
    return found[1] if found else host


def _answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
