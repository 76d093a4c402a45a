"""Table of the links' scores in tasks with a right answer, with paired changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from workflow_scripts.evaluate.task_scores import Samples, difference
from workflow_scripts.handover.chain import Chain, TaskKind
from workflow_scripts.handover.tasks import TaskScore
from workflow_scripts.report import results as measured
from workflow_scripts.report.tables import Table, signed, with_error

NONE_ASKED = (
    "There are no tasks: no conversation of the test split marks a reference answer, and"
    " evaluation.tasks.names is empty."
)


@dataclass(frozen=True)
class Link:
    """The scores of one link."""

    name: str
    scores: list[TaskScore]
    samples: Mapping[TaskKind, Samples]
    """Scores of every document, by kind of task."""
    kinds: list[TaskKind]
    """Kind of the task of each score."""


def read(chain: Chain, asked: measured.Asked) -> list[Link]:
    """Links of a run with scores in tasks, the base first."""
    return [
        _link(link.title, measured.read_tasks(files))
        for link in chain.links
        if (files := asked.tasks_of(link))
    ]


def asked_links(run: measured.RunResults) -> list[Link]:
    """The same for a run whose results were read already."""
    return [_link(link.name, link.tasks) for link in run.links if link.tasks]


def _link(name: str, tasks: Mapping[TaskKind, measured.Tasks]) -> Link:
    scores = [(kind, score) for kind, of_kind in tasks.items() for score in of_kind.scores]
    return Link(
        name,
        [score for _, score in scores],
        {kind: Samples.read(of_kind.samples) for kind, of_kind in tasks.items()},
        [kind for kind, _ in scores],
    )


def tasks(runs: Mapping[str, Sequence[Link]]) -> Table:
    """One row per task, metric, run and link."""
    by_task: dict[str, list[list[str]]] = {}
    for run, links in runs.items():
        for score, link, cells in cells_of(links):
            row = [f"{task_of(score)}: {run}: {link.name}", *cells]
            by_task.setdefault(task_of(score), []).append(row)
    rows = [row for of_task in by_task.values() for row in of_task]
    return Table(
        title="Tasks",
        note=NONE_ASKED
        if not rows
        else (
            "Scores are percentages ± a standard error over documents; reference answers have a"
            " 95 % Wilson interval. Higher is better, except for perplexities and bits. The"
            " difference is from the previous link of the same run, paired document by document; a"
            " difference smaller than twice its error is not significant. A dash means that there"
            " is no score to compare with. Every link reads the same token ids. “cut” counts the"
            " documents whose prompt exceeds the context of the GGUFs and lost its beginning."
            " Published scores are comparable if task, number of examples and documents are the"
            " same."
        ),
        header=["Task, run and link", "Examples", "Score", "Difference", "n", "cut"],
        rows=rows,
    )


def task_of(score: TaskScore) -> str:
    """`hellaswag acc_norm`, with the filter if there is one."""
    kind = "" if score.filter == "none" else f" ({score.filter})"
    return f"{score.task} {score.metric}{kind}"


def name_of(score: TaskScore, kind: TaskKind) -> str:
    """A name that is unique among the scores of a link: `hellaswag acc_norm, 10-shot`.

    A task that belongs to a group is followed by the group.
    """
    if kind == "references":
        return task_of(score)
    name = f"{task_of(score)}, {score.n_examples}-shot"
    group = score.asked.partition("@")[0]
    return name if group == score.task else f"{name} ({group})"


def cells_of(links: Sequence[Link]) -> Iterator[tuple[TaskScore, Link, list[str]]]:
    """Every score of a run's links, with the cells of its row."""
    for number, link in enumerate(links):
        for score, kind in zip(link.scores, link.kinds, strict=True):
            yield (
                score,
                link,
                [
                    str(score.n_examples),
                    shown(score),
                    change(score, kind, link, links[number - 1]) if number else "–",
                    f"{score.n_documents:,}",
                    f"{score.n_truncated:,}",
                ],
            )


def shown(score: TaskScore) -> str:
    """`81.3 ± 0.4`, in per cent for fractions; with its interval instead, where there is one."""
    scale = 100 if is_share(score) else 1
    if score.low is not None and score.high is not None:
        return f"{scale * score.score:.2f} [{scale * score.low:.2f}, {scale * score.high:.2f}]"
    error = score.standard_error
    return with_error(scale * score.score, None if error is None else scale * error)


def is_share(score: TaskScore) -> bool:
    """True for metrics that are fractions."""
    return score.metric.startswith(("acc", "exact_match", "f1", "em"))


def change(score: TaskScore, kind: TaskKind, link: Link, above: Link) -> str:
    """`+1.20 ± 0.30`: change from the link above, in the same task and metric."""
    same = attrgetter("asked", "task", "metric", "filter")
    others = [one for one in above.scores if same(one) == same(score)]
    if not others:
        return "–"
    found = difference(score, link.samples[kind], others[0], above.samples[kind])
    if found is None:
        return "–"
    scale = 100 if is_share(score) else 1
    error = found.standard_error
    return signed(scale * found.mean, None if error is None else scale * error)
