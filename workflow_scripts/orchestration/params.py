"""The settings that stages get, as JSON: only the parts of the config that change their output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from snakemake.iocontainers import InputFiles, Wildcards

from workflow_scripts.orchestration import shared_cache
from workflow_scripts.orchestration.build import Build
from workflow_scripts.quantize import attribution
from workflow_scripts.settings import RUN_TABLES, ReadingSettings


class Params:
    """Functions for the `params:` of rules."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.config = build.config

    def entry(self, table: str, name: str, *keys: str) -> str:
        """An entry of a table, or its part below `keys`."""
        settings: Any = self.config.entry(table, name)
        for key in keys:
            settings = getattr(settings, key)
        text: str = settings.model_dump_json()
        return text

    # --- models ---

    def base_model(self, wildcards: Wildcards) -> str:
        """The source of a base model. How its tokenizer is read must not fetch it again."""
        return self.config.models[wildcards.model].model_dump_json(include={"source", "revision"})

    def local_model_hashes(self, wildcards: Wildcards, resources: object) -> Mapping[str, str]:
        """Hashes of the files in a local folder. Like the versions of packages, only for the key of
        `--cache`."""
        if not self.build.is_shared:
            return {}
        source = self.config.models[wildcards.model].source
        assert source is not None  # only local models have this param
        return shared_cache.content_of(Path(source).expanduser())

    def versions_of(self, *packages: str) -> Callable[..., Mapping[str, str | None]]:
        """Versions of packages that a shared file depends on. The function takes `resources`, so
        that the versions count only in the key of `--cache` and re-run nothing."""

        def versions(wildcards: Wildcards, resources: object) -> Mapping[str, str | None]:
            return shared_cache.versions(packages) if self.build.is_shared else {}

        return versions

    def tokenizer_version(self, wildcards: Wildcards) -> list[str]:
        """`--version`, if the config gives it; otherwise the checkpoint's own files do."""
        version = self.config.models[wildcards.model].tokenizer_version
        return ["--version", version] if version else []

    def facts_arguments(self, wildcards: Wildcards) -> list[str]:
        """Arguments for facts that the config sets in place of the checkpoint's own files."""
        scaling = self.config.models[wildcards.model].rope_scaling
        rope = ["--rope-scaling", scaling.model_dump_json()] if scaling else []
        return self.tokenizer_version(wildcards) + rope

    # --- chats ---

    def cleaning(self, wildcards: Wildcards) -> str:
        """The settings that cleaning a dataset depends on: the cleaning table, and each source's
        format, columns and weight."""
        dataset = self.config.datasets[wildcards.dataset]
        return json.dumps(
            {
                "cleaning": dataset.cleaning.model_dump(),
                "sources": {
                    name: source.model_dump(include=set(ReadingSettings.model_fields))
                    for name, source in dataset.all_sources.items()
                    if not dataset.generate
                },
            }
        )

    def hub_source(self, wildcards: Wildcards) -> str:
        """The dataset on the Hub that a source names. How it is read belongs to `cleaning`."""
        source = self.config.datasets[wildcards.dataset].all_sources[wildcards.source]
        return source.model_dump_json(include={"hub", "revision", "subset", "split"})

    # --- training and merging ---

    def recipe(self, wildcards: Wildcards) -> str:
        """The recipe of a run that is trained."""
        return self.entry("recipes", self._recipe(wildcards.run))

    def training(self, resources: Any, n_nodes: int = 1) -> str:
        """The table `training`, with the number of GPUs per node that the job was given, as a
        profile may have fewer. Without GPU slots, the table's own number of processes stays."""
        gpus = resources.gpu // n_nodes or self.config.training.gpus
        return self.config.training.model_copy(update={"gpus": gpus}).model_dump_json()

    def beginning(self, wildcards: Wildcards) -> str:
        """The settings that fetching a run's adapter or merged model depends on."""
        return self.config.runs[wildcards.run].model_dump_json(
            include={"model", "dataset", "adapter", "merged", "revision"}
        )

    def merge_base(self, wildcards: Wildcards, input: InputFiles) -> str:
        """`--merge-base`: the base that the config names, or the file with the measured choice."""
        base: str = input.choice or self.config.runs[wildcards.run].merge_base
        return base

    def merged_adapter(self, wildcards: Wildcards, input: InputFiles) -> list[str]:
        """Arguments of the gate: the adapter, the precision it was trained in, the merge base."""
        return [
            "--adapter",
            str(Path(input.adapter).parent),
            "--precision",
            self.config.trained_precision(wildcards.run),
            "--merge-base",
            self.merge_base(wildcards, input),
        ]

    # --- GGUF ---

    def imatrix(self) -> str:
        """The keys of `gguf.imatrix` that change the matrix, not those that say who uses it."""
        return self.config.gguf.imatrix.model_dump_json(include={"n_tokens"})

    def quantizations(self) -> str:
        """The keys of `gguf` that decide the types of tensors."""
        return self.config.gguf.model_dump_json(
            include={"mixes": True, "quantizations": True, "imatrix": {"use"}}
        )

    def mix(self, wildcards: Wildcards) -> str:
        return self.config.gguf.mix(wildcards.quant).model_dump_json()

    def disk(self) -> str:
        """The settings that the large files of a build depend on."""
        gguf = self.config.gguf.model_dump(include={"mixes", "quantizations"})
        runs = {name: run.model for name, run in self.build.made_runs.items()}
        return json.dumps({"runs": runs, "gguf": gguf, "awq": self.config.awq.use})

    def published(self, run: str) -> str:
        """Sources that a run's files and model card name."""
        settings = self.config.runs[run]
        model, dataset = self.config.models[settings.model], self.config.datasets[settings.dataset]
        return json.dumps(
            attribution.published(settings, model, dataset, self.config.gguf.quantized_by)
        )

    def release(self, run: str) -> str:
        """The resolved config of a run for its release: the settings that change one of its files
        or figures. Those of previews and of timing do not."""
        settings = self.config.runs[run]
        entries: dict[str, Any] = {
            field: json.loads(self.entry(table, getattr(settings, field)))
            for field, table in RUN_TABLES.items()
            if getattr(settings, field)
        }
        entries["dataset"].pop("preview")
        if self.config.awq.use:
            entries["awq"] = self.config.awq.model_dump()
        entries["gguf"] = self.config.gguf.model_dump()
        entries["evaluation"] = json.loads(self.scoring())
        return json.dumps(entries)

    # --- evaluation and reports ---

    def scoring(self) -> str:
        """The keys of `evaluation` that change a score, without gates and timing."""
        return self.config.evaluation.model_dump_json(
            include={"piece_tokens", "full_length", "max_conversations"}
        )

    def positions(self) -> str:
        return self.config.evaluation.model_dump_json(include={"max_conversations"})

    def texts(self) -> str:
        return self.config.evaluation.model_dump_json(include={"text_context_tokens"})

    def context(self) -> str:
        """The settings that change the answers on long texts."""
        return self.config.evaluation.context.model_dump_json(exclude={"files", "of_merged", "use"})

    def samples(self) -> str:
        """The settings that change the sample answers."""
        return self.config.evaluation.samples.model_dump_json(exclude={"use"})

    def tasks(self) -> str:
        """The settings that change a score of lm-evaluation-harness."""
        return self.config.evaluation.tasks.model_dump_json(exclude={"use", "max_answer_tokens"})

    def task_data(self) -> str:
        return self.config.evaluation.tasks.model_dump_json(include={"names", "include"})

    def references(self) -> str:
        """The settings that change a score of reference answers."""
        return self.config.evaluation.tasks.model_dump_json(include={"limit", "max_answer_tokens"})

    def experiment(self) -> str:
        """The settings of every trained run in `build`; the report finds arms and seeds in them."""
        return json.dumps(
            {
                name: {"model": run.model, "dataset": run.dataset}
                | {
                    table: json.loads(self.entry(f"{table}s", getattr(run, table)))
                    for table in ("packing", "recipe")
                }
                for name, run in self.build.runs.items()
                if run.is_trained
            }
        )

    def sweeps(self) -> str:
        """Every sweep: its recipe, and the swept values of each run."""
        recipes = self.build.sweeps.recipes
        return json.dumps(
            {
                sweep: {
                    "recipe": recipes[self._recipe(runs[0])].recipe,
                    "runs": {name: self._swept_values(name) for name in runs},
                }
                for sweep, runs in self.build.sweeps.runs.items()
            }
        )

    def _recipe(self, run: str) -> str:
        recipe = self.config.runs[run].recipe
        assert recipe is not None
        return recipe

    def _swept_values(self, run: str) -> dict[str, Any]:  # untyped: values of any recipe key
        """The swept keys of a run, with validated values: `2e-4` is a number."""
        recipe = self._recipe(run)
        settings = self.config.recipes[recipe].model_dump(mode="json")
        return {key: settings[key] for key in self.build.sweeps.recipes[recipe].values}
