"""The files that each target requests, and those that reports and releases gather."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts.handover import chain
from workflow_scripts.orchestration.build import Build
from workflow_scripts.orchestration.links import Links
from workflow_scripts.orchestration.user_files import Remote

TargetInput = Callable[[Wildcards], list[str]]


class Targets:
    """Inputs of the targets in the Snakefile, and of the rules that gather files."""

    def __init__(self, build: Build, links: Links, remote: Remote) -> None:
        self.build = build
        self.config = build.config
        self.links = links
        self.remote = remote

    # --- checks before the first job ---

    def disk_plan(self) -> list[str]:
        """The check of disk space, before anything large is made."""
        return ["results/disk_plan.json"] if self.build.made_runs else []

    def quantization_plans(self) -> TargetInput:
        """For a target that makes GGUFs: the types that llama.cpp will give their tensors. Stops
        before the first job if GGUF cannot represent a model."""

        def plans(wildcards: Wildcards) -> list[str]:
            for name in self.build.models:
                scaling = self.config.models[name].rope_scaling
                if scaling and scaling.type == "dynamic":
                    raise WorkflowError(
                        "GGUF has no form of dynamic NTK\n"
                        f"  where:    models.{name}.rope_scaling.type\n"
                        "  expected: linear or yarn\n"
                        "  to fix:   use yarn, or build the target `train`, which makes no GGUFs"
                    )
            return _each("results/models/{}/quantization_plan.json", self.build.models)

        return plans

    def held_out(self, *splits: str, runs: Iterable[str] | None = None) -> TargetInput:
        """For a target that scores some runs on these splits: stops before the first job if the
        config holds out no share for one. Requests no file. A share that gives no conversation is
        noticed when chats are rendered."""
        scored = list(self._made(runs))

        def check(wildcards: Wildcards) -> list[str]:
            for name, split in itertools.product(scored, splits):
                dataset = self.config.runs[name].dataset
                if not getattr(self.config.datasets[dataset].cleaning, f"{split}_fraction"):
                    raise WorkflowError(_nothing_held_out(name, dataset, split))
            return []

        return check

    def recipe_checks(self, runs: Iterable[str] | None = None) -> list[str]:
        """The checks, before chats are packed, that the recipes of some runs fit their models."""
        made = [self.config.runs[name] for name in self._made(runs)]
        return sorted(
            {
                f"results/models/{run.model}/recipes/{run.recipe}_check.json"
                for run in made
                if run.is_trained
            }
        )

    # --- data and training ---

    def _packing_folders(self) -> set[str]:
        return {
            f"results/data/{run.dataset}/{run.model}/{run.packing}"
            for run in self.build.made_runs.values()
            if run.is_trained
        }

    def data(self) -> list[str]:
        """The gate of every run's tokens, and the packing plans of trained runs."""
        checks = {
            f"results/data/{run.dataset}/{run.model}/tokens/check.json"
            for run in self.build.made_runs.values()
        }
        return sorted(checks | {f"{folder}/plan.parquet" for folder in self._packing_folders()})

    def preview(self) -> list[str]:
        """The pages about the data: what cleaning kept and why, conversations as tokens, and how
        they are packed."""
        cleaned = {
            f"results/data/{run.dataset}/clean/cleaning_report.html"
            for run in self.build.made_runs.values()
        }
        packed = {
            f"{folder}/{page}"
            for folder in self._packing_folders()
            for page in ("preview.html", "packing.html")
        }
        return sorted(cleaned | packed)

    def built_trained_runs(self) -> list[str]:
        return [name for name, run in self.build.runs.items() if run.is_trained]

    def made_trained_runs(self) -> list[str]:
        return [name for name, run in self.build.made_runs.items() if run.is_trained]

    def adapters(self) -> list[str]:
        return _each("results/runs/{}/adapter/adapter_model.safetensors", self.made_trained_runs())

    # --- merged models and GGUFs ---

    def exported(self) -> list[str]:
        runs = self.build.made_runs
        return [
            *_each("results/runs/{}/merged_check.json", runs),
            *_each("results/runs/{}/gguf_check.json", runs),
            *(
                f"results/runs/{run}/gguf/{run}-{kind}.gguf"
                for run in runs
                for kind in self.build.gguf_types
            ),
            *(_each("results/runs/{}/awq", runs) if self.config.awq.use else []),
        ]

    def adapter_ggufs(self) -> list[str]:
        """GGUF LoRAs of the runs that have an adapter, and F16 GGUFs of their base models."""
        recipes = self.config.recipes
        runs = {
            name: run
            for name, run in self.build.made_runs.items()
            if run.adapter or (run.recipe and recipes[run.recipe].method != "full")
        }
        bases = sorted({run.model for run in runs.values()})
        return [
            *(f"results/runs/{run}/gguf/{run}-adapter.gguf" for run in runs),
            *(f"results/models/{model}/gguf/{model}-F16.gguf" for model in bases),
        ]

    def merge_base_choice(self, wildcards: Wildcards) -> list[str]:
        """The file of `choose_merge_base`, for runs with `merge_base: auto`."""
        if self.config.runs[wildcards.run].merge_base != "auto":
            return []
        return [f"results/runs/{wildcards.run}/merge_base.json"]

    def imatrix(self, wildcards: Wildcards) -> list[str]:
        """The importance matrix, for a quantization that uses it."""
        if not self.config.gguf.uses_imatrix(wildcards.quant):
            return []
        return [f"results/runs/{wildcards.run}/gguf/imatrix.gguf"]

    # --- measurements ---

    def token_scores(self, runs: Iterable[str]) -> list[str]:
        """The loss of every token, for every link of some runs."""
        return self.links.files_of(runs, lambda link: [link.token_scores])

    def text_scores(self, runs: Iterable[str] | None = None) -> list[str]:
        """Scores on the texts that the config names."""
        return self.links.files_of(self._made(runs), lambda link: link.texts.values())

    def evaluations(self, runs: Iterable[str] | None = None) -> list[str]:
        """Scores, speed and divergence of every link of some runs."""
        names = list(self._made(runs))
        evaluation = self.config.evaluation
        return [
            *self.links.files_of(names, lambda link: [link.scores, link.speed, link.divergence]),
            *(self.contexts(names) if evaluation.context.use else []),
            *(self.task_scores(names) if evaluation.tasks.use else []),
        ]

    def contexts(self, runs: Iterable[str] | None = None) -> list[str]:
        """Usable context of the links that it is measured for."""
        measured = self.links.context_links
        return self.links.files_of(
            self._shown(runs), lambda link: [link.context if link.name in measured else None]
        )

    def task_scores(self, runs: Iterable[str] | None = None) -> list[str]:
        """Scores in tasks, with the scores of every document."""
        measured, kinds = self.links.task_links, self.links.task_kinds
        scores = self.links.files_of(
            self._shown(runs),
            lambda link: [link.tasks.get(kind) for kind in kinds if link.name in measured],
        )
        return scores + [chain.samples_beside(file) for file in scores]

    def answers(self) -> list[str]:
        return self.links.files_of(self.build.runs, lambda link: [link.answers])

    def sampled_runs(self) -> list[str]:
        """The runs whose answers the overview shows."""
        return list(self.build.made_runs) if self.config.evaluation.samples.use else []

    def overview_answers(self) -> list[str]:
        shown = self.links.sample_links
        return self.links.files_of(
            self.sampled_runs(), lambda link: [link.answers if link.name in shown else None]
        )

    def _made(self, runs: Iterable[str] | None) -> Iterable[str]:
        return self.build.made_runs if runs is None else runs

    def _shown(self, runs: Iterable[str] | None) -> Iterable[str]:
        return self.build.runs if runs is None else runs

    # --- reports ---

    def chains(self) -> list[str]:
        return _each("results/runs/{}/chain.json", self.build.runs)

    def metrics(self) -> list[str]:
        return _each("results/runs/{}/metrics.json", self.build.runs)

    def context_pages(self) -> list[str]:
        return _each("results/report/context.{}", ["tsv", "md", "html"])

    def task_pages(self) -> list[str]:
        return _each("results/report/tasks.{}", ["tsv", "md", "html"])

    def data_reports(self, run: str) -> list[str]:
        """The counts of a run's conversations and, if it is trained here, of its rows."""
        of_run = self.links.chain(run)
        return [of_run.cleaning_report, *_there(of_run.packing_report)]

    def training_files(self, run: str) -> list[str]:
        """The files for the training plots on a run's page, if it is trained here."""
        of_run = self.links.chain(run)
        return _there(of_run.history, of_run.training_manifest, of_run.memory_plan)

    def training_reports(self, run: str) -> list[str]:
        """The reports on a run's rows and training, if it is trained here."""
        of_run = self.links.chain(run)
        return _there(of_run.packing_report, of_run.training_manifest)

    def report(self) -> list[str]:
        evaluation = self.config.evaluation
        return [
            "results/report/overview.html",
            "results/report/all_metrics.parquet",
            *_each("results/runs/{}/report.html", self.build.made_runs),
            *_each("results/report/comparison.{}", ["tsv", "md", "html"]),
            *_each("results/report/chain.{}", ["tsv", "md", "html", "svg"]),
            *(["results/report/loss.svg"] if self.built_trained_runs() else []),
            *(self.context_pages() if evaluation.context.use else []),
            *(self.task_pages() if evaluation.tasks.use else []),
        ]

    def releases(self, runs: Iterable[str] | None = None) -> list[str]:
        return _each("results/runs/{}/release", self._made(runs))

    def stored(self, wildcards: Wildcards) -> list[Any]:
        """SHA256SUMS of every release on storage."""
        folder = self.config.storage.releases
        if not folder:
            raise WorkflowError(
                "the config names no storage for releases\n"
                "  where:    storage.releases\n"
                "  expected: a folder on storage, such as s3://bucket/folder"
            )
        return [self.remote(f"{folder}/{run}/SHA256SUMS") for run in self.build.runs]

    def experiment(self) -> list[str]:
        """For an overlay in `config/experiments/`: its runs, trained and compared; no export."""
        return _each("results/report/experiment.{}", ["tsv", "md", "html", "svg"])

    def sweep(self, wildcards: Wildcards) -> list[str]:
        """For the sweeps in `runs`: every combination, trained, scored on validation and ranked."""
        if not self.build.sweeps.runs:
            raise WorkflowError(
                "no run of this config is a sweep\n"
                "  where:    runs.<name>.recipe\n"
                "  to fix:   see config/sweeps/learning_rate.yaml: a recipe with"
                " `sweep: true` and a list of values"
            )
        return _each("results/report/sweep.{}", ["tsv", "md", "html", "svg"])


def _each(pattern: str, names: Iterable[str]) -> list[str]:
    """A path for each name."""
    return [pattern.replace("{}", name) for name in names]


def _there(*files: str | None) -> list[str]:
    return [file for file in files if file]


def _nothing_held_out(name: str, dataset: str, split: str) -> str:
    ways_out = {
        "validation": "`snakemake train` scores nothing afterwards",
        "test": "`snakemake export` needs no test split",
    }
    return (
        f"nothing is held out for {split}, but this build scores runs.{name} on it\n"
        f"  where:    datasets.{dataset}.cleaning.{split}_fraction\n"
        "  found:    0\n"
        "  expected: a share above 0, of at least 20 conversations\n"
        f"  to fix:   set {split}_fraction: 0.05 for some hundred conversations, 0.2 for fewer; or"
        f" build less: {ways_out[split]}"
    )
