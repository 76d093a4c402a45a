"""Numbers of what cleaning kept, corrected and rejected (`clean_dataset`)."""

from __future__ import annotations

from workflow_scripts.handover.record import LEFT_OUT, Record


class SourceCounts(Record):
    """Conversations of one source."""

    n_read: int
    n_kept: int
    n_rejected: int
    """Conversations that were rejected or dropped."""
    weight: float
    """How many times an epoch sees a training conversation of this source."""


class Histogram(Record):
    """Counts by ranges."""

    edges: tuple[int, ...]
    """Where each range begins. The last has no end."""
    counts: tuple[int, ...]
    """One count per range."""


class CleaningReport(Record):
    """`cleaning_report.json`: what was read, kept, corrected and rejected."""

    n_read: int
    n_corrected: int
    """Kept conversations that were corrected in at least one way."""
    n_train: int
    n_validation: int
    n_test: int
    n_train_weighted: int
    """Training conversations that an epoch sees, with the weights of their sources."""
    n_with_reference: int
    """Kept conversations that have a right answer to their last question."""
    n_rejected: int
    rejected_by_reason: dict[str, int]
    """Most frequent first, as in the other tables by name."""
    corrections: dict[str, int]
    """Kept conversations by what was corrected; one may be counted several times."""
    by_source: dict[str, SourceCounts]
    roles: dict[str, int]
    """Messages of kept conversations by role."""
    n_messages: dict[int, int]
    """Kept conversations by their number of messages, ascending."""
    characters_histogram: Histogram
    """Kept conversations by the characters of all their messages."""
    languages: dict[str, int]
    """Conversations of the sample by ISO 639-1 code."""
    n_language_sample: int
    """Kept conversations whose language was identified."""
    personal_data: dict[str, int]
    """Findings by kind, in usable conversations, duplicates included."""
    held_out_fractions: dict[str, float] | None = LEFT_OUT
    """Shares of `validation` and `test` in the config; left out by older versions."""

    @property
    def n_by_split(self) -> dict[str, int]:
        return {"train": self.n_train, "validation": self.n_validation, "test": self.n_test}

    @property
    def n_kept(self) -> int:
        return sum(self.n_by_split.values())
