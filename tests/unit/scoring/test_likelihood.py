from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy, kl_div

from workflow_scripts.scoring.likelihood import (
    all_logits,
    divergence,
    negative_log_likelihoods,
    paired_difference,
    score_documents,
    summarize,
)
from workflow_scripts.scoring.pieces import Piece

VOCABULARY = 50


class TableModel:
    """A bigram model: a table of logits by token, read in blocks of 3."""

    def __init__(self, table):
        self.table = table

    def logit_blocks(self, input_ids, positions):
        yield from self.table[torch.from_numpy(input_ids[positions].astype("int64"))].split(3)


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    return TableModel(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator))


def piece_of(document, scored, *, length=12, seed=0):
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=length).astype(np.int32)
    return Piece(document, tokens, np.array(scored, dtype=np.int64))


@pytest.mark.parametrize("scored", [[1], [11], [2, 3, 4], [1, 4, 5, 9, 11], list(range(1, 12))])
def test_negative_log_likelihoods_equal_cross_entropy(model, scored):
    piece = piece_of(0, scored)
    found = negative_log_likelihoods(model, piece)
    tokens = torch.from_numpy(piece.input_ids.astype("int64"))
    expected = cross_entropy(model.table[tokens[:-1]], tokens[1:], reduction="none")
    assert found.dtype == np.float64
    # Both in float32; measured 1e-6 for losses of 10.
    np.testing.assert_allclose(found, expected[piece.scored - 1].numpy(), atol=5e-6)


def test_scores_of_a_documents_pieces_are_joined_in_order(model):
    pieces = [piece_of(0, [1, 2]), piece_of(2, [5], seed=1), piece_of(0, [3], seed=2)]
    scores = score_documents(model, pieces)
    assert list(scores) == [0, 2]
    expected = [negative_log_likelihoods(model, pieces[at]) for at in (0, 2)]
    np.testing.assert_array_equal(scores[0], np.concatenate(expected))
    assert len(scores[2]) == 1


def test_all_logits_are_the_blocks_in_order(model):
    piece = piece_of(0, [1, 2, 5, 6, 7, 11])
    tokens = torch.from_numpy(piece.input_ids.astype("int64"))
    assert torch.equal(all_logits(model, piece), model.table[tokens[piece.scored - 1]])


def random_scores(generator, n_documents):
    """Documents of different lengths; the tokens of each share a mean."""
    return {
        number: generator.normal(generator.normal(2, 0.4), 1, size=generator.integers(5, 80))
        for number in range(n_documents)
    }


def test_the_mean_is_over_tokens_not_over_documents():
    report = summarize({0: np.array([1.0]), 1: np.array([2.0, 4.0, 5.0])})
    assert report.n_conversations == 2 and report.n_scored_tokens == 4
    assert report.loss_nats_per_token == 3.0
    assert report.perplexity == pytest.approx(math.e**3)


def test_the_standard_error_of_two_documents_equals_the_formula_by_hand():
    # Sums 1 and 11, counts 1 and 3, ratio 3; residuals 1 − 3 = −2 and 11 − 9 = 2.
    # √(n/(n−1) · Σ residual²) ÷ tokens = √(2 · 8) ÷ 4.
    report = summarize({0: np.array([1.0]), 1: np.array([2.0, 4.0, 5.0])})
    assert report.loss_standard_error_nats_per_token == pytest.approx(1.0)


def test_the_standard_error_agrees_with_a_jackknife_over_documents():
    scores = random_scores(np.random.default_rng(0), 400)
    sums = np.array([part.sum() for part in scores.values()])
    counts = np.array([len(part) for part in scores.values()])
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = math.sqrt((len(sums) - 1) / len(sums) * ((left_out - left_out.mean()) ** 2).sum())
    found = summarize(scores).loss_standard_error_nats_per_token
    assert found == pytest.approx(jackknife, rel=0.01)  # measured 0.001
    # Tokens of a document are correlated: taken as independent, the error would be far smaller.
    independent = np.concatenate(list(scores.values())).std() / math.sqrt(counts.sum())
    assert found > 1.5 * independent


def test_one_document_has_no_standard_error():
    assert summarize({3: np.array([1.0, 2.0])}).loss_standard_error_nats_per_token is None


logits = st.tuples(st.integers(1, 70), st.integers(2, 40), st.integers(0, 2**31))


@given(shape=logits)
def test_divergence_equals_kl_div_reference_first(shape):
    n, vocabulary, seed = shape
    generator = torch.Generator().manual_seed(seed)
    p, q = (4 * torch.randn(n, vocabulary, generator=generator) for _ in range(2))
    found, agrees = divergence(p, q)
    log_p, log_q = (part.double().log_softmax(dim=-1) for part in (p, q))
    expected = kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    assert torch.equal(agrees, p.argmax(dim=-1) == q.argmax(dim=-1))


@given(shape=logits)
def test_equal_logits_have_no_divergence(shape):
    n, vocabulary, seed = shape
    p = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))
    found, agrees = divergence(p, p.clone())
    assert torch.equal(found, torch.zeros(n, dtype=torch.float64))
    assert agrees.all()
    # A constant added to all logits changes no probability.
    shifted, _ = divergence(p, p + 3)
    assert shifted.abs().max() < 1e-12


def test_the_difference_is_paired_by_document():
    """Documents that are hard for both models do not add to the error."""
    generator = np.random.default_rng(0)
    hardness = [generator.normal(5, 3, size=n) for n in (3, 9, 4, 7, 30)]
    one = {number: part for number, part in enumerate(hardness)}
    other = {number: part + 0.25 for number, part in one.items()}
    difference, error = paired_difference(one, other)
    assert difference == pytest.approx(-0.25)
    assert error == pytest.approx(0, abs=1e-12)
    assert paired_difference({0: one[0]}, {0: other[0]})[1] is None
