"""What the demo must show, judged on the finished build in `results/`: `make check-demo`.

Not part of `make test`: the demo takes its minutes, and `make run` has just spent them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests import release_server
from tests.conftest import REPOSITORY
from tests.demo.questions import Answered, ask_base, ask_server, questions_of, shown
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.scores import Scores
from workflow_scripts.scoring.token_scores import TokenScores
from workflow_scripts.tokens.documents import Documents

RESULTS = REPOSITORY / "results"
RUNS = ["generic", "mistral"]
OF_BASE = RESULTS / "evaluation" / "demo" / "stdlib-help"
DATA = RESULTS / "data" / "stdlib-help"
WINDOW = 512
N_QUESTIONS = 20
MAX_TOKENS = 200


def perplexity(run: str, link: str) -> float:
    return Scores.read(RESULTS / "runs" / run / "evaluation" / f"{link}.json").perplexity


def smallest_quantization(run: str) -> Path:
    return min(
        (RESULTS / "runs" / run / "release").glob("*.gguf"), key=lambda path: path.stat().st_size
    )


@pytest.mark.parametrize("run", RUNS)
def test_test_perplexity_is_at_least_30_percent_below_the_bases_beyond_its_error(run: str) -> None:
    """Paired token by token, with 95 % of certainty."""
    base = TokenScores.read(OF_BASE / "base.tokens.parquet")
    smallest = smallest_quantization(run).stem.removeprefix(f"{run}-")
    for link in ("adapter", "merged", smallest):
        scores = TokenScores.read(RESULTS / "runs" / run / "evaluation" / f"{link}.tokens.parquet")
        change = scores.difference(base)
        assert change.standard_error is not None
        assert change.mean + 1.96 * change.standard_error <= math.log(0.7), (link, change)


@pytest.mark.parametrize("run", RUNS)
def test_f16_is_within_a_thousandth_of_merged_and_q8_0_within_a_hundredth_of_f16(run: str) -> None:
    assert perplexity(run, "F16") == pytest.approx(perplexity(run, "merged"), rel=0.001)
    assert perplexity(run, "Q8_0") == pytest.approx(perplexity(run, "F16"), rel=0.01)


def test_training_is_bounded_by_the_data() -> None:
    documents = Documents(DATA / "demo" / "tokens" / "train.arrow")
    assert 22_000 <= documents.lengths.sum() <= 28_000


def test_a_fifth_of_the_test_chats_is_longer_than_the_window() -> None:
    facts = Facts.read(RESULTS / "models" / "demo" / "facts.json")
    assert facts.sliding_window == WINDOW
    for split in SPLITS:
        lengths = Documents(DATA / "demo" / "tokens" / f"{split}.arrow").lengths
        assert (lengths > WINDOW).mean() >= 0.2


@pytest.fixture(scope="module")
def base_answers(tmp_path_factory) -> list[Answered]:
    """Of the base, by transformers: there is no GGUF of it."""
    return ask_base(RESULTS, tmp_path_factory.mktemp("base"), N_QUESTIONS, MAX_TOKENS)


@pytest.mark.parametrize("run", RUNS)
def test_the_first_20_test_questions_are_answered_rightly_and_to_the_end(
    run: str, base_answers, tmp_path, record_counts
) -> None:
    """By the smallest quantization through the chat API, greedily and without a penalty."""
    questions = questions_of(DATA / "clean" / "test.parquet", N_QUESTIONS)
    assert len(questions) == N_QUESTIONS
    assert sum(question.asked_signature is not None for question in questions) >= 14
    gguf = smallest_quantization(run)
    with release_server.serving(tmp_path / "log", gguf) as served:
        answers = ask_server(served.address, questions, MAX_TOKENS)
    assert [one.question for one in base_answers] == questions
    record_counts(gguf.stem, answers)
    record_counts("its base", base_answers)
    told = "\n".join(map(shown, answers))
    assert sum(one.is_ended for one in answers) >= 16, told
    assert sum(one.has_right_signature for one in answers) >= 10, told
