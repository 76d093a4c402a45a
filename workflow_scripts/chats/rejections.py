"""Why a record or a conversation cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from logging import Logger

from workflow_scripts.log import StageError


class Rejected(Exception):
    """A record that cannot be used.

    Args:
        reason: a short phrase that never varies, to count by; `data/README.md` lists them.
        detail: the values of this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        # It quotes what may be broken, and is to be written to a file.
        self.detail = detail.encode(errors="replace").decode()

    def __reduce__(self) -> tuple[type[Rejected], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def check_rejected(
    problems: Sequence[str],
    logger: Logger,
    *,
    n_read: int,
    limit: float,
    key: str,
    n_rejected: int | None = None,
) -> None:
    """Log what was rejected, and stop where it is more than the config accepts.

    Args:
        problems: one line a rejected conversation, where and why; the first 10 are shown.
        n_rejected: where `problems` are only the first of them.
    Raises:
        StageError: the share is above `limit`.
    """
    for problem in problems[:1000]:
        logger.warning("rejected %s", problem)
    n_rejected = len(problems) if n_rejected is None else n_rejected
    if not n_read or n_rejected <= limit * n_read:
        return
    shown = "\n            ".join(problems[:10])
    raise StageError(
        f"{n_rejected} of {n_read} conversations cannot be used",
        where=shown,
        found=f"{n_rejected / n_read:.1%} rejected",
        expected=f"at most {limit:.1%} ({key})",
        to_fix="mend these conversations (the log names the first 1,000), or raise the limit",
    )
