"""All measurements of a run's links, read from the paths in its `chain.json`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

from workflow_scripts.handover.chain import Chain, LinkFiles, TaskKind, samples_beside
from workflow_scripts.handover.context import ContextScores
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GgufCheck, MergeBaseChoice, MergedCheck
from workflow_scripts.handover.scores import Divergence, Scores
from workflow_scripts.handover.speed import Speed
from workflow_scripts.handover.tasks import ReferenceScores, TaskScore, TaskScores
from workflow_scripts.handover.training import TrainingManifest
from workflow_scripts.settings import RunSettings


class Tasks(NamedTuple):
    """Scores of a link in tasks of one kind."""

    scores: tuple[TaskScore, ...]
    samples: Path
    """Path of the scores of every document."""
    are_chats: bool
    """True if the prompts were chats, as those of reference answers always are."""


@dataclass(frozen=True)
class Link:
    """One link of the chain of a run."""

    name: str
    """Name of the link in reports."""
    source: str | None
    """Name of the link that this one is made from; None for the base."""
    is_aside: bool
    """True if figures draw the link separately, because no other link is made from it."""
    is_product: bool
    """True if the link is meant for use, so that its size and speed matter."""
    scores: Scores
    token_scores: Path
    """Path of the loss of every token, written by evaluate_perplexity."""
    speed: Speed | None
    """None for the base and AWQ, which are not timed."""
    divergence: Divergence | None = None
    """None except for the quantizations."""
    texts: Mapping[str, Scores] = field(default_factory=dict)
    """Scores of evaluate_text by text, for the links that are scored on texts."""
    context: ContextScores | None = None
    """None if usable context was not measured."""
    tasks: Mapping[TaskKind, Tasks] = field(default_factory=dict)
    """Scores by kind: `tasks` from evaluate_tasks, `references` from match_references."""


@dataclass(frozen=True)
class RunResults:
    """All measurements of one run."""

    chain: Chain
    """The paths that the measurements were read from."""
    facts: Facts
    manifest: TrainingManifest | None
    """Manifest of train_adapter; None if the run started from an adapter or a merged model."""
    merge_base: MergeBaseChoice | None
    """Result of choose_merge_base; None if the config names the base."""
    links: list[Link]
    """Links from the base to the smallest file; those that are drawn separately come last."""

    @property
    def name(self) -> str:
        return self.chain.run

    @property
    def settings(self) -> RunSettings:
        return self.chain.settings

    @property
    def data(self) -> tuple[str, str]:
        """Base model and dataset: runs that share both are scored on the same tokens."""
        return (self.settings.model, self.settings.dataset)

    @property
    def smallest(self) -> Link:
        """The last quantization."""
        return [link for link in self.links if not link.is_aside][-1]

    def link(self, name: str) -> Link:
        return next(link for link in self.links if link.name == name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--chains`, and the arguments for measurements beyond scores and speed."""
    parser.add_argument(
        "--chains", nargs="+", type=Path, required=True, help="chain.json of each run"
    )
    add_context_argument(parser)
    add_task_arguments(parser)


def add_context_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", nargs="+", default=[], help="links with a measured context")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", default=[], help="links with scores in tasks")
    parser.add_argument(
        "--kinds", nargs="+", choices=get_args(TaskKind), default=[], help="kinds of tasks"
    )


class Asked(NamedTuple):
    """Links with measurements beyond scores and speed."""

    context: Sequence[str] = ()
    """Links whose usable context was measured."""
    tasks: Sequence[str] = ()
    """Links with scores in tasks."""
    kinds: Sequence[TaskKind] = ()
    """Kinds of tasks."""

    def context_of(self, link: LinkFiles) -> str | None:
        """Path of a link's usable context; None if it was not measured."""
        return link.context if link.name in self.context else None

    def tasks_of(self, link: LinkFiles) -> dict[TaskKind, str]:
        """Paths of a link's scores in tasks, by kind."""
        if link.name not in self.tasks:
            return {}
        return {kind: file for kind, file in link.tasks.items() if kind in self.kinds}


NOTHING_ASKED = Asked()


def read_results(chains: Sequence[Path], asked: Asked = NOTHING_ASKED) -> list[RunResults]:
    """All measurements of several runs.

    Args:
        chains: `chain.json` of each run.
    """
    return [_run(Chain.read(path), asked) for path in chains]


def _run(chain: Chain, asked: Asked) -> RunResults:
    titles = {link.name: link.title for link in chain.links}
    manifest = chain.training_manifest
    return RunResults(
        chain=chain,
        facts=Facts.read(Path(chain.facts)),
        manifest=TrainingManifest.read(Path(manifest)) if manifest else None,
        merge_base=MergeBaseChoice.read(Path(chain.merge_base)) if chain.merge_base else None,
        links=[_link(link, titles, asked) for link in chain.links],
    )


def _link(files: LinkFiles, titles: Mapping[str, str], asked: Asked) -> Link:
    context = asked.context_of(files)
    return Link(
        name=files.title,
        source=titles[files.source] if files.source else None,
        is_aside=files.is_aside,
        is_product=files.is_product,
        scores=Scores.read(Path(files.scores)),
        token_scores=Path(files.token_scores),
        speed=Speed.read(Path(files.speed)) if files.speed else None,
        divergence=Divergence.read(Path(files.divergence)) if files.divergence else None,
        texts={text: Scores.read(Path(path)) for text, path in files.texts.items()},
        context=ContextScores.read(Path(context)) if context else None,
        tasks=read_tasks(asked.tasks_of(files)),
    )


class Gates(NamedTuple):
    """Measurements of a run's gates."""

    merged: MergedCheck | None
    """None for a model that was merged elsewhere: there is nothing to compare it with."""
    gguf: GgufCheck


def read_gates(chain: Chain) -> Gates:
    is_given = chain.settings.merged
    merged = None if is_given else MergedCheck.read(Path(chain.merged_check))
    return Gates(merged, GgufCheck.read(Path(chain.gguf_check)))


def read_tasks(files: Mapping[TaskKind, str]) -> dict[TaskKind, Tasks]:
    """Scores of a link in tasks, by kind."""
    return {kind: tasks(Path(path), kind) for kind, path in files.items()}


def tasks(path: Path, kind: TaskKind) -> Tasks:
    """Scores in tasks of one kind, from a file."""
    samples = Path(samples_beside(str(path)))
    if kind == "references":
        return Tasks(ReferenceScores.read(path).scores, samples, are_chats=True)
    report = TaskScores.read(path)
    return Tasks(report.scores, samples, report.are_chats)
