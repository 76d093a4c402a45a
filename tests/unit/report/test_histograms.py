from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies as st

from workflow_scripts.report.histograms import count_ticks, histogram_svg, length_edges


def draw(counts, *, edges=None, scale=float, marks=None, names=None):
    edges = edges or list(range(len(counts) + 1))
    return ElementTree.fromstring(
        histogram_svg(
            edges,
            counts,
            axis="tokens",
            ticks={edges[0]: "first", edges[-1]: "last"},
            marks=marks or {},
            names=names or [f"bar {number}" for number in range(len(counts))],
            scale=scale,
        )
    )


def bars(root):
    return {
        "".join(rect.find("title").itertext()): {
            name: float(rect.get(name)) for name in ("x", "y", "width", "height")
        }
        for rect in root.iter("rect")
    }


@given(counts=st.lists(st.integers(0, 10**7), min_size=1, max_size=30).filter(any))
def test_bars_are_as_high_as_their_counts_and_none_is_lost(counts):
    found = list(bars(draw(counts)).items())
    assert len(found) == sum(count > 0 for count in counts)
    by_name = {name.partition(":")[0]: (name, bar) for name, bar in found}
    highest = max(bar["height"] for _, bar in found)
    feet = {round(bar["y"] + bar["height"], 1) for _, bar in found}
    assert max(feet) - min(feet) < 0.15
    for number, count in enumerate(counts):
        if count:
            name, bar = by_name[f"bar {number}"]
            assert f": {count:,} (" in name
            expected = max(highest * count / max(counts), 1.5)
            assert bar["height"] == pytest.approx(expected, abs=0.02)


def test_values_have_their_place_on_a_logarithmic_axis():
    root = draw([1, 2, 3], edges=[16, 64, 128, 1024], scale=math.log2, marks={"window 128": 128})
    found = list(bars(root).values())
    # Two, one and three octaves.
    widths = [bar["width"] + 1 for bar in found]
    assert widths == pytest.approx([2 * widths[1], widths[1], 3 * widths[1]], abs=0.05)
    (mark,) = (path for path in root.iter("path") if path.get("class") == "mark")
    at = float(mark.get("d").removeprefix("M").partition(" ")[0])
    assert at == pytest.approx(found[2]["x"] - 0.5, abs=0.06)
    ticks = {text.text: float(text.get("x")) for text in root.iter("text")}
    assert ticks["first"] == pytest.approx(found[0]["x"] - 0.5, abs=0.06)
    assert ticks["last"] == pytest.approx(found[2]["x"] + found[2]["width"] + 0.5, abs=0.06)


def test_names_are_texts():
    root = draw([1], names=["<b>\u202e"])
    assert list(bars(root)) == ["<b>U+202E: 1 (100.0%)"]


@given(highest=st.integers(0, 10**9))
def test_ticks_of_counts_are_round_few_and_reach_the_highest(highest):
    ticks = count_ticks(highest)
    step = ticks[1]
    assert ticks == [step * number for number in range(len(ticks))] and 2 <= len(ticks) <= 5
    assert ticks[-2] < max(highest, 1) <= ticks[-1]
    assert str(step).rstrip("0") in {"1", "2", "5"}


@pytest.mark.parametrize(
    ("highest", "expected"),
    [(0, [0, 1]), (4, [0, 1, 2, 3, 4]), (20, [0, 5, 10, 15, 20]), (587, [0, 200, 400, 600])],
)
def test_ticks_of_counts_are_as_close_as_four_allow(highest, expected):
    assert count_ticks(highest) == expected


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=20))
def test_edges_hold_every_length_and_no_bar_at_the_ends_is_for_nothing(lengths):
    edges = length_edges(min(lengths), max(lengths))
    assert edges[0] <= min(lengths) < edges[1] and edges[-2] <= max(lengths) < edges[-1]
    assert all(after > before for before, after in zip(edges, edges[1:], strict=False))
    powers = [2**power for power in range(25) if edges[0] <= 2**power <= edges[-1]]
    assert set(powers) <= set(edges)
    assert all(len([edge for edge in edges if one < edge < 2 * one]) <= 1 for one in powers)
