from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.context import cell_of
from workflow_scripts import files
from workflow_scripts.demo.stdlib_long_chats import make_long_chats
from workflow_scripts.evaluate import context_length, evaluate_context, long_prompts
from workflow_scripts.evaluate.needles import NeedlePrompts, haystack
from workflow_scripts.handover.context import TaskCell
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import ContextSettings
from workflow_scripts.tokens.documents import Document
from workflow_scripts.tokens.rendering import Renderer

STATEMENT = re.compile(r"The code of ([\w ]+) is (\d{4})\.")
SAME = re.compile(r"The variable (\w+) is (?:the same as the variable )?(\w+)\.")


class Reader:
    """Remembers the last `reach_tokens` tokens, and looks up the answer in them."""

    def __init__(self, tokenizer, reach_tokens):
        self._tokenizer = tokenizer
        self._reach = reach_tokens

    def found(self, text):
        codes = dict(STATEMENT.findall(text))
        asked = re.findall(r"What is the code of ([\w ]+)\?", text)
        if asked:
            return codes.get(asked[-1])
        values = {}
        for name, value in SAME.findall(text):
            values[name] = value if value.isdigit() else values.get(value)
        asked = re.findall(r"What number is the variable (\w+)\?", text)
        return values.get(asked[-1]) if asked else None

    def logit_blocks(self, input_ids, positions):
        start = positions[0] + 1
        remembered = input_ids[max(0, start - self._reach) : start]
        right = input_ids[positions + 1]
        given = self._tokenizer.decode(right.tolist()).strip()
        knows = self.found(self._tokenizer.decode(remembered.tolist())) == given
        logits = torch.zeros(len(positions), 32_768)
        logits[torch.arange(len(positions)), torch.from_numpy(right.astype(np.int64))] = (
            9.0 if knows else -9.0
        )
        yield logits


@pytest.fixture(scope="module")
def tokenizer(tokenizer_v3):
    return load_mistral_tokenizer(tokenizer_v3, for_training=True)


@pytest.fixture(scope="module")
def chats():
    return make_long_chats(n_conversations=40, seed=0)


@pytest.fixture(scope="module")
def prompts(tokenizer, chats):
    paragraphs = haystack(message for chat in chats for message in chat["messages"])
    return NeedlePrompts(paragraphs, Renderer(tokenizer), seed=0)


LENGTHS = [256, 512, 1024, 2048]


def scored(model, prompts, **settings):
    context = ContextSettings(**settings)
    questions = evaluate_context.questions_of(context, LENGTHS)
    cells = long_prompts.measure(model, prompts, questions, context)
    return cells, context_length.scores_by_length(cells)


def test_a_model_that_remembers_everything_has_the_whole_length(tokenizer, prompts):
    cells, scores = scored(Reader(tokenizer, 10**9), prompts, n_prompts=3)
    assert scores == dict.fromkeys(LENGTHS, 100.0)
    found = context_length.effective_lengths(scores)
    assert (found.effective_tokens_ruler, found.effective_tokens_nolima) == (2048, 2048)
    assert {cell.n_prompts for cell in cells} == {
        3,
        15,
    }  # variable tracing has no depth: one cell for all its prompts


def test_the_effective_length_ends_at_the_memory_of_a_model(tokenizer, prompts):
    cells, scores = scored(Reader(tokenizer, 600), prompts, n_prompts=4, tasks=["single"])
    assert scores[256] == scores[512] == 100
    assert 20 < scores[1024] < 80 and scores[2048] < 60
    found = context_length.effective_lengths(scores)
    assert (found.effective_tokens_ruler, found.effective_tokens_nolima) == (512, 512)
    deep = {
        cell.depth_fraction: cell.exact_fraction for cell in cells if cell.length_tokens == 2048
    }
    assert (deep[0.0], deep[1.0]) == (0, 1)


def test_a_model_that_answers_nothing_is_not_measurable_and_not_zero(tokenizer, prompts):
    _, scores = scored(Reader(tokenizer, 5), prompts, n_prompts=2)
    assert scores == dict.fromkeys(LENGTHS, 0.0)
    found = context_length.effective_lengths(scores)
    assert found.is_measurable is False
    assert found.effective_tokens_ruler is found.effective_tokens_nolima is None


@pytest.mark.parametrize(
    ("scores", "ruler", "nolima"),
    [
        ({512: 100, 1024: 86, 2048: 85.6, 4096: 85.5}, 2048, 4096),
        ({512: 100, 1024: 80, 2048: 99}, 512, 512),  # a length after a gap does not count
        ({512: 60, 1024: 60, 2048: 51.1, 4096: 50.9}, 0, 2048),
        ({2048: 90, 4096: 80}, 2048, 4096),  # no length is short: the shortest is the base
        ({512: 0, 1024: 100}, None, None),
    ],
)
def test_the_effective_length_by_both_definitions(scores, ruler, nolima):
    found = context_length.effective_lengths(scores)
    assert (found.effective_tokens_ruler, found.effective_tokens_nolima) == (ruler, nolima)


def cells_of(shares, n_prompts):
    """Cells of one task and one depth per length, with these shares of right answers."""
    return [
        TaskCell(
            task="single", **dict(cell_of(512 << at, None, round(share * n_prompts), n_prompts))
        )
        for at, share in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("shares", "n_prompts", "low", "high"),
    [
        ((1, 1, 1, 1), 500, 4096, 4096),
        ((1, 1, 0, 0), 500, 1024, 1024),
        # 9 of 10 may or may not mean more than 85.6 %: the interval is as wide as possible.
        ((1, 0.9, 0.2), 10, 0, 1024),
        ((1, 0.9, 0.2), 2000, 1024, 1024),
    ],
)
def test_the_interval_of_the_effective_length_narrows_with_the_prompts(
    shares, n_prompts, low, high
):
    found = context_length.effective_intervals(cells_of(shares, n_prompts), seed=0)
    assert found.effective_tokens_ruler_low == low
    assert found.effective_tokens_ruler_high == high


def test_the_interval_contains_the_truth_at_least_95_times_of_100():
    # Answers are drawn with a known chance of being right. The interval is wider than necessary,
    # because there are few lengths (measured: it contains the truth in all 100 cases).
    shares = (0.97, 0.92, 0.80, 0.5)
    truth = 1024
    generator = np.random.default_rng(3)
    n_held = 0
    for trial in range(100):
        cells = [
            cell.changed(n_exact=int(generator.binomial(40, share)))
            for cell, share in zip(cells_of(shares, 40), shares, strict=True)
        ]
        found = context_length.effective_intervals(cells, seed=trial)
        n_held += found.effective_tokens_ruler_low <= truth <= found.effective_tokens_ruler_high
    assert n_held >= 95


def test_a_length_that_is_not_measurable_has_no_interval():
    found = context_length.effective_intervals(cells_of((0, 1), 10), seed=0)
    assert [value for _, value in found] == [None] * 4


def test_lengths_double_up_to_the_context():
    assert evaluate_context.lengths_of(ContextSettings(), 32_768) == [
        512, 1024, 2048, 4096, 8192, 16_384, 32_768,
    ]  # fmt: skip
    assert evaluate_context.lengths_of(ContextSettings(), 512) == [128, 256, 512]
    own = ContextSettings(lengths_tokens=[900, 300, 5000])
    assert evaluate_context.lengths_of(own, 1000) == [300, 900]


class Forgetful:
    """A token costs 2 nats if the piece has fewer than 40 tokens before it, else 1."""

    def logit_blocks(self, input_ids, positions):
        nats = np.where(positions + 1 < 40, 2.0, 1.0)
        rest = np.log(np.expm1(nats) / 9)  # nine other words share 1 − e^−nats
        logits = torch.from_numpy(rest)[:, None].repeat(1, 10).float()
        right = torch.from_numpy(input_ids[positions + 1].astype(np.int64))
        logits[torch.arange(len(positions)), right] = 0.0
        yield logits


def test_the_gain_of_long_context_compares_the_same_tokens():
    documents = [
        Document(str(n), np.arange(n, dtype=np.int32) % 10, np.ones(n, bool)) for n in (30, 80, 100)
    ]
    settings = ContextSettings(short_tokens=32)
    found = context_length.long_gain(Forgetful(), documents, 200, settings)
    # With 32 tokens of context each costs 2 nats; with all, those from position 40 on cost 1.
    n_tokens = (80 - 32) + (100 - 32)
    assert found.n_long_conversations == 2 and found.n_long_tokens == n_tokens
    assert found.long_gain_nats_per_token == pytest.approx((n_tokens - 16) / n_tokens, rel=1e-5)
    assert found.long_gain_standard_error_nats_per_token < 0.1
    none = context_length.long_gain(Forgetful(), documents[:1], 200, settings)
    assert none.long_gain_nats_per_token is None
    settings = ContextSettings(short_tokens=32, n_long_conversations=1)
    one = context_length.long_gain(Forgetful(), documents, 200, settings)
    assert (one.n_long_conversations, one.n_long_tokens) == (1, 80 - 32)
    settings = ContextSettings(short_tokens=32, n_long_conversations=0)
    asked_for_none = context_length.long_gain(Forgetful(), documents, 200, settings)
    assert asked_for_none == none.changed(n_long_conversations=0)


@pytest.mark.parametrize("link", ["checkpoint", "gguf"])
def test_a_link_is_measured_up_to_the_context_that_it_serves(chain, tmp_path, link):
    scores = tmp_path / "scores.json"
    settings = ContextSettings(depths=[0.5], n_prompts=1, short_tokens=128)
    model = {"checkpoint": chain.merged, "gguf": chain.gguf}[link]
    evaluate_context.main(
        [f"--{link}", str(model), "--facts", str(chain.facts), "--tokenizer", str(chain.tokenizer)]
        + ["--tokens", str(chain.tokens), "--threads", "1"]
        + ["--settings", settings.model_dump_json(), "--scores", str(scores)]
    )
    report = files.read_json(scores)
    # The model's context is 512, its window 300, which llama.cpp does not apply.
    expected = {"checkpoint": [128, 256, 512], "gguf": [150, 300]}[link]
    assert [score["length_tokens"] for score in report["scores"]] == expected
    assert report["advertised_tokens"] == 512 and report["context_tokens"] == expected[-1]
    assert report["is_measurable"] is False  # random weights
    assert report["n_long_conversations"] == 1
    assert abs(report["long_gain_nats_per_token"]) < 0.5


def test_the_prompts_are_filled_with_the_user_s_text_or_python_s(tmp_path):
    (tmp_path / "own.txt").write_text("One.\n\nTwo.")
    assert list(evaluate_context.haystack_texts([tmp_path / "own.txt"])) == ["One.\n\nTwo."]
    # The longest prompts are cut from eight characters per token: enough for 128k.
    assert sum(map(len, evaluate_context.haystack_texts(None))) > 10**6


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.evaluate_context")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}
