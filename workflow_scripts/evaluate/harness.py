"""Tasks of lm-evaluation-harness: their names, their data from the Hub, and the scores of a link.

A preset is one of its tasks with the number of examples of the published figures:

- `mmlu` 5, `triviaqa` 5, `gsm8k` 8: Mistral 7B (arXiv:2310.06825, table 2). Its 52.2 of GSM8K is
  the majority of 8 sampled answers; here it is one greedy answer, as on the leaderboard.
- `hellaswag` 10, `arc_challenge` 25: Open LLM Leaderboard v1
  (huggingface.co/docs/leaderboards/open_llm_leaderboard/archive), read by `acc_norm`. The paper
  gives both without examples: `hellaswag@0`, `arc_challenge@0`.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from httpx2 import HTTPError
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from workflow_scripts import files
from workflow_scripts.evaluate.harness_models import is_truncated
from workflow_scripts.evaluate.task_scores import Sample
from workflow_scripts.handover.tasks import FetchedTask, TaskScore
from workflow_scripts.log import StageError
from workflow_scripts.settings import TaskSettings

PRESETS = {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25, "triviaqa": 5, "gsm8k": 8}
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def asked(name: str) -> tuple[str, int | None]:
    """Return task and number of examples of an entry of `names`; None is the task's own number."""
    task, _, n_examples = name.partition("@")
    return task, int(n_examples) if n_examples else PRESETS.get(task)


@functools.cache  # it reads 14,000 files, 10 s
def _index(folder: str | None) -> TaskManager:
    # It logs every request and the settings of every task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=folder)


def manager_of(settings: TaskSettings) -> TaskManager:
    """Return the index of all tasks, including the user's.

    Raises:
        StageError: a requested task is unknown.
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
    """Explain errors that mean that the data of a task is missing.

    Raises:
        StageError: the data of a task is neither in the cache nor on the Hub.
    """
    try:
        yield
    except (ConnectionError, HTTPError, DatasetNotFoundError, FileNotFoundError) as error:
        if files.is_full_disk(error):
            raise
        raise StageError(
            "the data of a task cannot be loaded",
            where=f"evaluation.tasks.names, {name}",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            to_fix="run `snakemake fetch_tasks` where the Hub can be reached, with the same"
            " HF_HOME; HF_DATASETS_OFFLINE=1 then reads only that cache",
        ) from error


def fetch(name: str, manager: TaskManager) -> list[FetchedTask]:
    """Bring the data of a task into the cache of `datasets`, and return a description of it.

    Raises:
        StageError: the Hub cannot be reached, and the data is not in the cache.
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
    """Return the scores of a task, and the score of each of its documents by each metric.

    Raises:
        StageError: its data cannot be loaded.
    """
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
    """Yield the score of each document by each metric, from the harness's log."""
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
    """Return a text, also from a list of one, unchanged; anything else as JSON."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def scores_of(
    asked_name: str,
    results: Mapping[str, Any],  # untyped: lm-evaluation-harness's results
    rows: Sequence[Sample],
) -> list[TaskScore]:
    """Return one score per metric; a tag or group without a score gives those of its tasks."""
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
