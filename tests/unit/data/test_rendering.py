from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from workflow_scripts.data.rendering import CannotRender, Renderer, locate
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

characters = st.sampled_from(list(" \n\té日🎉\x00a1.")) | st.characters(
    exclude_categories=["Cs"],
    exclude_characters="▁",  # SentencePiece decodes it to a space
)
plain = st.text(characters, min_size=1, max_size=20)
control = st.sampled_from(
    ["</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<0x0A>", "[SYSTEM_PROMPT]"]
)
texts = (
    st.lists(plain | control, min_size=1, max_size=3)
    .map(lambda parts: "".join(parts).strip())  # as cleaning strips
    .filter(bool)
)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
systems = st.none() | texts


def messages_of(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def unsupervised(rendering):
    """The tokens outside of every span; None stands for each span."""
    tokens, at = [], 0
    for start, end in rendering.supervised_spans:
        tokens += [*rendering.input_ids[at:start], None]
        at = end
    return tokens + rendering.input_ids[at:]


@pytest.fixture(scope="module", params=["v1", "v2", "v3", "v7"])
def folder(request, exported_tokenizer):
    return exported_tokenizer(request.param)


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(load_mistral_tokenizer(folder, for_training=True))


@pytest.fixture(scope="module")
def official(folder):
    """A second tokenizer, which no renderer listens to."""
    return load_mistral_tokenizer(folder, for_training=True)


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_ids_are_those_of_mistral_common(renderer, official, turns, system):
    messages = messages_of(turns, system)
    request = ChatCompletionRequest.from_openai(messages=messages)
    assert renderer.render(messages).input_ids == official.encode_chat_completion(request).tokens


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_spans_decode_to_the_answers_and_end_in_eos(renderer, official, turns, system):
    rendering = renderer.render(messages_of(turns, system))
    spans = [rendering.input_ids[start:end] for start, end in rendering.supervised_spans]
    assert [span[-1] for span in spans] == [renderer.eos_id] * len(turns)
    decoded = [official.decode(span[:-1]) for span in spans]
    assert decoded == [answer for _, answer in turns]


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_every_eos_is_supervised(renderer, turns, system):
    # Also where a text spells `</s>`: spelled out, it is text.
    rendering = renderer.render(messages_of(turns, system))
    ends = [at + 1 for at, token in enumerate(rendering.input_ids) if token == renderer.eos_id]
    assert ends == [end for _, end in rendering.supervised_spans]


@given(turns=turns, system=systems, other=texts)
@settings(max_examples=50)
def test_what_is_not_supervised_does_not_depend_on_the_answers(renderer, turns, system, other):
    rendering = renderer.render(messages_of(turns, system))
    replaced = renderer.render(messages_of([(question, other) for question, _ in turns], system))
    assert unsupervised(rendering) == unsupervised(replaced)


@given(turns=turns, system=systems, other=texts)
@settings(max_examples=50)
def test_what_is_supervised_does_not_depend_on_the_questions(renderer, turns, system, other):
    def supervised(rendering):
        return [rendering.input_ids[start:end] for start, end in rendering.supervised_spans]

    replaced = renderer.render(messages_of([(other, answer) for _, answer in turns]))
    assert supervised(renderer.render(messages_of(turns, system))) == supervised(replaced)


@given(question=texts, answer=texts, system=systems)
@settings(max_examples=50)
def test_a_single_answer_starts_where_the_prompt_of_inference_ends(
    folder, renderer, question, answer, system
):
    messages = messages_of([(question, answer)], system)
    prompt = ChatCompletionRequest.from_openai(messages=messages[:-1])
    prompt_ids = load_for_inference(folder).encode_chat_completion(prompt).tokens
    rendering = renderer.render(messages)
    assert rendering.input_ids[: len(prompt_ids)] == prompt_ids
    assert rendering.supervised_spans == [(len(prompt_ids), len(rendering.input_ids))]


_for_inference = {}


def load_for_inference(folder):
    if folder not in _for_inference:
        _for_inference[folder] = load_mistral_tokenizer(folder, for_training=False)
    return _for_inference[folder]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "What?"}],
        [{"role": "assistant", "content": "That."}],
        [{"role": "nobody", "content": "What?"}, {"role": "assistant", "content": "That."}],
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": None}],
    ],
)
def test_what_mistral_common_refuses_cannot_be_rendered(renderer, messages):
    with pytest.raises(CannotRender) as caught:
        renderer.render(messages)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_conversation_leaves_no_trace_in_the_next(renderer):
    messages = messages_of([("What?", "That."), ("Why?", "So.")])
    before = renderer.render(messages)
    with pytest.raises(CannotRender):
        renderer.render([*messages, {"role": "user", "content": "And?"}])
    assert renderer.render(messages) == before


answers = st.lists(
    st.lists(st.integers(3, 9), max_size=5).map(lambda tokens: [*tokens, 2]), max_size=5
)
gaps = st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=6, max_size=6)


@given(answers=answers, gaps=gaps)
def test_locate_finds_each_answer_where_it_was_put(answers, gaps):
    input_ids, expected = [], []
    for gap, answer in zip(gaps, answers, strict=False):
        input_ids += gap
        expected.append((len(input_ids), len(input_ids) + len(answer)))
        input_ids += answer
    assert locate(answers, input_ids, eos_id=2) == expected
