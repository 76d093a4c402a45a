"""What a row of training costs: floating-point operations, from the model's shape and its windows.

Rows of the same number of tokens differ in attention: a row of one long document has many times the
query-key pairs of a row of short ones, unless a sliding window bounds them. Whoever shares rows out
by tokens alone leaves GPUs waiting.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.packing.packing import Rows


def attention_pairs(lengths: np.ndarray | int, window: int | None) -> np.ndarray:
    """Query-key pairs of causal attention within a window: n(n+1)/2 for n ≤ w, else
    w(w+1)/2 + (n−w)·w.

    Args:
        lengths: any shape, tokens of attention segments.
        window: keys a query sees, itself included; None is full causal.
    Returns:
        int64, of the same shape.
    """
    n = np.asarray(lengths, dtype=np.int64)
    seen = n if window is None else np.minimum(n, window)
    return seen * (seen + 1) // 2 + (n - seen) * seen


def segment_lengths(rows: Rows, *, crosses_documents: bool) -> np.ndarray:
    """(segments,) lengths of the stretches within which tokens see each other, row after row: the
    pieces, or whole rows where attention crosses documents."""
    return rows.n_tokens if crosses_documents else rows.pieces.length


@dataclass(frozen=True)
class CostModel:
    """Operations of one forward and backward pass of LoRA training without checkpointing.

    The base is frozen, so a linear layer multiplies twice (output, gradient of its input) where
    full training does it three times; the adapter's own share is left out. Attention's backward
    pass makes five products where the forward pass makes two (arXiv:2307.08691 §4).
    """

    linear_flops_per_token: float
    output_flops_per_supervised_token: float
    """The output layer, which is applied at supervised positions alone."""
    attention_flops_per_pair: float
    """Of one layer."""
    layer_windows: tuple[int | None, ...]
    """Of each layer; None is full causal."""

    @classmethod
    def of(cls, facts: ModelShape) -> CostModel:
        """The cost of a model's shape.

        Args:
            facts: of `read_model_facts`; of a mixture's experts those that are active count.
        """
        hidden, heads = facts.hidden_size, facts.n_heads * facts.head_dim
        kv_heads = facts.n_kv_heads * facts.head_dim
        n_experts = facts.n_experts_per_token or 1
        weights = hidden * (2 * heads + 2 * kv_heads)
        weights += n_experts * 3 * hidden * facts.intermediate_size
        return cls(
            linear_flops_per_token=4.0 * weights * facts.n_layers,
            output_flops_per_supervised_token=4.0 * hidden * facts.vocabulary_size,
            attention_flops_per_pair=2.0 * (2 + 5) * heads,
            layer_windows=tuple(facts.layer_windows),
        )

    def pairs(self, rows: Rows, *, crosses_documents: bool) -> np.ndarray:
        """(rows,) int64: query-key pairs of each row, summed over the layers."""
        lengths = segment_lengths(rows, crosses_documents=crosses_documents)
        pairs = np.zeros(len(lengths), dtype=np.int64)
        for window, n_layers in Counter(self.layer_windows).items():
            pairs += n_layers * attention_pairs(lengths, window)
        if crosses_documents:
            return pairs
        ends = np.concatenate([[0], np.cumsum(pairs)])
        return np.diff(ends[rows.first_piece])

    def training_flops(
        self, n_tokens: np.ndarray, n_supervised: np.ndarray, pairs: np.ndarray
    ) -> np.ndarray:
        """(rows,) float64, from the tokens, supervised tokens and `pairs` of each row."""
        return (
            self.linear_flops_per_token * n_tokens
            + self.output_flops_per_supervised_token * n_supervised
            + self.attention_flops_per_pair * pairs
        )
