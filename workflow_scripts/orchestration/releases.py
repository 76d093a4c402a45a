"""Releases as Snakemake sees them: what they are made from, frozen ones, and storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts.log import StageError
from workflow_scripts.orchestration.build import Build
from workflow_scripts.orchestration.params import Params
from workflow_scripts.orchestration.user_files import Remote
from workflow_scripts.release import frozen, stored_release


class Releases:
    """What the rules of releases share.

    Args:
        remote: a URL as Snakemake's input or output, by the storage plugin for it.
    """

    def __init__(self, build: Build, params: Params, remote: Remote) -> None:
        self.build = build
        self.config = build.config
        self.params = params
        self.remote = remote

    def check_frozen(self) -> None:
        """The frozen runs that this build shows are what the config says now: else reports would
        say of them what is not so.

        Raises:
            WorkflowError: one was made with other settings.
        """
        for name in self.build.runs.keys() - self.build.made_runs.keys():
            settings = self.build.runs[name].model_dump()
            resolved = json.loads(self.params.release(name))
            try:
                frozen.check(name, settings, resolved, Path(f"results/runs/{name}/release"))
            except StageError as error:
                raise WorkflowError(str(error)) from None

    def beginning(self, wildcards: Wildcards) -> str:
        """Of a run: the manifest of its training, or where else its model came from."""
        run = wildcards.run
        if run in self.build.merged_runs:
            return f"results/runs/{run}/merged"
        name = "source.json" if run in self.build.adapter_runs else "training_manifest.json"
        return f"results/runs/{run}/adapter/{name}"

    def ggufs(self, wildcards: Wildcards) -> list[str]:
        run = wildcards.run
        return [f"results/runs/{run}/gguf/{run}-{kind}.gguf" for kind in self.build.released_types]

    def dataset(self, wildcards: Wildcards) -> list[str]:
        folder = f"results/data/{self.config.runs[wildcards.run].dataset}/clean"
        return [f"{folder}/{split}.parquet" for split in ("train", "validation", "test")]

    def stored_sums(self) -> object:
        """SHA256SUMS of a run's release on storage; where the config names none, a file no one asks
        for."""
        folder = self.config.storage.releases
        try:
            sums: object = self.remote(f"{folder}/{{run}}/SHA256SUMS") if folder else None
        except StageError as error:
            raise WorkflowError(f"storage.releases: {error}") from None
        return sums or "results/runs/{run}/SHA256SUMS"

    def store(self, run: str, release: str, sums: str, log_file: str) -> None:
        """Send a run's release, all but SHA256SUMS, which is left for Snakemake to send."""
        with open(log_file, "w", encoding="utf-8") as stream:

            def say(line: str) -> None:
                print(line, file=stream, flush=True)

            try:
                stored_release.send(
                    Path(release),
                    f"{self.config.storage.releases}/{run}",
                    Path(f"results/runs/{run}/stored.json"),
                    lambda url: self.remote(url).flags["storage_object"],
                    say,
                )
            except (StageError, WorkflowError) as error:
                say(str(error))
                raise WorkflowError(str(error)) from None
        shutil.copyfile(Path(release, "SHA256SUMS"), sums)
