"""Documents: conversations as token ids with their supervised spans, as `render_chats` writes them.

The Arrow files are mapped into memory, never read whole. `input_ids` is a list of int32 a row;
`supervised_spans` a flat list start, end, start, end … of half-open ranges in the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SPLITS = ("train", "validation", "test")


def documents_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            # large_list: 64-bit offsets; a million long chats pass 2³¹ tokens.
            ("input_ids", pa.large_list(pa.int32())),
            ("supervised_spans", pa.list_(pa.int32())),
            ("n_tokens", pa.int32()),
            ("n_supervised_tokens", pa.int32()),
        ]
    )


@dataclass(frozen=True)
class Document:
    """One rendered conversation."""

    id: str
    input_ids: np.ndarray
    """(n_tokens,) int32."""
    is_supervised: np.ndarray
    """(n_tokens,) bool: the loss counts the prediction of this token."""


class Documents(Sequence[Document]):
    """The documents of one split, read from the mapped file as they are asked for."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        table = files.read_arrow(path).combine_chunks()
        self.ids: list[str] = table["id"].to_pylist()
        self._tokens, self._token_offsets = _flat(table["input_ids"])
        self._spans, self._span_offsets = _flat(table["supervised_spans"])
        self.lengths = np.diff(self._token_offsets)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Document:
        import numpy as np

        index = range(len(self))[index]  # negative counts from the end, beyond is an IndexError
        input_ids = self._tokens[self._token_offsets[index] : self._token_offsets[index + 1]]
        spans = self._spans[self._span_offsets[index] : self._span_offsets[index + 1]]
        is_supervised = np.zeros(len(input_ids), dtype=bool)
        for start, end in spans.reshape(-1, 2):
            is_supervised[start:end] = True
        return Document(self.ids[index], input_ids, is_supervised)


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its flat values and the n + 1 offsets into them, without a copy."""
    import numpy as np

    if column.num_chunks == 0:
        return np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
    chunk = column.chunk(0)
    return chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()


def check_rejected(
    problems: Sequence[str], logger: Logger, *, n_read: int, limit: float, key: str
) -> None:
    """Log what was rejected, and stop where it is more than the config accepts.

    Args:
        problems: one line a rejected conversation, where and why; the first 10 are shown.
    Raises:
        StageError: the share is above `limit`.
    """
    for problem in problems[:1000]:
        logger.warning("rejected %s", problem)
    if not n_read or len(problems) <= limit * n_read:
        return
    shown = "\n            ".join(problems[:10])
    raise StageError(
        f"{len(problems)} of {n_read} conversations cannot be used",
        where=shown,
        found=f"{len(problems) / n_read:.1%} rejected",
        expected=f"at most {limit:.1%} ({key})",
        to_fix="mend these conversations (the log names the first 1,000), or raise the limit",
    )
