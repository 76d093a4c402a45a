"""Gates: the settings that a gate passed with, and whether its verdict is still valid.

A changed tolerance must run its gate again and nothing else. So downstream rules take the verdict
as `ancient()`, and the gate writes it with `update()`, which keeps the file in place while the gate
runs. With these two flags alone, a failed gate would be ignored (Snakemake 9.27):

- Snakemake records the params of failed jobs too, and `update()` restores the previous verdict. The
  next start would find nothing to do for the gate and run the downstream jobs. So a gate has a
  second output, `.passed`, which a failed job loses, and a param that changes as long as that file
  is missing.
- Snakemake does not examine the jobs downstream of a job that runs: it assumes that their inputs
  will change, but `ancient()` inputs do not. A quantization that was added in the same edit as a
  tolerance would be left out, with exit status 0. So a gate that runs again over finished work is
  a checkpoint, after which Snakemake examines the jobs again.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snakemake.io import IOFile, ancient
from snakemake.iocontainers import Wildcards

from workflow_scripts.orchestration.build import Build, output_version

# Recorded params of the output at a path, as Snakemake writes them: the `repr` of each.
RecordedParams = Callable[[str], Sequence[str] | None]
ATTEMPT = "no attempt passed before "


class Gate(NamedTuple):
    """A gate, as its rule needs it."""

    verdict: str
    """Path of the JSON that the gate writes, with wildcards."""
    settings: str
    """JSON of its settings."""
    version: int
    """OUTPUT_VERSION of its stage."""

    @property
    def passed(self) -> str:
        """Path of the file with the settings that the gate passed with, with wildcards."""
        return str(Path(self.verdict).with_suffix(".passed"))

    @property
    def record(self) -> str:
        """Content of that file if the verdict is valid."""
        return f"{self.settings} {self.version}"

    def is_valid(self, names: dict[str, str]) -> bool:
        """True if the last attempt passed with the current settings.

        Args:
            names: values of the wildcards.
        """
        passed = Path(self.passed.format(**names))
        return passed.is_file() and passed.read_text(encoding="utf-8") == self.record

    def judges_again(self, places: Iterable[dict[str, str]]) -> bool:
        """True if there is a verdict that is no longer valid.

        Args:
            places: values of the wildcards, for each job of the gate.
        """
        return any(
            Path(self.verdict.format(**names)).exists() and not self.is_valid(names)
            for names in places
        )

    def last_attempt(self, names: dict[str, str], recorded: RecordedParams) -> str:
        """A param that makes Snakemake run the gate until it passes.

        Args:
            names: values of the wildcards.
        Returns:
            The recorded value if the last attempt passed, else a text that was never used.
        """
        if not Path(self.passed.format(**names)).is_file():
            return f"{ATTEMPT}{time.time_ns()}"
        params = map(ast.literal_eval, recorded(self.verdict.format(**names)) or ())
        return next((one for one in params if str(one).startswith(ATTEMPT)), "")


class Gates:
    """The gates of a build, with input functions for their rules and the rules downstream.

    Args:
        workflow: Snakemake's workflow, which recorded the last attempts.
    """

    def __init__(self, build: Build, workflow: Any) -> None:  # untyped: Snakemake's
        settings = build.config.evaluation.gates
        self.build = build
        self.workflow = workflow
        self.tokens = Gate(
            "results/data/{dataset}/{model}/tokens/check.json",
            settings.tokens.model_dump_json(),
            output_version("tokens/check_tokens"),
        )
        self.merged = Gate(
            "results/runs/{run}/merged_check.json",
            settings.merge.model_dump_json(),
            output_version("merge/check_merged"),
        )
        self.gguf = Gate(
            "results/runs/{run}/gguf_check.json",
            settings.gguf.model_dump_json(),
            output_version("quantize/check_gguf"),
        )

    def last_attempt(self, gate: Gate) -> Callable[[Wildcards], str]:
        """A param that changes until the gate passes."""
        return lambda wildcards: gate.last_attempt(
            dict(wildcards.items()), lambda path: self.workflow.persistence.params(IOFile(path))
        )

    def verdict_of_tokens(self) -> Any:  # untyped: an input function with a flag
        """A run's verdict as an input that does not re-run the job when the gate runs again."""
        return ancient(self.build.of_run(self.tokens.verdict))

    def samples(self) -> str:
        """The settings that change the figures of gates in reports and releases. Tolerances do
        not."""
        samples = self.build.config.evaluation.gates.model_dump(
            include={"merge", "gguf"},
            exclude={"merge": {"perplexity_increase_fraction"}, "gguf": {"kl_divergence_nats"}},
        )
        return json.dumps(samples | {"versions": [self.merged.version, self.gguf.version]})

    def look_again(self) -> None:
        """Make checkpoints of the gates that run again over finished work."""
        config = self.build.config
        places = [self.build.names(name) for name in config.runs if not config.is_frozen(name)]
        for gate, rules in (
            (self.tokens, ["check_tokens"]),
            (self.merged, ["check_merged", "check_fetched_merged"]),
            (self.gguf, ["check_gguf"]),
        ):
            if gate.judges_again(places):
                for name in rules:
                    self.workflow.get_rule(name).is_checkpoint = True
