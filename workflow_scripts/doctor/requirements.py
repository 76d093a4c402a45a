"""The runs and base models of a config, and the repositories that are still to be fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint_files import read_shape
from workflow_scripts.settings import (
    Config,
    ModelSettings,
    RunSettings,
    config_files,
    is_local,
    load_config,
)


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub that is still to be fetched."""

    kind: str
    name: str
    revision: str | None
    key: str
    """The key of the config that names it."""
    model: str | None = None
    """Its entry in `models`, if it is a base model."""


@dataclass
class Wanted:
    """A config on this machine, and what is known about its base models."""

    config: Config
    results: Path
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    """Model → shape, where its config.json could be read."""
    weight_bytes: dict[str, int] = field(default_factory=dict)
    """Model → size of its weights, where the sizes of its files are known."""
    download_bytes: dict[str, int] = field(default_factory=dict)
    """Model → size of the download, where it is still to be fetched."""

    @property
    def runs(self) -> dict[str, RunSettings]:
        return {name: self.config.runs[name] for name in self.config.build}

    @property
    def models(self) -> dict[str, ModelSettings]:
        names = {run.model for run in self.runs.values()}
        return {name: self.config.models[name] for name in sorted(names)}

    @property
    def needs_gpu(self) -> bool:
        """A real model is trained and scored on a GPU; the demo's is small enough for a CPU."""
        return any(model.built_here is None for model in self.models.values())

    @property
    def n_gpus(self) -> int:
        """GPUs of this machine that one training job takes."""
        is_trained = any(
            run.is_trained and self.models[run.model].built_here is None
            for run in self.runs.values()
        )
        return self.config.training.gpus if is_trained else int(self.needs_gpu)

    @property
    def repositories(self) -> list[Repository]:
        """The repositories that the build will fetch; those in `results` are not fetched again."""
        found = []
        for name, model in self.models.items():
            is_there = (self.results / "models" / name / "checkpoint").exists()
            if model.source and not model.is_local and not is_there:
                found.append(
                    Repository(
                        "base model", model.source, model.revision, f"models.{name}.source", name
                    )
                )
        for name, run in self.runs.items():
            for kind, place, source in (
                ("adapter", "adapter", run.adapter),
                ("merged model", "merged", run.merged),
            ):
                is_there = (self.results / "runs" / name / place).exists()
                if source and not is_local(source) and not is_there:
                    found.append(Repository(kind, source, run.revision, f"runs.{name}.{place}"))
        for name in sorted({run.dataset for run in self.runs.values()}):
            for source, settings in self.config.datasets[name].all_sources.items():
                rows = self.results / "data" / name / "hub" / source / "rows.parquet"
                if settings.hub and not rows.exists():
                    found.append(
                        Repository(
                            "dataset", settings.hub, settings.revision, f"datasets.{name}.hub"
                        )
                    )
        return found


def read_config(overlays: Sequence[Path]) -> Config:
    """The config that Snakemake would build from the same `--configfile`.

    Raises:
        StageError: a file does not exist or is not YAML, or the config cannot be built.
    """
    paths = [*config_files.defaults(overlays), *overlays]
    return load_config(config_files.layered([config_files.read(path) for path in paths]))


def local_facts(wanted: Wanted) -> None:
    """Add the shapes and sizes of base models that are on this machine: from facts.json, else from
    a local folder."""
    for name, model in wanted.models.items():
        folder = wanted.results / "models" / name
        path = folder / "facts.json"
        checkpoint = folder / "checkpoint"
        if model.is_local and model.source:
            checkpoint = Path(model.source).expanduser()
        try:
            if path.is_file():
                facts = Facts.read(path)
                wanted.shapes[name], wanted.weight_bytes[name] = facts, facts.weight_bytes
            elif (checkpoint / "config.json").is_file():
                wanted.shapes[name] = read_shape(checkpoint, model.rope_scaling)
                wanted.weight_bytes[name] = weight_bytes(
                    {file.name: file.stat().st_size for file in checkpoint.iterdir()}
                )
        except StageError:
            continue  # its own stage reports what is wrong with it


def weight_bytes(sizes: Mapping[str, int]) -> int:
    """Size of a checkpoint's weights.

    Args:
        sizes: file name → bytes.
    """
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
