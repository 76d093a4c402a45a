"""Files of the user's as inputs: on this machine, or on storage, brought here as jobs need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts import urls
from workflow_scripts.chats import sources
from workflow_scripts.files import check_whole
from workflow_scripts.log import StageError
from workflow_scripts.merge import user_models
from workflow_scripts.orchestration.build import Build
from workflow_scripts.settings import is_local

Remote = Callable[[str], Any]


class UserFiles:
    """What the config names of the user's.

    Args:
        remote: a URL as Snakemake's input, by the storage plugin for it.
    """

    def __init__(self, build: Build, remote: Remote) -> None:
        self.build = build
        self.config = build.config
        self.remote = remote

    def look_for_all(self) -> None:
        """Look for what jobs will read, so that a file which is not there stops everything with its
        message alone. What is on storage is not asked for.

        Raises:
            WorkflowError: a file is missing, or something stands in for it.
        """
        for name in [*self.build.made_runs, *self.build.made_sweep_runs]:
            dataset = self.config.runs[name].dataset
            try:
                self.sources(dataset), self.held_out(dataset)
            except StageError as error:
                raise WorkflowError(f"datasets.{dataset}: {error}") from None
        for name in self.build.made_runs:
            try:
                self.of_beginning(name)
            except StageError as error:
                raise WorkflowError(f"runs.{name}: {error}") from None
        for text, name in self.config.evaluation.texts.items():
            if not urls.is_url(name):
                self.texts(f"evaluation.texts.{text}", [name])

    def input(self, name: str) -> Any:  # untyped: a path, or what a storage plugin makes of it
        """A file as an input.

        What stands in for a file is refused here, before any job: some are read after training."""
        if not urls.is_url(name):
            path = Path(name).expanduser()
            check_whole(path, may_be_empty=True)  # an empty one among many is right
            return str(path)
        urls.check_one_file(name)
        return self.remote(name)

    def texts(self, key: str, names: Iterable[str]) -> list[Any]:
        """Text files, which `key` of the config names, as inputs."""
        try:
            return [self.input(name) for name in names]
        except StageError as error:
            raise WorkflowError(f"{key}: {error}") from None

    def evaluation_text(self, wildcards: Wildcards) -> list[Any]:
        text = wildcards.text
        return self.texts(f"evaluation.texts.{text}", [self.config.evaluation.texts[text]])

    def context_texts(self) -> list[Any]:
        return self.texts("evaluation.context.files", self.config.evaluation.context.files)

    def calibration_texts(self) -> list[Any]:
        """Texts that the importance matrix is computed on beside the chats."""
        return self.texts("gguf.imatrix.files", self.config.gguf.imatrix.files)

    def tasks(self) -> list[str]:
        """Task files, with what lies beside them: data, and functions they name."""
        folder = self.config.evaluation.tasks.include
        if folder is None:
            return []
        found = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())
        found = [path for path in found if "__pycache__" not in path.parts]
        try:
            for path in found:
                check_whole(path, may_be_empty=True)
        except StageError as error:
            raise WorkflowError(f"evaluation.tasks.include: {error}") from None
        files = [str(path) for path in found]
        if not any(name.endswith((".yaml", ".yml")) for name in files):
            raise WorkflowError(
                "there is no task file\n"
                f"  where:    evaluation.tasks.include, {folder}\n"
                "  expected: a folder with YAML of lm-evaluation-harness"
            )
        return files

    def sources(self, dataset: str) -> dict[str, list[Any]]:
        """What each source of a dataset is read from: the user's files, what was fetched, or
        made."""
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
        """Evaluation files that training must not hold."""
        decontamination = self.config.datasets[dataset].cleaning.decontamination
        if not decontamination:
            return []
        return [self.input(file) for file in sources.expand(decontamination.files)]

    def of_dataset(self, wildcards: Wildcards) -> list[Any]:
        return [file for files in self.sources(wildcards.dataset).values() for file in files]

    def held_out_of_dataset(self, wildcards: Wildcards) -> list[Any]:
        return self.held_out(wildcards.dataset)

    def source_arguments(self, wildcards: Wildcards) -> list[str]:
        """`--source name file …` for every source; `--fetched` says where a URL's file lies
        here."""
        arguments: list[str] = []
        places: list[str] = []
        for name, files in self.sources(wildcards.dataset).items():
            arguments += ["--source", name, *map(name_of, files)]
            for file in files:
                if name_of(file) != file:
                    places += ["--fetched", name_of(file), str(file)]
        return [*arguments, *places]

    def of_beginning(self, run: str) -> list[str]:
        """The files of a run's adapter or merged model that lie on this machine already."""
        settings = self.config.runs[run]
        source = settings.adapter or settings.merged
        if source is None or not is_local(source):
            return []
        find = user_models.model_files if settings.merged else user_models.adapter_files
        return [str(path) for path in find(Path(source).expanduser())]


def name_of(file: Any) -> str:  # untyped: a path, or what a storage plugin makes of it
    """What the config calls an input: the URL of one that comes from storage."""
    on_storage = getattr(file, "flags", {}).get("storage_object")
    name: str = on_storage.query if on_storage else file
    return name
