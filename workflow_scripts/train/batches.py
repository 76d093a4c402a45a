"""Micro-batches: rows of a plan laid out flat, their tokens read from the mapped documents.

A micro-batch is one sequence of all its rows' tokens. Positions restart at 0 and attention stops
at every
segment: a document for `best_fit`, a whole row for `concatenate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workflow_scripts.data.documents import Documents
from workflow_scripts.data.packing import Row, attention_segments

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


class PlannedRows(Sequence[Row]):
    """The rows of a plan as a dataset: an item is the row's pieces, its tokens are the
    collator's."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


class Collator:
    """Rows to one flat micro-batch.

    Args:
        documents: what the rows' pieces point to.
        crosses_documents: attention runs on over the documents of a row.
    """

    def __init__(self, documents: Documents, *, crosses_documents: bool) -> None:
        self._documents = documents
        self._crosses_documents = crosses_documents

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch as the model takes it.

        Returns:
            `input_ids`, `position_ids`, `labels`: (1, tokens); `cu_seq_lens_q`, `cu_seq_lens_k`:
            (segments + 1,) int32; `max_length_q`, `max_length_k`: int. A label is the token to
            predict *at* its position (transformers shifts by one); the first token of a segment
            has none, as nothing before it belongs to it.
        """
        import numpy as np
        import torch

        tokens, labels, positions, bounds = [], [], [], [0]
        for row in rows:
            for piece in row:
                document = self._documents[piece.document]
                stretch = slice(piece.start, piece.start + piece.length)
                tokens.append(document.input_ids[stretch])
                supervised = document.is_supervised[stretch]
                labels.append(np.where(supervised, document.input_ids[stretch], IGNORED))
            for length in attention_segments(row, crosses_documents=self._crosses_documents):
                positions.append(np.arange(length))
                bounds.append(bounds[-1] + length)
        flat_labels = np.concatenate(labels).astype(np.int64)
        flat_labels[bounds[:-1]] = IGNORED
        longest = max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
        cu_seq_lens = torch.tensor(bounds, dtype=torch.int32)
        return {
            "input_ids": _row(np.concatenate(tokens)),
            "position_ids": _row(np.concatenate(positions)),
            "labels": _row(flat_labels),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _row(values: Any) -> Tensor:
    import torch

    return torch.from_numpy(values.astype("int64"))[None]
