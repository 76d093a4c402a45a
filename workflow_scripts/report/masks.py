"""What the tokens of a row see of each other, drawn as SVG for a page.

A pair of tokens is a point: the query's place in the row counted downwards, the key's across. The
unit of the drawing is a token, and each shape holds the centres of its pairs and no other centre.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from workflow_scripts import pages

SIDE = 276  # of the square, in pixels, as is what follows
LEFT, TOP, STRIP = 66, 40, 9


class Stretch(NamedTuple):
    """A piece as it lies in its row."""

    start: int
    """First token, from the row's start."""
    end: int
    n_context: int
    name: str
    """What to call it."""


def mask_svg(
    stretches: Sequence[Stretch],
    is_supervised: np.ndarray,
    *,
    window: int | None,
    crosses_documents: bool,
    extent_tokens: int,
    label: str,
) -> str:
    """The mask of a row, and beside it which of its tokens are supervised.

    Args:
        is_supervised: (tokens,) bool of the row.
        window: keys a query sees, itself included; None is full causal.
        crosses_documents: attention runs on over the documents of the row.
        extent_tokens: what the square's side stands for, at least the row's tokens.
        label: what it shows, for those who do not see it.
    """
    drawn = "".join(shapes(stretches, window, crosses_documents=crosses_documents))
    starts, ends = runs(is_supervised)
    learned = "".join(
        f'<rect y="{start}" width="1" height="{end - start}"/>'
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    square = f'width="{SIDE}" height="{SIDE}"'
    width, height = LEFT + SIDE + 20, TOP + SIDE + 6
    return (
        f'<svg class="drawing" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' role="img" aria-label="{pages.visible(label)}">{"".join(axes(extent_tokens))}'
        f'<rect class="ground" x="{LEFT}" y="{TOP}" {square}/>'
        f'<svg class="pairs" x="{LEFT}" y="{TOP}" {square}'
        f' viewBox="0 0 {extent_tokens} {extent_tokens}">{drawn}</svg>'
        f'<svg class="learned" x="{LEFT - STRIP - 3}" y="{TOP}" width="{STRIP}" height="{SIDE}"'
        f' viewBox="0 0 1 {extent_tokens}" preserveAspectRatio="none">{learned}</svg></svg>'
    )


def shapes(
    stretches: Sequence[Stretch], window: int | None, *, crosses_documents: bool
) -> Iterator[str]:
    if crosses_documents:
        yield f'<polygon class="across" points="{band(0, stretches[-1].end, window)}"/>'
    for number, (start, end, n_context, name) in enumerate(stretches):
        title = f"<title>{pages.visible(name)}</title>"
        if window is not None and end - start > window:
            yield f'<polygon class="beyond" points="{band(start, end, None)}">{title}</polygon>'
        kind = ("one", "next")[number % 2]
        yield f'<polygon class="{kind}" points="{band(start, end, window)}">{title}</polygon>'
        if n_context:
            points = band(start, start + n_context, window)
            yield f'<polygon class="context" points="{points}">{title}</polygon>'
    if crosses_documents:
        reach = stretches[-1].end if window is None else window
        for start, *_ in stretches[1:]:
            left, low = max(0, start - reach), min(stretches[-1].end, start + reach)
            yield f'<path class="border" d="M{left} {start}H{start}V{low}"/>'


def band(start: int, end: int, window: int | None) -> str:
    """Corners of the pairs within [start, end) that are causal and in the window.

    The edges run half a token beside the last pair that is seen: the one of a query with itself,
    and the one with the first key of its window.
    """
    corners = [(start, start), (start + 0.5, start), (end, end - 0.5), (end, end)]
    if window is None or end - start <= window:
        corners.append((start, end))
    else:
        corners += [(end - window + 0.5, end), (start, start + window - 0.5)]
    return " ".join(f"{key:.12g},{query:.12g}" for key, query in corners)


def runs(is_true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the runs of True."""
    steps = np.diff(is_true.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


def axes(extent_tokens: int) -> Iterator[str]:
    """Ticks at round numbers of tokens, and what the two directions are."""
    step = 1
    while extent_tokens / step > 5:
        step *= 2
    for tick in range(0, extent_tokens + 1, step):
        at = SIDE * tick / extent_tokens
        yield (
            f'<text x="{LEFT + at:.1f}" y="{TOP - 6}" text-anchor="middle">{tick:,}</text>'
            f'<text x="{LEFT - STRIP - 8}" y="{TOP + at + 4:.1f}" text-anchor="end">{tick:,}</text>'
        )
    middle = TOP + SIDE / 2
    yield (
        f'<text x="{LEFT + SIDE / 2}" y="13" text-anchor="middle">key: the token looked at →</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        "← query: the token that looks</text>"
    )
