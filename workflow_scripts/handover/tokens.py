"""Counts of rendered conversations (`render_chats`), and of those that its gate compared
(`check_tokens`)."""

from __future__ import annotations

from workflow_scripts.handover.record import Record


class SplitTokens(Record):
    """Documents of one split."""

    n_documents: int
    n_tokens: int
    n_supervised_tokens: int
    n_documents_up_to_tokens: dict[int, int]
    """Documents by length in tokens. A key is a power of two; its value counts the documents that
    are longer than half the key and at most as long as the key."""


class RenderingReport(Record):
    """`rendering_report.json`: documents and tokens of all splits together, then of each."""

    n_documents: int
    n_rejected: int
    n_tokens: int
    n_supervised_tokens: int
    splits: dict[str, SplitTokens]
    n_rejected_by_reason: dict[str, int]
    """Most frequent first."""


class TokensCheck(Record):
    """`tokens/check.json`: the compared documents had the same token ids in every rendering."""

    n_documents: int
    """Documents of all splits."""
    n_conversations: int
    """Documents that were compared."""
    n_with_tools: int
    """Those of them that offer or call a tool."""
    n_compared_with_template: int
    """Those of them that were compared with the tokenizer that ships and its chat template too."""
    n_compared_with_mistral_common_alone: dict[str, int]
    """The others, by the reason why the template renders them differently."""
