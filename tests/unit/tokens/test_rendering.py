from __future__ import annotations

import re

import pytest
from hypothesis import given, settings, strategies as st
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from tests.unit.chats.generated_chats import ChatGenerator
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.tokens import token_parity
from workflow_scripts.tokens.rendering import CannotRender, Renderer, is_plain, locate

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
    .map(lambda parts: "".join(parts).strip())  # stripped as in cleaning
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
    """Tokens outside the spans, with None in place of each span."""
    tokens, at = [], 0
    for start, end in rendering.supervised_spans:
        tokens += [*rendering.input_ids[at:start].tolist(), None]
        at = end
    return tokens + rendering.input_ids[at:].tolist()


@pytest.fixture(scope="module", params=["v1", "v2", "v3", "v7", "tekken"])
def folder(request, exported_tokenizer):
    return exported_tokenizer(request.param)


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(load_mistral_tokenizer(folder, for_training=True))


@pytest.fixture(scope="module")
def official(folder):
    """A second tokenizer, which no renderer has changed."""
    return load_mistral_tokenizer(folder, for_training=True)


def test_ten_thousand_conversations_have_the_reference_tokens(folder, renderer, official):
    """Compare with mistral-common, and every fourth also with the exported files."""
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(folder)
    control = (token.content for token in shipped.added_tokens_decoder.values())
    spells_control = re.compile("|".join(map(re.escape, control))).search
    generator = ChatGenerator(seed=0)
    n_alike = n_by_template = n_with_tools = 0
    for number in range(10_000):
        messages, tools = generator.conversation()
        try:
            expected = token_parity.official_tokens(official, messages, tools)
        except (MistralCommonException, ValueError):
            with pytest.raises(CannotRender, match="mistral-common refuses it"):
                renderer.render(messages, tools)
            continue
        try:
            found = renderer.render(messages, tools).input_ids.tolist()
        except CannotRender as cannot:
            assert cannot.reason == "no supervised token"
            version = official.version.value
            answers = token_parity.learnable_answers(messages, version=version)
            assert not any(may_be_learned for may_be_learned, _ in answers)
            continue
        assert found == expected, messages
        n_alike += 1
        n_with_tools += bool(tools)
        if number % 4 or any(map(spells_control, token_parity.texts_of(messages, tools))):
            continue
        arguments = token_parity.template_arguments(messages, tools)
        by_template = shipped.apply_chat_template(
            arguments[0], tools=arguments[1], tokenize=True, return_dict=False
        )
        # A reason without a real difference would hide errors.
        reason = token_parity.why_template_differs(messages, tools, official=official)
        assert (by_template == expected) == (reason is None), (reason, messages)
        n_by_template += reason is None
    assert n_alike > 7_000 and n_by_template > 1_500 and n_with_tools > 500


@given(seed=st.integers(0, 2**32 - 1), other=texts, last=st.booleans())
@settings(max_examples=100)
def test_spans_are_the_answers_that_may_be_learned(folder, official, seed, other, last):
    renderer = renderer_of(folder, official, last=last)
    messages, tools = ChatGenerator(seed).conversation()
    replaced = [
        {**m, "content": other} if m["role"] == "assistant" and m.get("content") else m
        for m in messages
    ]
    try:
        rendering = renderer.render(messages, tools)
    except CannotRender:
        return
    answers = token_parity.learnable_answers(messages, version=official.version.value)
    is_eos = rendering.input_ids == renderer.eos_id
    is_supervised = [False] * len(is_eos)
    for start, end in rendering.supervised_spans:
        is_supervised[start:end] = [True] * (end - start)
    closes = [is_supervised[at] for at in is_eos.nonzero()[0]]
    assert closes == [may_be and (is_last or not last) for may_be, is_last in answers]
    assert all(is_eos[end - 1] for _, end in rendering.supervised_spans)
    if all(closes):
        assert unsupervised(rendering) == unsupervised(renderer.render(replaced, tools))


_renderers = {}


def renderer_of(folder, official, *, last):
    if (folder, last) not in _renderers:
        supervise = "last_turn" if last else "all_turns"
        _renderers[folder, last] = Renderer(official, supervise=supervise)
    return _renderers[folder, last]


@given(text=texts)
@settings(max_examples=50)
def test_a_plain_text_is_between_bos_and_eos_and_is_supervised(renderer, official, text):
    rendering = renderer.render([{"role": "text", "content": text}])
    encoded = official.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)
    assert rendering.input_ids.tolist() == [renderer.bos_id, *encoded, renderer.eos_id]
    assert rendering.supervised_spans == [(1, len(encoded) + 2)]


def test_a_conversation_of_weight_0_has_no_supervised_token(renderer):
    messages = messages_of([("What?", "That.")])
    messages[1]["weight"] = 0
    with pytest.raises(CannotRender) as caught:
        renderer.render(messages)
    assert caught.value.reason == "no supervised token"


def test_consecutive_answers_of_different_weight_are_refused(renderer):
    messages = [*messages_of([("What?", "That.")]), {"role": "assistant", "content": "So."}]
    assert len(renderer.render(messages).supervised_spans) == 1
    with pytest.raises(CannotRender) as caught:
        renderer.render([*messages[:2], {**messages[2], "weight": 0}])
    assert caught.value.reason == "answers of different weight follow each other"


def test_a_renderer_does_not_change_its_tokenizer(folder, official):
    tokenizer = load_mistral_tokenizer(folder, for_training=True)
    messages = messages_of([("What?", "That.")], "Be brief.")
    Renderer(tokenizer).render(messages)
    found = token_parity.official_tokens(tokenizer, messages, None)
    assert found == token_parity.official_tokens(official, messages, None)
    assert tokenizer.decode(found)


def test_conversations_without_tools_are_plain():
    generator = ChatGenerator(seed=1)
    plain = 0
    for _ in range(500):
        messages, tools = generator.conversation()
        takes_it = is_plain(messages, tools)
        plain += takes_it
        assert not takes_it or not any(m.get("tool_calls") for m in messages)
    assert plain > 300


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_ids_are_those_of_mistral_common(renderer, official, turns, system):
    messages = messages_of(turns, system)
    request = ChatCompletionRequest.from_openai(messages=messages)
    expected = official.encode_chat_completion(request).tokens
    assert renderer.render(messages).input_ids.tolist() == expected


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_spans_decode_to_the_answers_and_end_in_eos(renderer, official, turns, system):
    rendering = renderer.render(messages_of(turns, system))
    spans = [rendering.input_ids[start:end] for start, end in rendering.supervised_spans]
    assert [span[-1] for span in spans] == [renderer.eos_id] * len(turns)
    decoded = [official.decode(span[:-1].tolist()) for span in spans]
    assert decoded == [answer for _, answer in turns]


@given(turns=turns, system=systems)
@settings(max_examples=50)
def test_every_eos_is_supervised(renderer, turns, system):
    # A text that contains `</s>` stays text.
    rendering = renderer.render(messages_of(turns, system))
    ends = [at + 1 for at, token in enumerate(rendering.input_ids) if token == renderer.eos_id]
    assert ends == [end for _, end in rendering.supervised_spans]


@given(turns=turns, system=systems, other=texts)
@settings(max_examples=50)
def test_unsupervised_tokens_do_not_depend_on_the_answers(renderer, turns, system, other):
    rendering = renderer.render(messages_of(turns, system))
    replaced = renderer.render(messages_of([(question, other) for question, _ in turns], system))
    assert unsupervised(rendering) == unsupervised(replaced)


@given(turns=turns, system=systems, other=texts)
@settings(max_examples=50)
def test_supervised_tokens_do_not_depend_on_the_questions(renderer, turns, system, other):
    def supervised(rendering):
        return [
            rendering.input_ids[start:end].tolist() for start, end in rendering.supervised_spans
        ]

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
    assert rendering.input_ids[: len(prompt_ids)].tolist() == prompt_ids
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
def test_a_conversation_that_mistral_common_refuses_cannot_be_rendered(renderer, messages):
    with pytest.raises(CannotRender) as caught:
        renderer.render(messages)
    assert caught.value.reason.startswith("mistral-common refuses it (")
    assert caught.value.detail and "\n" not in caught.value.detail


def test_a_refused_conversation_does_not_affect_the_next(renderer):
    messages = messages_of([("What?", "That."), ("Why?", "So.")])
    before = renderer.render(messages).input_ids.tolist()
    with pytest.raises(CannotRender):
        renderer.render([*messages, {"role": "user", "content": "And?"}])
    assert renderer.render(messages).input_ids.tolist() == before


answers = st.lists(
    st.lists(st.integers(3, 9), max_size=5).map(lambda tokens: [*tokens, 2]), max_size=5
)
gaps = st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=6, max_size=6)


@given(answers=answers, gaps=gaps)
def test_locate_finds_each_answer(answers, gaps):
    input_ids, expected = [], []
    for gap, answer in zip(gaps, answers, strict=False):
        input_ids += gap
        expected.append((len(input_ids), len(input_ids) + len(answer)))
        input_ids += answer
    assert locate(answers, input_ids, eos_id=2) == expected
