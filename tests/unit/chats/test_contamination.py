from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from workflow_scripts.chats import contamination
from workflow_scripts.chats.contamination import NgramIndex
from workflow_scripts.chats.shingles import ngram_hashes, word_hashes

# Few values, at both ends and in the middle, so that some are equal or share bits of the bitmap.
hashes = st.sampled_from([0, 1, 2, 2**16, 2**47, 2**48, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
hashes |= st.integers(0, 2**64 - 1)
ngram_arrays = st.lists(hashes, max_size=12).map(lambda values: np.array(values, np.uint64))
held_out = st.lists(ngram_arrays, max_size=40)


def brute_force_overlap(conversations, ngrams):
    """Compute the overlap by its definition, with Python's sets."""
    entries = [set(conversation.tolist()) for conversation in conversations]
    counts = Counter(ngram for entry in entries for ngram in entry)
    known = {ngram for ngram, n in counts.items() if n <= contamination.MOST_CONVERSATIONS}
    own = set(ngrams.tolist())
    shares = [sum(ngram in known for ngram in ngrams.tolist()) / len(ngrams)] if own else []
    shares += [len(own & known & entry) / len(entry) for entry in entries if entry]
    return max(shares, default=0)


def overlap(index, ngrams):
    """Return the overlap of one conversation, looked up together with others."""
    others = np.array([2**63 + 1, 2**63 + 2], np.uint64)
    rows = [ngrams[:0], others, ngrams, ngrams[:0], others]
    offsets = np.cumsum([0, *map(len, rows)])
    shares = index.overlaps(np.concatenate(rows), offsets)
    assert shares[0] == shares[3] == 0
    assert shares[1] == shares[4]
    return shares[2]


@given(conversations=held_out)
def test_the_index_holds_each_identifying_ngram_once_per_entry(conversations):
    index = NgramIndex.build(conversations)
    counts = Counter(ngram for ngrams in conversations for ngram in set(ngrams.tolist()))
    expected = sorted(
        (ngram, entry)
        for entry, ngrams in enumerate(conversations)
        for ngram in set(ngrams.tolist())
        if counts[ngram] <= contamination.MOST_CONVERSATIONS
    )
    assert list(zip(index.hashes.tolist(), index.entries.tolist(), strict=True)) == expected
    assert index.n_ngrams.tolist() == [len(set(ngrams.tolist())) for ngrams in conversations]


@given(conversations=held_out, ngrams=ngram_arrays)
def test_overlap_equals_its_definition_by_sets(conversations, ngrams):
    found = overlap(NgramIndex.build(conversations), ngrams)
    assert found == pytest.approx(brute_force_overlap(conversations, ngrams), rel=1e-12)


def test_a_large_index_finds_its_ngrams_and_no_others():
    random = np.random.default_rng(0)
    values = np.unique(random.integers(0, 2**64, 300_000, dtype=np.uint64))
    random.shuffle(values)
    inside, outside = values[:150_000], values[150_000:]
    index = NgramIndex.build([inside])
    assert overlap(index, inside) == 1
    assert overlap(index, outside) == 0
    half = np.concatenate([inside[:75_000], outside[:75_000]])
    assert overlap(index, half) == 0.5


def test_the_bitmap_avoids_most_searches():
    random = np.random.default_rng(1)
    index = NgramIndex.build([random.integers(0, 2**64, 100_000, dtype=np.uint64)])
    places = [
        contamination._place(
            random.integers(0, 2**64, 10_000, dtype=np.uint64), choice, index.bitmap
        )
        for choice in range(contamination.N_PLACES)
    ]
    set_bits = [index.bitmap[place >> 3] >> contamination._bit(place) & 1 for place in places]
    assert np.logical_and.reduce(set_bits).mean() < 0.02


def test_boilerplate_identifies_no_conversation():
    phrase = " ".join(f"word{number}" for number in range(20))
    ngrams = ngram_hashes(word_hashes(phrase), 13)
    assert overlap(NgramIndex.build([ngrams] * 10), ngrams) == 1
    assert overlap(NgramIndex.build([ngrams] * 11), ngrams) == 0


def test_a_short_question_is_found_within_a_long_conversation():
    question = " ".join(f"word{number}" for number in range(20))
    rest = " ".join(f"other{number}" for number in range(2000))
    index = NgramIndex.build([ngram_hashes(word_hashes(question), 13)])
    assert overlap(index, ngram_hashes(word_hashes(f"{rest} {question} {rest}"), 13)) == 1


def test_a_repeated_ngram_of_a_conversation_counts_once():
    ngrams = np.array([5] * 50, np.uint64)
    assert overlap(NgramIndex.build([ngrams]), ngrams) == 1


@settings(max_examples=20)
@given(conversations=held_out, ngrams=ngram_arrays)
def test_a_mapped_index_gives_the_same_overlaps_as_the_saved_one(
    tmp_path_factory, conversations, ngrams
):
    folder = tmp_path_factory.mktemp("index")
    built = NgramIndex.build(conversations)
    built.save(folder)
    mapped = NgramIndex.load(folder)
    assert overlap(mapped, ngrams) == overlap(built, ngrams)
    assert not mapped.hashes.flags.writeable


def test_a_lookup_does_not_change_the_ngrams():
    ngrams = np.array([9, 3, 7], np.uint64)
    overlap(NgramIndex.build([ngrams]), ngrams)
    assert ngrams.tolist() == [9, 3, 7]
