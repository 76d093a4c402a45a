"""Complete runs on our own task files: models that copy, and models that cannot."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("lm_eval", reason="make test-tasks installs it")

from workflow_scripts import files
from workflow_scripts.evaluate import evaluate_tasks, fetch_tasks
from workflow_scripts.handover.tasks import FetchedTasks, TaskScores

FILES = "tests/unit/evaluate/tasks/files"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty cache of `datasets`."""
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = kept


@pytest.fixture(scope="module")
def evaluate(chain, tmp_path_factory):
    """`evaluate("--gguf", path, **settings)`: report and rows."""

    def run(flag, model, **settings):
        folder = tmp_path_factory.mktemp("scores")
        evaluate_tasks.main(
            [flag, str(model), "--facts", str(chain.facts), "--tokenizer", str(chain.tokenizer)]
            + ["--settings", json.dumps({"include": FILES, **settings}), "--threads", "1"]
            + ["--scores", str(folder / "s.json"), "--samples", str(folder / "s.parquet")]
        )
        rows = files.read_parquet(folder / "s.parquet").to_pylist()
        return TaskScores.read(folder / "s.json"), rows

    return run


def scores_of(report):
    return {(score.task, score.metric): score for score in report.scores}


@pytest.mark.parametrize("engine", ["--checkpoint", "--gguf"])
def test_a_model_that_copies_is_always_right(evaluate, copying, engine):
    model = {"--checkpoint": copying.checkpoint, "--gguf": copying.gguf}[engine]
    report, rows = evaluate(engine, model, names=["next_word", "say_again", "both_again@2"])
    scores = scores_of(report)
    assert {key: score.score for key, score in scores.items()} == {
        ("next_word", "acc"): 1.0,
        ("next_word", "acc_norm"): 1.0,
        ("say_again", "exact_match"): 1.0,
        ("both_again", "acc"): 1.0,
    }
    assert scores["next_word", "acc"].n_documents == 12
    assert scores["next_word", "acc"].n_examples == 0
    of_group = scores["both_again", "acc"]
    assert of_group.n_examples == 2
    assert of_group.n_documents == 16
    assert of_group.subtasks == ("next_word", "next_letter")
    assert {score.n_truncated for score in scores.values()} == {0}
    answered = {row["document"]: row["answer"] for row in rows if row["task"] == "say_again"}
    assert answered["0"] == "apple" and len(answered) == 12


@pytest.mark.parametrize("engine", ["--checkpoint", "--gguf"])
def test_a_model_without_preferences_is_at_chance(evaluate, uniform, engine):
    model = {"--checkpoint": uniform.checkpoint, "--gguf": uniform.gguf}[engine]
    report, rows = evaluate(engine, model, names=["next_word", "say_again"])
    scores = scores_of(report)
    # Of four equally likely choices the first counts; the right one is first in a quarter.
    assert scores["next_word", "acc"].score == 0.25
    expected = math.sqrt(0.25 * 0.75 / 11)
    assert scores["next_word", "acc"].standard_error == pytest.approx(expected)
    assert scores["say_again", "exact_match"].score == 0
    values = [row["value"] for row in rows if row["metric"] == "acc"]
    assert sorted(values) == [0] * 9 + [1] * 3


def test_a_limit_keeps_the_first_documents(evaluate, copying):
    report, rows = evaluate("--gguf", copying.gguf, names=["next_word"], limit=5)
    assert {score.n_documents for score in report.scores} == {5}
    assert {row["document"] for row in rows} == set("01234")


def test_chats_have_other_prompts_and_the_scores_say_so(evaluate, copying):
    asked = []
    for is_chat in (False, True):
        settings = {"names": ["next_word"], "limit": 2, "chat_template": is_chat}
        report, rows = evaluate("--gguf", copying.gguf, **settings)
        assert report.are_chats is is_chat
        asked.append({row["document"]: row["prompt_hash"] for row in rows})
    plain, chats = asked
    assert plain.keys() == chats.keys()
    assert not set(plain.values()) & set(chats.values())


def fetch_arguments(tmp_path, *names):
    return [
        *("--settings", json.dumps({"names": names, "include": FILES})),
        *("--fetched", str(tmp_path / "fetched.json")),
    ]


def test_the_users_own_tasks_need_no_hub(tmp_path):
    fetch_tasks.main(fetch_arguments(tmp_path, "both_again"))
    tasks = FetchedTasks.read(tmp_path / "fetched.json").tasks
    assert {task.task: task.n_documents for task in tasks} == {
        "next_word": 12,
        "next_letter": 4,
    }


def test_without_the_hub_the_message_says_how_to_get_the_data(
    tmp_path, monkeypatch, ends_with_message
):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = ends_with_message(fetch_tasks.main, fetch_arguments(tmp_path, "hellaswag"))
    for part in ("cannot be loaded", "hellaswag", "snakemake fetch_tasks", "HF_DATASETS_OFFLINE"):
        assert part in message


def test_an_unknown_task_is_named_with_a_similar_one(tmp_path, ends_with_message):
    message = ends_with_message(fetch_tasks.main, fetch_arguments(tmp_path, "helaswag"))
    assert "a task is unknown" in message and "did you mean hellaswag" in message
