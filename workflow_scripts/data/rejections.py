"""Why a record or a conversation cannot be used."""

from __future__ import annotations


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
