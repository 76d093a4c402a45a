"""Cost of a training row in floating-point operations, from the model's shape and windows.

Rows with the same number of tokens differ in attention: one long document has many times the
query-key pairs of several short ones, unless a sliding window limits them. Rows distributed by
their tokens alone leave GPUs waiting.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.packing.packing import Rows


def attention_pairs(lengths: np.ndarray | int, window: int | None) -> np.ndarray:
    """Count query-key pairs of causal attention: n(n+1)/2 for n ≤ w, else w(w+1)/2 + (n−w)·w.

    Args:
        lengths: any shape, tokens of each attention segment.
        window: keys a query sees, itself included; None is full causal.
    Returns:
        int64, of the same shape.
    """
    n = np.asarray(lengths, dtype=np.int64)
    seen = n if window is None else np.minimum(n, window)
    return seen * (seen + 1) // 2 + (n - seen) * seen


@dataclass(frozen=True)
class CostModel:
    """Operations of one forward and backward pass of LoRA training without checkpointing.

    The base model is frozen, so a linear layer needs two matrix products (output, gradient of its
    input) instead of the three of full training. The adapter's operations are not counted.
    Attention needs five products in the backward pass and two in the forward pass
    (arXiv:2307.08691 §4).
    """

    linear_flops_per_token: float
    output_flops_per_supervised_token: float
    """The output layer, which is applied at supervised positions only."""
    attention_flops_per_pair: float
    """In one layer."""
    layer_windows: tuple[int | None, ...]
    """Window of each layer; None is full causal."""

    @classmethod
    def of(cls, facts: ModelShape) -> CostModel:
        """Derive the cost from a model's shape; only the active experts of a mixture count."""
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
        """Return (rows,) int64: query-key pairs of each row, summed over the layers."""
        # Tokens see each other within a piece, or within the row if attention crosses documents.
        lengths = rows.n_tokens if crosses_documents else rows.pieces.length
        pairs = np.zeros(len(lengths), dtype=np.int64)
        for window, n_layers in Counter(self.layer_windows).items():
            pairs += n_layers * attention_pairs(lengths, window)
        if crosses_documents:
            return pairs
        return rows.sum_pieces(pairs)

    def training_flops(
        self, n_tokens: np.ndarray, n_supervised: np.ndarray, pairs: np.ndarray
    ) -> np.ndarray:
        """Return (rows,) float64 from the tokens, supervised tokens and `pairs` of each row."""
        return (
            self.linear_flops_per_token * n_tokens
            + self.output_flops_per_supervised_token * n_supervised
            + self.attention_flops_per_pair * pairs
        )
