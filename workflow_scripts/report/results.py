"""What the report reads: the metrics of every run and link, found by the layout of `results/`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from workflow_scripts import files
from workflow_scripts.evaluate.task_scores import Score


class Tasks(NamedTuple):
    """What a link scored in tasks of one kind."""

    scores: list[Score]
    samples: Path
    """What every document scored."""
    are_chats: bool
    """Whether prompts were chats; reference answers always are of one."""


@dataclass(frozen=True)
class Link:
    """One state of the chain, for one run."""

    name: str
    scores: dict[str, Any]
    """Of evaluate_perplexity."""
    token_scores: Path
    """Of evaluate_perplexity: the loss of every token."""
    speed: dict[str, Any] | None
    """Of benchmark_inference; None for the base and AWQ, which are scored alone."""
    divergence: dict[str, Any] | None = None
    """Of `evaluate_perplexity --reference`, for the quantizations."""
    texts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of evaluate_text, by name, for the links that are scored on texts."""
    context: dict[str, Any] | None = None
    """Of evaluate_context; None where it was not asked for."""
    tasks: Mapping[str, Tasks] = field(default_factory=dict)
    """By kind: `tasks` of evaluate_tasks, `references` of match_references."""


@dataclass(frozen=True)
class RunResults:
    """Everything measured of one run."""

    name: str
    settings: dict[str, Any]
    """Of `runs.<name>`."""
    base_hub_id: str | None
    """Whose scores the base's are, where the Hub has it and it was taken as it is."""
    facts: dict[str, Any]
    manifest: dict[str, Any] | None
    """Of train_adapter; None where the run began with an adapter or a merged model."""
    merge_base: dict[str, Any] | None
    """Of choose_merge_base; None where the config names the base."""
    links: list[Link]
    """From base to the smallest quantization."""
    awq: Link | None
    """Beside them, made of the merged model; None where it was not asked for."""

    def link(self, name: str) -> Link:
        return next(link for link in self.links if link.name == name)


@dataclass(frozen=True)
class Wanted:
    """What was measured, as the rules say it."""

    runs: Mapping[str, dict[str, Any]]
    """Settings of each, by name."""
    gguf_types: Sequence[str]
    awq: bool
    texts: Sequence[str] = ()
    """Names of the texts that links are scored on."""
    context: Sequence[str] = ()
    """Links whose usable context was measured."""
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Kind of task → links that were asked."""
    hub_ids: Mapping[str, str] = field(default_factory=dict)
    """Model → where it is on the Hub, of those taken as they are."""

    @classmethod
    def read(cls, text: str) -> Wanted:
        """Of its JSON."""
        return cls(**json.loads(text))


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
            base_hub_id=wanted.hub_ids.get(settings["model"]),
            facts=files.read_json(results / "models" / settings["model"] / "facts.json"),
            manifest=(
                files.read_json(results / "runs" / name / "adapter" / "training_manifest.json")
                if settings["recipe"]
                else None
            ),
            merge_base=(
                files.read_json(results / "runs" / name / "merge_base.json")
                if settings["merge_base"] == "auto"
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


def _links(run: str, settings: dict[str, Any], wanted: Wanted, results: Path) -> Iterator[Link]:
    base = results / "evaluation" / settings["model"] / settings["dataset"]
    folder = results / "runs" / run / "evaluation"

    def link(name: str, place: Path, **files_of: Path | None) -> Link:
        context = place / f"{place_name(name)}.context.json"
        return dataclasses.replace(
            _link(name, place / f"{place_name(name)}.json", **files_of),
            texts=_texts(run, settings, name, results, wanted.texts),
            context=files.read_json(context) if name in wanted.context else None,
            tasks={
                kind: tasks(results / tasks_file(run, settings, name, kind))
                for kind, links in wanted.tasks.items()
                if name in links
            },
        )

    yield link("base", base)
    yield link("base NF4", base)
    adapter = () if settings["merged"] else ("adapter",)
    for name in (*adapter, "merged", *wanted.gguf_types):
        speed, divergence = (folder / f"{name}.{what}.json" for what in ("inference", "divergence"))
        is_quantization = name in wanted.gguf_types and name != "F16"
        yield link(name, folder, speed=speed, divergence=divergence if is_quantization else None)


def tasks_file(run: str, settings: Mapping[str, Any], link: str, kind: str) -> str:
    """Where a link's scores are, below the folder of results; the base is asked published tasks
    once a model, and the references of a dataset's chats once a model and dataset."""
    if link != "base":
        return f"runs/{run}/evaluation/{link}.{kind}.json"
    dataset = f"{settings['dataset']}/" if kind == "references" else ""
    return f"evaluation/{settings['model']}/{dataset}base.{kind}.json"


def tasks(path: Path) -> Tasks:
    """From a file of scores, beside which what every document scored lies."""
    report = files.read_json(path)
    return Tasks(report["scores"], path.with_suffix(".parquet"), report.get("are_chats", True))


def place_name(link: str) -> str:
    """How the files of a link are called: `base-nf4` of `base NF4`."""
    return link.lower().replace(" ", "-") if link.startswith("base") else link


def _link(
    name: str, scores: Path, speed: Path | None = None, divergence: Path | None = None
) -> Link:
    """A link from the files of its scores, beside which the losses of its tokens lie."""
    return Link(
        name,
        files.read_json(scores),
        scores.with_suffix(".tokens.parquet"),
        files.read_json(speed) if speed else None,
        files.read_json(divergence) if divergence else None,
    )


def _texts(
    run: str, settings: Mapping[str, str], link: str, results: Path, texts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Scores of a link on the texts; the base is scored once a model, in its own precision."""
    if link in ("base NF4", "adapter"):
        return {}
    base = results / "evaluation" / settings["model"] / "texts"
    folder = base if link == "base" else results / "runs" / run / "evaluation" / "texts"
    return {text: files.read_json(folder / text / f"{link}.json") for text in texts}
