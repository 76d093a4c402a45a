from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from workflow_scripts.chats import duplicates
from workflow_scripts.chats.duplicates import (
    band_keys,
    choose_bands,
    first_of_equal,
    jaccard,
    near_duplicates,
    normalized_digest,
)


def chat(*contents):
    return [
        {"role": ("user", "assistant")[at % 2], "content": content}
        for at, content in enumerate(contents)
    ]


def call(name, arguments, call_id="a"):
    function = {"name": name, "arguments": arguments}
    tool_calls = [{"id": call_id, "type": "function", "function": function}]
    return [{"role": "assistant", "content": None, "tool_calls": tool_calls}]


def flat(sets):
    arrays = [np.array(sorted(one), np.uint64) for one in sets]
    offsets = np.cumsum([0, *map(len, arrays)])
    return np.concatenate([np.empty(0, np.uint64), *arrays]), offsets


def planted(random, similarity, size):
    """Return two sets with this Jaccard similarity, or the next higher one that is possible."""
    n_shared = math.ceil(size * 2 * similarity / (1 + similarity) - 1e-9)
    values = random.integers(0, 2**64, 2 * size - n_shared, dtype=np.uint64)
    return set(values[:size].tolist()), set(values[size - n_shared :].tolist())


def test_case_white_space_call_ids_and_weights_make_no_difference():
    digest = normalized_digest(chat("Hello  World", "Hi\n"), None)
    assert digest == normalized_digest(chat(" hello world", "HI"), "")
    weighted = [{**message, "weight": 0} for message in chat("Hello World", "Hi")]
    assert digest == normalized_digest(weighted, None)
    assert normalized_digest(call("f", "{}", "a"), None) == normalized_digest(
        call("f", "{}", "b"), None
    )
    assert len(digest) == 16


def test_texts_roles_calls_and_tools_make_a_difference():
    said = "x y"
    variants = [
        (chat(said), None),
        (chat(said), "[]"),
        (chat("x", "y"), None),
        (chat("x y", ""), None),
        ([{"role": "system", "content": said}], None),
        ([{"role": "text", "content": said}], None),
        (call("x", "y"), None),
        (call("x y", ""), None),
        (call("", "x y"), None),
        (chat("x\x1fassistant\x1fy"), None),
        (chat("xy"), None),
    ]
    assert len({normalized_digest(*variant) for variant in variants}) == len(variants)


@given(values=st.lists(st.integers(0, 6), max_size=40), random=st.randoms(use_true_random=False))
def test_the_twin_is_the_conversation_of_lowest_rank_with_an_equal_digest(values, random):
    rank = list(range(len(values)))
    random.shuffle(rank)
    digests = np.array([(value // 2, value % 2) for value in values], np.uint64).reshape(-1, 2)
    twins = first_of_equal(digests, np.array(rank, np.int64))
    for one, value in enumerate(values):
        first = min((at for at in range(len(values)) if values[at] == value), key=rank.__getitem__)
        assert twins[one] == (-1 if first == one else first)


@pytest.mark.parametrize("threshold", [0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    n_bands, n_slots = choose_bands(threshold)
    assert n_bands * n_slots <= duplicates.N_PERMUTATIONS
    assert 1 - (1 - threshold**n_slots) ** n_bands >= 0.99


@pytest.mark.parametrize("size", [12, 450])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_planted_pairs_share_a_band_as_often_as_expected(threshold, size):
    random = np.random.default_rng(0)
    pairs = [planted(random, threshold, size) for _ in range(1500)]
    keys = band_keys(*flat(itertools.chain(*pairs)), threshold=threshold)
    found = (keys[::2] == keys[1::2]).any(axis=1).mean()
    assert found >= 0.98  # 0.994 or more is expected; four standard errors below 0.99 is 0.98


def test_few_dissimilar_pairs_share_a_band():
    random = np.random.default_rng(1)
    pairs = [planted(random, 0.3, 450) for _ in range(1000)]
    keys = band_keys(*flat(itertools.chain(*pairs)), threshold=0.8)
    assert (keys[::2] == keys[1::2]).any(axis=1).mean() < 0.05


def test_keys_depend_only_on_the_set():
    random = np.random.default_rng(2)
    sets = [random.integers(0, 2**64, size, dtype=np.uint64) for size in (1, 5, 90, 400, 3000)]
    shuffled = [random.permutation(np.concatenate([one, one])) for one in sets]
    offsets = np.cumsum([0, *map(len, sets)])
    keys = band_keys(np.concatenate(sets), offsets, threshold=0.8)
    assert np.array_equal(
        keys, band_keys(np.concatenate(shuffled), 2 * offsets, threshold=0.8)
    )  # order and repeats do not matter
    alone = [band_keys(one, np.array([0, len(one)]), threshold=0.8) for one in sets]
    assert np.array_equal(keys, np.concatenate(alone))  # nor do the other conversations


# Written by rensa 0.5.0 (its algorithm version 2), on x86-64.
FIRST_KEYS = [5806994286952656221, 6566221716748043169]


def test_keys_are_the_same_on_every_machine():
    keys = band_keys(np.arange(1, 6, dtype=np.uint64), np.array([0, 5]), threshold=0.8)
    assert keys.shape == (1, 21)
    assert keys[0, :2].tolist() == FIRST_KEYS


def test_a_conversation_without_words_has_no_near_duplicate():
    keys = band_keys(*flat([set(), {1, 2}, set(), {1, 2}]), threshold=0.8)
    assert (keys[[0, 2]] == duplicates.NO_KEY).all()
    assert (keys[[1, 3]] != duplicates.NO_KEY).all()

    def ask(one, other):
        assert {one, other} == {1, 3}
        return 1.0

    assert near_duplicates(keys, np.arange(4), ask, 0.8)[0].tolist() == [-1, -1, -1, 1]
    assert band_keys(*flat([]), threshold=0.8).shape == (0, 21)


@given(first=st.sets(st.integers(0, 30)), second=st.sets(st.integers(0, 30)))
def test_jaccard_is_the_intersection_over_the_union(first, second):
    found = jaccard(np.array(sorted(first), np.uint64), np.array(sorted(second), np.uint64))
    assert found == (len(first & second) / len(first | second) if first | second else 0)


def greedy(keys, rank, similarity, threshold):
    """Compare each conversation with every kept one that shares a band: the specification."""
    kept, dropped = [], {}
    for one in sorted(range(len(keys)), key=rank.__getitem__):
        shared = {
            other: sum(
                a == b != duplicates.NO_KEY for a, b in zip(keys[one], keys[other], strict=True)
            )
            for other in kept
        }
        candidates = sorted((other for other in kept if shared[other]), key=lambda o: -shared[o])
        like = [other for other in candidates if similarity(one, other) >= threshold]
        if like:
            dropped[one] = like[0]
        else:
            kept.append(one)
    return dropped


@settings(deadline=None)
@given(
    keys=st.integers(1, 4).flatmap(
        lambda bands: st.lists(st.tuples(*[st.integers(0, 4)] * bands), max_size=25)
    ),
    random=st.randoms(use_true_random=False),
)
def test_near_duplicates_equal_a_greedy_brute_force(keys, random):
    n = len(keys)
    rank = list(range(n))
    random.shuffle(rank)
    like = {frozenset(pair): random.random() for pair in itertools.combinations(range(n), 2)}

    def similarity(one, other):
        return like[frozenset((one, other))]

    n_bands = len(keys[0]) if keys else 1
    matrix = np.array(keys, np.uint64).reshape(n, n_bands)
    duplicate_of, similarities = near_duplicates(matrix, np.array(rank), similarity, 0.5)
    dropped = greedy(keys, rank, similarity, 0.5)
    assert duplicate_of.tolist() == [dropped.get(one, -1) for one in range(n)]
    expected = [similarity(one, dropped[one]) if one in dropped else 0 for one in range(n)]
    assert similarities == pytest.approx(expected, rel=1e-6)


def families(random, *, n_families, n_copies):
    """Return originals and copies with replaced shingles; some copies are near duplicates."""
    sets = []
    for _ in range(n_families):
        original = random.integers(0, 2**64, 200, dtype=np.uint64)
        sets.append(set(original.tolist()))
        for _ in range(n_copies):
            copy = original.copy()
            n_changed = random.integers(0, 60)
            copy[:n_changed] = random.integers(0, 2**64, n_changed, dtype=np.uint64)
            sets.append(set(random.permutation(copy).tolist()))
    return sets


def test_exactly_the_near_duplicates_of_kept_conversations_are_dropped():
    random = np.random.default_rng(3)
    sets = families(random, n_families=60, n_copies=6)
    rank = random.permutation(len(sets))

    def similarity(one, other):
        return len(sets[one] & sets[other]) / len(sets[one] | sets[other])

    keys = band_keys(*flat(sets), threshold=0.8)
    duplicate_of, similarities = near_duplicates(keys, rank, similarity, 0.8)
    kept = set(np.flatnonzero(duplicate_of < 0).tolist())
    assert 60 <= len(kept) < len(sets)
    for one, other in enumerate(duplicate_of.tolist()):
        if other >= 0:
            assert other in kept and rank[other] < rank[one]
            assert similarities[one] == pytest.approx(similarity(one, other), rel=1e-6)
            assert similarity(one, other) >= 0.8
    left = [pair for pair in itertools.combinations(kept, 2) if similarity(*pair) >= 0.8]
    assert len(left) <= 0.01 * (len(sets) - len(kept))  # all but a hundredth are found


def test_a_chain_of_similar_conversations_drops_no_dissimilar_one():
    window = [
        set(range(at * 10, at * 10 + 100)) for at in range(6)
    ]  # neighbours are similar, ends are not
    keys = np.ones((6, 1), np.uint64)

    def similarity(one, other):
        return len(window[one] & window[other]) / len(window[one] | window[other])

    duplicate_of, _ = near_duplicates(keys, np.arange(6), similarity, 0.8)
    assert duplicate_of.tolist() == [-1, 0, -1, 2, -1, 4]


def test_thousands_of_copies_cost_one_comparison_each():
    keys = np.ones((5000, 21), np.uint64)
    asked = []
    duplicate_of, _ = near_duplicates(
        keys, np.arange(5000), lambda *pair: asked.append(pair) or 1.0, 0.8
    )
    assert asked == [(one, 0) for one in range(1, 5000)]
    assert duplicate_of[0] == -1 and (duplicate_of[1:] == 0).all()


def test_a_shared_template_costs_a_bounded_number_of_comparisons():
    asked = []
    near_duplicates(
        np.ones((400, 1), np.uint64), np.arange(400), lambda *pair: asked.append(pair) or 0.1, 0.8
    )
    assert len(asked) <= 400 * duplicates.MOST_COMPARED


def test_the_result_does_not_depend_on_the_order_of_the_rows():
    random = np.random.default_rng(4)
    sets = families(random, n_families=20, n_copies=5)
    order = random.permutation(len(sets))

    def dropped(rows, rank):
        keys = band_keys(*flat([sets[row] for row in rows]), threshold=0.8)
        duplicate_of, _ = near_duplicates(
            keys,
            rank,
            lambda a, b: len(sets[rows[a]] & sets[rows[b]]) / len(sets[rows[a]] | sets[rows[b]]),
            0.8,
        )
        return {rows[at]: rows[of] for at, of in enumerate(duplicate_of.tolist()) if of >= 0}

    assert dropped(list(range(len(sets))), np.arange(len(sets))) == dropped(order.tolist(), order)
