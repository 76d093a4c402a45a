"""Chunks of a source file: its records as bytes, cut apart but not yet parsed.

One process cuts, and does little else, so that it can feed many processes that parse (`records`).
The boundaries of the chunks depend only on the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from workflow_scripts import files
from workflow_scripts.chats.sources import file_format
from workflow_scripts.log import StageError

# A chunk ends at this size, so that a thousand long records do not fill the memory.
CHUNK_BYTES = 16 * 2**20
# No chat is this long. A longer line has lost its end, and would be read until memory is full.
RECORD_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Unparsed records of one file; small, and cheap to send to another process."""

    source_file: str
    numbers: Sequence[int]
    """For each record the line it begins on; in a JSON array or Parquet its row. From 1."""
    content: list[bytes] | list[list[str]] | bytes
    """JSON texts; the cells of rows; or rows as an Arrow stream."""
    columns: tuple[str, ...] = ()
    """Names of the cells, if `content` is cells."""


def read_chunks(
    path: str | Path, *, records_per_chunk: int = 1000, name: str | None = None
) -> Iterator[Chunk]:
    """Yield a file's records in order, cut into chunks at the same places every time.

    Args:
        name: the `source_file` of the records, if it is not the path (a URL).
    Raises:
        StageError: the file cannot be read to its end, or is a stand-in for the real file.
    """
    path = str(path)
    suffix, compression = file_format(path)
    files.check_whole(Path(path), may_be_empty=True)
    n_read = 0
    try:
        if suffix == ".parquet":
            chunks = _parquet_chunks(path, records_per_chunk)
        elif suffix in (".csv", ".tsv"):
            chunks = _table_chunks(path, suffix, compression, records_per_chunk)
        else:
            chunks = _json_chunks(path, suffix, compression, records_per_chunk)
        for chunk in chunks:
            n_read += len(chunk.numbers)
            yield replace(chunk, source_file=name or path)
    except FileNotFoundError as error:
        raise StageError(
            "a dataset file cannot be read",
            where=path,
            found=error.strerror,
            to_fix="check the path; it is relative to the folder where Snakemake runs",
        ) from error
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise StageError(
            "a dataset file cannot be read to its end",
            where=f"{path}, after record {n_read}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            to_fix="the file is damaged or truncated: download or write it again",
        ) from error


def _groups(items: Iterable[Any], n_items: int, *, size: Callable[[Any], int]) -> Iterator[list]:
    """Yield lists of `n_items`, or of fewer if their sizes add up to CHUNK_BYTES."""
    group: list[Any] = []
    n_bytes = 0
    for item in items:
        group.append(item)
        n_bytes += size(item)
        if len(group) == n_items or n_bytes >= CHUNK_BYTES:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _opened(path: str, compression: str | None) -> Iterator[IO[bytes]]:
    """Yield the file's bytes, decompressed, without a byte order mark."""
    # Arrow reads all gzip members and zstd frames, and reports one that is truncated.
    with pa.input_stream(path, compression=compression) as source:
        stream = io.BufferedReader(source, BLOCK_BYTES)
        if stream.peek(3)[:3] == BYTE_ORDER_MARK:
            stream.read(3)
        yield stream


# JSON


def _json_chunks(
    path: str, suffix: str, compression: str | None, n_records: int
) -> Iterator[Chunk]:
    is_lines = suffix != ".json" or _is_json_lines(path, compression)
    with _opened(path, compression) as stream:
        values = _lines(path, stream) if is_lines else _values(path, stream)
        for group in _groups(values, n_records, size=lambda item: len(item[1])):
            numbers, texts = map(list, zip(*group, strict=True))
            yield Chunk(path, numbers, texts)


def _is_json_lines(path: str, compression: str | None) -> bool:
    """True if the first line of a `.json` file is a complete object."""
    with _opened(path, compression) as stream:
        line = stream.readline(80)
        while line and not line.strip():
            line = stream.readline(80)
        if not line.lstrip().startswith(b"{"):
            return False
        if not line.endswith(b"\n"):
            line += stream.readline(RECORD_BYTES)
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    lines = iter(lambda: stream.readline(RECORD_BYTES), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
            raise _too_long(f"{path}, line {number}")
        if text := line.strip(b" \t\r\n"):
            yield number, text


def _too_long(where: str) -> StageError:
    return StageError(
        "a record is too long to be a chat",
        where=where,
        found=f"more than {RECORD_BYTES // 2**20} MiB",
        to_fix="name a file .json if it is a JSON array; otherwise correct or remove the record",
    )


BETWEEN = re.compile(rb"[\s,\]]*")
# A string is matched whole, or to the end of the text: brackets inside it do not count.
STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{}]', re.DOTALL)
SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,\]"][^\s,\]]*', re.DOTALL)


def _values(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the elements of a JSON array with their index, or other values with their line.

    Only quotes and brackets are examined. That is fast, and a broken element does not affect the
    others: the parser rejects it later.
    """
    text, at, at_end = b"", 0, False
    index, line, is_array, is_closed = 0, 1, None, False
    while True:
        between = BETWEEN.match(text, at)
        assert between is not None  # the pattern also matches nothing
        start = between.end()
        line += text.count(b"\n", at, start)
        is_closed |= b"]" in text[at:start]
        at = start
        if is_array is None and at < len(text):
            is_array = text.startswith(b"[", at)
            at += is_array
            continue
        end = _value_end(text, at)
        if end is None and at_end:
            end = len(text)
        if end is not None:
            if at == end:
                break
            index += 1
            yield (index if is_array else line), text[at:end]
            line += text.count(b"\n", at, end)
            at = end
            continue
        text = text[at:]
        if len(text) > RECORD_BYTES:
            raise _too_long(f"{path}, record {index + 1}")
        # The block doubles the text, so that a long value is searched a few times, not often.
        block = stream.read(max(BLOCK_BYTES, len(text)))
        text, at, at_end = text + block, 0, not block
    if is_array and not is_closed:
        raise EOFError("the JSON array has no end")


def _value_end(text: bytes, start: int) -> int | None:
    """Return the end of the JSON value that begins at `start`; None if the text ends before it."""
    if text.startswith((b"{", b"["), start):
        depth = 0
        for token in STRUCTURE.finditer(text, start):
            depth += (token[0] in b"{[") - (token[0] in b"}]")
            if depth == 0:
                return token.end()
        return None
    # A text, a number or a word is not a record, but it is rejected as one, by its number.
    scalar = SCALAR.match(text, start)
    return scalar.end() if scalar and scalar.end() < len(text) else None


# Tables


def _table_chunks(
    path: str, suffix: str, compression: str | None, n_records: int
) -> Iterator[Chunk]:
    csv.field_size_limit(RECORD_BYTES)  # an unclosed quote runs to the end of the file
    with _opened(path, compression) as stream:
        # Bytes that are not UTF-8 pass here, so that only their own row is rejected.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if suffix == ".tsv" else ",")
        columns = tuple(next(reader, ()))
        if len(set(columns)) != len(columns):
            raise StageError("a table has two columns of one name", where=path, found=columns)
        for group in _groups(_rows(reader), n_records, size=lambda row: sum(map(len, row[1]))):
            numbers, cells = map(list, zip(*group, strict=True))
            yield Chunk(path, numbers, cells, columns)


def _rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank with its first line; a quoted cell may span several."""
    first_line = reader.line_num + 1
    for cells in reader:
        if cells:
            yield first_line, cells
        first_line = reader.line_num + 1


def _parquet_chunks(path: str, n_records: int) -> Iterator[Chunk]:
    # Read in blocks, because a row group may be larger than the memory.
    with parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        row_bytes = sum(group.total_byte_size for group in groups) / (file.metadata.num_rows or 1)
        n_rows = max(1, min(n_records, int(CHUNK_BYTES / (row_bytes or 1))))
        first = 1
        for batch in file.iter_batches(n_rows, use_threads=False):
            if not batch.num_rows:
                continue
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            numbers = range(first, first + batch.num_rows)
            yield Chunk(path, numbers, sink.getvalue().to_pybytes())
            first += batch.num_rows
