"""What the report reads: the metrics of every run and link, found by the layout of `results/`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_scripts import files


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
    """Of evaluate_divergence, for the quantizations."""
    texts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of evaluate_text, by name, for the links that are scored on texts."""
    context: dict[str, Any] | None = None
    """Of evaluate_context; None where it was not asked for."""


@dataclass(frozen=True)
class RunResults:
    """Everything measured of one run."""

    name: str
    settings: dict[str, Any]
    """Of `runs.<name>`."""
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
        )

    yield link("base", base)
    yield link("base NF4", base)
    adapter = () if settings["merged"] else ("adapter",)
    for name in (*adapter, "merged", *wanted.gguf_types):
        speed, divergence = (folder / f"{name}.{what}.json" for what in ("inference", "divergence"))
        is_quantization = name in wanted.gguf_types and name != "F16"
        yield link(name, folder, speed=speed, divergence=divergence if is_quantization else None)


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
