"""Documents: conversations as token ids with their supervised spans, as `render_chats` writes them.

The Arrow files are memory-mapped, never read whole. In each row, `input_ids` is a list of int32 and
`supervised_spans` is a flat list (start, end, start, end …) of half-open ranges in the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

BATCH_CONVERSATIONS = 1000


def documents_schema() -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.string()),
            # large_list has 64-bit offsets: a million long chats exceed 2³¹ tokens.
            ("input_ids", pa.large_list(pa.int32())),
            ("supervised_spans", pa.list_(pa.int32())),
            ("n_tokens", pa.int32()),
            ("n_supervised_tokens", pa.int32()),
            ("n_copies", pa.int32()),  # times per epoch, from its source's weight
        ]
    )


def conversation_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read the conversations of a split, as `clean_dataset` writes them, batch by batch."""
    # pre_buffer would hold a whole row group, which may be the whole file.
    with parquet.ParquetFile(path, pre_buffer=False) as table:
        yield from table.iter_batches(BATCH_CONVERSATIONS, columns=columns)


@dataclass(frozen=True)
class Document:
    """One rendered conversation."""

    id: str
    input_ids: np.ndarray
    """(n_tokens,) int32."""
    is_supervised: np.ndarray
    """(n_tokens,) bool: True if the loss counts the prediction of the token."""


class Documents:
    """The documents of one split, each read from the memory-mapped file on access.

    The file has many record batches. They are kept apart, because joining them would copy every
    token into memory.
    """

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.lengths = self._whole_column("n_tokens")
        """(n_documents,) int32."""
        self.n_supervised = self._whole_column("n_supervised_tokens")
        """(n_documents,) int32."""
        self.n_copies = self._whole_column("n_copies")
        """(n_documents,) int32: how often each is seen per epoch."""

    @cached_property
    def ids(self) -> list[str]:
        return [name for batch in self._batches for name in batch.column("id").to_pylist()]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __iter__(self) -> Iterator[Document]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Document:
        index = range(len(self))[index]  # a negative index counts from the end
        at = int(np.searchsorted(self._first, index, side="right")) - 1
        batch, row = self._batches[at], index - int(self._first[at])
        input_ids = _row(batch.column("input_ids"), row)
        is_supervised = np.zeros(len(input_ids), dtype=bool)
        for start, end in _row(batch.column("supervised_spans"), row).reshape(-1, 2):
            is_supervised[start:end] = True
        return Document(batch.column("id")[row].as_py(), input_ids, is_supervised)

    def _whole_column(self, name: str) -> np.ndarray:
        columns = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int32)


def _row(column: pa.ListArray | pa.LargeListArray, row: int) -> np.ndarray:
    """Return one row of a list column, without a copy."""
    return column[row].values.to_numpy()
