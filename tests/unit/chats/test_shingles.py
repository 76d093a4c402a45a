from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.chats import shingles
from workflow_scripts.chats.shingles import comparable_text, ngram_hashes, spaced, word_hashes


def words(text):
    return spaced(text).split()


hash_lists = st.lists(st.integers(0, 2**64 - 1), max_size=40)


def reference_ngram_hash(run):
    """Compute the polynomial and its mixing with Python's integers."""
    value = sum(word * shingles.MULTIPLIER**place for place, word in enumerate(run)) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value = (value ^ value >> shift) * factor % 2**64
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! It's 3.5.", ["hello", "world", "it", "s", "3", "5"]),
        ("snake_case and ÉCOLE straße", ["snake", "case", "and", "école", "strasse"]),
        ("你好,世界 ok", ["你", "好", "世", "界", "ok"]),
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ไทย", list("ไทย")),
        ("👍 — … !?", []),
    ],
)
def test_words_are_case_folded_and_free_of_punctuation(text, expected):
    assert words(text) == expected


@given(text=st.text())
def test_case_punctuation_and_spacing_change_no_word(text):
    spaced = " ".join(text.split())
    assert words(spaced.casefold() + " !") == words(text)
    assert words("— " + text.replace(" ", "  ,\n")) == words(text)


def reference_word_hash(word):
    terms = [
        (byte + 1) * pow(shingles.MULTIPLIER, place + 1, 2**64)
        for place, byte in enumerate(word.encode("utf-8", "surrogatepass"))
    ]
    return int(shingles.mixed(np.array([sum(terms) % 2**64], np.uint64))[0])


@given(text=st.text())
def test_a_word_hash_is_a_polynomial_of_its_bytes(text):
    assert word_hashes(text).dtype == np.uint64
    assert word_hashes(text).tolist() == list(map(reference_word_hash, words(text)))


@given(texts=st.lists(st.text(max_size=12), max_size=6))
def test_the_word_hashes_of_many_texts_equal_those_of_each(texts):
    hashes, offsets = shingles.word_hashes_by_row(texts)
    alone = [word_hashes(text).tolist() for text in texts]
    assert hashes.tolist() == list(itertools.chain.from_iterable(alone))
    assert offsets.tolist() == list(itertools.accumulate(map(len, alone), initial=0))


def test_a_million_words_have_as_many_hashes():
    text = " ".join(f"{number}x{number % 97} y{number}" for number in range(500_000))
    assert len(np.unique(word_hashes(text))) == 1_000_000


def test_hashes_are_the_same_in_another_process():
    text = "The quick brown fox, der schnelle Fuchs, 敏捷的狐狸"
    program = (
        "from workflow_scripts.chats.shingles import word_hashes, ngram_hashes;"
        f"print(ngram_hashes(word_hashes({text!r}), 5).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
    )
    assert run.stdout.strip() == str(ngram_hashes(word_hashes(text), 5).tolist())


@given(hashes=hash_lists, n=st.integers(1, 20))
def test_ngram_hashes_equal_a_brute_force(hashes, n):
    found = ngram_hashes(np.array(hashes, np.uint64), n)
    n = min(n, len(hashes))
    runs = [hashes[at : at + n] for at in range(len(hashes) - n + 1)] if hashes else []
    assert found.tolist() == [reference_ngram_hash(run) for run in runs]


@given(hashes=hash_lists, n=st.integers(1, 8))
def test_ngram_hashes_do_not_change_their_input(hashes, n):
    given_words = np.array(hashes, np.uint64)
    ngram_hashes(given_words, n)
    assert given_words.tolist() == hashes


def test_the_order_of_words_counts():
    assert set(ngram_hashes(word_hashes("a b c"), 2)).isdisjoint(
        ngram_hashes(word_hashes("c b a"), 2)
    )


def test_a_short_text_has_one_shingle_and_an_empty_text_none():
    assert len(ngram_hashes(word_hashes("only three words"), 5)) == 1
    assert len(ngram_hashes(word_hashes("..."), 5)) == 0


def test_an_ngram_of_zero_words_is_refused():
    with pytest.raises(ValueError, match="n: found 0"):
        ngram_hashes(word_hashes("a b"), 0)


def test_a_conversation_is_compared_without_its_system_message():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "You are shared."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "tool_calls": None},
        {"role": "assistant", "content": "Two.", "tool_calls": None},
    ]
    assert words(comparable_text(messages)) == ["add", "add", "a", "1", "2", "two"]


@given(
    texts=st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=9), max_size=8),
    n=st.integers(1, 6),
)
def test_the_ngram_hashes_of_many_texts_equal_those_of_each(texts, n):
    alone = [shingles.ngram_hashes(np.array(text, np.uint64), n) for text in texts]
    flat = np.array([word for text in texts for word in text], np.uint64)
    offsets = np.cumsum([0, *map(len, texts)])
    found, bounds = shingles.ngram_hashes_by_row(flat, offsets, n)
    assert bounds.tolist() == np.cumsum([0, *map(len, alone)]).tolist()
    assert found.tolist() == [value for one in alone for value in one.tolist()]
