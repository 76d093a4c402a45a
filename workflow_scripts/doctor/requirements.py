"""What a config asks of a machine: its runs, their models, what is still to be fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts.handover.facts import Facts, ModelShape

if TYPE_CHECKING:
    from workflow_scripts.settings import Config, ModelSettings, RunSettings


@dataclass(frozen=True)
class Repository:
    """Something on the Hub that is still to be fetched."""

    kind: str
    name: str
    revision: str | None
    key: str
    """Of the config, which names it."""
    model: str | None = None
    """The entry of `models` that it is, if it is one."""


@dataclass
class Wanted:
    """A config on this machine, and what is known of its base models."""

    config: Config
    results: Path
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    """Of the models whose config.json can be had."""
    weight_bytes: dict[str, int] = field(default_factory=dict)
    """Of the models whose files' sizes can be had."""
    download_bytes: dict[str, int] = field(default_factory=dict)
    """Model → what its repository's files take, where it is still to be fetched."""

    @property
    def runs(self) -> dict[str, RunSettings]:
        return {name: self.config.runs[name] for name in self.config.build}

    @property
    def models(self) -> dict[str, ModelSettings]:
        names = {run.model for run in self.runs.values()}
        return {name: self.config.models[name] for name in sorted(names)}

    @property
    def needs_gpu(self) -> bool:
        """A real model is trained and scored on one; the demo's is small enough for none."""
        return any(model.built_here is None for model in self.models.values())

    @property
    def n_gpus(self) -> int:
        """Of this machine, for one job of training."""
        is_trained = any(
            run.is_trained and self.models[run.model].built_here is None
            for run in self.runs.values()
        )
        return self.config.training.gpus if is_trained else int(self.needs_gpu)

    def folder_of(self, model: str) -> Path:
        return self.results / "models" / model

    @property
    def repositories(self) -> list[Repository]:
        """Those that the build will ask the Hub for; what is there is not fetched again."""
        from workflow_scripts.settings import is_local

        found = []
        for name, model in self.models.items():
            if model.source and not model.is_local and not self._has(name):
                key = f"models.{name}.source"
                found.append(Repository("base model", model.source, model.revision, key, name))
        for name, run in self.runs.items():
            for kind, place in (("adapter", "adapter"), ("merged model", "merged")):
                source = run.adapter if kind == "adapter" else run.merged
                is_there = (self.results / "runs" / name / place).exists()
                if source and not is_local(source) and not is_there:
                    found.append(Repository(kind, source, run.revision, f"runs.{name}.{place}"))
        for name in sorted({run.dataset for run in self.runs.values()}):
            for source, settings in self.config.datasets[name].all_sources.items():
                rows = self.results / "data" / name / "hub" / source / "rows.parquet"
                if settings.hub and not rows.exists():
                    key = f"datasets.{name}.hub"
                    found.append(Repository("dataset", settings.hub, settings.revision, key))
        return found

    def _has(self, model: str) -> bool:
        return (self.folder_of(model) / "checkpoint").exists()


def read_config(overlays: Sequence[Path]) -> Config:
    """The config that Snakemake would build from the same `--configfile`.

    Raises:
        StageError: a file does not exist or is not YAML, or the config cannot be built.
    """
    from workflow_scripts.settings import config_files, load_config

    paths = [*config_files.defaults(overlays), *overlays]
    return load_config(config_files.layered([config_files.read(path) for path in paths]))


def local_facts(wanted: Wanted) -> None:
    """Fill in what the files here say of the base models: facts.json, else a local folder."""
    from workflow_scripts.log import StageError
    from workflow_scripts.models.checkpoint_files import read_shape

    for name, model in wanted.models.items():
        path = wanted.folder_of(name) / "facts.json"
        checkpoint = wanted.folder_of(name) / "checkpoint"
        if model.is_local and model.source:
            checkpoint = Path(model.source).expanduser()
        try:
            if path.is_file():
                facts = Facts.read(path)
                wanted.shapes[name], wanted.weight_bytes[name] = facts, facts.weight_bytes
            elif (checkpoint / "config.json").is_file():
                wanted.shapes[name] = read_shape(checkpoint, model.rope_scaling)
                sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
                wanted.weight_bytes[name] = weight_bytes(sizes)
        except StageError:
            continue  # its own stage says what is wrong with it


def weight_bytes(sizes: Mapping[str, int]) -> int:
    """Size of a checkpoint's weights.

    Args:
        sizes: of its files, bytes, by name.
    """
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
