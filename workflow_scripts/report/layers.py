"""A graph in layers, from above to below, as SVG: boxes, and lines that do not run through them.

After Sugiyama, Tagawa, Toda (1981): every box below all that it follows, a line that passes a layer
has a place in it, each layer in the order of what it is joined to; then every box as near to what
it is joined to as its neighbours let it be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from graphlib import TopologicalSorter
from typing import NamedTuple

BOX_WIDTH, BOX_HEIGHT, LINE_WIDTH = 166, 40, 8
GAP, LAYER_HEIGHT, MARGIN = 14, 68, 4
N_SWEEPS = 12
Edges = Set[tuple[int, int]]


class Place(NamedTuple):
    """Where a box is: its middle, and its upper edge; pixels."""

    x: float
    y: float


class Drawing(NamedTuple):
    """A graph laid out."""

    places: list[Place]
    """Of every box."""
    paths: list[str]
    """Of every line, as SVG draws it."""
    width: float
    height: float


def without_detours(n: int, edges: Edges) -> Edges:
    """The edges that no way through other boxes says as well (transitive reduction).

    Raises:
        graphlib.CycleError: boxes follow each other in a circle.
    """
    after: dict[int, set[int]] = {}  # all that follow, however far
    below = targets(edges)
    for place in reversed(in_order(n, edges)):
        after[place] = set(below[place]).union(*(after[one] for one in below[place]))
    return {
        (one, other)
        for one, other in edges
        if not any(other in after[between] for between in below[one])
    }


def in_order(n: int, edges: Edges) -> list[int]:
    sorter: TopologicalSorter[int] = TopologicalSorter({place: () for place in range(n)})
    for one, other in sorted(edges):
        sorter.add(other, one)
    return list(sorter.static_order())


def targets(edges: Edges) -> Mapping[int, list[int]]:
    found = defaultdict(list)
    for one, other in sorted(edges):
        found[one].append(other)
    return found


def lay_out(n: int, edges: Edges) -> Drawing:
    """Places of `n` boxes joined by `edges`.

    Raises:
        graphlib.CycleError: boxes follow each other in a circle.
    """
    level = [0] * n
    for place in in_order(n, edges):
        for other in targets(edges)[place]:
            level[other] = max(level[other], level[place] + 1)
    # Nearer to what follows, where that makes more lines shorter than longer.
    n_above = Counter(other for _, other in edges)
    for place in reversed(in_order(n, edges)):
        below = targets(edges)[place]
        if len(below) > n_above[place]:
            level[place] = min(level[other] for other in below) - 1
    chains, levels = [], list(level)
    for one, other in sorted(edges):
        passed = range(level[one] + 1, level[other])
        chains.append([one, *range(len(levels), len(levels) + len(passed)), other])
        levels += passed
    joined: dict[int, list[int]] = {item: [] for item in range(len(levels))}
    for chain in chains:
        for one, other in zip(chain, chain[1:], strict=False):
            joined[one].append(other)
            joined[other].append(one)
    rows: list[list[int]] = [[] for _ in range(max(levels, default=-1) + 1)]
    for item, row in enumerate(levels):
        rows[row].append(item)

    def width(item: int) -> float:
        return BOX_WIDTH if item < n else LINE_WIDTH

    x = placed(rows, joined, levels, width)
    left = min((x[item] - width(item) / 2 for item in x), default=0) - MARGIN
    right = max((x[item] + width(item) / 2 for item in x), default=0) + MARGIN
    x = {item: round(middle - left, 1) for item, middle in x.items()}
    height = max(len(rows) - 1, 0) * LAYER_HEIGHT + BOX_HEIGHT + 2 * MARGIN
    return Drawing(
        [Place(x[place], MARGIN + level[place] * LAYER_HEIGHT) for place in range(n)],
        [line([(x[item], MARGIN + levels[item] * LAYER_HEIGHT) for item in chain])
         for chain in chains],
        round(right - left, 1),
        height,
    )  # fmt: skip


def placed(
    rows: Sequence[list[int]],
    joined: Mapping[int, list[int]],
    levels: Sequence[int],
    width: Callable[[int], float],
) -> dict[int, float]:
    """Middle of every item of every row; the rows are put in order on the way."""
    x = {item: float(at) for row in rows for at, item in enumerate(row)}
    for sweep in range(2 * N_SWEEPS):
        is_down = sweep % 2 == 0
        for row in rows if is_down else reversed(rows):
            wished = {}
            for item in row:
                # The first sweeps go by one side, so that an order spreads; the last by both.
                near = [
                    x[other]
                    for other in joined[item]
                    if sweep >= N_SWEEPS or (levels[other] < levels[item]) == is_down
                ]
                wished[item] = sum(near) / len(near) if near else x[item]
                # At last a line goes straight down from where it first passed a layer.
                if sweep >= N_SWEEPS and width(item) == LINE_WIDTH:
                    above = joined[item][0]
                    wished[item] = x[above] if width(above) == LINE_WIDTH else wished[item]
            if sweep < N_SWEEPS:
                row.sort(key=wished.__getitem__)
            x |= spread(row, wished, width)
    return x


def spread(
    row: Sequence[int], wished: Mapping[int, float], width: Callable[[int], float]
) -> dict[int, float]:
    """Middles as near to the wished ones as the items' widths allow, by least squares: what would
    overlap is pooled and centred on what all of it wishes (pool adjacent violators)."""
    offsets, end = [], 0.0
    for item in row:
        offsets.append(end + width(item) / 2)
        end += width(item) + GAP
    pools: list[list[float]] = []  # sum of wishes, how many
    for item, offset in zip(row, offsets, strict=True):
        pools.append([wished[item] - offset, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    shifts = [total / count for total, count in pools for _ in range(int(count))]
    return {item: offset + shift for item, offset, shift in zip(row, offsets, shifts, strict=True)}


def line(points: Sequence[tuple[float, float]]) -> str:
    """From the lower edge of the first box to the upper edge of the last, straight down past the
    boxes of the layers between."""
    (x, y), *others = points
    y += BOX_HEIGHT
    path = f"M{x:g} {y:g}"
    for number, (to_x, to_y) in enumerate(others, start=1):
        middle = (y + to_y) / 2
        path += f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
        x, y = to_x, to_y
        if number < len(others):
            y += BOX_HEIGHT
            path += f"V{y:g}"
    return path
