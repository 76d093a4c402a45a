"""The first questions of the test split, asked of the demo's models, and the answers judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import REPOSITORY
from tests.signature_answers import asked_signature, is_right
from workflow_scripts import files


class Question(NamedTuple):
    """What stands before the first answer of a test chat."""

    conversation: str
    messages: list[dict[str, Any]]
    asked_signature: str | None
    """The object whose signature is asked for; None for another question."""


class Answered(NamedTuple):
    """A model's answer."""

    question: Question
    text: str
    is_ended: bool
    """By EOS."""

    @property
    def has_right_signature(self) -> bool:
        """Whether a signature was asked for, and the answer's equals `inspect.signature`."""
        name = self.question.asked_signature
        return name is not None and is_right(self.text, name)


def questions_of(test: Path, n: int) -> list[Question]:
    """The first by id.

    Args:
        test: the test split of clean_dataset, Parquet.
    """
    rows = sorted(files.read_parquet(test).to_pylist(), key=lambda row: row["id"])
    questions = []
    for row in rows[:n]:
        said = [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
        first = [message["role"] for message in said].index("assistant")
        asked = asked_signature(said[first - 1]["content"])
        questions.append(Question(row["id"], said[:first], asked))
    return questions


def ask_server(address: str, questions: Sequence[Question], max_tokens: int) -> list[Answered]:
    """Greedily and without a penalty on repetition, over HTTP."""
    answers = []
    for question in questions:
        body = {
            "messages": question.messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            "repeat_penalty": 1.0,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            (choice,) = json.load(response)["choices"]
        is_ended = choice["finish_reason"] == "stop"
        answers.append(Answered(question, choice["message"]["content"], is_ended))
    return answers


def ask_base(results: Path, folder: Path, n: int, max_tokens: int) -> list[Answered]:
    """The base of the demo by the workflow's own `answer_prompts`, greedily."""
    path = folder / "answers.json"
    model, data = results / "models" / "demo", results / "data" / "stdlib-help"
    command = [sys.executable, "-m", "workflow_scripts.evaluate.answer_prompts"]
    command += ["--checkpoint", model / "checkpoint", "--facts", model / "facts.json"]
    command += ["--tokenizer", model / "tokenizer", "--tokens", data / "demo/tokens/test.arrow"]
    command += ["--settings", json.dumps({"n_prompts": n, "max_tokens": max_tokens})]
    command += ["--threads", str(os.cpu_count())]
    done = subprocess.run(
        [*map(str, command), "--answers", str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    questions = {one.conversation: one for one in questions_of(data / "clean/test.parquet", n)}
    return [
        Answered(questions[one["conversation"]], one["answer"], one["is_ended"])
        for one in files.read_json(path)["answers"]
    ]


def shown(answered: Answered) -> str:
    """A line for the reader of a failed check."""
    asked = answered.question.asked_signature or "another question"
    ended = "ended" if answered.is_ended else "NOT ENDED"
    right = "right" if answered.has_right_signature else "–"
    return f"{asked}: {ended}, {right}: {answered.text!r}"
