from __future__ import annotations

import itertools
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from workflow_scripts.report.masks import Stretch, mask_svg

NAME = "<b>&\u202e chat"
# (tokens, of these context) of each piece of a row
pieces = st.lists(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    min_size=1,
    max_size=5,
)


def stretches(sizes: list[tuple[int, int]]) -> list[Stretch]:
    ends = list(itertools.accumulate(length for length, _ in sizes))
    return [
        Stretch(end - length, end, n_context, NAME)
        for end, (length, n_context) in zip(ends, sizes, strict=True)
    ]


def draw(sizes, *, window=None, crosses_documents=False, is_supervised=None, extent_tokens=None):
    """The drawing, parsed as XML."""
    row = stretches(sizes)
    n_tokens = row[-1].end
    return ElementTree.fromstring(
        mask_svg(
            row,
            np.zeros(n_tokens, dtype=bool) if is_supervised is None else is_supervised,
            window=window,
            crosses_documents=crosses_documents,
            extent_tokens=extent_tokens or n_tokens,
            label="A & B",
        )
    )


def inside(points: str, n_tokens: int) -> np.ndarray:
    """(query, key) bool: centres of pairs inside a polygon, by the even-odd rule."""
    corners = np.array([point.split(",") for point in points.split()], dtype=float)
    query, key = np.mgrid[:n_tokens, :n_tokens] + 0.5
    is_inside = np.zeros((n_tokens, n_tokens), dtype=bool)
    for (x, y), (next_x, next_y) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y != next_y:
            crosses = (y > query) != (next_y > query)
            is_inside ^= crosses & (key < x + (query - y) * (next_x - x) / (next_y - y))
    return is_inside


@given(sizes=pieces, window=st.none() | st.integers(1, 14), crosses_documents=st.booleans())
@example(sizes=[(9, 0)], window=8, crosses_documents=False)
@example(sizes=[(8, 3), (1, 0)], window=1, crosses_documents=True)
def test_shapes_hold_exactly_the_pairs_that_attention_sees(sizes, window, crosses_documents):
    root = draw(sizes, window=window, crosses_documents=crosses_documents)
    n_tokens = sum(length for length, _ in sizes)
    found = {
        kind: np.zeros((n_tokens, n_tokens), dtype=bool)
        for kind in ("one", "next", "across", "beyond", "context")
    }
    for polygon in root.iter("polygon"):
        pairs = inside(polygon.get("points"), n_tokens)
        assert pairs.any() and not (found[polygon.get("class")] & pairs).any()
        found[polygon.get("class")] |= pairs

    document = np.repeat(np.arange(len(sizes)), [length for length, _ in sizes])
    is_context = np.concatenate([np.arange(length) < n_context for length, n_context in sizes])
    length = np.array([length for length, _ in sizes])[document]
    for query, key in itertools.product(range(n_tokens), repeat=2):
        is_causal = key <= query
        is_near = window is None or query - key < window
        is_same = document[query] == document[key]
        kind = ("one", "next")[document[query] % 2]
        other = ("next", "one")[document[query] % 2]
        at = (query, key)
        assert found[kind][at] == (is_causal and is_near and is_same)
        assert not found[other][at]
        assert found["across"][at] == (crosses_documents and is_causal and is_near)
        is_long = window is not None and length[query] > window
        assert found["beyond"][at] == (is_long and is_causal and is_same)
        # The context is faded only where its own queries look.
        is_faded = is_context[query] and is_causal and is_near and is_same
        assert found["context"][at] == is_faded


@given(is_supervised=st.lists(st.booleans(), min_size=1, max_size=40), more=st.integers(0, 9))
def test_the_strip_marks_exactly_the_supervised_tokens(is_supervised, more):
    n_tokens = len(is_supervised)
    root = draw(
        [(n_tokens, 0)],
        is_supervised=np.array(is_supervised),
        extent_tokens=n_tokens + more,
    )
    (strip,) = (svg for svg in root.iter("svg") if svg.get("class") == "learned")
    assert strip.get("viewBox") == f"0 0 1 {n_tokens + more}"
    found = [False] * n_tokens
    for rect in strip.iter("rect"):
        for token in range(int(rect.get("y")), int(rect.get("y")) + int(rect.get("height"))):
            assert not found[token]
            found[token] = True
    assert found == is_supervised


@pytest.mark.parametrize("window", [None, 3])
def test_borders_of_documents_stay_within_the_visible_pairs(window):
    root = draw([(4, 0), (5, 0), (6, 0)], window=window, crosses_documents=True)
    paths = [path.get("d") for path in root.iter("path")]
    if window is None:
        assert paths == ["M0 4H4V15", "M0 9H9V15"]
    else:
        assert paths == ["M1 4H4V7", "M6 9H9V12"]
    assert not list(draw([(4, 0), (5, 0)], window=window).iter("path"))


def test_each_document_is_named_and_its_name_is_no_markup():
    root = draw([(4, 2), (5, 0)], window=3)
    titles = ["".join(title.itertext()) for title in root.iter("title")]
    assert titles == ["<b>&U+202E chat"] * 5  # twice beyond the window, twice within, one context
    assert root.get("aria-label") == "A & B"


def test_the_square_and_the_strip_have_one_scale():
    root = draw([(100, 0)], extent_tokens=128)
    square, strip = list(root)[-2:]
    assert (square.get("class"), strip.get("class")) == ("pairs", "learned")
    assert square.get("viewBox") == "0 0 128 128"
    assert (square.get("y"), square.get("height")) == (strip.get("y"), strip.get("height"))
    assert square.get("width") == square.get("height")
    assert float(strip.get("x")) + float(strip.get("width")) < float(square.get("x"))


@given(extent_tokens=st.integers(1, 131_072))
def test_both_axes_have_the_same_few_ticks(extent_tokens):
    root = draw([(1, 0)], extent_tokens=extent_tokens)
    texts = [text.text for text in root.iter("text") if text.text.replace(",", "").isdigit()]
    assert texts[::2] == texts[1::2]
    ticks = [int(text.replace(",", "")) for text in texts[::2]]
    assert ticks[0] == 0 and 2 <= len(ticks) <= 6
    assert len(set(np.diff(ticks))) == 1 and ticks[-1] <= extent_tokens
