"""Files as the interface between stages: written whole or not at all, read with a clear message.

Every writer here goes through a temporary name in the same folder and a rename, so that a file
which exists is complete. Arrow and Parquet are imported where they are used: the Snakefile needs
none of it.
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
    """Whether a write failed for want of room: on the disk, in a quota, within a limit for files.

    safetensors has an error of its own, and only its text says so.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """
    Raises:
        StageError: a write in the block failed for want of room.
    """
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise StageError(
            "the disk is full",
            where=path,
            found=f"{error}; {free / 1e9:.1f} GB free, with what was half written",
            expected="room for the whole of it",
            to_fix=f"make room and start again; what was half written is removed; {DOCTOR}",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it when the block ends, removed when it raises."""
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
    """A temporary folder beside `path`; it replaces `path` when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _full_disk_named(path):
            yield temporary
            # mkdtemp and safetensors write for the owner alone; results are shared like any
            # other file.
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
    """Refuse a file that stands in for another: a Git LFS pointer, a web page saved under the
    file's name, or an empty file.

    Every reader of a file that a user brings calls this first; what cannot be opened is left to it.

    Args:
        may_be_empty: an empty file is right here.
    Raises:
        StageError: with what it is, and the way to the file itself.
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
            found=f"a text of {path.stat().st_size} bytes that stands for"
            f" {size.removeprefix(b'size ').decode(errors='replace')} bytes",
            expected="the file",
            to_fix="run `git lfs install` and `git lfs pull` in the folder of the repository",
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML_STARTS) and path.suffix.lower() not in HTML_SUFFIXES:
        raise StageError(
            "a file is a web page, not what its name says",
            where=path,
            found="HTML: an error or login page that was saved in its place",
            expected=f"a file of the kind {path.suffix or path.name}",
            to_fix="download it again; on a website take the `raw` or `download` link",
        )
    if not start and not may_be_empty:
        raise StageError(
            "a file is empty",
            where=path,
            found="0 bytes",
            to_fix="fetch or write it again: an interrupted download or a full disk leaves these",
        )


def read_json(path: Path) -> dict[str, Any]:  # untyped: any file; ours are read by records
    """A JSON object.

    Raises:
        StageError: the file is missing, is not JSON, or holds something other than an object.
    """
    check_whole(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise StageError("a file is not UTF-8", where=path, found=error.reason) from error
    except FileNotFoundError as error:
        raise StageError(
            "a file is missing", where=path, to_fix="make it, or check the path"
        ) from error
    except json.JSONDecodeError as error:
        raise StageError(
            "a file is not JSON", where=f"{path}, line {error.lineno}", found=error.msg
        ) from error
    if not isinstance(content, dict):
        raise StageError("a file holds no JSON object", where=path, found=type(content).__name__)
    return content


def write_json(
    path: Path,
    content: Mapping[str, Any],  # untyped: any JSON object
) -> None:
    """A JSON object, indented, its keys in the order given; NaN is refused (JSON has none)."""
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
    """A Parquet file written table by table, in groups of equal size whatever the tables' sizes."""
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
    """Arrow IPC; uncompressed unless a codec is named, so that readers can map it into memory."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression=compression)
    with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)


def read_arrow(path: Path) -> pa.Table:
    """A memory-mapped table: its columns are read from disk as they are touched."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, independent of key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def copy_or_link(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
