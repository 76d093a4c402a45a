"""A small results tree, as written by the stages before the report."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.context import context_scores
from tests.facts import MISTRAL_7B
from tests.gates import GGUF_CHECK, MERGED_CHECK
from tests.reports import CLEANING, PACKING
from tests.scores import DIVERGENCE, scores_of
from tests.speed import SPEED
from tests.tasks import reference_scores, task_scores
from tests.training import history_of, manifest_of, parts_of, plan_of_memory
from tests.unit.evaluate.test_task_scores import rows_of, score_of
from workflow_scripts.evaluate.task_scores import write_samples
from workflow_scripts.handover.chain import ChainSettings, chain_of
from workflow_scripts.report.results import Asked, RunResults, read_results
from workflow_scripts.scoring.token_scores import TokenScores
from workflow_scripts.tokens.documents import Document

GGUF_TYPES = ["F16", "Q4_K_M"]
PERPLEXITIES = {"adapter": 5.0, "merged": 5.05, "F16": 5.051, "Q4_K_M": 5.5}
FACTS = MISTRAL_7B.changed(
    context_tokens=2048,
    sliding_window=64,
    hidden_size=256,
    n_kv_heads=2,
    head_dim=32,
    n_layers=2,
    layer_windows=(64, 64),
)
RUNS = {
    name: {
        "model": "tiny",
        "dataset": "chats",
        "packing": packing,
        "recipe": name,
        "merged": None,
        "merge_base": "original",
    }
    for name, packing in (("generic", "joined"), ("mistral", "apart"))
}


@dataclasses.dataclass(frozen=True)
class Results:
    """The folder `results` of the working directory, and its measurements."""

    folder: Path
    settings: Mapping[str, ChainSettings]
    asked: Asked = Asked()

    @property
    def chains(self) -> list[Path]:
        """Write the chain file of each run, and return the paths."""
        paths = [self.folder / "runs" / run / "chain.json" for run in self.settings]
        for (run, settings), path in zip(self.settings.items(), paths, strict=True):
            chain_of(run, settings).write(path)
        return paths

    @property
    def arguments(self) -> list[str]:
        return arguments_of(self.chains, self.asked)

    @property
    def by_run(self) -> dict[str, list[str]]:
        """Arguments by run, for reports of a single run."""
        chains = zip(self.settings, self.chains, strict=True)
        return {run: arguments_of([path], self.asked) for run, path in chains}

    def read(self) -> list[RunResults]:
        return read_results(self.chains, self.asked)

    def changed(
        self, runs: Mapping[str, Mapping[str, object]] | None = None, **settings: object
    ) -> Results:
        """The same results with other settings of the given runs, or of all chains."""
        return dataclasses.replace(
            self,
            settings={
                name: ChainSettings.model_validate(
                    of_run.model_dump()
                    | settings
                    | {"run": of_run.run.model_dump() | (runs or {}).get(name, {})}
                )
                for name, of_run in self.settings.items()
            },
        )


def arguments_of(chains: Sequence[Path], asked: Asked) -> list[str]:
    """Arguments of a report."""
    flags = [[f"--{name}", *values] for name, values in asked._asdict().items() if values]
    return ["--chains", *map(str, chains), *itertools.chain.from_iterable(flags)]


LINKS = ["base", "merged", "Q4_K_M"]
ASKED = Asked(LINKS, LINKS, ["tasks", "references"])


def chain_settings(run: str) -> ChainSettings:
    return ChainSettings(run=RUNS[run], quantizations=["Q4_K_M"])


HARDNESS = (0.5, -0.25, 0.0, -0.25)
"""Loss above average of four equally long conversations, the same for every link."""
CHANGES = (0.01, -0.02, 0.03, -0.02)
"""Small differences between the losses of one link and the next, by conversation."""


def token_scores(losses: Sequence[float], n_tokens: int = 10) -> TokenScores:
    """Scores of conversations that have the same number of tokens.

    Args:
        losses: mean loss of each conversation, nats per token.
    """
    document = Document("", np.zeros(n_tokens + 1, np.int32), np.ones(n_tokens + 1, bool))
    return TokenScores.of(
        [dataclasses.replace(document, id=f"chat/{number}") for number in range(len(losses))],
        {number: np.full(n_tokens, loss) for number, loss in enumerate(losses)},
    )


def write_link(path: Path, perplexity: float, *, place: int, **more: object) -> None:
    """Scores of a link and of its tokens.

    Args:
        place: position in the chain; links at odd positions differ by `CHANGES`.
    """
    scores_of(perplexity, **more).write(path)
    losses = [
        math.log(perplexity) + hard + change * (place % 2)
        for hard, change in zip(HARDNESS, CHANGES, strict=True)
    ]
    token_scores(losses).write(path.with_suffix(".tokens.parquet"))


def write_gates(folder: Path) -> None:
    """Write the measurements of a run's gates, and its memory plan."""
    merged = MERGED_CHECK.changed(perplexity_increase_fraction=-0.0025)
    merged.write(folder / "merged_check.json")
    GGUF_CHECK.write(folder / "gguf_check.json")
    parts = parts_of(program=5 * 10**8, base_weights=10**9)
    plan_of_memory(parts, usable_bytes=20 * 10**9).write(folder / "memory_plan.json")


@pytest.fixture
def write_results(tmp_path, monkeypatch) -> Callable[[], Results]:
    def write() -> Results:
        monkeypatch.chdir(tmp_path)  # paths are relative to it
        folder = Path("results")
        FACTS.write(folder / "models" / "tiny" / "facts.json")
        clean = folder / "data" / "chats" / "clean"
        CLEANING.write(clean / "cleaning_report.json")
        base = folder / "evaluation" / "tiny" / "chats"
        whole = {"full_length_perplexity": 9.876}
        write_link(base / "base.json", 10.0, place=0, **whole)
        write_link(base / "base-nf4.json", 10.25, place=1, **whole)
        for number, run in enumerate(RUNS):
            adapter = folder / "runs" / run / "adapter"
            manifest_of(
                peak_memory_bytes=(number + 1) * 3 * 2**29,
                predicted_peak_memory_bytes=(number + 1) * 5 * 2**28,
                n_steps=7 + number,
            ).write(adapter / "training_manifest.json")
            history_of(5, validation_loss=1.5 if number else None).write(adapter / "history.json")
            write_gates(folder / "runs" / run)
            packed = folder / "data" / "chats" / "tiny" / RUNS[run]["packing"]
            PACKING.write(packed / "packing_report.json")
            for place, (link, perplexity) in enumerate(PERPLEXITIES.items(), start=2):
                evaluation = folder / "runs" / run / "evaluation"
                more = whole if link in ("adapter", "merged") else {}
                write_link(evaluation / f"{link}.json", perplexity + number, place=place, **more)
                SPEED.write(evaluation / f"{link}.inference.json")
                if link == "Q4_K_M":
                    DIVERGENCE.write(evaluation / f"{link}.divergence.json")
        return Results(folder, {name: chain_settings(name) for name in RUNS})

    return write


@pytest.fixture
def results(write_results) -> Results:
    return write_results()


GAIN = {
    "long_gain_nats_per_token": 0.0123,
    "long_gain_standard_error_nats_per_token": 0.0045,
}


REFERENCES = {
    "asked": "reference answers",
    "task": "reference answers",
    "metric": "exact_match",
    "subtasks": ["reference answers"],
    "low": 0.1,
    "high": 0.9,
}
HELLASWAG = {
    "asked": "hellaswag@10",
    "task": "hellaswag",
    "metric": "acc_norm",
    "subtasks": ["hellaswag"],
    "n_examples": 10,
}


def write_tasks(stem: Path, values: Sequence[float], score: dict) -> None:
    """Write the scores of one task and of its documents, as evaluate_tasks or match_references."""
    scored = score_of(values, standard_error=0.25 - 0.01 * sum(values), **score)
    is_reference = stem.suffix == ".references"
    report = reference_scores(scored) if is_reference else task_scores(scored)
    report.write(stem.parent / f"{stem.name}.json")
    rows = rows_of(values, scored.task, asked=scored.asked)
    metric = {"metric": scored.metric}
    write_samples(stem.parent / f"{stem.name}.parquet", [row | metric for row in rows])


@pytest.fixture
def all_measured(results) -> Results:
    """The same results with all optional measurements.

    These are a text and AWQ and, for base, merged model and smallest file, tasks and usable
    context. For the smallest file of the second run, usable context is not measurable.
    """
    folder = results.folder
    texts = folder / "evaluation" / "tiny" / "texts" / "wiki"
    scores_of(20.0).write(texts / "base.json")
    base = folder / "evaluation" / "tiny" / "chats"
    context_scores([100, 90, 80]).write(base / "base.context.json")
    write_tasks(base.parent / "base.tasks", [0.0, 0.0, 1.0, 0.0], HELLASWAG)
    write_tasks(base / "base.references", [0.0, 0.0, 1.0, 0.0, 0.0], REFERENCES)
    for number, run in enumerate(RUNS):
        evaluation = folder / "runs" / run / "evaluation"
        write_link(evaluation / "awq.json", 5.25 + number, place=4, size_bytes=3 * 2**20)
        for place, link in enumerate(("merged", *GGUF_TYPES)):
            scored = scores_of(21.0 + number + 0.1 * place)
            scored.write(evaluation / "texts" / "wiki" / f"{link}.json")
        for link, found in (("merged", [100, 90, 80]), ("Q4_K_M", [0, 0] if number else [90, 70])):
            scores = context_scores(found, **(GAIN if link == "merged" else {}))
            scores.write(evaluation / f"{link}.context.json")
        for link, right in (("merged", [1.0, 0.0, 1.0, number]), ("Q4_K_M", [1.0, 0.0, 0, number])):
            write_tasks(evaluation / f"{link}.tasks", right, HELLASWAG)
            write_tasks(evaluation / f"{link}.references", [*right, 0.0], REFERENCES)
    return dataclasses.replace(results.changed(awq=True, texts=["wiki"]), asked=ASKED)


@pytest.fixture
def read_tsv() -> Callable[[Path], list[list[str]]]:
    return lambda path: [line.split("\t") for line in path.read_text().splitlines()]
