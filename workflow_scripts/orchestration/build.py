"""The runs that a config builds, grouped by what they start from, and the values of wildcards."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.io import temp
from snakemake.iocontainers import Wildcards

from workflow_scripts.handover import chain
from workflow_scripts.log import StageError
from workflow_scripts.settings import Config, RunSettings, sweeps

ROOT = Path(__file__).parents[2]
Runs = Mapping[str, RunSettings]
InputFunction = Callable[[Wildcards], str]


class Build:
    """The config, with the questions that rules ask about it.

    Args:
        config: the validated config.
        written: the config as the user wrote it, sweeps included.
        cores: cores of this machine, if jobs run on it; None on a cluster.
        is_shared: Snakemake was started with `--cache`.
    """

    def __init__(
        self,
        config: Config,
        written: dict[str, Any],  # untyped: as Snakemake read it
        *,
        cores: int | None = None,
        is_shared: bool = False,
    ) -> None:
        self.config = config
        self.cores = cores
        self.is_shared = is_shared
        self.sweeps = sweeps.expand(written)

    # --- runs ---

    @cached_property
    def runs(self) -> Runs:
        """The runs that reports show."""
        return {name: self.config.runs[name] for name in self.config.build}

    @cached_property
    def made_runs(self) -> Runs:
        """The runs that this build makes: those that are not frozen."""
        return {name: run for name, run in self.runs.items() if not self.config.is_frozen(name)}

    @cached_property
    def trained_runs(self) -> Runs:
        return {name: run for name, run in self.config.runs.items() if run.is_trained}

    @cached_property
    def adapter_runs(self) -> Runs:
        """The runs that start from an adapter of the user."""
        return {name: run for name, run in self.config.runs.items() if run.adapter}

    @cached_property
    def merged_runs(self) -> Runs:
        """The runs that start from a merged model of the user."""
        return {name: run for name, run in self.config.runs.items() if run.merged}

    @cached_property
    def sweep_runs(self) -> list[str]:
        """Names of the runs that sweeps expand to."""
        return [name for names in self.sweeps.runs.values() for name in names]

    @cached_property
    def made_sweep_runs(self) -> list[str]:
        return [name for name in self.sweep_runs if not self.config.is_frozen(name)]

    @cached_property
    def stopping_runs(self) -> list[str]:
        """The runs of this build that stop early by their validation loss."""
        return [
            name
            for name, run in self.made_runs.items()
            if run.recipe and self.config.recipes[run.recipe].early_stopping
        ]

    # --- links ---

    @cached_property
    def quantizations(self) -> list[str]:
        return list(self.config.gguf.quantizations)

    @cached_property
    def gguf_types(self) -> list[str]:
        return ["F16", *self.quantizations]

    @cached_property
    def released_types(self) -> list[str]:
        return self.gguf_types if self.config.retention.f16 else self.quantizations

    @cached_property
    def links(self) -> dict[str, chain.Link]:
        """Every possible link, by name."""
        return {link.name: link for link in chain.links(self.quantizations)}

    @cached_property
    def compared_links(self) -> set[str]:
        """The links that are compared token by token with the link that they are made from."""
        return {name for name, link in self.links.items() if "divergence" in link.measured}

    # --- models and datasets ---

    @cached_property
    def models(self) -> list[str]:
        """The base models of the runs that this build makes."""
        return sorted({run.model for run in self.made_runs.values()})

    def models_that(self, key: str) -> list[str]:
        """Models with a value under `key`: `transplant`, `generate`, `is_local`."""
        return [name for name, model in self.config.models.items() if getattr(model, key)]

    @cached_property
    def hub_models(self) -> list[str]:
        return [
            name
            for name, model in self.config.models.items()
            if model.source and not model.is_local
        ]

    @cached_property
    def generated_datasets(self) -> list[str]:
        return [name for name, dataset in self.config.datasets.items() if dataset.generate]

    @cached_property
    def hub_sources(self) -> set[str]:
        return {
            name
            for dataset in self.config.datasets.values()
            for name, source in dataset.all_sources.items()
            if source.hub
        }

    # --- wildcards ---

    def any_run_of(self, names: Iterable[str]) -> str:
        """A wildcard constraint without frozen runs: no rule makes their files."""
        return any_of([name for name in names if not self.config.is_frozen(name)])

    @cached_property
    def any_place(self) -> str:
        """A wildcard constraint: the folder of a link's measurements, below `runs/` or, for a base,
        below `evaluation/`."""
        runs = self.any_run_of(self.config.runs)
        models, datasets = any_of(self.config.models), any_of(self.config.datasets)
        return f"runs/(?:{runs})/evaluation|evaluation/(?:{models})(?:/(?:{datasets}))?"

    def names(self, run: str) -> dict[str, str]:
        """The values of the wildcards in the paths of a run."""
        settings = self.config.runs[run]
        return {
            "run": run,
            "model": settings.model,
            "dataset": settings.dataset,
            "packing": settings.packing or "",
        }

    def owner(self, wildcards: Wildcards) -> dict[str, str]:
        """The owner of the measurements in a {place}, as values of wildcards: model; run, unless
        they are of a base; dataset, unless they do not depend on one."""
        kind, name, *rest = wildcards.place.split("/")
        if kind == "runs":
            return self.names(name)
        return {"model": name} | dict(zip(["dataset"], rest, strict=False))

    def of_run(self, pattern: str) -> InputFunction:
        """An input function: `pattern` with {model}, {dataset} and {packing} filled in from the
        run."""
        return lambda wildcards: pattern.format(**self.names(wildcards.run))

    def of_place(self, pattern: str) -> InputFunction:
        """An input function: `pattern` with the names of the {place}'s owner."""
        return lambda wildcards: pattern.format_map({**wildcards, **self.owner(wildcards)})

    # --- outputs ---

    def kept(self, what: str, file: str) -> str:
        """An output, temporary unless `retention` keeps it."""
        flagged: str = file if getattr(self.config.retention, what) else temp(file)
        return flagged


@contextmanager
def stopping(key: str = "") -> Iterator[None]:
    """Turn a StageError into Snakemake's error, which stops it before the first job.

    Args:
        key: where in the config the error is; it precedes the message.
    Raises:
        WorkflowError: with the message of the StageError.
    """
    try:
        yield
    except StageError as error:
        raise WorkflowError(f"{key}: {error}" if key else str(error)) from None


def any_of(names: Iterable[str]) -> str:
    """A wildcard constraint: exactly one of these names."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


def output_version(stage: str) -> int:
    """A stage's OUTPUT_VERSION, read without importing it. Raising it rebuilds the stage's outputs.

    Args:
        stage: room and program: `packing/pack_sequences`.
    """
    source = ROOT / "workflow_scripts" / f"{stage}.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OUTPUT_VERSION":
            version: int = ast.literal_eval(node.value)
            return version
    raise WorkflowError(f"{source} has no OUTPUT_VERSION")


def flagged(flag: str, files: Iterable[str]) -> list[str]:
    """A flag with its files; nothing if there are no files."""
    found = list(files)
    return [flag, *found] if found else []
