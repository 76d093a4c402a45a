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


def read_results(runs: str, results: Path, texts: Sequence[str] = ()) -> list[RunResults]:
    """All runs of a report.

    Args:
        runs: JSON of the runs' settings and the GGUF types, as the rule hands it.
        results: the folder `results/`.
        texts: names of texts whose scores are read too.
    """
    wanted = json.loads(runs)
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
            links=[
                dataclasses.replace(link, texts=_texts(name, settings, link.name, results, texts))
                for link in _links(name, settings, wanted["gguf_types"], results)
            ],
            awq=(
                _link("AWQ", results / "runs" / name / "evaluation" / "awq.json")
                if wanted["awq"]
                else None
            ),
        )
        for name, settings in wanted["runs"].items()
    ]


def _links(
    run: str, settings: dict[str, Any], gguf_types: list[str], results: Path
) -> Iterator[Link]:
    base = results / "evaluation" / settings["model"] / settings["dataset"]
    yield _link("base", base / "base.json")
    yield _link("base NF4", base / "base-nf4.json")
    folder = results / "runs" / run / "evaluation"
    adapter = () if settings["merged"] else ("adapter",)
    for name in (*adapter, "merged", *gguf_types):
        speed, divergence = (folder / f"{name}.{what}.json" for what in ("inference", "divergence"))
        is_quantization = name in gguf_types and name != "F16"
        yield _link(name, folder / f"{name}.json", speed, divergence if is_quantization else None)


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
