"""Usable context and recall of a link (`evaluate_context`,
`evaluate_recall`)."""

from __future__ import annotations

from typing import Literal

from workflow_scripts.handover.record import LEFT_OUT, Record

Definition = Literal["ruler", "nolima"]


class Cell(Record):
    """Answers to the questions of one length and depth."""

    length_tokens: int
    """Length of prompt and answer."""
    depth_fraction: float | None
    """Depth of the fact: 0 is the beginning of the text; None for a task without one."""
    n_prompts: int
    n_exact: int
    """Questions whose code greedy decoding gives."""
    exact_fraction: float
    exact_low_fraction: float
    """Lower end of the 95 % Wilson interval."""
    exact_high_fraction: float
    nats_per_answer: float
    """Mean negative log-likelihood of the right code."""
    standard_error_nats_per_answer: float | None
    """None for a single prompt."""


class Task(Record):
    """A kind of question."""

    task: str


class TaskCell(Cell, Task):
    """Answers to the questions of one task, length and depth."""


class LengthScore(Record):
    """Score of one length, over all tasks and depths."""

    length_tokens: int
    score_percent: float


class Questions(Record):
    """Questions to a link, and its answers."""

    advertised_tokens: int
    """Context of the base model."""
    context_tokens: int
    """Context that the link is advertised for; a GGUF's ends at the sliding window."""
    sliding_window: int | None
    """Keys that a query sees; None is full causal attention."""
    cells: tuple[TaskCell, ...]
    scores: tuple[LengthScore, ...]
    n_prompts: int


class EffectiveLengths(Record):
    """Usable context by two published definitions."""

    is_measurable: bool
    """False for a link that answers nothing at the shortest length."""
    base_score_percent: float
    """Best score at short lengths, which NoLiMa's definition refers to."""
    effective_tokens_ruler: int | None
    """Longest length up to which every score is at least 85.6 % (arXiv:2404.06654); None where it
    is not measurable."""
    effective_tokens_nolima: int | None
    """Longest length up to which every score is at least 85 % of `base_score_percent`
    (arXiv:2502.05167)."""


class EffectiveIntervals(Record):
    """95 % intervals of the effective lengths; None where they are not measurable."""

    effective_tokens_ruler_low: int | None
    effective_tokens_ruler_high: int | None
    effective_tokens_nolima_low: int | None
    effective_tokens_nolima_high: int | None


class LongGain(Record):
    """Gain from the context beyond `short_tokens`."""

    short_tokens: int
    """Context that the whole context is compared with."""
    n_long_conversations: int
    """Test conversations that the gain is measured on."""
    long_gain_nats_per_token: float | None
    """Loss with `short_tokens` of context minus the loss with all of it; None where no conversation
    is longer, or the gain was not asked for."""
    long_gain_standard_error_nats_per_token: float | None
    n_long_tokens: int | None = LEFT_OUT
    """Tokens that the gain is measured on; left out where it was not measured."""


class ContextScores(LongGain, EffectiveIntervals, EffectiveLengths, Questions):
    """`{link}.context.json`: usable context of one link (`evaluate_context`)."""

    duration_seconds: float

    def effective_tokens(self, definition: Definition) -> tuple[int | None, int | None, int | None]:
        """Effective length and its 95 % interval: None where it is not measurable."""
        if definition == "ruler":
            return (
                self.effective_tokens_ruler,
                self.effective_tokens_ruler_low,
                self.effective_tokens_ruler_high,
            )
        return (
            self.effective_tokens_nolima,
            self.effective_tokens_nolima_low,
            self.effective_tokens_nolima_high,
        )


class RecallScores(Record):
    """`recall.json`: facts that a live adapter recalls from held-out text, by length of the prompt
    and depth of the fact (`evaluate_recall`)."""

    precision: str
    """Weights and arithmetic: `float32`, `nf4`…"""
    sliding_window: int | None
    """Keys that a query sees; None is full causal attention."""
    chance_nats_per_answer: float
    """Cost of a code that is guessed."""
    cells: tuple[Cell, ...]
    duration_seconds: float
