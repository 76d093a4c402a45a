"""Releases for Snakemake: their inputs, frozen runs, and storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

from workflow_scripts.log import StageError
from workflow_scripts.orchestration.build import Build, stopping
from workflow_scripts.orchestration.params import Params
from workflow_scripts.orchestration.user_files import Remote
from workflow_scripts.release import frozen, stored_release


class Releases:
    """Input functions of the rules that make and send releases.

    Args:
        remote: turns a URL into an input or output, by its storage plugin.
    """

    def __init__(self, build: Build, params: Params, remote: Remote) -> None:
        self.build = build
        self.config = build.config
        self.params = params
        self.remote = remote

    def check_frozen(self) -> None:
        """Check that the frozen runs of this build were made with the settings of the config;
        otherwise reports would describe them wrongly.

        Raises:
            WorkflowError: a run was made with other settings.
        """
        for name in self.build.runs.keys() - self.build.made_runs.keys():
            with stopping():
                frozen.check(
                    name,
                    self.build.runs[name].model_dump(),
                    json.loads(self.params.release(name)),
                    Path(f"results/runs/{name}/release"),
                )

    def beginning(self, wildcards: Wildcards) -> str:
        """The file that says where a run's model comes from: the manifest of its training, or the
        source of what the user gave."""
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
        """SHA256SUMS of a run's release on storage; without storage, a path that nothing
        requests."""
        folder = self.config.storage.releases
        if not folder:
            return "results/runs/{run}/SHA256SUMS"
        with stopping("storage.releases"):
            return self.remote(f"{folder}/{{run}}/SHA256SUMS")

    def store(self, run: str, release: str, sums: str, log_file: str) -> None:
        """Send a run's release, except SHA256SUMS, which Snakemake sends after this."""
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
