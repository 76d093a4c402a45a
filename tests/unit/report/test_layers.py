from __future__ import annotations

import graphlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflow_scripts.report import layers


@st.composite
def graphs(draw, most=14):
    """Boxes and edges from lower to higher numbers, so without a circle; then numbered anew."""
    n = draw(st.integers(1, most))
    pairs = [(one, other) for other in range(n) for one in range(other)]
    edges = draw(st.sets(st.sampled_from(pairs), max_size=30)) if pairs else set()
    names = draw(st.permutations(range(n)))
    return n, {(names[one], names[other]) for one, other in edges}


def reached(n, edges):
    """(n, n) bool: whether a way leads from one to the other (Warshall)."""
    found = np.zeros((n, n), bool)
    for one, other in edges:
        found[one, other] = True
    for between in range(n):
        found |= found[:, [between]] & found[[between], :]
    return found


@given(graphs())
def test_without_detours_the_same_is_reached_and_no_edge_can_be_spared(graph):
    n, edges = graph
    kept = layers.without_detours(n, edges)
    assert kept <= edges
    whole = reached(n, edges)
    assert (reached(n, kept) == whole).all()
    for edge in kept:
        assert not (reached(n, kept - {edge}) == whole).all()


@given(graphs())
def test_every_box_is_below_what_it_follows_and_none_covers_another(graph):
    n, edges = graph
    drawing = layers.lay_out(n, edges)
    places = drawing.places
    for one, other in edges:
        assert places[other].y >= places[one].y + layers.LAYER_HEIGHT
    for one in range(n):
        assert layers.BOX_WIDTH / 2 <= places[one].x <= drawing.width - layers.BOX_WIDTH / 2
        assert 0 <= places[one].y <= drawing.height - layers.BOX_HEIGHT
        for other in range(one):
            if places[one].y == places[other].y:
                apart = abs(places[one].x - places[other].x)
                assert apart >= layers.BOX_WIDTH + layers.GAP - 0.2  # rounded to 0.1 pixel


@given(graphs())
def test_a_line_begins_and_ends_at_its_boxes_and_runs_through_none(graph):
    n, edges = graph
    drawing = layers.lay_out(n, edges)
    assert len(drawing.paths) == len(edges)
    for (one, other), path in zip(sorted(edges), drawing.paths, strict=True):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        begins, ends = drawing.places[one], drawing.places[other]
        assert numbers[:2] == pytest.approx([begins.x, begins.y + layers.BOX_HEIGHT], abs=0.06)
        assert numbers[-2:] == pytest.approx([ends.x, ends.y], abs=0.06)
        for x, top in re.findall(r" (-?[\d.]+) ([\d.]+)V", path):
            for box in drawing.places:
                if box.y == pytest.approx(float(top), abs=0.06):
                    assert abs(box.x - float(x)) > layers.BOX_WIDTH / 2


def test_what_follows_in_a_circle_cannot_be_laid_out():
    for function in (layers.lay_out, layers.without_detours):
        with pytest.raises(graphlib.CycleError):
            function(3, {(0, 1), (1, 2), (2, 0)})


def test_nothing_is_an_empty_drawing():
    drawing = layers.lay_out(0, set())
    assert drawing.places == drawing.paths == []
