"""The whole config: its tables, what must agree between them, and how it is read."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from workflow_scripts.settings import sweeps
from workflow_scripts.settings.datasets import DatasetSettings
from workflow_scripts.settings.errors import SettingsError, describe, did_you_mean
from workflow_scripts.settings.evaluation import EvaluationSettings
from workflow_scripts.settings.export import (
    AwqSettings,
    GgufSettings,
    PushSettings,
    RetentionSettings,
    StorageSettings,
)
from workflow_scripts.settings.fields import Count, Name, Settings
from workflow_scripts.settings.models import ModelSettings
from workflow_scripts.settings.runs import RunSettings
from workflow_scripts.settings.training import PackingSettings, RecipeSettings, TrainingSettings

Table = TypeVar("Table", bound=Settings)


class Config(Settings):
    """The whole config: four tables, the runs that combine them, and what to build."""

    models: dict[Name, ModelSettings] = {}
    """Base models by name."""
    datasets: dict[Name, DatasetSettings] = {}
    """Chat datasets by name."""
    packings: dict[Name, PackingSettings] = {}
    """Packing policies by name."""
    recipes: dict[Name, RecipeSettings] = {}
    """Training recipes by name."""
    runs: dict[Name, RunSettings] = {}
    """A run trains one model on one dataset with one packing and one recipe."""
    training: TrainingSettings = TrainingSettings()
    """How training runs on this machine."""
    build: Annotated[list[str], Field(min_length=1)]
    """Names of the runs to build. In an overlay this list replaces the one before."""
    frozen: list[str] = []
    """Runs whose files are final, by name or pattern (`rates-*`). Reports show them, and no job
    makes their files again, whatever changes."""
    gguf: GgufSettings = GgufSettings()
    """GGUF files."""
    retention: RetentionSettings = RetentionSettings()
    """Large intermediate files."""
    awq: AwqSettings = AwqSettings()
    """AWQ, besides the GGUFs."""
    push: PushSettings = PushSettings()
    """Releases on the Hub."""
    storage: StorageSettings = StorageSettings()
    """Releases on storage."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Measurements and gates."""
    max_steps: Count | None = None
    """Limit on the steps of every training, the healing of the demo's base included, to try a
    config quickly; null is no limit."""

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        problems = []
        for run_name, named in self.runs.items():
            for field, table in RUN_TABLES.items():
                entry, known = getattr(named, field), getattr(self, table)
                if entry is not None and entry not in known:
                    remedy = (
                        did_you_mean(entry, known) if known else NO_ENTRY.get(table, "it is empty")
                    )
                    problems.append(
                        f"runs.{run_name}.{field}: found {entry!r}, which is not in `{table}`"
                        f" ({remedy})"
                    )
        for run_name in self.build:
            if run_name not in self.runs:
                problems.append(
                    f"build: found {run_name!r}, which is not in `runs`"
                    f" ({did_you_mean(run_name, self.runs)})"
                )
        for pattern in self.frozen:
            if not fnmatch.filter(self.runs, pattern):
                problems.append(
                    f"frozen: found {pattern!r}, which is not a run and matches none"
                    f" ({did_you_mean(pattern, self.runs)})"
                )
        if len(set(self.build)) != len(self.build):
            problems.append("build: a run is named twice")
        for run_name in self.build:
            run = self.runs.get(run_name)
            if run and run.merge_base != "original" and self._trained_in(run) != "nf4":
                reason = (
                    f"recipes.{run.recipe}.method is {self.recipes[run.recipe].method!r}, whose"
                    if run.recipe in self.recipes
                    else f"runs.{run_name}.precision is {run.precision!r}: its"
                )
                problems.append(
                    f"runs.{run_name}.merge_base: found {run.merge_base!r}, expected 'original':"
                    f" {reason} base has no 4-bit weights"
                )
            packing = run and self.packings.get(run.packing or "")
            model = run and self.models.get(run.model)
            if run and packing and model and model.built_here:
                context, scaling = model.built_here.context_tokens, model.rope_scaling
                if scaling:
                    context = int((scaling.original_context_tokens or context) * scaling.factor)
                if packing.row_tokens > context:
                    how = "transplant" if model.transplant else "generate"
                    problems.append(
                        f"packings.{run.packing}.row_tokens: found {packing.row_tokens}, expected"
                        f" at most models.{run.model}.{how}.context_tokens"
                        f"{' × rope_scaling.factor' if scaling else ''} ({context})"
                    )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def is_frozen(self, run_name: str) -> bool:
        """True if `frozen` names a run."""
        return any(fnmatch.fnmatchcase(run_name, pattern) for pattern in self.frozen)

    def trained_precision(self, run_name: str) -> str:
        """Precision of a run's base in training: `native` (16 bits), `int8` or `nf4`."""
        return self._trained_in(self.runs[run_name])

    def _trained_in(self, run: RunSettings) -> str:
        recipe = self.recipes.get(run.recipe or "")
        if recipe is None:
            return run.precision
        return {"qlora": "nf4", "lora_int8": "int8"}.get(recipe.method, "native")

    def entry(self, table: str, name: str) -> Settings:
        """An entry of one of the four tables, limited by `max_steps`.

        Args:
            table: `models`, `datasets`, `packings` or `recipes`.
        Raises:
            KeyError: the table has no such name.
        """
        entry: Settings = getattr(self, table)[name]
        if self.max_steps is None:
            return entry
        if isinstance(entry, RecipeSettings):
            limit = min(self.max_steps, entry.max_steps or self.max_steps)
            return entry.model_copy(update={"max_steps": limit})
        if isinstance(entry, ModelSettings) and entry.transplant is not None:
            limit = min(self.max_steps, entry.transplant.n_healing_steps)
            transplant = entry.transplant.model_copy(update={"n_healing_steps": limit})
            return entry.model_copy(update={"transplant": transplant})
        return entry


NO_ENTRY = {
    "models": "name a model's file before yours: --configfile config/models/mistral-7b-v0.3.yaml"
    " my-data.yaml, or config/demo.yaml my-data.yaml for the demo's model",
    "datasets": "no dataset is named; config/own-data.yaml shows how",
}
"""Remedy for a name in a table that has no entry."""
RUN_TABLES = {"model": "models", "dataset": "datasets", "packing": "packings", "recipe": "recipes"}


def load_config(config: Mapping[str, Any]) -> Config:  # untyped: as YAML gave it
    """Validate a whole config, after each sweep is expanded into its recipes and runs.

    Raises:
        SettingsError: one message that lists every problem by its key's path.
    """
    what = "the config cannot be built"
    expanded = sweeps.expand(config)
    if expanded.problems:
        raise SettingsError("\n  ".join([what, *expanded.problems]))
    return _validated(Config, expanded.config, what, expanded.recipes)


def settings_from_json(table: type[Table], text: str) -> Table:
    """Parse the `--settings` of a stage.

    Raises:
        SettingsError: the text is not JSON, or does not fit `table`.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError("--settings is not JSON", found=text, to_fix=str(error)) from error
    return _validated(table, content, "--settings cannot be used")


def _validated(
    table: type[Table],
    content: object,
    what: str,
    swept: Mapping[str, sweeps.Combination] = MappingProxyType({}),
) -> Table:
    try:
        return table.model_validate(content)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in describe(table, problem, swept)]
        # A wrong value of a sweep is in many expanded recipes; one line is enough.
        raise SettingsError("\n  ".join([what, *dict.fromkeys(lines)])) from error
