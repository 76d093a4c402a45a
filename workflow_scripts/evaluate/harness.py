"""lm-evaluation-harness: which tasks, what they need from the Hub, and what a link scores in them.

A preset is one of its tasks with as many examples as the published figures have:

- `mmlu` 5, `triviaqa` 5, `gsm8k` 8: Mistral 7B (arXiv:2310.06825, table 2). Its 52.2 of GSM8K is
  the majority of 8 drawn answers; here it is one greedy answer, as on the leaderboard.
- `hellaswag` 10, `arc_challenge` 25: Open LLM Leaderboard v1
  (huggingface.co/docs/leaderboards/open_llm_leaderboard/archive), read by `acc_norm`. The paper has
  both without examples: `hellaswag@0`, `arc_challenge@0`.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files
from workflow_scripts.evaluate.task_scores import Sample
from workflow_scripts.handover.tasks import FetchedTask, TaskScore
from workflow_scripts.log import StageError
from workflow_scripts.settings import TaskSettings

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

PRESETS = {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25, "triviaqa": 5, "gsm8k": 8}
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def check_installed() -> None:
    """
    Raises:
        StageError: the harness is not there.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise StageError(
            "lm-evaluation-harness is not installed",
            where="evaluation.tasks.names",
            found=error,
            to_fix="`make tasks`, or `snakemake tasks --sdm conda`;"
            " workflow_scripts/evaluate/README.md tells how",
        ) from error
    # It tells every request, and the settings of every task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def asked(name: str) -> tuple[str, int | None]:
    """Task and number of examples of an entry of `names`; None is what the task's file says."""
    task, _, n_examples = name.partition("@")
    return task, int(n_examples) if n_examples else PRESETS.get(task)


@functools.cache  # it reads 14,000 files, 10 s
def _index(folder: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def manager_of(settings: TaskSettings) -> TaskManager:
    """The index of all tasks, those of the user among them.

    Raises:
        StageError: one that is asked for is not there.
    """
    manager = _index(settings.include and str(Path(settings.include).expanduser()))
    unknown = [task for task, _ in map(asked, settings.names) if task not in manager.task_index]
    if unknown:
        close = [difflib.get_close_matches(task, list(manager.task_index), n=3) for task in unknown]
        raise StageError(
            "a task is unknown",
            where="evaluation.tasks.names",
            found=", ".join(unknown),
            expected="a task of lm-evaluation-harness (`lm-eval ls tasks`), or of"
            " `evaluation.tasks.include`",
            to_fix=f"did you mean {', '.join(sum(close, []))}?" if any(close) else None,
        )
    return manager


@contextmanager
def hub_explained(name: str) -> Iterator[None]:
    """
    Raises:
        StageError: the data of a task is not to be had.
    """
    from datasets.exceptions import DatasetNotFoundError
    from httpx2 import HTTPError

    try:
        yield
    except (ConnectionError, HTTPError, DatasetNotFoundError, FileNotFoundError) as error:
        if files.is_full_disk(error):
            raise
        raise StageError(
            "the data of a task cannot be had",
            where=f"evaluation.tasks.names, {name}",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            to_fix="run `snakemake fetch_tasks` where the Hub can be reached, with the same"
            " HF_HOME; HF_DATASETS_OFFLINE=1 then takes what lies there and asks nobody",
        ) from error


def fetch(name: str, manager: TaskManager) -> list[FetchedTask]:
    """Bring the data of a task into the cache of `datasets`; what it consists of.

    Raises:
        StageError: the Hub cannot be reached, and the cache has it not.
    """
    with hub_explained(name):
        loaded = manager.load([asked(name)[0]])["tasks"]
    return [
        FetchedTask(
            task=task_name,
            version=task.VERSION,
            dataset=task.DATASET_PATH,
            subset=task.DATASET_NAME,
            n_documents=len(task.eval_docs),
        )
        for task_name, task in loaded.items()
    ]


def evaluate(
    lm: TemplateLM, name: str, settings: TaskSettings, manager: TaskManager
) -> tuple[list[TaskScore], list[Sample]]:
    """Scores of a task, and what every document of it scored by each metric.

    Raises:
        StageError: its data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate

    task, n_examples = asked(name)
    with hub_explained(name):
        results = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=n_examples,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            task_manager=manager,
        )
    rows = list(sample_rows(lm, name, results["samples"]))
    return scores_of(name, results, rows), rows


def sample_rows(
    lm: TemplateLM,
    name: str,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],  # untyped: lm-evaluation-harness's log
) -> Iterator[Sample]:
    """Of what the harness logs of every document."""
    from workflow_scripts.evaluate.harness_models import is_truncated

    for task, documents in samples.items():
        for document in documents:
            loses_tokens = any(is_truncated(lm, request) for request in document["arguments"])
            for metric in document["metrics"]:
                value = document[metric]
                is_number = isinstance(value, bool | int | float)
                yield {
                    "asked": name,
                    "task": task,
                    "document": str(document["doc_id"]),
                    "metric": metric,
                    "filter": document["filter"],
                    "value": float(value) if is_number else None,
                    "prompt_hash": document["doc_hash"] + document["prompt_hash"],
                    "answer": as_text(document["filtered_resps"]),
                    "reference": as_text(document["target"]),
                    "is_truncated": loses_tokens,
                }


def as_text(value: Any) -> str:
    """A text as it is, a single one in a list too; anything else as JSON."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def scores_of(
    asked_name: str,
    results: Mapping[str, Any],  # untyped: as lm-evaluation-harness gives them
    rows: Sequence[Sample],
) -> list[TaskScore]:
    """A score a metric; of a tag or a group that has no score of its own, its tasks'."""
    children: Mapping[str, Sequence[str]] = results["group_subtasks"]

    def leaves(name: str) -> list[str]:
        return (
            [leaf for child in children[name] for leaf in leaves(child)]
            if name in children
            else [name]
        )

    task, _ = asked(asked_name)
    metrics = results["results"]
    has_score = any("," in key for key in metrics.get(task, ()))
    shown = [task] if has_score else [name for name in metrics if name in results["configs"]]
    truncated: dict[str, set[str]] = {}
    for row in rows:
        if row["is_truncated"]:
            truncated.setdefault(row["task"], set()).add(row["document"])
    scores = []
    for name in shown:
        of_task = leaves(name)
        for key, value in metrics[name].items():
            metric, comma, kind = key.partition(",")
            if not comma or key in NOT_METRICS or metric.endswith("_stderr"):
                continue
            error = metrics[name].get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    asked=asked_name,
                    task=name,
                    n_examples=results["n-shot"][of_task[0]],
                    metric=metric,
                    filter=kind,
                    score=float(value),
                    standard_error=error if isinstance(error, float) else None,
                    low=None,
                    high=None,
                    n_documents=sum(results["n-samples"][leaf]["effective"] for leaf in of_task),
                    n_truncated=sum(len(truncated.get(leaf, ())) for leaf in of_task),
                    subtasks=tuple(of_task),
                )
            )
    return scores
