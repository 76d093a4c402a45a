from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.chats.tables import clean_schema
from workflow_scripts.demo.stdlib_long_chats import make_long_chats
from workflow_scripts.evaluate import evaluate_recall
from workflow_scripts.evaluate.long_prompts import Answer, answer, summarize, wilson_interval
from workflow_scripts.evaluate.needles import Needle
from workflow_scripts.evaluate.questions import Question
from workflow_scripts.scoring.transformers_model import TransformersModel

QUESTION = Question(
    statements=((0.5, "The code of Oslo is 1234."),),
    text="What is the code of Oslo?",
    answer_start="The code of Oslo is",
    answer="1234",
)
SETTINGS = '{"lengths_tokens": [120, 60], "depths": [1, 0], "n_prompts": 3}'


@pytest.fixture(scope="module")
def chats_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "validation.parquet"
    rows = [
        {
            "id": f"chat/{number}",
            "messages": chat["messages"],
            "source_file": "c",
            "source_line": number,
        }
        for number, chat in enumerate(make_long_chats(n_conversations=20, seed=0))
    ]
    files.write_parquet(path, pa.Table.from_pylist(rows, schema=clean_schema()))
    return path


@pytest.fixture
def arguments(chain, chats_path, tmp_path):
    def make(settings=SETTINGS, chats=chats_path):
        return [
            *("--checkpoint", str(chain.checkpoint), "--facts", str(chain.facts)),
            *("--adapter", str(chain.adapter)),
            *("--tokenizer", str(chain.tokenizer), "--chats", str(chats)),
            *("--settings", settings, "--scores", str(tmp_path / "recall.json")),
        ]

    return make


@pytest.fixture
def report(arguments, tmp_path):
    evaluate_recall.main(arguments())
    return files.read_json(tmp_path / "recall.json")


def test_there_is_one_cell_per_length_and_depth_in_order(report):
    cells = [(cell["length_tokens"], cell["depth_fraction"]) for cell in report["cells"]]
    assert cells == [(60, 0.0), (60, 1.0), (120, 0.0), (120, 1.0)]
    assert {cell["n_prompts"] for cell in report["cells"]} == {3}
    assert report["sliding_window"] == 300
    assert report["chance_nats_per_answer"] == pytest.approx(math.log(9000))


def test_random_weights_recall_no_fact_and_guess_among_all_tokens(report):
    for cell in report["cells"]:
        assert cell["n_exact"] == cell["exact_fraction"] == cell["exact_low_fraction"] == 0
        # Five tokens, each one of 32,768 at random: 52 nats; initial logits scatter.
        assert 30 < cell["nats_per_answer"] < 120
        assert cell["standard_error_nats_per_answer"] > 0


def test_the_adapter_changes_the_answers_of_the_base(
    report, chain, chats_path, arguments, tmp_path
):
    without = arguments()
    at = without.index("--adapter")
    del without[at : at + 2]
    evaluate_recall.main(without)
    base = files.read_json(tmp_path / "recall.json")
    assert base["cells"][0]["nats_per_answer"] != report["cells"][0]["nats_per_answer"]


@pytest.fixture(scope="module")
def tiny_model(checkpoint):
    """300 tokens of vocabulary and a window of 8: prompts of 40 tokens are five windows long."""
    return TransformersModel(checkpoint, window=8, precision="float32")


def greedy(model, prompt, n_tokens):
    """Decode token by token over the whole text each time, without a cache or generation code."""
    tokens = torch.from_numpy(prompt.astype("int64"))[None]
    with torch.no_grad():
        for _ in range(n_tokens):
            likeliest = model(tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, likeliest[None, None]], dim=1)
    return tokens[0, len(prompt) :].numpy()


def needle_of(prompt, right):
    input_ids = np.concatenate([prompt, right]).astype(np.int32)
    return Needle(QUESTION, input_ids, (len(prompt), len(input_ids)))


@pytest.mark.parametrize("seed", range(5))
def test_exact_is_what_greedy_decoding_would_answer(tiny_model, seed):
    prompt = np.random.default_rng(seed).integers(3, 300, size=40)
    decoded = greedy(tiny_model.model, prompt, 5)
    assert answer(tiny_model, needle_of(prompt, decoded)).is_exact
    for at in range(5):  # a wrong token at any place, including the last
        wrong = decoded.copy()
        wrong[at] = (wrong[at] + 1) % 300
        assert not answer(tiny_model, needle_of(prompt, wrong)).is_exact


def test_generation_with_a_cache_answers_the_same_beyond_the_window(tiny_model):
    prompt = np.random.default_rng(9).integers(3, 300, size=40)
    generated = tiny_model.model.generate(
        torch.from_numpy(prompt)[None],
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 40:]
    assert answer(tiny_model, needle_of(prompt, generated.numpy())).is_exact


def test_nats_are_summed_over_the_whole_code(tiny_model):
    generator = np.random.default_rng(1)
    prompt, right = generator.integers(3, 300, size=30), generator.integers(3, 300, size=5)
    tokens = torch.from_numpy(np.concatenate([prompt, right]))[None]
    with torch.no_grad():
        log_p = tiny_model.model(tokens, use_cache=False).logits[0].log_softmax(dim=-1)
    expected = -sum(log_p[29 + at, right[at]].item() for at in range(5))
    assert answer(tiny_model, needle_of(prompt, right)).nats == pytest.approx(expected, abs=1e-3)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilsons_interval_solves_its_equation(n, share):
    """Its ends are the shares p that are 1.96 standard errors of p away from the observed share."""
    n_right = round(share * n)
    low, high = wilson_interval(n_right, n)
    found = n_right / n
    assert 0 <= low <= found <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(found - end) == pytest.approx(
                1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-9
            )


def test_no_right_answer_of_20_allows_up_to_16_per_cent():
    # Wilson's bound for 0 of n: z² ÷ (n + z²).
    assert wilson_interval(0, 20) == (0.0, pytest.approx(3.8415 / 23.8415, abs=1e-4))
    low, high = wilson_interval(20, 20)
    assert (low, high) == (pytest.approx(20 / 23.8415, abs=1e-4), pytest.approx(1.0))


def test_answers_are_summarized():
    answers = [Answer(True, 1.0), Answer(False, 4.0), Answer(False, 7.0)]
    cell = summarize(answers, length_tokens=60, depth_fraction=0.5)
    assert (cell.length_tokens, cell.depth_fraction) == (60, 0.5)
    assert (cell.n_prompts, cell.n_exact) == (3, 1)
    assert cell.exact_fraction == pytest.approx(1 / 3)
    assert cell.nats_per_answer == 4.0
    assert cell.standard_error_nats_per_answer == pytest.approx(3 / math.sqrt(3))
    alone = summarize(answers[:1], length_tokens=60, depth_fraction=0.5)
    assert alone.standard_error_nats_per_answer is None


def test_a_prompt_beyond_the_context_is_a_stage_error(arguments, ends_with_message, tmp_path):
    message = ends_with_message(
        evaluate_recall.main, arguments(settings='{"lengths_tokens": [60, 513]}')
    )
    for part in ("longer than the model's context", "lengths_tokens", "513", "at most 512"):
        assert part in message
    assert not (tmp_path / "recall.json").exists()


def test_too_little_held_out_text_is_a_stage_error(arguments, chain, ends_with_message):
    message = ends_with_message(evaluate_recall.main, arguments(chats=chain.clean))
    for part in ("held-out text is too short", "120 tokens", "validation_fraction"):
        assert part in message


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.evaluate_recall")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "numpy", "mistral_common"}
