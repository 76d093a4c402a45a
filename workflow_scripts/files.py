"""Files as the interface between stages: written whole or not at all, read with a clear message.

Every writer here writes to a temporary name in the same folder and renames it at the end, so a
file that exists is complete. pyarrow is imported inside the functions that need it: the Snakefile
imports this module and needs neither Arrow nor Parquet.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.log import DOCTOR, StageError

if TYPE_CHECKING:
    import pyarrow as pa


def is_full_disk(error: BaseException) -> bool:
    """True if a write failed because the disk, a quota or the file size limit is full.

    safetensors raises its own error type, and only its text names the cause.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """
    Raises:
        StageError: a write in the block failed because the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StageError) or not is_full_disk(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise StageError(
            "the disk is full",
            where=path,
            found=f"{error}; {free / 1e9:.1f} GB free while the partial file was there",
            expected="room for the complete file or folder",
            to_fix=f"free some space and start again; the partial file is removed; {DOCTOR}",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`: renamed to it at the end, removed on an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Dotted prefix, same suffix: some writers choose their format by the suffix.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with _full_disk_named(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it replaces `path` when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _full_disk_named(path):
            yield temporary
            # mkdtemp and safetensors give access to the owner only; results get the usual modes.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o777 & ~mask)
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(0o666 & ~mask)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HTML_STARTS = (b"<!doctype html", b"<html")
HTML_SUFFIXES = (".html", ".htm")


def check_whole(path: Path, *, may_be_empty: bool = False) -> None:
    """Refuse a placeholder: a Git LFS pointer, a web page under the file's name, an empty file.

    Every reader of a user's file calls this first. A file that cannot be opened passes: its reader
    reports that.

    Args:
        may_be_empty: accept an empty file.
    Raises:
        StageError: the file is a placeholder; the message says how to get the real file.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError:
        return
    if start.startswith(LFS_POINTER):
        size = next((line for line in start.split(b"\n") if line.startswith(b"size ")), b"size ?")
        raise StageError(
            "a file is a Git LFS pointer, not the file itself",
            where=path,
            found=f"a text of {path.stat().st_size} bytes that points to a file of"
            f" {size.removeprefix(b'size ').decode(errors='replace')} bytes",
            expected="the file itself",
            to_fix="run `git lfs install` and `git lfs pull` in the repository's folder",
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML_STARTS) and path.suffix.lower() not in HTML_SUFFIXES:
        raise StageError(
            "a file contains a web page, not the format its name says",
            where=path,
            found="HTML, probably an error or login page saved by a download",
            expected=f"a {path.suffix or path.name} file",
            to_fix="download it again; on a website use the `raw` or `download` link",
        )
    if not start and not may_be_empty:
        raise StageError(
            "a file is empty",
            where=path,
            found="0 bytes",
            to_fix="fetch or write it again; interrupted downloads and full disks leave these",
        )


def read_json(path: Path) -> dict[str, Any]:  # untyped: any file; ours are read by records
    """Read a JSON object.

    Raises:
        StageError: the file is missing, is not JSON, or contains something other than an object.
    """
    check_whole(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise StageError("a file is not UTF-8", where=path, found=error.reason) from error
    except FileNotFoundError as error:
        raise StageError(
            "a file is missing", where=path, to_fix="create it, or check the path"
        ) from error
    except json.JSONDecodeError as error:
        raise StageError(
            "a file is not JSON", where=f"{path}, line {error.lineno}", found=error.msg
        ) from error
    if not isinstance(content, dict):
        raise StageError(
            "a file does not contain a JSON object", where=path, found=type(content).__name__
        )
    return content


def write_json(
    path: Path,
    content: Mapping[str, Any],  # untyped: any JSON object
) -> None:
    """Write a JSON object, indented, keys in the given order; NaN is refused (JSON has none)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(
    path: Path,
    records: Sequence[Mapping[str, Any]],  # untyped: any JSON objects
) -> None:
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    write_text(path, "".join(line + "\n" for line in lines))


def write_parquet(path: Path, table: pa.Table) -> None:
    from pyarrow import parquet

    with atomic_file(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


@contextmanager
def parquet_stream(
    path: Path, schema: pa.Schema, *, rows_per_group: int = 4096
) -> Iterator[Callable[[pa.Table], None]]:
    """Write a Parquet file table by table; row groups are equal whatever the tables' sizes."""
    import pyarrow as pa
    from pyarrow import parquet

    waiting = schema.empty_table()
    with atomic_file(path) as temporary:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:

            def write(table: pa.Table) -> None:
                nonlocal waiting
                waiting = pa.concat_tables([waiting, table])
                while len(waiting) >= rows_per_group:
                    writer.write_table(waiting.slice(0, rows_per_group))
                    waiting = waiting.slice(rows_per_group)

            yield write
            if len(waiting):
                writer.write_table(waiting)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path, columns=columns)


def write_arrow(path: Path, table: pa.Table, compression: str | None = None) -> None:
    """Write Arrow IPC; without a codec it is uncompressed, so readers can memory-map it."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression=compression)
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)


def read_arrow(path: Path) -> pa.Table:
    """Read a memory-mapped table: its columns are read from disk when they are used."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Return 16 hexadecimal digits of a JSON value's SHA-256, independent of key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def copy_or_link(source: Path, target: Path) -> None:
    """Make a hard link if the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
