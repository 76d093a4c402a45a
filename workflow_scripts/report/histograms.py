"""A histogram drawn as SVG for a page."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

from workflow_scripts import pages

WIDTH, HEIGHT = 440, 190  # of the bars, in pixels, as is what follows
LEFT, TOP, BELOW = 62, 34, 40


def histogram_svg(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    axis: str,
    ticks: Mapping[float, str],
    marks: Mapping[str, float],
    names: Sequence[str],
    scale: Callable[[float], float] = float,
) -> str:
    """Bars with their ticks and marked values; pointed at, a bar says its count.

    Args:
        edges: (bars + 1,) rising; `counts` is what lies from each to the next.
        axis: what is counted, below the bars.
        ticks, marks: values with their text, texts with their value, all within the edges.
        names: (bars,) what to call each bar.
        scale: `math.log2` for a logarithmic axis.
    """
    first, last = scale(edges[0]), scale(edges[-1])
    top_count = count_ticks(max(counts))[-1]
    n_all = sum(counts)

    def across(value: float) -> float:
        return LEFT + WIDTH * (scale(value) - first) / (last - first)

    def down(count: float) -> float:
        return TOP + HEIGHT * (1 - count / top_count)

    parts = []
    for count in count_ticks(max(counts)):
        y = down(count)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>'
        )
    for start, end, count, name in zip(edges, edges[1:], counts, names, strict=False):
        if count:
            left, height = across(start), HEIGHT * count / top_count
            height = max(height, 1.5)  # what is there is never drawn as nothing
            title = f"{name}: {count:,} ({pages.share(count, n_all)})"
            parts.append(
                f'<rect class="bar" x="{left + 0.5:.2f}" y="{TOP + HEIGHT - height:.2f}"'
                f' width="{max(across(end) - left - 1, 0.5):.2f}" height="{height:.2f}">'
                f"<title>{pages.visible(title)}</title></rect>"
            )
    foot = TOP + HEIGHT
    parts += [
        f'<text x="{across(value):.1f}" y="{foot + 16}" text-anchor="middle">{text}</text>'
        for value, text in ticks.items()
    ]
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{foot + 34}" text-anchor="middle">{axis}</text>')
    for number, (text, value) in enumerate(marks.items()):
        x, y = across(value), 12 + 14 * number
        anchor, text_x = ("end", x - 4) if x > LEFT + WIDTH / 2 else ("start", x + 4)
        parts.append(
            f'<path class="mark" d="M{x:.1f} {y - 9}V{foot}"/>'
            f'<text class="mark" x="{text_x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'
        )
    width, height = LEFT + WIDTH + 24, foot + BELOW
    return (
        f'<svg class="drawing" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' role="img" aria-label="{pages.visible(axis)}">{"".join(parts)}</svg>'
    )


def count_ticks(highest: int) -> list[int]:
    """0 and up to four round numbers above, the last at least `highest`."""
    rough = max(highest, 1) / 4
    power = 10 ** math.floor(math.log10(rough)) if rough >= 1 else 1
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [step * n for n in range(math.ceil(max(highest, 1) / step) + 1)]


def length_edges(shortest: int, longest: int) -> list[int]:
    """Half octaves, in whole tokens, from at most `shortest` (1 or more) to above `longest`."""
    edges = sorted({math.ceil(2 ** (power / 2)) for power in range(64)})
    return edges[bisect.bisect(edges, shortest) - 1 : bisect.bisect(edges, longest) + 1]
