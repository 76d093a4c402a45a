"""Micro-batches: rows of a plan as one flat row, with tokens read from memory-mapped documents.

A micro-batch is one sequence of all tokens of its rows. Positions restart at 0 at every segment,
and attention does not cross its bounds. A segment is a document for the strategies `best_fit` and
`none`, a whole row for `concatenate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from workflow_scripts.packing.balance import NO_ROW
from workflow_scripts.packing.packing import Piece, Row, Rows
from workflow_scripts.tokens.documents import Documents

IGNORED = -100
PADDING = 0  # any token would do: no other token sees it


class PlannedRows:
    """The rows of a plan as a dataset of pieces, to which the collator adds the tokens.

    The item `NO_ROW` is a row without pieces.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return [] if index == NO_ROW else self._rows[index]


class Segments(TypedDict):
    """Tokens of one flat row and the bounds of its segments, as the model takes them."""

    input_ids: Tensor
    """(1, tokens)."""
    position_ids: Tensor
    """(1, tokens)."""
    cu_seq_lens_q: Tensor
    """(segments + 1,) int32."""
    cu_seq_lens_k: Tensor
    """(segments + 1,) int32."""
    max_length_q: int
    max_length_k: int


class Batch(Segments):
    """A micro-batch of training."""

    labels: Tensor
    """(1, tokens): the token to predict, at its own position (transformers shifts by one)."""
    predicting: Tensor
    """(supervised tokens,): the position before each label."""


class Collator:
    """Joins rows into one flat micro-batch.

    Args:
        documents: the documents that the pieces of the rows refer to.
        crosses_documents: attention crosses the documents of a row.
        pads_rows: each row is padded to the length of the longest in the micro-batch.
    """

    def __init__(
        self, documents: Documents, *, crosses_documents: bool, pads_rows: bool = False
    ) -> None:
        self._documents = documents
        self._crosses_documents = crosses_documents
        self._pads_rows = pads_rows

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch as the model takes it.

        Padding forms separate segments without labels, which no other token sees. A micro-batch
        without pieces is one padding token, so that a process without a row takes part in the step.

        The first token of a segment has no label, because no token of its segment precedes it.
        Carried-over context has none either.
        """
        n_longest = max((sum(piece.length for piece in row) for row in rows), default=0)
        tokens, labels, segments = [], [], []
        for row in rows:
            for piece in row:
                piece_tokens, piece_labels = self._piece(piece)
                tokens.append(piece_tokens)
                labels.append(piece_labels)
            lengths = [piece.length for piece in row]
            n_tokens = sum(lengths)
            segments += [n_tokens] if self._crosses_documents and row else lengths
            if self._pads_rows and n_tokens < n_longest:
                tokens.append(np.full(n_longest - n_tokens, PADDING))
                labels.append(np.full(n_longest - n_tokens, IGNORED))
                segments.append(n_longest - n_tokens)
        if not segments:
            tokens, labels, segments = [np.array([PADDING])], [np.array([IGNORED])], [1]
        bounds = np.cumsum([0, *segments])
        flat_labels = np.concatenate(labels)
        flat_labels[bounds[:-1]] = IGNORED
        cu_seq_lens = torch.from_numpy(bounds.astype("int32"))
        return {
            "input_ids": _row(np.concatenate(tokens)),
            "position_ids": _row(np.concatenate([np.arange(length) for length in segments])),
            "labels": _row(flat_labels),
            # Computed here: on the GPU the CPU would have to wait for it.
            "predicting": _row(np.flatnonzero(flat_labels[1:] != IGNORED))[0],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max(segments),
            "max_length_k": max(segments),
        }

    def _piece(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of a piece, int64."""
        document = self._documents[piece.document]
        stretch = slice(piece.start, piece.start + piece.length)
        tokens = document.input_ids[stretch].astype(np.int64)
        labels = np.where(document.is_supervised[stretch], tokens, IGNORED)
        labels[: piece.n_context] = IGNORED
        if piece.n_context and piece.start:
            tokens[0] = document.input_ids[0]  # BOS: every document begins with it
        return tokens, labels


def _row(values: Any) -> Tensor:
    return torch.from_numpy(values.astype("int64"))[None]
