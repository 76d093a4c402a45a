"""The user's files as inputs: on this machine, or on storage and fetched when a job needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts import urls
from workflow_scripts.chats import sources
from workflow_scripts.files import check_whole
from workflow_scripts.merge import user_models
from workflow_scripts.orchestration.build import Build, stopping
from workflow_scripts.settings import is_local

Remote = Callable[[str], Any]


class UserFiles:
    """The files that the config names.

    Args:
        remote: turns a URL into an input, by its storage plugin.
    """

    def __init__(self, build: Build, remote: Remote) -> None:
        self.build = build
        self.config = build.config
        self.remote = remote

    def look_for_all(self) -> None:
        """Look for the files that jobs will read, so that a missing one stops Snakemake before the
        first job. Storage is not asked.

        Raises:
            WorkflowError: a file is missing, or is a placeholder for the real one.
        """
        for name in [*self.build.made_runs, *self.build.made_sweep_runs]:
            dataset = self.config.runs[name].dataset
            with stopping(f"datasets.{dataset}"):
                self.sources(dataset), self.held_out(dataset)
        for name in self.build.made_runs:
            with stopping(f"runs.{name}"):
                self.of_beginning(name)
        for text, name in self.config.evaluation.texts.items():
            if not urls.is_url(name):
                self.texts(f"evaluation.texts.{text}", [name])

    def input(self, name: str) -> Any:  # untyped: a path, or what a storage plugin makes of it
        """A file as an input.

        Placeholders (a Git LFS pointer, a web page) are refused here, before any job: some files
        are read only after training."""
        if not urls.is_url(name):
            path = Path(name).expanduser()
            check_whole(path, may_be_empty=True)  # one of many may be empty
            return str(path)
        urls.check_one_file(name)
        return self.remote(name)

    def texts(self, key: str, names: Iterable[str]) -> list[Any]:
        """Text files as inputs.

        Args:
            key: the key of the config that names them.
        """
        with stopping(key):
            return [self.input(name) for name in names]

    def evaluation_text(self, wildcards: Wildcards) -> list[Any]:
        text = wildcards.text
        return self.texts(f"evaluation.texts.{text}", [self.config.evaluation.texts[text]])

    def context_texts(self) -> list[Any]:
        return self.texts("evaluation.context.files", self.config.evaluation.context.files)

    def calibration_texts(self) -> list[Any]:
        """Texts that the importance matrix is computed on, besides the chats."""
        return self.texts("gguf.imatrix.files", self.config.gguf.imatrix.files)

    def tasks(self) -> list[str]:
        """Task files and the other files of their folder: data, and functions that tasks name."""
        folder = self.config.evaluation.tasks.include
        if folder is None:
            return []
        files = [
            str(path)
            for path in sorted(Path(folder).expanduser().rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        ]
        with stopping("evaluation.tasks.include"):
            for name in files:
                check_whole(Path(name), may_be_empty=True)
        if not any(name.endswith((".yaml", ".yml")) for name in files):
            raise WorkflowError(
                "there is no task file\n"
                f"  where:    evaluation.tasks.include, {folder}\n"
                "  expected: a folder with YAML files of lm-evaluation-harness"
            )
        return files

    def sources(self, dataset: str) -> dict[str, list[Any]]:
        """Source → files of a dataset: the user's, fetched from the Hub, or generated."""
        settings = self.config.datasets[dataset]
        if settings.generate:
            return {"demo": [f"results/data/{dataset}/source/conversations.jsonl"]}
        return {
            name: (
                [f"results/data/{dataset}/hub/{name}/rows.parquet"]
                if source.hub
                else [self.input(file) for file in sources.expand(source.files or ())]
            )
            for name, source in settings.all_sources.items()
        }

    def held_out(self, dataset: str) -> list[Any]:
        """Evaluation files whose text must not be in the training data."""
        decontamination = self.config.datasets[dataset].cleaning.decontamination
        if not decontamination:
            return []
        return [self.input(file) for file in sources.expand(decontamination.files)]

    def of_dataset(self, wildcards: Wildcards) -> list[Any]:
        return [file for files in self.sources(wildcards.dataset).values() for file in files]

    def held_out_of_dataset(self, wildcards: Wildcards) -> list[Any]:
        return self.held_out(wildcards.dataset)

    def source_arguments(self, wildcards: Wildcards) -> list[str]:
        """`--source name file …` for every source; `--fetched` gives the local path of a URL."""
        arguments: list[str] = []
        places: list[str] = []
        for name, files in self.sources(wildcards.dataset).items():
            arguments += ["--source", name, *map(name_of, files)]
            for file in files:
                if name_of(file) != file:
                    places += ["--fetched", name_of(file), str(file)]
        return [*arguments, *places]

    def of_beginning(self, run: str) -> list[str]:
        """The files of a run's adapter or merged model, if they are on this machine."""
        settings = self.config.runs[run]
        source = settings.adapter or settings.merged
        if source is None or not is_local(source):
            return []
        find = user_models.model_files if settings.merged else user_models.adapter_files
        return [str(path) for path in find(Path(source).expanduser())]


def name_of(file: Any) -> str:  # untyped: a path, or what a storage plugin makes of it
    """The name of an input in the config: its path, or its URL if it is on storage."""
    on_storage = getattr(file, "flags", {}).get("storage_object")
    name: str = on_storage.query if on_storage else file
    return name
