from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.facts import MISTRAL_7B
from workflow_scripts.packing.balance import MAX_IMBALANCE, NO_ROW, order_rows, step_imbalance
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.packing.packing import Pieces, best_fit

costs_of_any_kind = st.lists(st.integers(1, 10**6), max_size=120).map(np.array)
shapes = st.fixed_dictionaries(
    {
        "n_ranks": st.integers(1, 5),
        "micro_batches_per_step": st.integers(1, 4),
        "rows_per_micro_batch": st.integers(1, 4),
        "seed": st.integers(0, 2**32 - 1),
        "pads_rows": st.booleans(),
    }
)


@given(costs=costs_of_any_kind, shape=shapes)
def test_every_row_is_used_once_per_epoch(costs, shape):
    order = order_rows(costs, **shape)
    step = (shape["micro_batches_per_step"], shape["n_ranks"], shape["rows_per_micro_batch"])
    assert order.shape == (-(-len(costs) // np.prod(step)), *step)
    counts = Counter(order.ravel().tolist())
    missing = counts.pop(NO_ROW, 0)
    assert counts == Counter(range(len(costs)))
    assert NO_ROW not in order[:-1]
    assert missing < np.prod(step)


@given(costs=costs_of_any_kind, shape=shapes)
def test_a_seed_decides_the_order(costs, shape):
    assert np.array_equal(order_rows(costs, **shape), order_rows(costs, **shape))


@given(n_rows=st.integers(1, 60), shape=shapes)
def test_in_the_last_step_no_rank_has_two_rows_before_all_have_one(n_rows, shape):
    last = order_rows(np.ones(n_rows), **shape)[-1]
    for micro_batch in last:
        n_of_rank = (micro_batch != NO_ROW).sum(axis=1)
        assert n_of_rank.max() - n_of_rank.min() <= 1


def test_step_imbalance_is_the_slowest_rank_over_the_mean():
    costs = np.array([1.0, 2.0, 3.0, 6.0])
    order = np.array([[[[0], [1]], [[2], [3]]], [[[0], [3]], [[1], [2]]]])
    assert step_imbalance(costs, order).tolist() == [8 / 6, 9 / 6]


def ranks_of(values):
    return np.argsort(np.argsort(values))


def spearman(one, other):
    return np.corrcoef(ranks_of(one), ranks_of(other))[0, 1]


@pytest.fixture(scope="module", params=[4096, None], ids=["windowed", "full"])
def long_rows(request):
    """Rows of 32,768 tokens from lognormal lengths, and their costs for Mistral 7B."""
    lengths = np.random.default_rng(0).lognormal(np.log(800), 1.5, 300_000).astype(int) + 8
    rows = best_fit(Pieces.whole(lengths.clip(max=32_768)), row_tokens=32_768, seed=0)
    cost = CostModel.of(
        MISTRAL_7B.changed(vocabulary_size=32_000, layer_windows=[request.param] * 32)
    )
    pairs = cost.pairs(rows, crosses_documents=False)
    return rows, cost.training_flops(rows.n_tokens, rows.n_tokens // 2, pairs)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_eight_ranks_finish_together_and_steps_stay_random(long_rows, micro_batches):
    rows, costs = long_rows
    order = order_rows(
        costs, n_ranks=8, micro_batches_per_step=micro_batches, rows_per_micro_batch=1, seed=0
    )
    whole = order[: len(rows) // (8 * micro_batches)]
    in_turn = np.arange(whole.size).reshape(whole.shape)
    assert step_imbalance(costs, whole).mean() <= MAX_IMBALANCE
    assert step_imbalance(costs, in_turn).mean() > 1.03  # as planned, in random order
    n_pieces = np.diff(rows.first_piece)
    mean_length = np.array(
        [rows.n_tokens[step].sum() / n_pieces[step].sum() for step in whole.reshape(len(whole), -1)]
    )
    assert abs(spearman(mean_length, np.arange(len(whole)))) < 0.05


def test_a_step_takes_its_rows_from_a_short_stretch_of_the_random_order(long_rows):
    rows, costs = long_rows
    order = order_rows(costs, n_ranks=8, micro_batches_per_step=1, rows_per_micro_batch=1, seed=0)
    drawn_at = np.argsort(np.random.default_rng(0).permutation(len(rows)))
    places = drawn_at[order[: len(rows) // 8]].reshape(-1, 8)
    assert np.ptp(places, axis=1).max() < len(rows) / 8


def test_four_rows_per_rank_of_similar_cost_need_no_sorting_across_steps():
    costs = np.random.default_rng(0).uniform(0.97, 1.03, 4096)
    order = order_rows(costs, n_ranks=2, micro_batches_per_step=4, rows_per_micro_batch=1, seed=1)
    drawn = np.random.default_rng(1).permutation(4096).reshape(-1, 8)
    assert all(
        set(step.ravel()) == set(as_drawn) for step, as_drawn in zip(order, drawn, strict=True)
    )


def test_the_rank_with_the_lowest_cost_takes_the_most_expensive_row():
    costs = np.array([10, 1, 11, 2])
    for seed in range(10):
        order = order_rows(
            costs, n_ranks=2, micro_batches_per_step=2, rows_per_micro_batch=1, seed=seed
        )
        assert step_imbalance(costs, order).tolist() == [1.0]


def test_sorted_steps_come_in_random_order():
    costs = np.random.default_rng(0).lognormal(0, 1, 4000)
    shape = {"micro_batches_per_step": 1, "rows_per_micro_batch": 1, "n_ranks": 4}
    order = order_rows(costs, **shape, seed=0, max_imbalance=1.0)
    means = costs[order].mean(axis=(1, 2, 3))
    assert step_imbalance(costs, order).mean() < 1.01  # all rows sorted
    assert abs(spearman(means, np.arange(1000))) < 0.1


def test_one_rank_takes_the_rows_in_random_order():
    costs = np.arange(100.0)
    order = order_rows(costs, n_ranks=1, micro_batches_per_step=2, rows_per_micro_batch=1, seed=5)
    assert np.array_equal(order.ravel(), np.random.default_rng(5).permutation(100))


def test_padded_micro_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).lognormal(6, 0.8, 4000).astype(int) + 1

    def padding(order):
        rows = order.reshape(-1, 8)
        return 1 - lengths[rows].sum() / (8 * lengths[rows].max(axis=1).sum())

    shape = {"n_ranks": 1, "micro_batches_per_step": 1, "rows_per_micro_batch": 8, "seed": 0}
    grouped = padding(order_rows(lengths, **shape, pads_rows=True))
    assert grouped < 0.1 < 0.4 < padding(order_rows(lengths, **shape))
