"""Attention masks of packed rows, drawn as SVG for a page.

Each point of the drawing is a pair of tokens: the query's position in the row runs downwards, the
key's to the right. The unit of the drawing is a token, and each shape contains the centres of its
own pairs and no other centre.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from workflow_scripts import pages

MOST_TICKS = 5


class Stretch(NamedTuple):
    """A piece at its place in a row."""

    start: int
    """First token, counted from the start of the row."""
    end: int
    n_context: int
    name: str


class Shape(NamedTuple):
    """A polygon of the drawing."""

    kind: str
    points: str
    name: str = ""


def mask_svg(
    stretches: Sequence[Stretch],
    is_supervised: np.ndarray,
    *,
    window: int | None,
    crosses_documents: bool,
    extent_tokens: int,
    label: str,
) -> Markup:
    """The mask of a row, with a strip that marks its supervised tokens.

    Args:
        is_supervised: (tokens,) bool of the row.
        window: keys a query sees, itself included; None is full causal attention.
        crosses_documents: True if attention continues across the documents of the row.
        extent_tokens: tokens along the side of the square, at least those of the row.
        label: description for readers who cannot see the drawing.
    """
    steps = np.diff(is_supervised.astype(np.int8), prepend=0, append=0)
    return pages.render(
        "mask.svg.j2",
        label=label,
        extent=extent_tokens,
        ticks=ticks(extent_tokens),
        shapes=shapes(stretches, window, crosses_documents=crosses_documents),
        borders=borders(stretches, window) if crosses_documents else (),
        learned=zip(
            np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True
        ),
    )


def shapes(
    stretches: Sequence[Stretch], window: int | None, *, crosses_documents: bool
) -> Iterator[Shape]:
    if crosses_documents:
        yield Shape("across", band(0, stretches[-1].end, window))
    for number, (start, end, n_context, name) in enumerate(stretches):
        if window is not None and end - start > window:
            yield Shape("beyond", band(start, end, None), name)
        yield Shape(("one", "next")[number % 2], band(start, end, window), name)
        if n_context:
            yield Shape("context", band(start, start + n_context, window), name)


def borders(stretches: Sequence[Stretch], window: int | None) -> Iterator[tuple[int, int, int]]:
    """Left end, corner and lower end of the lines that separate documents."""
    last = stretches[-1].end
    reach = last if window is None else window
    for start, *_ in stretches[1:]:
        yield max(0, start - reach), start, min(last, start + reach)


def band(start: int, end: int, window: int | None) -> str:
    """Corners of the pairs within [start, end) that are causal and inside the window.

    The edges run half a token outside the last visible pairs: each query with itself, and each
    query with the first key of its window.
    """
    corners = [(start, start), (start + 0.5, start), (end, end - 0.5), (end, end)]
    if window is None or end - start <= window:
        corners.append((start, end))
    else:
        corners += [(end - window + 0.5, end), (start, start + window - 0.5)]
    return " ".join(f"{key:.12g},{query:.12g}" for key, query in corners)


def ticks(extent_tokens: int) -> range:
    """Multiples of a power of two, from 0."""
    step = 1
    while extent_tokens / step > MOST_TICKS:
        step *= 2
    return range(0, extent_tokens + 1, step)
