"""Our models for the harness, compared with the harness's own and with likelihoods computed
without it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="make test-tasks installs it")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from workflow_scripts.evaluate.greedy import by_llama_cpp, by_transformers
from workflow_scripts.evaluate.harness_models import (
    LogitLM,
    TransformersLM,
    is_truncated,
    load_tokenizer,
)
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring.likelihood import negative_log_likelihoods
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.tokens.rendering import Renderer

MAX_LENGTH = 64
LONG = " ".join(f"{n} after {n - 1}" for n in range(1, 40))
PAIRS = [
    ("Question: What is a list?\nAnswer:", " A sequence"),
    ("Question: What is a list?\nAnswer:", " A mapping"),
    ("Question: What is a list?\nAnswer:", " A"),
    ("Question: What is a list?\nAnswer: ", "yes"),  # the space belongs to the continuation
    ("What do you", "tube"),  # the joined words have other tokens
    ("", "Once upon a time"),
    ("Größe «日本» 🎉", " naïve"),
    (LONG, " and so on"),  # longer than the context
]
TEXTS = ["Once upon a time there was a list.", LONG, ""]
PROMPTS = [
    ("Question: What is a list?\nAnswer:", {"until": ["\n"], "max_gen_toks": 12}),
    (LONG, {"until": ["the"], "max_gen_toks": 20, "do_sample": False}),
]


def instances(kind, arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def tokenizer(chain):
    return load_tokenizer(chain.tokenizer)


@pytest.fixture(scope="module")
def scorer(chain):
    return TransformersModel(chain.merged, window=300, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def of_harness(chain):
    """The harness's own model class, which loads model and tokenizer itself."""
    return HFLM(
        pretrained=str(chain.merged),
        tokenizer=str(chain.tokenizer),
        device="cpu",
        dtype="float32",
        max_length=MAX_LENGTH,
    )


@pytest.fixture(scope="module")
def transformers(scorer, tokenizer):
    return TransformersLM(scorer.model, tokenizer, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def by_logits(scorer, tokenizer):
    greedy = by_transformers(scorer.model, tokenizer.eos_token_id)
    return LogitLM(scorer.logit_blocks, greedy, tokenizer, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def llama_cpp(chain, tokenizer):
    with LlamaCppModel(chain.gguf, context_tokens=MAX_LENGTH + 16, n_threads=1) as model:
        greedy = by_llama_cpp(model, tokenizer.eos_token_id)
        yield LogitLM(model.resumed_logit_blocks, greedy, tokenizer, max_length=MAX_LENGTH)


# Measured: 0 for the harness's own class, 5e-6 of 45 nats by logits; 0.002 by llama.cpp, whose keys
# and values are F16.
TOLERANCES = {"transformers": 1e-4, "by_logits": 1e-4, "llama_cpp": 0.01}


@pytest.fixture(params=TOLERANCES)
def ours(request):
    return request.getfixturevalue(request.param), TOLERANCES[request.param]


def test_continuations_are_as_likely_as_in_the_harness_own_model(ours, of_harness):
    model, tolerance = ours
    expected = of_harness.loglikelihood(instances("loglikelihood", PAIRS))
    found = model.loglikelihood(instances("loglikelihood", PAIRS))
    assert (
        min(value for value, _ in expected) < -30
    )  # large enough to show one token too many or too few
    for (value, is_greedy), (other, was_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, abs=tolerance)
        assert is_greedy == was_greedy


def test_only_the_continuation_of_greedy_decoding_is_greedy(ours, tokenizer):
    model, _ = ours
    context = "Question: What is a list?\nAnswer:"
    (answer,) = model.generate_until(
        instances("generate_until", [(context, {"until": [], "max_gen_toks": 1})])
    )
    ids = tokenizer.encode(context)
    context_ids, other = model._encode_pair(context, " A")
    assert context_ids == ids
    likeliest = next(
        token
        for token in range(3, 32_768)
        if tokenizer.decode([token]) == answer
        and model._loglikelihood_tokens([(("", ""), ids, [token])], disable_tqdm=True)[0][1]
    )
    pair = [(("", ""), ids, [likeliest]), (("", ""), ids, [other[0]])]
    assert [one for _, one in model._loglikelihood_tokens(pair, disable_tqdm=True)] == [True, False]


@pytest.mark.parametrize("text", TEXTS[:1])
def test_a_text_is_as_likely_as_its_tokens_after_one_bos(ours, scorer, tokenizer, text):
    model, tolerance = ours
    ids = np.array([1, *tokenizer.encode(text, add_special_tokens=False)])
    nats = negative_log_likelihoods(scorer, Piece(0, ids, np.arange(1, len(ids))))
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx(-nats.sum(), abs=tolerance)


def test_a_text_longer_than_the_context_is_scored_in_windows_of_full_context(
    ours, scorer, tokenizer
):
    model, tolerance = ours
    ids = [1, *tokenizer.encode(LONG, add_special_tokens=False)]
    n = len(ids)
    assert MAX_LENGTH + 1 < n
    expected = 0.0
    # The first window begins with BOS; each later one is as long and ends at its last token.
    starts = [(0, 1, min(n, MAX_LENGTH + 1))]
    while starts[-1][2] < n:
        end = min(n, starts[-1][2] + MAX_LENGTH)
        starts.append((end - MAX_LENGTH - 1, starts[-1][2], end))
    for first, scored, end in starts:
        piece = Piece(0, np.array(ids[first:end]), np.arange(scored - first, end - first))
        expected -= negative_log_likelihoods(scorer, piece).sum()
    found, empty = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(LONG,), ("",)]))
    # About 190 tokens, 2,796 nats: measured differences 5e-5, and 0.018 by llama.cpp.
    assert found == pytest.approx(expected, abs=5 * tolerance)
    assert empty == 0


def test_answers_equal_those_of_the_harness_own_model(ours, of_harness):
    model, _ = ours
    prompts = instances("generate_until", PROMPTS)
    assert model.generate_until(prompts) == of_harness.generate_until(prompts)


def test_an_answer_ends_before_its_first_stop_text(ours):
    model, _ = ours
    context = PROMPTS[0][0]

    def answer(until):
        options = {"until": until, "max_gen_toks": 12}
        return model.generate_until(instances("generate_until", [(context, options)]))[0]

    whole = answer([])
    assert len(whole) > 4
    assert answer([whole[3:5]]) == whole.split(whole[3:5])[0]
    assert answer([]) == whole  # no state is left from the answer before


def test_a_chat_has_the_token_ids_of_training_with_one_bos(ours, chain):
    model, _ = ours
    chat = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": "And a dict?"},
    ]
    renderer = Renderer(load_mistral_tokenizer(chain.tokenizer, for_training=True))
    rendered = renderer.render([*chat, {"role": "assistant", "content": "x"}])
    prompt = rendered.input_ids[: rendered.supervised_spans[-1][0]]
    found = model.tok_encode(model.apply_chat_template(chat))
    assert found == list(prompt)
    assert found.count(1) == 1


def test_a_prompt_begins_with_bos_and_the_space_of_sentencepiece(ours, chain):
    model, _ = ours
    official = load_mistral_tokenizer(chain.tokenizer, for_training=True)
    expected = official.instruct_tokenizer.tokenizer.encode("What is it?", bos=True, eos=False)
    assert model.tok_encode("What is it?") == expected


def test_prompts_that_lose_their_beginning_are_recognized(ours):
    model, _ = ours
    assert [is_truncated(model, pair) for pair in PAIRS] == [False] * 7 + [True]
    assert [is_truncated(model, prompt) for prompt in PROMPTS] == [False, True]
    assert not is_truncated(model, (LONG,))
    # The most that fits is one token more than the context: the last one is only predicted.
    context = "a " * 70
    ids = model.tok_encode(context.strip())
    fitting = model.tokenizer.decode(ids[1 : MAX_LENGTH + 1])
    assert len(model.tok_encode(fitting)) == MAX_LENGTH + 1
    assert not is_truncated(model, (fitting[:-2], fitting[-2:]))
    assert is_truncated(model, (fitting, " a"))


def test_requests_that_do_not_fit_are_refused(ours):
    model, _ = ours
    prompt = ("Why?", {"until": ["\n"], "max_gen_toks": MAX_LENGTH})
    with pytest.raises(StageError, match="no room"):
        model.generate_until(instances("generate_until", [prompt]))


def test_llama_cpp_refuses_to_sample_an_answer(llama_cpp):
    prompt = ("Why?", {"do_sample": True, "temperature": 0.7, "max_gen_toks": 4})
    with pytest.raises(StageError, match="sampled"):
        llama_cpp.generate_until(instances("generate_until", [prompt]))


def test_a_model_without_preferences_is_indifferent(uniform, tokenizer):
    with LlamaCppModel(uniform.gguf, context_tokens=MAX_LENGTH, n_threads=1) as model:
        greedy = by_llama_cpp(model, tokenizer.eos_token_id)
        lm = LogitLM(model.resumed_logit_blocks, greedy, tokenizer, max_length=MAX_LENGTH)
        found = lm.loglikelihood(instances("loglikelihood", PAIRS[:3]))
    n_tokens = [len(tokenizer.encode(a + b)) - len(tokenizer.encode(a)) for a, b in PAIRS[:3]]
    expected = [-n * math.log(32_768) for n in n_tokens]
    # The logarithm in float32: measured 1e-6.
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-5)
    assert torch.tensor(expected).unique().numel() > 1
