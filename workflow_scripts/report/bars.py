"""Counts as the bars of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

N_BARS = 20


class Bar(NamedTuple):
    """One line of a drawing of counts."""

    label: str
    n: int
    start: int = 0
    """Count at which the bar begins."""
    kind: str = ""
    """Style of the bar: `whole`, `lost`, `kept`, or `part` (of the bar above)."""


def range_bars(edges: Sequence[int], counts: Sequence[int]) -> list[Bar]:
    """One bar per range, from the first to the last range that is not empty.

    Args:
        edges: first value of each range. One edge more than counts closes the last range.
    """
    used = [at for at, n in enumerate(counts) if n]
    if not used:
        return []
    bars = []
    for at in range(used[0], used[-1] + 1):
        is_open = at + 1 == len(edges)
        label = f"{edges[at]:,} or more" if is_open else f"{edges[at]:,} – {edges[at + 1] - 1:,}"
        bars.append(Bar(label, counts[at]))
    return bars


def first_bars(bars: Sequence[Bar], *, rest: str) -> list[Bar]:
    """The first bars, and a last one called `rest` that sums up the others."""
    if len(bars) <= N_BARS:
        return list(bars)
    n_rest = sum(bar.n for bar in bars[N_BARS - 1 :])
    return [*bars[: N_BARS - 1], Bar(rest, n_rest)]
