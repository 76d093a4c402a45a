"""Files of chats as records, streaming: which files, cut into chunks, and each chunk parsed.

The process that reads cuts cheaply, so that it can feed many; `records` parses in theirs. A chunk's
boundaries depend on the file alone. Whatever a record holds, it comes out once: parsed, or with
the reason why it could not be.

    .jsonl .ndjson   an object a line
    .json            an array, an object a line, or objects one after the other, by the content
    .csv .tsv        a header, then a row a record
    .parquet         a row a record
    … .gz .zst       the same, compressed (Parquet is compressed inside)
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from workflow_scripts import files, urls
from workflow_scripts.chats.rejections import Rejected
from workflow_scripts.log import StageError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# A chunk ends at so many bytes, so that a thousand long records do not fill the memory.
CHUNK_BYTES = 16 * 2**20
# No chat is as long; a line that is has lost its end, and would be read until the memory is full.
RECORD_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Records of one file as they lie in it, not yet parsed; small, and cheap to send."""

    source_file: str
    numbers: Sequence[int]
    """Of each record: its line counted from 1; in a JSON array or Parquet its row."""
    content: list[bytes] | list[list[str]] | bytes
    """JSON texts; cells of rows; or rows as an Arrow stream."""
    columns: tuple[str, ...] = ()
    """Names of the cells, where `content` is such."""


class Record(NamedTuple):
    """One record of a source file, parsed if that was possible."""

    source_file: str
    source_line: int
    """Counted from 1: the line it begins on; in a JSON array or Parquet its row."""
    raw: str
    """As it was read; bytes that are not UTF-8 appear as U+FFFD, and a row as JSON."""
    content: Any
    """The JSON value, or the row as a dict."""
    rejection: Rejected | None
    """Why there is no content."""


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths, folders and globs stand for, each once.

    In the order of the patterns, sorted within each. A folder stands for every file below it of a
    known suffix, hidden ones left out; a URL for itself.

    Raises:
        StageError: a pattern matches nothing, or a file of unknown suffix.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if urls.is_url(pattern):
            urls.check_one_file(pattern)
            paths = [pattern]
        else:
            paths = _matches(os.path.expanduser(pattern))
        if not paths:
            raise StageError(
                "a dataset's pattern matches no file",
                where=pattern,
                expected="a file, a folder or a glob of " + " ".join(FORMATS),
                to_fix="check the path; it is taken from the folder Snakemake runs in",
            )
        for path in paths:
            file_format(path)
        found.update(dict.fromkeys(paths))
    return list(found)


def _matches(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        folder = Path(pattern)
        paths = (path for path in folder.rglob("*") if _is_seen(path.relative_to(folder)))
        return sorted(os.path.normpath(path) for path in paths if path.is_file() and _known(path))
    # Before globbing: a name may hold brackets.
    names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return sorted({os.path.normpath(name) for name in names if os.path.isfile(name)})


def _is_seen(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _known(path: Path) -> bool:
    with contextlib.suppress(StageError):
        return bool(file_format(str(path)))
    return False


def file_format(path: str) -> tuple[str, str | None]:
    """A file's format and compression by its name: (`.json`, `gzip`).

    Raises:
        StageError: the suffix is unknown.
    """
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    if suffix not in FORMATS or (compression and suffix == ".parquet"):
        raise StageError(
            "a dataset file's format is unknown",
            where=path,
            found=os.path.basename(path),
            expected=f"{' '.join(FORMATS)}, all but Parquet also with {' '.join(COMPRESSIONS)}",
            to_fix="rename the file to what it holds, or leave it out",
        )
    return suffix, compression


def read_chunks(
    path: str | Path, *, records_per_chunk: int = 1000, name: str | None = None
) -> Iterator[Chunk]:
    """A file's records in order, cut into chunks at the same places whenever it is read.

    Args:
        name: the `source_file` of its records, where that is not the path: a URL.
    Raises:
        StageError: the file cannot be read to its end, or something stands in for it.
    """
    import pyarrow as pa

    path = str(path)
    suffix, compression = file_format(path)
    files.check_whole(Path(path), may_be_empty=True)
    n_read = 0
    try:
        if suffix == ".parquet":
            chunks = _parquet_chunks(path, records_per_chunk)
        elif suffix in (".csv", ".tsv"):
            chunks = _table_chunks(path, compression, records_per_chunk)
        else:
            values = _json_texts(path, suffix, compression)
            chunks = (
                Chunk(path, [number for number, _ in group], [text for _, text in group])
                for group in _groups(values, records_per_chunk, size=lambda item: len(item[1]))
            )
        for chunk in chunks:
            n_read += len(chunk.numbers)
            yield replace(chunk, source_file=name) if name else chunk
    except FileNotFoundError as error:
        raise StageError(
            "a dataset file cannot be read",
            where=path,
            found=error.strerror,
            to_fix="check the path; it is taken from the folder Snakemake runs in",
        ) from error
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise StageError(
            "a dataset file cannot be read to its end",
            where=f"{path}, after record {n_read}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            to_fix="the file is damaged or cut short: fetch or write it again",
        ) from error


def _groups(items: Iterable[Any], n_items: int, *, size: Callable[[Any], int]) -> Iterator[list]:
    """Lists of `n_items`, or fewer where their sizes add up to CHUNK_BYTES."""
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
    """The file's bytes, decompressed, a byte order mark left out."""
    import pyarrow as pa

    # Arrow reads gzip members and zstd frames to the last, and says so when one is cut short.
    with pa.input_stream(path, compression=compression) as source:
        stream = io.BufferedReader(source, BLOCK_BYTES)
        if stream.peek(3)[:3] == BYTE_ORDER_MARK:
            stream.read(3)
        yield stream


# JSON


def _json_texts(path: str, suffix: str, compression: str | None) -> Iterator[tuple[int, bytes]]:
    """The JSON values of a file, unparsed, with their numbers."""
    if suffix != ".json" or _is_one_a_line(path, compression):
        with _opened(path, compression) as stream:
            yield from _lines(path, stream)
    else:
        with _opened(path, compression) as stream:
            yield from _values(path, stream)


def _is_one_a_line(path: str, compression: str | None) -> bool:
    """Whether a `.json` file is JSON Lines: its first line is an object, whole."""
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
    number = 0
    while line := stream.readline(RECORD_BYTES):
        number += 1
        if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
            raise _too_long(f"{path}, line {number}")
        if text := line.strip(b" \t\r\n"):
            yield number, text


def _too_long(where: str) -> StageError:
    return StageError(
        "a record is too long to be a chat",
        where=where,
        found=f"more than {RECORD_BYTES // 2**20} MiB",
        to_fix="a JSON array belongs in a file named .json; else mend or remove the record",
    )


BETWEEN = re.compile(rb"[\s,\]]*")
# A string is taken whole, or to the end of what is there: brackets within it count for nothing.
STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{}]', re.DOTALL)
SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,\]"][^\s,\]]*', re.DOTALL)


def _values(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array, counted; or values one after the other, with their lines.

    Only quotes and brackets are looked at: quick, and a broken element costs no other, because it
    is left to the parser to refuse it.
    """
    text, at, at_end = b"", 0, False
    index, line, is_array, is_closed = 0, 1, None, False
    while True:
        between = BETWEEN.match(text, at)
        assert between is not None  # it matches nothing as well
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
        # As much again as waits: a long value is then looked through a few times, not often.
        block = stream.read(max(BLOCK_BYTES, len(text)))
        text, at, at_end = text + block, 0, not block
    if is_array and not is_closed:
        raise EOFError("the JSON array has no end")


def _value_end(text: bytes, start: int) -> int | None:
    """Where the JSON value that starts there ends; None if that lies beyond the text."""
    if text.startswith((b"{", b"["), start):
        depth = 0
        for token in STRUCTURE.finditer(text, start):
            match token[0]:
                case b"{" | b"[":
                    depth += 1
                case b"}" | b"]":
                    depth -= 1
                    if depth == 0:
                        return token.end()
        return None
    # A text, a number or a word: no record, but one that is to be rejected by its number.
    scalar = SCALAR.match(text, start)
    return scalar.end() if scalar and scalar.end() < len(text) else None


# Tables


def _table_chunks(path: str, compression: str | None, n_records: int) -> Iterator[Chunk]:
    csv.field_size_limit(RECORD_BYTES)  # a quote that is never closed runs to the end of the file
    with _opened(path, compression) as stream:
        # Bytes that are not UTF-8 pass here, so that only their own row is rejected.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if ".tsv" in file_format(path) else ",")
        columns = tuple(next(reader, ()))
        if len(set(columns)) != len(columns):
            raise StageError("a table has two columns of one name", where=path, found=columns)
        rows = _rows(reader)
        for group in _groups(rows, n_records, size=lambda row: sum(map(len, row[1]))):
            numbers, cells = map(list, zip(*group, strict=True))
            yield Chunk(path, numbers, cells, columns)


def _rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the line they begin on: a quoted cell may span several."""
    first_line = reader.line_num + 1
    for cells in reader:
        if cells:
            yield first_line, cells
        first_line = reader.line_num + 1


def _parquet_chunks(path: str, n_records: int) -> Iterator[Chunk]:
    import pyarrow as pa
    from pyarrow import parquet

    # Read in blocks: a row group may be larger than the memory.
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


# Parsing


def records(chunk: Chunk) -> Iterator[Record]:
    """The records of a chunk, one for each, in order."""
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


Parsed = tuple[str, Any, Rejected | None]


def _json_value(text: bytes) -> Parsed:
    try:
        raw = text.decode()
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start + 1}"
        return text.decode(errors="replace"), None, Rejected("not UTF-8", detail)
    # The standard library's parser takes 8 to 18 µs a chat of 2.8 kB. orjson takes 3 to 6, but
    # makes a large integer a float, and finding those takes 30.
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
    """Rows as dicts; a row that is not UTF-8 as Arrow prints it."""
    import pyarrow as pa

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
    """Arrow gives every struct of a column the same keys; those of other rows are null here."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
