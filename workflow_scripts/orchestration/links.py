"""The links of the chain for Snakemake: their files, the arguments of programs that measure them,
and the paths of measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from snakemake.io import ancient
from snakemake.iocontainers import InputFiles, Wildcards

from workflow_scripts.handover import chain
from workflow_scripts.handover.chain import Chain, ChainSettings, LinkFiles, TaskKind
from workflow_scripts.orchestration.build import Build, flagged


class Links:
    """Input functions and arguments of the rules that measure or report links."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.config = build.config

    def files(self, wildcards: Wildcards) -> dict[str, str]:
        """The files of a link, by name."""
        link, names = self.build.links[wildcards.link], self.build.owner(wildcards)
        weights = "gguf" if link.engine == "llama.cpp" else "checkpoint"
        files = {weights: self._weights(link, names)}
        if link.adapter:
            files["adapter"] = link.adapter.format_map(names)
        if link.gate:
            files["gate"] = ancient(link.gate.format_map(names))  # read by none
        return files

    def source(self, wildcards: Wildcards) -> str:
        """The weights of the link that this link is made from."""
        source = self.build.links[wildcards.link].source
        assert source is not None  # only links with a source are compared
        return self._weights(self.build.links[source], self.build.owner(wildcards))

    def _weights(self, link: chain.Link, names: dict[str, str]) -> str:
        return link.weights.format_map({**names, "link": link.name})

    def arguments(self, wildcards: Wildcards, input: InputFiles) -> list[str]:
        """Arguments that name the model to measure."""
        link = self.build.links[wildcards.link]
        if link.engine == "llama.cpp":
            return ["--gguf", input.gguf]
        if link.precision == "trained":
            return self.live_adapter(self.build.owner(wildcards)["run"], input)
        precision = ["--precision", link.precision] if link.precision else []
        return ["--checkpoint", input.checkpoint, *precision]

    def live_adapter(self, run: str, input: InputFiles) -> list[str]:
        """Arguments for the adapter on the base that it was trained on, not merged."""
        adapter = str(Path(input.adapter).parent)
        precision = self.config.trained_precision(run)
        return ["--checkpoint", input.checkpoint, "--adapter", adapter, "--precision", precision]

    @property
    def task_links(self) -> list[str]:
        """The base, the merged model (both honour the window), and the smallest file, which people
        run."""
        return ["base", "merged", self.build.quantizations[-1]]

    @property
    def context_links(self) -> list[str]:
        if self.config.evaluation.context.of_merged:
            return self.task_links
        return [link for link in self.task_links if link != "merged"]

    @property
    def sample_links(self) -> list[str]:
        """The links on the overview: the base, and in llama.cpp the tuned model and the smallest
        file, which people run."""
        return ["base", "F16", self.build.quantizations[-1]]

    @property
    def task_kinds(self) -> list[TaskKind]:
        """The kinds of tasks: those that the config names, and reference answers."""
        return ["tasks", "references"] if self.config.evaluation.tasks.names else ["references"]

    def chain_settings(self, run: str) -> ChainSettings:
        """The settings that the chain of a run depends on."""
        return ChainSettings(
            run=self.config.runs[run],
            quantizations=tuple(self.build.quantizations),
            awq=self.config.awq.use,
            base_gguf=self.config.evaluation.base_gguf,
            texts=tuple(self.config.evaluation.texts),
        )

    def chain(self, run: str) -> Chain:
        """The paths of all measurements of a run."""
        return chain.chain_of(run, self.chain_settings(run))

    def scores(self, run: str) -> list[str]:
        """The scores of a run's links, from the base to the smallest file."""
        return [link.scores for link in self.chain(run).links]

    def files_of(
        self, runs: Iterable[str], files_of: Callable[[LinkFiles], Iterable[str | None]]
    ) -> list[str]:
        """Some files of every link of some runs. Runs on the same base share its files.

        Args:
            files_of: selects the files of a link; None stands for a file that does not exist.
        """
        return sorted(
            {
                file
                for run in runs
                for link in self.chain(run).links
                for file in files_of(link)
                if file
            }
        )

    def context_arguments(self) -> list[str]:
        return flagged("--context", self.context_links)

    def task_arguments(self) -> list[str]:
        return [*flagged("--tasks", self.task_links), *flagged("--kinds", self.task_kinds)]

    def also_measured(self) -> list[str]:
        """Arguments of reports that name further measurements, besides scores and speed."""
        evaluation = self.config.evaluation
        return [
            *(self.context_arguments() if evaluation.context.use else []),
            *(self.task_arguments() if evaluation.tasks.use else []),
        ]
