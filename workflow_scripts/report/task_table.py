"""Scores of the links in tasks with a right answer, and what each link changes, paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from workflow_scripts.evaluate.task_scores import Samples, difference
from workflow_scripts.handover.chain import Chain, TaskKind
from workflow_scripts.handover.tasks import TaskScore
from workflow_scripts.report import results as measured
from workflow_scripts.report.tables import Table

NONE_ASKED = (
    "No task was asked: no chat of the test split marks a reference answer, and"
    " evaluation.tasks.names is empty."
)


@dataclass(frozen=True)
class Link:
    """What one link scored."""

    name: str
    scores: list[TaskScore]
    samples: Mapping[TaskKind, Samples]
    """By kind of task: `tasks`, `references`."""
    kinds: list[TaskKind]
    """Of each score."""


def read(chain: Chain, asked: measured.Asked) -> list[Link]:
    """Links of a run that were asked, its base first."""
    return [
        _link(link.title, measured.read_tasks(files))
        for link in chain.links
        if (files := asked.tasks_of(link))
    ]


def asked_links(run: measured.RunResults) -> list[Link]:
    """The same of a run whose results were read; none where no task was asked for."""
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
    """A row a task, metric, run and link."""
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
            "Per cent ± a standard error over documents (of reference answers the 95 % Wilson"
            " interval), higher is better, but for perplexities and bits. The difference is to the"
            " link above of the same run, paired document by document: a difference smaller than"
            " twice its error is none; a dash where there is none to take. Every link reads the"
            " same token ids; “cut” counts documents whose prompt was longer than a GGUF of the"
            " model serves and lost its beginning. Figures that others publish are comparable where"
            " task, examples and documents are the same."
        ),
        header=["Task, run and link", "Examples", "Score", "Difference", "n", "cut"],
        rows=rows,
    )


def task_of(score: TaskScore) -> str:
    """`hellaswag acc_norm`, and the filter where there is one."""
    kind = "" if score.filter == "none" else f" ({score.filter})"
    return f"{score.task} {score.metric}{kind}"


def name_of(score: TaskScore, kind: TaskKind) -> str:
    """What tells a score from every other of its link: `hellaswag acc_norm, 10-shot`; of one that
    was asked in a group, the group too."""
    if kind == "references":
        return task_of(score)
    name = f"{task_of(score)}, {score.n_examples}-shot"
    group = score.asked.partition("@")[0]
    return name if group == score.task else f"{name} ({group})"


def cells_of(links: Sequence[Link]) -> Iterator[tuple[TaskScore, Link, list[str]]]:
    """Of every score of a run's links."""
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
    """`81.3 ± 0.4`, per cent where it is a share; its interval where that is known better."""
    scale = 100 if is_share(score) else 1
    value = f"{scale * score.score:.2f}"
    if score.low is not None and score.high is not None:
        return f"{value} [{scale * score.low:.2f}, {scale * score.high:.2f}]"
    error = score.standard_error
    return value if error is None else f"{value} ± {scale * error:.2f}"


def is_share(score: TaskScore) -> bool:
    """Whether it lies between 0 and 1 by what it is."""
    return score.metric.startswith(("acc", "exact_match", "f1", "em"))


def change(score: TaskScore, kind: TaskKind, link: Link, above: Link) -> str:
    """`+1.20 ± 0.30`, of the same task and metric of the link above."""
    same = attrgetter("asked", "task", "metric", "filter")
    others = [one for one in above.scores if same(one) == same(score)]
    if not others:
        return "–"
    found = difference(score, link.samples[kind], others[0], above.samples[kind])
    if found is None:
        return "–"
    scale = 100 if is_share(score) else 1
    # A difference that is shown as nothing has no sign.
    text = f"{scale * found.mean:+.2f}".replace("-", "−")
    text = "0.00" if text in ("+0.00", "−0.00") else text
    error = found.standard_error
    return text if error is None else f"{text} ± {scale * error:.2f}"
