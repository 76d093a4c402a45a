"""Everything measured of a run's links, read from the paths in its `chain.json`."""

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
    """As reports call it."""
    source: str | None
    """The link that it is made from; None for the base."""
    is_aside: bool
    """Whether figures draw it by itself: no other link is made from it."""
    is_product: bool
    """Whether people run it, so that its size and speed matter."""
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
    tasks: Mapping[TaskKind, Tasks] = field(default_factory=dict)
    """By kind: `tasks` of evaluate_tasks, `references` of match_references."""


@dataclass(frozen=True)
class RunResults:
    """Everything measured of one run."""

    chain: Chain
    """Where it was read from."""
    facts: Facts
    manifest: TrainingManifest | None
    """Of train_adapter; None where the run began with an adapter or a merged model."""
    merge_base: MergeBaseChoice | None
    """Of choose_merge_base; None where the config names the base."""
    links: list[Link]
    """From the base to the smallest file; links aside come last."""

    @property
    def name(self) -> str:
        return self.chain.run

    @property
    def settings(self) -> RunSettings:
        return self.chain.settings

    @property
    def smallest(self) -> Link:
        """The last quantization, which people run."""
        return [link for link in self.links if not link.is_aside][-1]

    def link(self, name: str) -> Link:
        return next(link for link in self.links if link.name == name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--chains`, and what was measured of the links beside their scores and speed."""
    parser.add_argument("--chains", nargs="+", type=Path, required=True, help="of write_chain")
    add_context_argument(parser)
    add_task_arguments(parser)


def add_context_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", nargs="+", default=[], help="links with usable context")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", default=[], help="links that were asked tasks")
    parser.add_argument(
        "--kinds", nargs="+", choices=get_args(TaskKind), default=[], help="what the tasks were"
    )


class Asked(NamedTuple):
    """What was measured of links beside their scores and speed."""

    context: Sequence[str] = ()
    """Links whose usable context was measured."""
    tasks: Sequence[str] = ()
    """Links that were asked tasks."""
    kinds: Sequence[TaskKind] = ()
    """What the tasks were."""

    def context_of(self, link: LinkFiles) -> str | None:
        """The file of a link's usable context."""
        return link.context if link.name in self.context else None

    def tasks_of(self, link: LinkFiles) -> dict[TaskKind, str]:
        """The files of what a link scored in tasks, by kind."""
        if link.name not in self.tasks:
            return {}
        return {kind: file for kind, file in link.tasks.items() if kind in self.kinds}


NOTHING_ASKED = Asked()


def read_results(chains: Sequence[Path], asked: Asked = NOTHING_ASKED) -> list[RunResults]:
    """All runs of a report.

    Args:
        chains: `chain.json` of each.
    """
    return [_run(Chain.read(path), asked) for path in chains]


def _run(chain: Chain, asked: Asked) -> RunResults:
    titles = {link.name: link.title for link in chain.links}
    return RunResults(
        chain=chain,
        facts=Facts.read(Path(chain.facts)),
        manifest=(
            TrainingManifest.read(Path(chain.training_manifest))
            if chain.training_manifest
            else None
        ),
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
    """What the gates of a run's export measured."""

    merged: MergedCheck | None
    """None for a model that was merged elsewhere, which is compared with nothing."""
    gguf: GgufCheck


def read_gates(chain: Chain) -> Gates:
    is_given = chain.settings.merged
    merged = None if is_given else MergedCheck.read(Path(chain.merged_check))
    return Gates(merged, GgufCheck.read(Path(chain.gguf_check)))


def read_tasks(files: Mapping[TaskKind, str]) -> dict[TaskKind, Tasks]:
    """What a link scored in tasks, by their kind."""
    return {kind: tasks(Path(path), kind) for kind, path in files.items()}


def tasks(path: Path, kind: TaskKind) -> Tasks:
    """From a file of scores."""
    samples = Path(samples_beside(str(path)))
    if kind == "references":
        return Tasks(ReferenceScores.read(path).scores, samples, are_chats=True)
    report = TaskScores.read(path)
    return Tasks(report.scores, samples, report.are_chats)
