"""What the report reads: the metrics of every run and link, found by the layout of `results/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from workflow_scripts.handover.context import ContextScores
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GgufCheck, MergeBaseChoice, MergedCheck
from workflow_scripts.handover.scores import Divergence, Scores
from workflow_scripts.handover.speed import Speed
from workflow_scripts.handover.tasks import ReferenceScores, TaskScore, TaskScores
from workflow_scripts.handover.training import TrainingManifest
from workflow_scripts.settings import RunSettings, settings_from_json
from workflow_scripts.settings.fields import Settings


class Tasks(NamedTuple):
    """What a link scored in tasks of one kind."""

    scores: tuple[TaskScore, ...]
    samples: Path
    """What every document scored."""
    are_chats: bool
    """Whether prompts were chats; reference answers always are of one."""


@dataclass(frozen=True)
class Link:
    """One state of the chain, for one run."""

    name: str
    scores: Scores
    token_scores: Path
    """Path of the loss of every token, which evaluate_perplexity writes."""
    speed: Speed | None
    """None for the base and AWQ, which are scored alone."""
    divergence: Divergence | None = None
    """For the quantizations alone."""
    texts: Mapping[str, Scores] = field(default_factory=dict)
    """Of evaluate_text, by name, for the links that are scored on texts."""
    context: ContextScores | None = None
    """None where it was not asked for."""
    tasks: Mapping[str, Tasks] = field(default_factory=dict)
    """By kind: `tasks` of evaluate_tasks, `references` of match_references."""


@dataclass(frozen=True)
class RunResults:
    """Everything measured of one run."""

    name: str
    settings: RunSettings
    base_hub_id: str | None
    """Whose scores the base's are, where the Hub has it and it was taken as it is."""
    facts: Facts
    manifest: TrainingManifest | None
    """Of train_adapter; None where the run began with an adapter or a merged model."""
    merge_base: MergeBaseChoice | None
    """Of choose_merge_base; None where the config names the base."""
    links: list[Link]
    """From base to the smallest quantization."""
    awq: Link | None
    """Beside them, made of the merged model; None where it was not asked for."""

    def link(self, name: str) -> Link:
        return next(link for link in self.links if link.name == name)


class Wanted(Settings):
    """What was measured, as the rules say it."""

    runs: dict[str, RunSettings]
    gguf_types: tuple[str, ...] = ()
    awq: bool = False
    texts: tuple[str, ...] = ()
    """Names of the texts that links are scored on."""
    context: tuple[str, ...] = ()
    """Links whose usable context was measured."""
    tasks: dict[str, tuple[str, ...]] = {}
    """Kind of task → links that were asked."""
    hub_ids: dict[str, str] = {}
    """Model → where it is on the Hub, of those taken as they are."""

    @classmethod
    def read(cls, text: str) -> Wanted:
        """Of its JSON."""
        return settings_from_json(cls, text)


def read_results(runs: str, results: Path) -> list[RunResults]:
    """All runs of a report.

    Args:
        runs: JSON of `Wanted`, as the rule hands it.
        results: the folder `results/`.
    """
    wanted = Wanted.read(runs)
    return [
        RunResults(
            name=name,
            settings=settings,
            base_hub_id=wanted.hub_ids.get(settings.model),
            facts=Facts.read(results / "models" / settings.model / "facts.json"),
            manifest=(
                TrainingManifest.read(
                    results / "runs" / name / "adapter" / "training_manifest.json"
                )
                if settings.recipe
                else None
            ),
            merge_base=(
                MergeBaseChoice.read(results / "runs" / name / "merge_base.json")
                if settings.merge_base == "auto"
                else None
            ),
            links=list(_links(name, settings, wanted, results)),
            awq=(
                _link("AWQ", results / "runs" / name / "evaluation" / "awq.json")
                if wanted.awq
                else None
            ),
        )
        for name, settings in wanted.runs.items()
    ]


class Gates(NamedTuple):
    """What the gates of a run's export measured."""

    merged: MergedCheck | None
    """None for a model that was merged elsewhere, which is compared with nothing."""
    gguf: GgufCheck


def read_gates(run: RunResults, results: Path) -> Gates:
    folder = results / "runs" / run.name
    is_given = run.settings.merged
    merged = None if is_given else MergedCheck.read(folder / "merged_check.json")
    return Gates(merged, GgufCheck.read(folder / "gguf_check.json"))


def _links(run: str, settings: RunSettings, wanted: Wanted, results: Path) -> Iterator[Link]:
    base = results / "evaluation" / settings.model / settings.dataset
    folder = results / "runs" / run / "evaluation"

    def link(name: str, place: Path, **files_of: Path | None) -> Link:
        context = place / f"{place_name(name)}.context.json"
        return dataclasses.replace(
            _link(name, place / f"{place_name(name)}.json", **files_of),
            texts=_texts(run, settings, name, results, wanted.texts),
            context=ContextScores.read(context) if name in wanted.context else None,
            tasks={
                kind: tasks(results / tasks_file(run, settings, name, kind), kind)
                for kind, links in wanted.tasks.items()
                if name in links
            },
        )

    yield link("base", base)
    yield link("base NF4", base)
    adapter = () if settings.merged else ("adapter",)
    for name in (*adapter, "merged", *wanted.gguf_types):
        speed, divergence = (folder / f"{name}.{what}.json" for what in ("inference", "divergence"))
        is_quantization = name in wanted.gguf_types and name != "F16"
        yield link(name, folder, speed=speed, divergence=divergence if is_quantization else None)


def tasks_file(run: str, settings: RunSettings, link: str, kind: str) -> str:
    """Where a link's scores are, below the folder of results; the base is asked published tasks
    once a model, and the references of a dataset's chats once a model and dataset."""
    if link != "base":
        return f"runs/{run}/evaluation/{link}.{kind}.json"
    dataset = f"{settings.dataset}/" if kind == "references" else ""
    return f"evaluation/{settings.model}/{dataset}base.{kind}.json"


def tasks(path: Path, kind: str) -> Tasks:
    """From a file of scores, beside which what every document scored lies."""
    samples = path.with_suffix(".parquet")
    if kind == "references":
        return Tasks(ReferenceScores.read(path).scores, samples, are_chats=True)
    report = TaskScores.read(path)
    return Tasks(report.scores, samples, report.are_chats)


def place_name(link: str) -> str:
    """How the files of a link are called: `base-nf4` of `base NF4`."""
    return link.lower().replace(" ", "-") if link.startswith("base") else link


def _link(
    name: str, scores: Path, speed: Path | None = None, divergence: Path | None = None
) -> Link:
    """A link from the files of its scores, beside which the losses of its tokens lie."""
    return Link(
        name,
        Scores.read(scores),
        scores.with_suffix(".tokens.parquet"),
        Speed.read(speed) if speed else None,
        Divergence.read(divergence) if divergence else None,
    )


def _texts(
    run: str, settings: RunSettings, link: str, results: Path, texts: Sequence[str]
) -> dict[str, Scores]:
    """Scores of a link on the texts; the base is scored once a model, in its own precision."""
    if link in ("base NF4", "adapter"):
        return {}
    base = results / "evaluation" / settings.model / "texts"
    folder = base if link == "base" else results / "runs" / run / "evaluation" / "texts"
    return {text: Scores.read(folder / text / f"{link}.json") for text in texts}
