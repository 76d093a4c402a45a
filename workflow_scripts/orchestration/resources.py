"""Threads, GPUs and memory that jobs request from a machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from snakemake.iocontainers import InputFiles, Wildcards

from workflow_scripts.handover.facts import Facts
from workflow_scripts.orchestration.build import Build

Megabytes = Callable[..., int]


class Resources:
    """Functions of rules' `threads:` and `resources:`."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.config = build.config

    def threads_of_model(self, wildcards: Wildcards) -> int:
        return self._threads(wildcards.model)

    def threads_of_run(self, wildcards: Wildcards) -> int:
        return self._threads(self.config.runs[wildcards.run].model)

    def threads_of_link(self, wildcards: Wildcards) -> int:
        return self._threads(self.build.owner(wildcards)["model"])

    def _threads(self, model: str) -> int:
        """8 for a real model; 1 for the demo's, whose jobs spend most of their time starting."""
        return 1 if self.config.models[model].built_here else 8

    def threads_of_dataset(self, wildcards: Wildcards) -> int:
        """Processes that clean and render a dataset: 8, or 1 for the demo's, which is done before
        more would have started."""
        return 1 if self.config.datasets[wildcards.dataset].generate else 8

    def threads_of_training(self, wildcards: Wildcards) -> int:
        """On a CPU, a share of this machine's cores: the demo's runs train in parallel, as each
        gains little from a second core. 8 on a GPU or a cluster."""
        if self.build.cores is None or self.gpus_of_run(wildcards):
            return 8
        n_trained = sum(run.is_trained for run in self.build.made_runs.values())
        return max(1, min(8, self.build.cores // max(1, n_trained)))

    def threads_of_quantizing(self, wildcards: Wildcards) -> int:
        """Half the threads of other stages, so that two quantizations run in parallel."""
        return max(1, self.threads_of_run(wildcards) // 2)

    def all_cores(self) -> int:
        """All cores, so that a job runs alone; 8 if Snakemake was given none (--report)."""
        return self.build.cores or 8

    def gpus_of_run(self, wildcards: Wildcards) -> int:
        return self._gpus(self.config.runs[wildcards.run].model)

    def gpus_of_link(self, wildcards: Wildcards) -> int:
        return self._gpus(self.build.owner(wildcards)["model"])

    def gpus_of_scoring(self, wildcards: Wildcards) -> int:
        """0 for llama.cpp, which is installed without GPU support; 1 for a real model."""
        link = self.build.links[wildcards.link]
        return 0 if link.engine == "llama.cpp" else self.gpus_of_link(wildcards)

    def gpus_of_a_node(self, wildcards: Wildcards) -> int:
        """GPU slots of a training job on each of its nodes; none for the demo's model."""
        return self.gpus_of_run(wildcards) * self.config.training.gpus

    def gpus_of_training(self, wildcards: Wildcards) -> int:
        """GPU slots of a training job on all its nodes."""
        return self.gpus_of_a_node(wildcards) * self.config.training.nodes

    def _gpus(self, model: str) -> int:
        """1 for a real model; 0 for the demo's, which is small enough for a CPU but uses a GPU if
        there is one."""
        return 0 if self.config.models[model].built_here else 1

    def memory_of_scoring(self, wildcards: Wildcards, input: InputFiles, attempt: int) -> int:
        """llama.cpp maps its file; transformers may hold the weights twice while loading."""
        is_mapped = self.build.links[wildcards.link].engine == "llama.cpp"
        return memory_of_models(1.1 if is_mapped else 2)(wildcards, input, attempt)

    def several_nodes(self) -> dict[str, Any]:  # untyped: resources of Snakemake's
        """Resources with which the Slurm executor starts a job of several nodes on the first one
        only; the job itself calls srun. There is one task per node, not per GPU."""
        nodes = self.config.training.nodes
        return {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0} if nodes > 1 else {}


def growing(amount: int) -> Megabytes:
    """A resource that grows by the same amount with each attempt."""
    return lambda wildcards, attempt: amount * attempt


def memory_of_models(n_models: float, other_mb: int = 4_000) -> Megabytes:
    """Memory, MB, of a job that holds `n_models` copies of the weights; grows per attempt."""

    def megabytes(wildcards: Wildcards, input: InputFiles, attempt: int) -> int:
        # Before the facts exist this raises FileNotFoundError, and Snakemake asks again later.
        facts = Path(input.facts)
        weights_mb = _weight_bytes(facts, facts.stat().st_mtime_ns) / 1e6
        return int((n_models * weights_mb + other_mb) * attempt)

    return megabytes


@cache
def _weight_bytes(facts: Path, changed_ns: int) -> int:
    return Facts.read(facts).weight_bytes
