"""Fill, cost and balance of a packing plan (`pack_sequences`)."""

from __future__ import annotations

from workflow_scripts.handover.record import Record


class PackingReport(Record):
    """`packing_report.json`: fill, cost and balance of a plan, and the fate of long documents."""

    strategy: str
    """`best_fit`, `concatenate` or `none`."""
    row_tokens: int
    """Length of a full row."""
    sliding_window: int | None
    """Keys that a query sees, itself included; None is full causal attention."""
    n_documents: int
    """Documents of the training split, copies not counted."""
    n_documents_placed: int
    """Documents in the plan, copies counted."""
    n_pieces: int
    n_rows: int
    n_tokens: int
    n_context_tokens: int
    """Tokens that a piece repeats from the piece before it. They are not learned."""
    n_supervised_tokens: int
    fill_fraction: float
    """Tokens ÷ room of all rows."""
    n_documents_cut: int
    """Documents in more than one piece."""
    n_documents_beyond_window: int
    """Documents longer than the sliding window; 0 without a window."""
    attention_pairs: int
    """Query-key pairs of an epoch, summed over the layers."""
    training_flops: float
    """Floating-point operations of an epoch."""
    attention_flops_fraction: float
    """Attention's share of `training_flops`."""
    none_padding_fraction: float | None
    """Padding of micro-batches of 8 unpacked pieces, grouped by length; None with fewer pieces."""
    none_random_order_padding_fraction: float | None
    """The same in random order."""
    step_imbalance_8_ranks: float | None
    """Cost of the slowest of 8 ranks ÷ their mean, averaged over steps of balanced rows; None with
    fewer rows."""
    step_imbalance_8_ranks_random_order: float | None
    """The same with rows in the order of the plan."""
    n_documents_split: int
    """Documents longer than a row that were split. Like all counts below, 0 for `concatenate`."""
    n_documents_truncated: int
    n_documents_dropped: int
    n_cuts_at_turn: int
    n_cuts_at_sentence: int
    n_cuts_at_token: int
    """Cuts where neither a turn nor a sentence ends."""
    n_pieces_without_supervision: int
    """Pieces left out because they have no supervised token."""
    n_tokens_left_out: int
    """Tokens of dropped documents, of truncated ends and of the pieces without supervision."""
