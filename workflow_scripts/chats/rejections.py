"""Rejections: why a record or a conversation cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from logging import Logger
from typing import NamedTuple

from workflow_scripts.log import StageError


class Rejected(Exception):
    """A record that cannot be used.

    Args:
        reason: a fixed short phrase, to count by; `data/README.md` lists them.
        detail: the values of this record.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        # It quotes text that may be damaged, and is written to a file.
        self.detail = detail.encode(errors="replace").decode()


class RejectedRow(NamedTuple):
    """A row of `rejected.parquet`."""

    source: str
    source_file: str
    source_line: int
    reason: str
    detail: str | None
    raw: str | None
    """The record as read."""


def check_rejected(
    problems: Sequence[str],
    logger: Logger,
    *,
    n_read: int,
    limit: float,
    key: str,
    n_rejected: int | None = None,
) -> None:
    """Log the rejected conversations, and stop if there are more than the config accepts.

    Args:
        problems: one line per rejected conversation: where and why. The first 10 are shown.
        n_rejected: the number of rejected conversations, if `problems` holds only the first.
    Raises:
        StageError: the rejected share is above `limit`.
    """
    for problem in problems[:1000]:
        logger.warning("rejected %s", problem)
    n_rejected = len(problems) if n_rejected is None else n_rejected
    if n_rejected <= limit * n_read:
        return
    raise StageError(
        f"{n_rejected} of {n_read} conversations cannot be used",
        where="\n            ".join(problems[:10]),
        found=f"{n_rejected / n_read:.1%} rejected",
        expected=f"at most {limit:.1%} ({key})",
        to_fix="correct these conversations (the log lists the first 1,000), or raise the limit",
    )
