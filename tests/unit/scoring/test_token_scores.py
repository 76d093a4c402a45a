from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.scoring.likelihood import summarize
from workflow_scripts.scoring.token_scores import TokenScores, turns
from workflow_scripts.tokens.documents import Document

NAMES = ["a", "b", None]


@st.composite
def scored(draw):
    """Documents, their scores, and the sources of some; some documents have no token to score."""
    supervised = draw(
        st.lists(st.lists(st.booleans(), min_size=1, max_size=700), min_size=1, max_size=6)
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    documents = [
        Document(
            f"chat/{number}",
            generator.integers(0, 300, size=len(one)).astype(np.int32),
            np.array(one),
        )
        for number, one in enumerate(supervised)
    ]
    nats = {
        number: generator.gamma(1, 2, size=n).astype(np.float32).astype(float)
        for number, document in enumerate(documents)
        if (n := int(document.is_supervised[1:].sum()))
    }
    chosen = [draw(st.sampled_from(NAMES)) for _ in documents]
    sources = {
        document.id: name
        for document, name in zip(documents, chosen, strict=True)
        if name is not None
    }
    return documents, nats, sources


@given(scored=scored())
def test_a_table_is_read_as_it_was_written(scored, tmp_path_factory):
    documents, nats, sources = scored
    path = tmp_path_factory.mktemp("scores") / "link.tokens.parquet"
    for whole in (None, {number: 2 * part for number, part in nats.items()}):
        written = TokenScores.of(documents, nats, whole_nats=whole, sources=sources)
        written.write(path)
        read = TokenScores.read(path)
        assert (read.ids, read.sources) == (written.ids, written.sources)
        for name in ("conversation", "turn", "position", "token", "nats", "whole_nats"):
            found, expected = getattr(read, name), getattr(written, name)
            assert (found is None) == (expected is None), name
            if expected is not None:
                np.testing.assert_array_equal(found, expected, err_msg=name)
                assert found.dtype == expected.dtype


@given(scored=scored())
def test_each_row_is_a_supervised_token_with_its_place_and_loss(scored):
    documents, nats, sources = scored
    scores = TokenScores.of(documents, nats, sources=sources)
    rows = zip(
        *(scores.conversation.tolist(), scores.turn.tolist(), scores.position.tolist()),
        *(scores.token.tolist(), scores.nats.tolist()),
        strict=True,
    )
    expected = []
    for number, document in enumerate(documents):
        turn, before = 0, False
        losses = iter(nats.get(number, ()))
        for position, is_supervised in enumerate(document.is_supervised.tolist()):
            turn += is_supervised and not before
            before = is_supervised
            if is_supervised and position:
                token = int(document.input_ids[position])
                expected.append((document.id, turn, position, token, next(losses)))
    assert [(scores.ids[one], *rest) for one, *rest in rows] == expected
    assert scores.sources == [sources.get(name) for name in scores.ids]


@given(scored=scored())
def test_metrics_equal_those_of_the_scores_and_parts_add_up_to_the_whole(scored):
    documents, nats, sources = scored
    if not nats:
        return
    scores = TokenScores.of(documents, nats, sources=sources)
    for (key, found), (_, expected) in zip(scores.metrics(), summarize(nats), strict=True):
        assert found == (expected and pytest.approx(expected, rel=1e-9, abs=1e-9)), key
    n, total = scores.metrics().n_scored_tokens, sum(part.sum() for part in nats.values())
    for parts in (scores.by_position(), scores.by_turn(), scores.by_source()):
        assert sum(part.n_scored_tokens for part in parts) == n
        found = sum(part.n_scored_tokens * part.loss_nats_per_token for part in parts)
        assert found == pytest.approx(total, rel=1e-9)


EDGES = st.sampled_from([1, 255, 256, 257, 511, 512, 1023, 1024, 4095, 4096])


@given(
    positions=st.dictionaries(
        st.integers(0, 9),
        st.lists(EDGES | st.integers(1, 5000), min_size=1, max_size=20, unique=True).map(sorted),
        min_size=1,
    )
)
def test_each_token_is_in_the_bucket_of_its_position(positions):
    nothing = Document("chat", np.zeros(5001, np.int32), np.zeros(5001, bool))
    # The nats of a token are a hundredth of its position, which shows the bucket it went to.
    places = {number: np.array(found) for number, found in positions.items()}
    nats = {number: part / 100 for number, part in places.items()}
    scores = TokenScores.of([nothing] * 10, nats, positions=places)
    last = -1
    for bucket in scores.by_position():
        assert bucket.first_position > last
        first, last = bucket.first_position, bucket.last_position
        assert last + 1 in (256, 512, 1024, 2048, 4096, 8192)
        assert first == (0 if last == 255 else (last + 1) // 2)
        inside = [part[(part >= first) & (part <= last)] for part in places.values()]
        assert bucket.n_conversations == sum(len(part) > 0 for part in inside)
        assert bucket.n_scored_tokens == sum(map(len, inside)) > 0
        assert bucket.loss_nats_per_token == pytest.approx(
            np.concatenate(inside).mean() / 100, rel=1e-6
        )
    n_tokens = sum(bucket.n_scored_tokens for bucket in scores.by_position())
    assert n_tokens == sum(map(len, places.values()))


def test_a_turn_begins_with_each_supervised_run():
    document = Document("a", np.zeros(9, np.int32), np.array([0, 0, 1, 1, 0, 1, 0, 0, 1], bool))
    assert turns(document)[document.is_supervised].tolist() == [1, 1, 2, 3]
    from_the_start = Document("b", np.zeros(3, np.int32), np.ones(3, bool))
    assert turns(from_the_start).tolist() == [1, 1, 1]


def of_lengths(parts, sources=None):
    """Scores of conversations whose tokens are all supervised."""
    documents = [
        Document(f"chat/{number}", np.zeros(len(part) + 1, np.int32), np.ones(len(part) + 1, bool))
        for number, part in enumerate(parts)
    ]
    return TokenScores.of(documents, dict(enumerate(parts)), sources=sources)


def test_pairing_cancels_text_difficulty():
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 80, size=400)
    hard = [generator.normal(generator.normal(2, 1), 1, size=length) for length in lengths]
    other = [part + generator.normal(0.03, 0.1, size=len(part)) for part in hard]
    one, two = of_lengths(other), of_lengths(hard)
    found = one.difference(two)
    losses = [scores.metrics().loss_nats_per_token for scores in (one, two)]
    assert found.mean == pytest.approx(losses[0] - losses[1], abs=1e-7)
    changes = np.array([(a - b).sum() for a, b in zip(other, hard, strict=True)])
    left_out = (changes.sum() - changes) / (lengths.sum() - lengths)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(jackknife, rel=0.01)  # measured 1e-4
    # Unpaired, it would be fifty times as large.
    alone = [scores.metrics().loss_standard_error_nats_per_token for scores in (one, two)]
    assert math.hypot(*alone) > 20 * found.standard_error


def test_a_difference_of_equally_long_conversations_has_the_classic_error():
    generator = np.random.default_rng(1)
    one, two = ([generator.normal(2, 1, size=20) for _ in range(9)] for _ in range(2))
    found = of_lengths(one).difference(of_lengths(two))
    changes = [(a - b).mean() for a, b in zip(one, two, strict=True)]
    assert found.mean == pytest.approx(np.mean(changes), rel=1e-6)
    error = np.std(changes, ddof=1) / math.sqrt(9)
    assert found.standard_error == pytest.approx(error, rel=1e-6)


def test_a_single_conversation_has_a_difference_without_an_error():
    one, two = of_lengths([np.array([1.0, 2.0])]), of_lengths([np.array([0.5, 1.0])])
    assert one.difference(two) == (0.75, None)


def test_scores_of_other_tokens_are_not_the_same():
    one = of_lengths([np.ones(3), np.ones(2)])
    assert one.scores_the_same(of_lengths([np.zeros(3), np.zeros(2)]))
    assert not one.scores_the_same(of_lengths([np.ones(2), np.ones(3)]))
    assert not one.scores_the_same(of_lengths([np.ones(3)]))
    moved = of_lengths([np.ones(3), np.ones(2)])
    moved.position[0] += 1
    assert not one.scores_the_same(moved)


def test_sources_are_scored_separately():
    parts = [np.array([1.0, 1.0]), np.array([4.0]), np.array([2.0, 4.0])]
    scores = of_lengths(parts, {"chat/0": "web", "chat/2": "ours"})
    found = {one.source: one.loss_nats_per_token for one in scores.by_source()}
    assert found == {"web": 1.0, None: 4.0, "ours": 3.0}


def test_a_token_takes_few_bytes(tmp_path):
    generator = np.random.default_rng(2)
    scores = of_lengths([generator.gamma(1, 2, size=500) for _ in range(200)], {"chat/0": "web"})
    scores.write(tmp_path / "link.tokens.parquet")
    # 4 of them are the loss, which hardly compresses; measured 5.1.
    assert (tmp_path / "link.tokens.parquet").stat().st_size < 7 * 200 * 500
    table = files.read_parquet(tmp_path / "link.tokens.parquet")
    assert len(table) == 200 * 500
