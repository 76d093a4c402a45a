from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from workflow_scripts import files
from workflow_scripts.evaluate import exact_match, match_references
from workflow_scripts.evaluate.greedy import by_llama_cpp
from workflow_scripts.evaluate.long_prompts import wilson_interval
from workflow_scripts.evaluate.prompts import before_last_answer
from workflow_scripts.handover.tasks import ReferenceScores
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.tokens.documents import Document, Documents


@pytest.mark.parametrize(
    ("answer", "references", "is_right"),
    [
        ("The Eiffel-Tower!", ["eiffel tower"], False),  # punctuation goes without a space
        ("The Eiffel Tower!", ["eiffel  tower"], True),
        ("an answer", ["Answer."], True),
        ("another", ["other"], False),  # articles are words
        ("x", ["y", "X"], True),
        ("", ["x"], False),
        ("It takes `a`, `b`.", ["it takes a b"], True),
        ("the", ["a"], True),  # as in SQuAD: both become empty
    ],
)
def test_answers_are_compared_as_squad_does(answer, references, is_right):
    assert exact_match.matches(answer, references) is is_right


def test_the_prompt_is_the_last_question_with_all_before_it():
    supervised = np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=bool)
    tokens = np.arange(8, dtype=np.int32)
    chats = [
        Document("two", tokens, supervised),
        Document("unmarked", tokens, supervised),
        Document("unsupervised end", tokens[:6], supervised[:6]),
        Document("all", tokens, np.ones(8, dtype=bool)),
    ]
    marked = dict.fromkeys(["two", "unsupervised end", "all", "elsewhere"], ["x"])
    (asked,) = before_last_answer(chats, marked)
    assert asked.conversation == "two" and asked.prompt.tolist() == [0, 1, 2, 3, 4, 5]
    assert asked.reference.tolist() == [6, 7]


@pytest.fixture
def match(chain, tmp_path):
    """`match(references, "--gguf", path, **settings)`: report and rows; references by chat."""

    def run(references, flag, model, **settings):
        table = files.read_parquet(chain.clean)
        column = [references.get(name) for name in table["id"].to_pylist()]
        at = table.schema.get_field_index("references")
        table = table.set_column(at, "references", pa.array(column, pa.list_(pa.string())))
        files.write_parquet(tmp_path / "clean.parquet", table)
        match_references.main(
            [flag, str(model), "--facts", str(chain.facts), "--tokenizer", str(chain.tokenizer)]
            + ["--tokens", str(chain.tokens), "--clean", str(tmp_path / "clean.parquet")]
            + ["--settings", json.dumps({"max_answer_tokens": 6, **settings}), "--threads", "1"]
            + ["--scores", str(tmp_path / "s.json"), "--samples", str(tmp_path / "s.parquet")]
        )
        rows = files.read_parquet(tmp_path / "s.parquet").to_pylist()
        return ReferenceScores.read(tmp_path / "s.json"), rows

    return run


@pytest.fixture(scope="module")
def greedy_answer(chain):
    """The GGUF's greedy answer to the last question of the second chat."""
    document = Documents(chain.tokens)[1]
    runs = np.flatnonzero(np.diff(document.is_supervised.astype(int), prepend=0) == 1)
    prompt = document.input_ids[: runs[-1]]
    with LlamaCppModel(chain.gguf, context_tokens=300, n_threads=1) as model:
        tokens = by_llama_cpp(model, -1)(prompt, 6)
    return load_mistral_tokenizer(chain.tokenizer, for_training=False).decode(tokens).strip()


@pytest.mark.parametrize("engine", ["--gguf", "--checkpoint"])
def test_an_answer_equal_to_a_reference_is_right_and_another_wrong(
    match, chain, greedy_answer, engine
):
    model = {"--gguf": chain.gguf, "--checkpoint": chain.merged}[engine]
    references = {"chat/0": ["no such words"], "chat/1": ["nothing", greedy_answer.upper()]}
    report, rows = match(references, engine, model)
    (score,) = report.scores
    assert (score.n_documents, score.score) == (2, 0.5)
    assert (score.low, score.high) == pytest.approx(wilson_interval(1, 2))
    assert [(row["document"], row["value"]) for row in rows] == [("chat/0", 0), ("chat/1", 1)]
    assert rows[1]["answer"] == greedy_answer


def test_both_engines_get_the_same_prompts(match, chain):
    references = {"chat/0": ["x"], "chat/1": ["y"]}
    hashes = [
        [row["prompt_hash"] for row in match(references, flag, model)[1]]
        for flag, model in (("--gguf", chain.gguf), ("--checkpoint", chain.merged))
    ]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 2


def test_without_references_no_prompt_is_asked_and_none_scored(match, tmp_path):
    report, rows = match({}, "--gguf", tmp_path / "no such.gguf")
    assert report.scores == () and rows == []
    assert report.n_with_reference == 0


def test_prompts_without_room_for_an_answer_are_counted(match, chain):
    report, rows = match({"chat/0": ["x"], "chat/1": ["y"]}, "--gguf", chain.gguf,
                         max_answer_tokens=280)  # fmt: skip
    assert report.n_too_long == 1 and len(rows) == 1


def test_a_limit_keeps_the_first_prompts(match, chain):
    _, rows = match({"chat/0": ["x"], "chat/1": ["y"]}, "--gguf", chain.gguf, limit=1)
    assert [row["document"] for row in rows] == ["chat/0"]


def test_help_starts_without_torch(ask_for_help):
    for program in ("match_references", "evaluate_tasks", "fetch_tasks"):
        done, imported = ask_for_help(f"workflow_scripts.evaluate.{program}")
        assert done.returncode == 0
        assert not imported & {"torch", "transformers", "llama_cpp", "lm_eval"}
