"""What jobs ask of a machine or a cluster: threads, GPUs, memory."""

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
        """8 for a real model; one for the demo's, whose jobs are mostly start-up."""
        return 1 if self.config.models[model].built_here else 8

    def threads_of_dataset(self, wildcards: Wildcards) -> int:
        """As many processes clean and render a dataset; the demo's is done sooner than they
        start."""
        return 1 if self.config.datasets[wildcards.dataset].generate else 8

    def threads_of_training(self, wildcards: Wildcards) -> int:
        """On this machine a share of the cores, so that as many runs of the demo's as it has train
        side by side: each is slow to use a second one. 8 on a GPU or a cluster."""
        if self.build.cores is None or self.gpus_of_run(wildcards):
            return 8
        n_trained = sum(run.is_trained for run in self.build.made_runs.values())
        return max(1, min(8, self.build.cores // max(1, n_trained)))

    def threads_of_quantizing(self, wildcards: Wildcards) -> int:
        """Half of what other stages take, so that two quantizations run side by side."""
        return max(1, self.threads_of_run(wildcards) // 2)

    def all_cores(self) -> int:
        """Every core Snakemake was given, so that a job is alone; 8 where it needs none
        (--report)."""
        return self.build.cores or 8

    def gpus_of_run(self, wildcards: Wildcards) -> int:
        return self._gpus(self.config.runs[wildcards.run].model)

    def gpus_of_link(self, wildcards: Wildcards) -> int:
        return self._gpus(self.build.owner(wildcards)["model"])

    def gpus_of_scoring(self, wildcards: Wildcards) -> int:
        """None for llama.cpp as it is installed here."""
        link = self.build.links[wildcards.link]
        return 0 if link.engine == "llama.cpp" else self.gpus_of_link(wildcards)

    def gpus_of_a_node(self, wildcards: Wildcards) -> int:
        """GPU slots of a training job on each of its nodes; none for the demo's model."""
        return self.gpus_of_run(wildcards) * self.config.training.gpus

    def gpus_of_training(self, wildcards: Wildcards) -> int:
        """On all of them."""
        return self.gpus_of_a_node(wildcards) * self.config.training.nodes

    def _gpus(self, model: str) -> int:
        """A slot for a real model; the demo's is small enough for none, and uses one if it is
        there."""
        return 0 if self.config.models[model].built_here else 1

    def memory_of_scoring(self, wildcards: Wildcards, input: InputFiles, attempt: int) -> int:
        """llama.cpp maps its file; transformers may hold the weights twice as it loads them."""
        is_mapped = self.build.links[wildcards.link].engine == "llama.cpp"
        return memory_of_models(1.1 if is_mapped else 2)(wildcards, input, attempt)

    def several_nodes(self) -> dict[str, Any]:  # untyped: resources of Snakemake's
        """How the Slurm executor starts a job of several nodes: on the first of them alone, and the
        job calls srun itself. The tasks are the nodes, not the GPUs."""
        nodes = self.config.training.nodes
        return {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0} if nodes > 1 else {}


def growing(amount: int) -> Megabytes:
    """A resource of which each attempt asks for as much again."""

    def asked(wildcards: Wildcards, attempt: int) -> int:
        return amount * attempt

    return asked


def memory_of_models(n_models: float, beside_mb: int = 4_000) -> Megabytes:
    """Memory, MB, of a job that holds a model's weights so many times; more with each attempt."""

    def megabytes(wildcards: Wildcards, input: InputFiles, attempt: int) -> int:
        # FileNotFoundError, where the facts are not made yet, has Snakemake ask again when they
        # are.
        facts = Path(input.facts)
        weights_mb = _weight_bytes(facts, facts.stat().st_mtime_ns) / 1e6
        return int((n_models * weights_mb + beside_mb) * attempt)

    return megabytes


@cache
def _weight_bytes(facts: Path, changed_ns: int) -> int:
    return Facts.read(facts).weight_bytes
