"""Best-fit decreasing as it is published: one document after the other, rows found in a tree.

The reference of `packing.best_fit`, after Ding et al. 2024, arXiv:2404.10830 §3.2: a segment tree
over the free spaces of a row answers "the tightest row that holds this document" in
O(log row_tokens).
"""

from __future__ import annotations

import numpy as np


class Spaces:
    """Which free spaces there are, and the smallest of them that is large enough.

    Args:
        largest: the largest space.
    """

    def __init__(self, largest: int) -> None:
        self._n_leaves = 1 << largest.bit_length()
        # The children of node i are 2i and 2i + 1; a node holds the largest space below it, 0 where
        # there is none. The leaf of a space is n_leaves + space.
        self._largest = [0] * (2 * self._n_leaves)

    def add(self, space: int) -> None:
        node = self._n_leaves + space
        while node and self._largest[node] < space:
            self._largest[node] = space
            node >>= 1

    def remove(self, space: int) -> None:
        largest = self._largest
        node = self._n_leaves + space
        largest[node] = 0
        node >>= 1
        while node and largest[node] == space:
            left, right = largest[2 * node], largest[2 * node + 1]
            largest[node] = left if left > right else right
            node >>= 1

    def tightest(self, length: int) -> int:
        """The smallest space of at least `length`; 0 where there is none."""
        largest = self._largest
        if largest[1] < length:
            return 0
        node = 1
        while node < self._n_leaves:
            node *= 2
            if largest[node] < length:
                node += 1
        return largest[node]


def best_fit_decreasing(lengths: np.ndarray, *, row_tokens: int) -> tuple[np.ndarray, int]:
    """The row of each document, longest first, each in the fullest row that still holds it.

    Args:
        lengths: (documents,) tokens of each, at most `row_tokens`.
    Returns:
        (documents,) int64, and the number of rows.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows_by_space: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    spaces = Spaces(row_tokens)
    placed = np.empty(len(lengths), dtype=np.int64)
    n_rows = 0
    for at, length in enumerate(lengths[order].tolist()):
        space = spaces.tightest(length)
        if space:
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces.remove(space)
        else:
            row, space = n_rows, row_tokens
            n_rows += 1
        placed[at] = row
        rest = space - length
        if rest:
            if not rows_by_space[rest]:
                spaces.add(rest)
            rows_by_space[rest].append(row)
    row_of_document = np.empty_like(placed)
    row_of_document[order] = placed
    return row_of_document, n_rows
