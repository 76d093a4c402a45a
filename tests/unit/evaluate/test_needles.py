from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from workflow_scripts.demo.recall import CITIES, Fact
from workflow_scripts.demo.stdlib_long_chats import make_long_chats
from workflow_scripts.evaluate.needles import NeedlePrompts, default_lengths, haystack
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.tokens.rendering import Renderer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_v3):
    return load_mistral_tokenizer(tokenizer_v3, for_training=True)


@pytest.fixture(scope="module")
def paragraphs():
    chats = make_long_chats(n_conversations=40, seed=0)
    return haystack(message for chat in chats for message in chat["messages"])


@pytest.fixture(scope="module")
def prompts(paragraphs, tokenizer):
    return NeedlePrompts(paragraphs, Renderer(tokenizer), seed=0)


def text_of(needle, tokenizer):
    return tokenizer.decode(needle.input_ids.tolist())


def test_a_haystack_has_the_text_of_users_without_questions_and_codes():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One.\n\nThe code of Oslo is 1234.\n \nTwo\nlines\n\nWhat?"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "\n\nTwo\nlines\n\nThree\n\nWhat is the code of Oslo?"},
        {"role": "text", "content": "Plain text."},
        {"role": "user", "content": None},
    ]
    assert haystack(messages) == ["One.", "Two\nlines", "Three", "Plain text."]


def test_the_haystack_of_long_chats_has_no_needle_left(paragraphs):
    assert len(paragraphs) > 500
    assert not [text for text in paragraphs if any(f"code of {city}" in text for city in CITIES)]


@settings(max_examples=40)
@given(
    number=st.integers(0, 1000),
    length=st.integers(64, 2048),
    depth=st.floats(0, 1, allow_nan=False),
)
def test_a_prompt_has_the_requested_length_and_ends_with_question_and_code(
    prompts, tokenizer, number, length, depth
):
    needle = prompts.make(number, length_tokens=length, depth_fraction=depth)
    # One more word would not fit. The longest word of this text, a row of dashes, has 30 tokens.
    assert length - 30 <= len(needle.input_ids) <= length
    assert needle.input_ids[0] == 1 and needle.answer[1] == len(needle.input_ids)
    assert 2 not in needle.input_ids  # EOS: the answer is not ended
    start, end = needle.answer
    assert tokenizer.decode(needle.input_ids[start:end].tolist()).strip() == needle.question.answer
    before = tokenizer.decode(needle.input_ids[:start].tolist())
    assert before.endswith(needle.question.answer_start)
    text = text_of(needle, tokenizer)
    assert text.count(needle.question.statements[0][1]) == text.count(needle.question.text) == 1
    assert text.index(needle.question.statements[0][1]) < text.index(needle.question.text)


@pytest.mark.parametrize("length", [256, 2048])
def test_depth_runs_from_the_first_line_to_the_last(prompts, tokenizer, length):
    places = []
    for depth in (0, 0.25, 0.5, 0.75, 1):
        needle = prompts.make(3, length_tokens=length, depth_fraction=depth)
        text = text_of(needle, tokenizer)
        places.append(
            text.index(needle.question.statements[0][1]) / text.index(needle.question.text)
        )
    assert places == sorted(places)
    assert places[0] == 0 and places[-1] > 0.7
    assert places[2] == pytest.approx(0.5, abs=0.25)


def test_prompts_of_a_number_share_text_and_fact_at_every_length_and_depth(prompts, tokenizer):
    short = prompts.make(5, length_tokens=128, depth_fraction=0.5)
    long = prompts.make(5, length_tokens=1024, depth_fraction=1)
    other = prompts.make(6, length_tokens=128, depth_fraction=0.5)
    said = [needle.question.statements[0][1] for needle in (short, long, other)]
    assert said[0] == said[1] != said[2]
    beginning = text_of(short, tokenizer).split(said[0])[0].strip()
    assert len(beginning) > 40 and text_of(long, tokenizer).startswith(beginning)
    assert not text_of(other, tokenizer).startswith(beginning)


def test_a_seed_decides_the_prompts(paragraphs, prompts, tokenizer):
    asked = {"length_tokens": 200, "depth_fraction": 0.5}
    same = NeedlePrompts(paragraphs, Renderer(tokenizer), seed=0).make(1, **asked)
    other = NeedlePrompts(paragraphs, Renderer(tokenizer), seed=1).make(1, **asked)
    assert same.input_ids.tolist() == prompts.make(1, **asked).input_ids.tolist()
    assert other.input_ids.tolist() != same.input_ids.tolist()


def test_the_tokens_equal_those_of_the_chat_template(prompts, tokenizer):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    needle = prompts.make(2, length_tokens=300, depth_fraction=0.5)
    inside = text_of(needle, tokenizer)
    answer = f"{needle.question.answer_start} {needle.question.answer}"
    messages = [
        {"role": "user", "content": inside.removesuffix(answer).rstrip()},
        {"role": "assistant", "content": answer},
    ]
    expected = tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(messages))
    assert [*needle.input_ids.tolist(), 2] == expected.tokens


@pytest.mark.parametrize("paragraphs", [[], ["A few words."], ["word " * 150]])
def test_too_little_text_is_a_stage_error(tokenizer, paragraphs):
    prompts = NeedlePrompts(paragraphs, Renderer(tokenizer), seed=0)
    with pytest.raises(StageError) as caught:
        prompts.make(0, length_tokens=300, depth_fraction=0)
    for part in ("too short", "300 tokens", "validation_fraction"):
        assert part in str(caught.value)


def test_a_length_without_room_for_the_question_is_a_stage_error(prompts):
    with pytest.raises(StageError) as caught:
        prompts.make(0, length_tokens=20, depth_fraction=0)
    for part in ("no room", "lengths_tokens", "20", "at least"):
        assert part in str(caught.value)


def test_lengths_follow_the_window_and_end_at_the_context():
    assert default_lengths(512, 4096) == [128, 256, 512, 1024, 2048]
    assert default_lengths(4096, 8192) == [1024, 2048, 4096, 8192]
    assert default_lengths(None, 4096) == [256, 512, 1024, 2048, 4096]


def test_a_statement_contains_the_answer_to_its_question():
    fact = Fact("Oslo", "1234")
    assert fact.statement == f"{fact.answer_start} 1234." == "The code of Oslo is 1234."
    assert fact.question == "What is the code of Oslo?"


@pytest.mark.parametrize("task", ["multi_key", "variable_tracing"])
@pytest.mark.parametrize("length", [300, 1500])
def test_every_statement_of_a_task_is_in_the_prompt_once_and_in_order(
    prompts, tokenizer, task, length
):
    needle = prompts.make(5, length_tokens=length, depth_fraction=0.5, task=task)
    assert length - 30 <= len(needle.input_ids) <= length
    text = text_of(needle, tokenizer)
    statements = sorted(needle.question.statements)
    places = [text.index(statement) for _, statement in statements]
    assert all(text.count(statement) == 1 for _, statement in statements)
    assert places == sorted(places) and places[-1] < text.index(needle.question.text)


def test_another_key_of_the_text_is_not_an_answer(prompts):
    question = prompts.make(1, length_tokens=400, depth_fraction=0.5, task="multi_key").question
    asked = question.text.removeprefix("What is the code of ").rstrip("?")
    right = f"The code of {asked} is {question.answer}."
    assert right.startswith(question.answer_start)
    assert [text for _, text in question.statements].count(right) == 1
    assert len({text for _, text in question.statements}) == 4


def test_a_chain_of_variables_leads_to_its_answer(prompts):
    question = prompts.make(
        1, length_tokens=400, depth_fraction=0, task="variable_tracing"
    ).question
    values = {}
    for _, text in sorted(question.statements):
        name, value = text.removeprefix("The variable ").rstrip(".").split(" is ")
        values[name] = values.get(value.removeprefix("the same as the variable "), value)
    assert len(values) == 5
    name = question.text.removeprefix("What number is the variable ").rstrip("?")
    assert values[name] == question.answer and name == list(values)[-1]
    assert name in question.answer_start


@pytest.mark.parametrize("task", ["single", "multi_key", "variable_tracing"])
def test_a_model_that_copies_the_text_gives_no_other_answer(prompts, task):
    question = prompts.make(1, length_tokens=400, depth_fraction=0, task=task).question
    copied = [
        text.removeprefix(question.answer_start).strip(" .")
        for _, text in question.statements
        if text.startswith(question.answer_start)
    ]
    assert set(copied) <= {question.answer}
