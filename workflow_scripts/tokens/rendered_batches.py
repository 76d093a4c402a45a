"""Batches of conversations, rendered to batches of documents in one or several processes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from workflow_scripts import files
from workflow_scripts.chats.messages import Message
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import RenderingSettings
from workflow_scripts.tokens.documents import conversation_batches, documents_schema
from workflow_scripts.tokens.rendering import CannotRender, Renderer, Rendering

# Rejected conversations: where each comes from, a `reason` for counting, and a `detail`.
REJECTED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("source_file", pa.string()),
        ("source_line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class CleanBatch:
    """Conversations of `clean_schema`, of one split."""

    split: str
    rows: pa.RecordBatch


@dataclass(frozen=True)
class RenderedBatch:
    """The documents and the rejected conversations of a `CleanBatch`."""

    split: str
    n_read: int
    documents: pa.RecordBatch
    rejected: pa.RecordBatch


@dataclass
class Totals:
    """Sums over one split."""

    n_documents: int = 0
    n_tokens: int = 0
    n_supervised_tokens: int = 0
    n_by_length: Counter[int] = field(default_factory=Counter)
    """Documents by length in tokens, rounded up to a power of two."""

    def add(self, batch: RenderedBatch) -> None:
        lengths = batch.documents.column("n_tokens").to_numpy()
        self.n_documents += len(lengths)
        self.n_tokens += int(lengths.sum())
        self.n_supervised_tokens += int(
            batch.documents.column("n_supervised_tokens").to_numpy().sum()
        )
        self.n_by_length.update(1 << (int(length) - 1).bit_length() for length in lengths)


def clean_batches(paths: Mapping[str, Path]) -> Iterator[CleanBatch]:
    """Read the conversations of all splits lazily."""
    columns = ["id", "messages", "tools", "n_copies", "source", "source_file", "source_line"]
    for split, path in paths.items():
        for rows in conversation_batches(path, columns):
            yield CleanBatch(split, rows)


@contextlib.contextmanager
def arrow_writer(path: Path) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Write an Arrow IPC file batch by batch; it gets its name when it is complete."""
    with files.atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, documents_schema()) as writer:
            yield writer


_renderer: Renderer | None = None


def load_renderer(tokenizer: Path, settings: RenderingSettings) -> None:
    """Load this process's renderer, once: a tokenizer takes a second to load."""
    global _renderer
    official = load_mistral_tokenizer(tokenizer, for_training=True)
    _renderer = Renderer(
        official, supervise=settings.supervise, max_tokens=settings.max_document_tokens
    )


def render_batch(batch: CleanBatch) -> RenderedBatch:
    """Render one batch in a process that called `load_renderer`."""
    assert _renderer is not None
    kept: list[int] = []
    renderings: list[Rendering] = []
    rejected: list[tuple[int, CannotRender]] = []
    tools = batch.rows.column("tools").to_pylist()
    for row, messages in enumerate(read_messages(batch.rows.column("messages"))):
        try:
            renderings.append(_renderer.render(messages, tools[row]))
            kept.append(row)
        except CannotRender as cannot:
            rejected.append((row, cannot))
    places = [row for row, _ in rejected]
    columns = batch.rows.take(pa.array(places, pa.int64())).select(REJECTED_SCHEMA.names[:4])
    reasons = [
        pa.array([cannot.reason for _, cannot in rejected], pa.string()),
        pa.array([cannot.detail for _, cannot in rejected], pa.string()),
    ]
    return RenderedBatch(
        split=batch.split,
        n_read=batch.rows.num_rows,
        documents=document_batch(batch.rows.take(pa.array(kept, pa.int64())), renderings),
        rejected=pa.RecordBatch.from_arrays([*columns.columns, *reasons], schema=REJECTED_SCHEMA),
    )


def read_messages(column: pa.ListArray) -> Iterator[list[Message]]:
    """Yield the messages of each conversation of a batch.

    They are read column by column: `to_pylist` makes an object of every null of every message and
    takes longer than the rendering. Columns for tool calls are read only if they have a value.
    """
    flat = column.flatten()
    fields = ["role", "content", "weight"]
    fields += [
        name
        for name in ("tool_calls", "tool_call_id", "name")
        if flat.field(name).null_count < len(flat)
    ]
    values = [flat.field(name).to_pylist() for name in fields]
    rows = [dict(zip(fields, one, strict=True)) for one in zip(*values, strict=True)]
    messages = cast("list[Message]", rows)
    offsets = column.offsets.to_pylist()
    first = offsets[0] if offsets else 0
    for start, end in zip(offsets, offsets[1:], strict=False):
        yield messages[start - first : end - first]


def document_batch(rows: pa.RecordBatch, renderings: Sequence[Rendering]) -> pa.RecordBatch:
    """Convert renderings to a batch of `documents_schema`, without a Python object per token."""
    lengths = np.array([len(one.input_ids) for one in renderings], dtype=np.int32)
    n_positions = np.array([2 * len(one.supervised_spans) for one in renderings], dtype=np.int32)
    spans = np.array(
        [place for one in renderings for span in one.supervised_spans for place in span], np.int32
    )
    token_ids = np.concatenate(
        [np.zeros(0, np.int32), *(one.input_ids for one in renderings)], dtype=np.int32
    )
    return pa.RecordBatch.from_arrays(
        [
            rows.column("id"),
            pa.LargeListArray.from_arrays(
                pa.array(offsets(lengths, np.int64)), pa.array(token_ids)
            ),
            pa.ListArray.from_arrays(pa.array(offsets(n_positions, np.int32)), pa.array(spans)),
            pa.array(lengths),
            pa.array([one.n_supervised_tokens for one in renderings], pa.int32()),
            rows.column("n_copies"),
        ],
        schema=documents_schema(),
    )


def offsets(lengths: np.ndarray, dtype: type) -> np.ndarray:
    """Return the start of each list of a flat column, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
