"""What the demo must show, judged on the finished build in `results/`: `make check-demo`.

Not part of `make test`: the demo takes its ten minutes, and `make run` has just spent them.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from workflow_scripts import files
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

RESULTS = Path(__file__).parents[2] / "results"
RUNS = ["generic", "mistral"]
EOS = 2  # of the v3 tokenizer


def perplexity(run: str, link: str) -> float:
    return files.read_json(RESULTS / "runs" / run / "evaluation" / f"{link}.json")["perplexity"]


@pytest.mark.parametrize("run", RUNS)
def test_fine_tuning_lowers_test_perplexity_by_at_least_30_percent(run: str) -> None:
    base = files.read_json(RESULTS / "evaluation/demo/stdlib-help/base.json")["perplexity"]
    for link in ("adapter", "merged", "Q4_K_M"):
        assert perplexity(run, link) <= 0.7 * base


@pytest.mark.parametrize("run", RUNS)
def test_f16_is_within_a_thousandth_of_merged_and_q8_0_within_a_hundredth_of_f16(run: str) -> None:
    assert perplexity(run, "F16") == pytest.approx(perplexity(run, "merged"), rel=0.001)
    assert perplexity(run, "Q8_0") == pytest.approx(perplexity(run, "F16"), rel=0.01)


def test_documents_run_from_20_to_3000_tokens_and_some_are_several_windows_long() -> None:
    from workflow_scripts.data.documents import SPLITS, Documents

    folder = RESULTS / "data/stdlib-help/demo/tokens"
    lengths = [
        length for split in SPLITS for length in Documents(folder / f"{split}.arrow").lengths
    ]
    assert 15 <= min(lengths) <= 25
    assert 2000 <= max(lengths) <= 3000
    assert sum(length > 2 * 512 for length in lengths) >= 10


def test_where_the_right_answer_ends_the_model_would_end_it() -> None:
    """EOS has more than half of the probability after most answers. Seen: 88 % of them, after none
    by the base, and after 34 % by the run that trained with its neighbours in view."""
    folder = RESULTS / "runs" / "mistral" / "evaluation"
    scores = files.read_parquet(folder / "Q4_K_M.tokens.parquet")
    nats = scores["nats"].to_numpy()[scores["token"].to_numpy() == EOS]
    assert len(nats) > 100
    assert (nats < math.log(2)).mean() > 0.5


def ask_20_questions(run: str) -> int:
    """Ask the Q4_K_M release 20 test questions, greedily; how many answers end by EOS.

    With Ollama's penalty on repetition: without it a model this small may repeat itself without
    end; of one build 19 answers of 20 ended, of another 10. Why they differ is not known.

    Each prompt must be mistral-common's, id by id, with exactly one BOS.
    """
    from llama_cpp import Llama
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    chats = files.read_parquet(RESULTS / "data/stdlib-help/clean/test.parquet").to_pylist()[:20]
    official = load_mistral_tokenizer(RESULTS / "models/demo/tokenizer", for_training=False)
    model = Llama(
        str(RESULTS / "runs" / run / "release" / f"{run}-Q4_K_M.gguf"), n_ctx=512, verbose=False
    )
    n_finished = 0
    try:
        for chat in chats:
            answers_from = [message["role"] for message in chat["messages"]].index("assistant")
            question = chat["messages"][:answers_from]
            request = ChatCompletionRequest.from_openai(messages=question)
            expected = official.encode_chat_completion(request).tokens
            completion = model.create_chat_completion(
                question, max_tokens=200, temperature=0, repeat_penalty=1.1
            )
            assert model.input_ids[: len(expected)].tolist() == expected
            assert expected.count(1) == 1
            n_finished += completion["choices"][0]["finish_reason"] == "stop"
    finally:
        model.close()
    return n_finished


def test_most_of_20_test_questions_are_answered_to_the_end() -> None:
    assert ask_20_questions("mistral") > 10


def test_the_generic_run_is_asked_with_one_bos_as_well() -> None:
    # Every prompt is judged inside. How many answers end is not: trained with its neighbours in
    # view, this run was seen to finish a third of them.
    ask_20_questions("generic")
