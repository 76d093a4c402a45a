from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

from workflow_scripts.tokens.token_texts import TokenText, is_control, token_bytes, token_texts

VERSIONS = ["v1", "v2", "v3", "v7", "tekken"]
hangul = st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3)  # tekken cuts these at any byte
texts = st.text(
    st.sampled_from(" \n\t a.é日本שע👩💻\u200d\u202e\x00ʰ<0xF0>습니다했어요")
    | hangul
    | st.characters(codec="utf-8"),
    min_size=1,
).filter(lambda text: "▁" not in text)  # SentencePiece reads it as a space


@pytest.fixture(scope="module", params=VERSIONS)
def tokenizer(request, official_tokenizer):
    path = official_tokenizer(request.param)
    return MistralTokenizer.from_file(path).instruct_tokenizer.tokenizer


@pytest.fixture(scope="module")
def fragments(tokenizer) -> list[int]:
    """Tokens that contain part of a character."""
    return [
        token_id
        for token_id in range(tokenizer.n_words)
        if not is_control(tokenizer, token_id)
        and "�" in token_bytes(tokenizer, token_id).decode(errors="replace")
        and token_bytes(tokenizer, token_id) != "�".encode()
    ]


def joined_bytes(found: list[TokenText]) -> bytes:
    """A character split over several tokens is in the bytes of all, and also in one text."""
    return b"".join(
        one.first_bytes + (one.text[1:] if one.first_bytes else one.text).encode() + one.last_bytes
        for one in found
    )


@given(text=texts)
@settings(max_examples=200)
def test_the_texts_of_all_tokens_join_to_the_text(tokenizer, text):
    token_ids = tokenizer.encode(text, bos=False, eos=False)
    found = list(token_texts(tokenizer, token_ids))
    assert len(found) == len(token_ids)
    said = "".join(one.text for one in found)
    # SentencePiece adds a leading space.
    assert said == (text if is_tekkenizer(tokenizer) else " " + text)
    assert joined_bytes(found) == said.encode()
    assert not any(one.is_control for one in found)


@given(text=texts, at=st.integers(0, 30))
def test_a_tokens_text_does_not_depend_on_later_tokens(tokenizer, text, at):
    token_ids = tokenizer.encode(text, bos=False, eos=False)
    assert (
        list(token_texts(tokenizer, token_ids[:at])) == list(token_texts(tokenizer, token_ids))[:at]
    )


@given(choice=st.lists(st.integers(0, 10**6), max_size=12))
@settings(max_examples=300)
def test_no_byte_is_lost_even_if_the_tokens_are_not_text(tokenizer, fragments, choice):
    token_ids = [fragments[at % len(fragments)] for at in choice]
    found = list(token_texts(tokenizer, token_ids))
    assert joined_bytes(found) == b"".join(token_bytes(tokenizer, one) for one in token_ids)


def test_control_tokens_are_named_and_end_a_character(tokenizer):
    token_ids = tokenizer.encode("𓀀", bos=False, eos=False)
    ids = [tokenizer.bos_id, *token_ids[:-1], tokenizer.eos_id, tokenizer.unk_id, *token_ids]
    found = list(token_texts(tokenizer, ids))
    assert [one.text for one in found if one.is_control] == ["<s>", "</s>", "<unk>"]
    assert found[-1].text == "𓀀" and found[-1].first_bytes
    assert "𓀀" not in "".join(one.text for one in found[:-1])


def test_invalid_bytes_are_shown_as_bytes_and_do_not_affect_later_tokens(tokenizer):
    (*begun, last) = tokenizer.encode("𓀀", bos=False, eos=False)
    after = tokenizer.encode("a b", bos=False, eos=False)
    alone = list(token_texts(tokenizer, [last, *after]))
    assert alone[0].text == "" and alone[0].first_bytes == "𓀀".encode()[-1:]
    assert alone[1].text.strip() == "a"
    broken_off = list(token_texts(tokenizer, [*begun, *after]))
    assert broken_off[-1].text == " b"
