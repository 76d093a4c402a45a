"""Answers of a link to the first questions of held-out conversations (`answer_prompts`)."""

from __future__ import annotations

from workflow_scripts.handover.record import Record


class Answer(Record):
    """A greedy answer to one prompt. Texts are without control tokens at their ends."""

    conversation: str
    """Id of the conversation."""
    prompt: str
    """All that the model saw."""
    reference: str
    """The conversation's own answer."""
    answer: str
    n_tokens: int
    """Tokens of the answer."""
    is_ended: bool
    """True if the model ended its answer within the limit."""
    is_reference: bool
    """True if the answer has the token ids of the reference."""


class Answers(Record):
    """`{link}.answers.json`: answers of one link. Every link is given the same prompts in the same
    order."""

    answers: tuple[Answer, ...]
    duration_seconds: float
