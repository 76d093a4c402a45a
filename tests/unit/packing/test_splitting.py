from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.packing.splitting import TokenEnds, split
from workflow_scripts.tokens.token_texts import is_control, token_bytes

VERSIONS = ["v1", "v2", "v3", "v7", "tekken"]
positions = st.sets(st.integers(1, 400), max_size=60)


@st.composite
def cases(draw) -> dict:
    """Arguments of `split`, with a context of one token to half a row."""
    row_tokens = draw(st.integers(2, 80))
    return {
        "input_ids": np.arange(draw(st.integers(1, 400))),
        "row_tokens": row_tokens,
        "overlap_tokens": draw(st.integers(1, row_tokens // 2)),
        "turn_ends": np.array(sorted(draw(positions)), dtype=np.int64),
        "sentence_ends": np.array(sorted(draw(positions)), dtype=np.int64),
    }


def case(n_tokens: int, row_tokens: int, overlap_tokens: int, turns=(), sentences=()) -> dict:
    return {
        "input_ids": np.arange(n_tokens),
        "row_tokens": row_tokens,
        "overlap_tokens": overlap_tokens,
        "turn_ends": np.array(turns, dtype=np.int64),
        "sentence_ends": np.array(sentences, dtype=np.int64),
    }


@given(arguments=cases())
def test_every_token_is_new_in_exactly_one_piece_and_no_piece_is_too_long(arguments):
    parts, kinds = split(**arguments)
    new = Counter()
    for start, length, n_context in parts:
        assert 0 <= n_context < length <= arguments["row_tokens"]
        new.update(arguments["input_ids"][start + n_context : start + length].tolist())
    assert new == Counter(arguments["input_ids"].tolist())
    assert len(kinds) == len(parts) - 1


@given(arguments=cases())
def test_each_piece_begins_with_the_last_tokens_before_its_cut(arguments):
    parts, _ = split(**arguments)
    assert parts[0].start == parts[0].n_context == 0
    for before, after in zip(parts, parts[1:], strict=False):
        cut = before.start + before.length
        assert after.start + after.n_context == cut
        assert after.n_context == arguments["overlap_tokens"] and after.start >= 0


@given(arguments=cases())
@example(arguments=case(100, 20, 4, turns=[10, 30], sentences=[20]))
@example(arguments=case(100, 20, 4, turns=[9, 21], sentences=[14, 15]))
def test_each_cut_is_the_best_of_all_that_fit(arguments):
    """Compare with a search over every position at which a piece could end."""
    n_tokens, row_tokens = len(arguments["input_ids"]), arguments["row_tokens"]
    turns = set(arguments["turn_ends"].tolist())
    sentences = set(arguments["sentence_ends"].tolist())
    expected, kinds = [0], []
    while True:
        done = expected[-1]
        n_context = arguments["overlap_tokens"] if done else 0
        fitting = [end for end in range(done + 1, n_tokens) if end - done + n_context <= row_tokens]
        if n_tokens - done + n_context <= row_tokens:
            break
        room = row_tokens - n_context
        choices = [(0, fitting[-1], "token")]
        for end in fitting:
            if end in sentences and 4 * (end - done) >= 3 * room:
                choices.append((1, end, "sentence"))
            if end in turns and 2 * (end - done) >= room:
                choices.append((2, end, "turn"))
        _, end, kind = max(choices)
        expected.append(end)
        kinds.append(kind)
    parts, found_kinds = split(**arguments)
    assert [part.start + part.n_context for part in parts] == expected
    assert found_kinds == kinds


def test_a_document_that_fits_is_not_cut():
    assert split(**case(20, 20, 4, turns=[10], sentences=[15])) == ([(0, 20, 0)], [])


def test_context_reduces_the_room_of_later_pieces():
    parts, kinds = split(**case(36, 20, 4))
    assert parts == [(0, 20, 0), (16, 20, 4)] and kinds == ["token"]


@pytest.mark.parametrize("overlap_tokens", [0, 11])
def test_an_empty_context_or_one_of_most_of_a_row_is_refused(overlap_tokens):
    with pytest.raises(ValueError, match=f"overlap_tokens: found {overlap_tokens}, row_tokens 20"):
        split(**case(100, 20, overlap_tokens))


@pytest.fixture(scope="module", params=VERSIONS)
def tokenizer(request, exported_tokenizer):
    folder = exported_tokenizer(request.param)
    return load_mistral_tokenizer(folder, for_training=True).instruct_tokenizer.tokenizer


@pytest.fixture(scope="module")
def token_ends(tokenizer) -> TokenEnds:
    return TokenEnds.of(tokenizer)


def stretches(tokenizer, input_ids, cuts) -> list[str]:
    """The texts between cuts."""
    texts = [
        b"" if is_control(tokenizer, token_id) else token_bytes(tokenizer, token_id)
        for token_id in input_ids.tolist()
    ]
    bounds = [0, *cuts.tolist(), len(texts)]
    return [
        b"".join(texts[start:end]).decode() for start, end in zip(bounds, bounds[1:], strict=False)
    ]


@pytest.mark.parametrize(
    "expected",
    [
        ["Pi is 3.14, not 3.2.", " Is it?", " Yes!", " See a.b.c()"],
        ["He said “no.”", " She (too.)", " Nobody else..."],
        ["def f():\n", "    return 1.5\n\n", "print(f())"],
        ["One.\n\n", "Two:\n", "- three\n", "- four"],
        ["中文。", "好！", "是吗？！", "「对。」", "他说"],
        ["क्या?", " हाँ।", " ठीक"],
        ["هل هذا؟", " نعم"],
        ["no end at all 1 000.5 and x.y"],
    ],
)
def test_sentences_and_lines_of_real_text_end_where_a_reader_expects(
    tokenizer, token_ends, expected
):
    input_ids = np.array(tokenizer.encode("".join(expected), bos=False, eos=False))
    found = stretches(tokenizer, input_ids, token_ends.sentence_ends(input_ids))
    if not is_tekkenizer(tokenizer):  # SentencePiece adds a leading space
        found[0] = found[0].removeprefix(" ")
    assert found == expected


def test_chats_are_cut_after_answers_and_context_precedes_the_cut(tokenizer, token_ends):
    """A rendered conversation: every turn ends with EOS, and questions end sentences too."""
    encode = tokenizer.encode
    turns = [
        encode(f"[INST] Question {n}? [/INST] Answer {n}. It is so.", bos=n == 0, eos=True)
        for n in range(20)
    ]
    input_ids = np.concatenate(turns)
    bounds = np.cumsum([len(turn) for turn in turns])
    turn_ends = token_ends.turn_ends(input_ids)
    assert turn_ends.tolist() == bounds.tolist()
    parts, kinds = split(
        input_ids,
        row_tokens=100,
        overlap_tokens=8,
        turn_ends=turn_ends,
        sentence_ends=token_ends.sentence_ends(input_ids),
    )
    assert len(parts) > 3 and set(kinds) == {"turn"}
    for part in parts[:-1]:
        assert input_ids[part.start + part.length - 1] == tokenizer.eos_id


def test_a_long_answer_is_cut_between_its_sentences(tokenizer, token_ends):
    sentences = [f"Sentence {n} says that {n} is {n / 10}." for n in range(60)]
    input_ids = np.array(tokenizer.encode(" ".join(sentences), bos=True, eos=True))
    parts, kinds = split(
        input_ids,
        row_tokens=128,
        overlap_tokens=16,
        turn_ends=token_ends.turn_ends(input_ids),
        sentence_ends=token_ends.sentence_ends(input_ids),
    )
    assert len(kinds) > 4 and set(kinds) == {"sentence"}
    cuts = np.array([part.start + part.length for part in parts[:-1]])
    for text in stretches(tokenizer, input_ids, cuts):
        assert text.lstrip().startswith("Sentence") and text.endswith(".")
