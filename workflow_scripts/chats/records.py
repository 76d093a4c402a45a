"""Records: each one of a chunk, parsed, or rejected with the reason why it cannot be parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import pyarrow as pa

from workflow_scripts.chats.chunks import Chunk
from workflow_scripts.chats.rejections import Rejected

# Text as read, content, and the reason why there is no content.
Parsed = tuple[str, Any, Rejected | None]


class Record(NamedTuple):
    """One record of a source file, parsed if possible."""

    source_file: str
    source_line: int
    """The line it begins on; in a JSON array or Parquet its row. Counted from 1."""
    raw: str
    """The record as read; a byte that is not UTF-8 becomes U+FFFD, and a row becomes JSON."""
    content: Any
    """The JSON value, or the row as a dict."""
    rejection: Rejected | None
    """The reason why there is no content."""


def parse_chunk(chunk: Chunk) -> Iterator[Record]:
    """Yield the records of a chunk, in order."""
    parsed: Iterator[Parsed]
    if isinstance(chunk.content, bytes):
        parsed = map(_arrow_row, _arrow_rows(chunk.content))
    elif chunk.columns:
        rows = cast("list[list[str]]", chunk.content)
        parsed = (_cells_row(chunk.columns, cells) for cells in rows)
    else:
        parsed = map(_json_value, cast("list[bytes]", chunk.content))
    for number, (raw, content, rejection) in zip(chunk.numbers, parsed, strict=True):
        yield Record(chunk.source_file, number, raw, content, rejection)


def _json_value(text: bytes) -> Parsed:
    try:
        raw = text.decode()
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start + 1}"
        return text.decode(errors="replace"), None, Rejected("not UTF-8", detail)
    # The standard library parses a chat of 2.8 kB in 8 to 18 µs. orjson takes 3 to 6 µs, but turns
    # a large integer into a float, and finding those takes 30 µs.
    try:
        return raw, json.loads(raw), None
    except ValueError as error:
        return raw, None, Rejected("not JSON", str(error))
    except RecursionError:
        return raw, None, Rejected("not JSON", "nested too deeply")


def _cells_row(columns: tuple[str, ...], cells: list[str]) -> Parsed:
    if len(cells) != len(columns):
        detail = f"{len(cells)} cells, {len(columns)} columns"
        rejection = Rejected("a row does not fit the header", detail)
        return _without_surrogates(_row_text(cells)), None, rejection
    row = dict(zip(columns, cells, strict=True))
    raw = _row_text(row)
    readable = _without_surrogates(raw)
    if readable != raw:
        return readable, None, Rejected("not UTF-8")
    return raw, row, None


def _without_surrogates(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _row_text(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _arrow_rows(stream: bytes) -> Iterator[Any]:
    """Yield rows as dicts; a row that is not UTF-8 as the text that Arrow prints."""
    table = pa.ipc.open_stream(stream).read_all()
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError:
        for at in range(len(table)):
            row = table.slice(at, 1)
            try:
                yield from row.to_pylist()
            except UnicodeDecodeError:
                yield str(row)


def _arrow_row(row: Any) -> Parsed:
    if isinstance(row, str):
        return row, None, Rejected("not UTF-8")
    content = _without_nulls(row)
    return _row_text(content), content, None


def _without_nulls(value: Any) -> Any:
    """Drop null fields: Arrow gives every struct of a column the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
