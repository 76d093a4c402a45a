"""Measures of a packing plan: fill, cost, balance, and the padding that it avoids."""

from __future__ import annotations

from collections import Counter

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.packing import balance
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.packing.long_documents import COUNTS
from workflow_scripts.packing.plan import Plan
from workflow_scripts.tokens.documents import Documents

# Reference set-ups: padded micro-batches of eight documents; eight ranks with one row each.
PADDED_ROWS = 8
N_RANKS = 8


def measure(
    plan: Plan, documents: Documents, facts: ModelShape, counts: Counter[str]
) -> PackingReport:
    """Measure the fill, cost and balance of a plan.

    Args:
        counts: how long documents were handled, by `COUNTS`.
    """
    pieces, n_tokens = plan.rows.pieces, int(plan.rows.n_tokens.sum())
    is_first = pieces.start + pieces.n_context == 0
    window = facts.sliding_window
    attention_flops = CostModel.of(facts).attention_flops_per_pair * plan.attention_pairs.sum()
    generator = np.random.default_rng(0)

    def padding(order: np.ndarray) -> float:
        """Return the fraction of padding; `order` is (micro-batches, rows), one piece per row."""
        lengths = pieces.length[order]
        return float(1 - lengths.sum() / (lengths.max(axis=1, initial=0).sum() * order.shape[1]))

    n_padded = pieces.n_pieces // PADDED_ROWS * PADDED_ROWS
    random_order = generator.permutation(pieces.n_pieces)[:n_padded].reshape(-1, PADDED_ROWS)
    grouped = balance.order_rows(
        pieces.length, n_ranks=1, micro_batches_per_step=1, rows_per_micro_batch=PADDED_ROWS,
        seed=0, pads_rows=True,
    )[: len(random_order), 0, 0]  # fmt: skip
    n_steps = len(plan.rows) // N_RANKS
    balanced = balance.order_rows(
        plan.training_flops, n_ranks=N_RANKS, micro_batches_per_step=1, rows_per_micro_batch=1,
        seed=0,
    )[:n_steps]  # fmt: skip
    as_planned = np.arange(n_steps * N_RANKS).reshape(balanced.shape)

    def imbalance(order: np.ndarray) -> float | None:
        return float(balance.step_imbalance(plan.training_flops, order).mean()) if n_steps else None

    return PackingReport(
        strategy=plan.strategy,
        row_tokens=plan.row_tokens,
        sliding_window=window,
        n_documents=len(documents),
        n_documents_placed=int(is_first.sum()),
        n_pieces=pieces.n_pieces,
        n_rows=len(plan.rows),
        n_tokens=n_tokens,
        n_context_tokens=int(pieces.n_context.sum()),
        n_supervised_tokens=int(plan.n_supervised.sum()),
        fill_fraction=n_tokens / (len(plan.rows) * plan.row_tokens),
        n_documents_cut=len(np.unique(pieces.document[~is_first])),
        n_documents_beyond_window=int((documents.lengths > window).sum()) if window else 0,
        attention_pairs=int(plan.attention_pairs.sum()),
        training_flops=float(plan.training_flops.sum()),
        attention_flops_fraction=float(attention_flops / plan.training_flops.sum()),
        none_padding_fraction=padding(grouped) if n_padded else None,
        none_random_order_padding_fraction=padding(random_order) if n_padded else None,
        step_imbalance_8_ranks=imbalance(balanced),
        step_imbalance_8_ranks_random_order=imbalance(as_planned),
        **{name: counts[name] for name in COUNTS},
    )
