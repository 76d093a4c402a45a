"""Balance: which rows share an optimizer step, and which process rank gets each row.

In a step all ranks wait for the slowest one. Rows with the same number of tokens differ in cost, so
a random assignment leaves ranks idle; ranks with rows of similar cost finish together. Rows are
sorted by cost only as far as necessary: each step draws its rows from a stretch of the random
order, and shorter stretches keep steps closer to random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_IMBALANCE = 1.01  # mean over the steps of the slowest rank's cost ÷ the ranks' mean
# Padded micro-batches are formed from a sorted stretch of at least this many micro-batches, as in
# transformers' length-grouped sampler.
PADDED_MICRO_BATCHES = 50
NO_ROW = -1


def order_rows(
    costs: np.ndarray,
    *,
    n_ranks: int,
    micro_batches_per_step: int,
    rows_per_micro_batch: int,
    seed: int | Sequence[int],
    pads_rows: bool = False,
    max_imbalance: float = MAX_IMBALANCE,
) -> np.ndarray:
    """Return the rows of an epoch in training order.

    Args:
        costs: (rows,) in any unit.
        n_ranks: number of processes that share a step.
        pads_rows: rows of a micro-batch are padded to the longest one, so their lengths should be
            similar; `costs` must then increase with length.
        max_imbalance: stop at this imbalance, see `MAX_IMBALANCE`.
    Returns:
        (steps, micro-batches, ranks, rows of a micro-batch) int64 indices. Every row occurs once;
        `NO_ROW` fills the rest of the last step.
    """
    generator = np.random.default_rng(seed)
    shape = (micro_batches_per_step, n_ranks, rows_per_micro_batch)
    step_rows = int(np.prod(shape))
    order = generator.permutation(len(costs))
    n_whole = len(order) // step_rows
    whole, rest = order[: n_whole * step_rows], order[n_whole * step_rows :]
    # Rows that one rank computes together: of similar length if padded, else one row.
    unit_rows = rows_per_micro_batch if pads_rows else 1

    if n_whole and n_ranks * unit_rows > 1:
        stretch = -(-PADDED_MICRO_BATCHES // micro_batches_per_step) if unit_rows > 1 else 1
        units = _deal(whole, costs, n_ranks, unit_rows, step_rows, stretch, generator)
        while stretch < n_whole and step_imbalance(costs, units).mean() > max_imbalance:
            stretch *= 2
            units = _deal(whole, costs, n_ranks, unit_rows, step_rows, stretch, generator)
        # (steps, units of a rank, ranks, rows of a unit) to the shape of micro-batches
        whole = units.reshape(n_whole, micro_batches_per_step, -1, n_ranks, unit_rows)
        whole = whole.swapaxes(2, 3)

    if len(rest):
        last = np.full(step_rows, NO_ROW)
        last[: len(rest)] = rest
        # Every rank gets one row before any rank gets two.
        last = last.reshape(micro_batches_per_step, rows_per_micro_batch, n_ranks).swapaxes(1, 2)
        return np.concatenate([whole.reshape(-1, *shape), last[None]])
    return whole.reshape(-1, *shape)


def step_imbalance(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return (steps,) the slowest rank's cost ÷ the ranks' mean; 1 is perfect balance.

    Args:
        order: (steps, …, ranks, rows), as returned by `order_rows`, without `NO_ROW`.
    """
    summed = tuple(axis for axis in range(1, order.ndim) if axis != order.ndim - 2)
    by_rank = np.asarray(costs, dtype=np.float64)[order].sum(axis=summed)
    return by_rank.max(axis=1) / by_rank.mean(axis=1)


def _deal(
    rows: np.ndarray,
    costs: np.ndarray,
    n_ranks: int,
    unit_rows: int,
    step_rows: int,
    stretch: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Assign the rows of each `stretch` of steps to its steps and ranks.

    A stretch is sorted by cost and cut into layers with one unit per rank. Its steps draw layers at
    random. Within a step, layer by layer, the rank with the lowest total cost so far gets the most
    expensive unit.

    Returns:
        (steps, layers of a step, ranks, unit_rows) indices.
    """
    n_steps = len(rows) // step_rows
    n_even = n_steps // stretch * stretch
    parts = [
        part.reshape(-1, n * step_rows)
        for part, n in (
            (rows[: n_even * step_rows], stretch),
            (rows[n_even * step_rows :], n_steps - n_even),
        )
        if len(part)
    ]
    dealt = []
    for part in parts:
        part = np.take_along_axis(part, np.argsort(costs[part], axis=1, kind="stable"), axis=1)
        layers = part.reshape(len(part), -1, n_ranks, unit_rows)
        drawn = np.argsort(generator.random(layers.shape[:2]), axis=1)
        layers = np.take_along_axis(layers, drawn[:, :, None, None], axis=1)
        dealt.append(layers.reshape(-1, step_rows // (n_ranks * unit_rows), n_ranks, unit_rows))
    steps = np.concatenate(dealt)
    totals = np.zeros((len(steps), n_ranks))
    for layer in range(steps.shape[1]):
        units = steps[:, layer]  # in order of increasing cost
        busiest_first = np.argsort(-totals, axis=1, kind="stable")
        steps[:, layer] = np.take_along_axis(
            units, np.argsort(busiest_first, axis=1)[:, :, None], axis=1
        )
        totals += costs[steps[:, layer]].sum(axis=-1)
    return steps
