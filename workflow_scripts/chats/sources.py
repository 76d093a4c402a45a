"""Source files of a dataset: the files that a pattern names, and the format of each.

.jsonl .ndjson   one record per line
.json            an array, one record per line, or records one after the other
.csv .tsv        a header, then one record per row
.parquet         one record per row
… .gz .zst       the same, compressed (Parquet is compressed inside)
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import urls
from workflow_scripts.log import StageError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths, folders, globs and URLs name, each file once.

    The files follow the order of the patterns and are sorted within each. A folder names every file
    below it that has a known suffix and is not hidden; a URL names itself.

    Raises:
        StageError: a pattern matches no file, or a file whose suffix is unknown.
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
                to_fix="check the path; it is relative to the folder where Snakemake runs",
            )
        for path in paths:
            file_format(path)
        found.update(dict.fromkeys(paths))
    return list(found)


def _matches(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        folder = Path(pattern)
        return sorted(
            os.path.normpath(path)
            for path in folder.rglob("*")
            if path.is_file()
            and _is_known(path)
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
    # Before globbing, because a name may contain brackets.
    names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return sorted({os.path.normpath(name) for name in names if os.path.isfile(name)})


def _is_known(path: Path) -> bool:
    with contextlib.suppress(StageError):
        return bool(file_format(str(path)))
    return False


def file_format(path: str) -> tuple[str, str | None]:
    """Return a file's format and compression, read from its name: (`.json`, `gzip`).

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
            expected=f"{' '.join(FORMATS)}; all except Parquet also with {' '.join(COMPRESSIONS)}",
            to_fix="give the file the suffix of its format, or leave it out",
        )
    return suffix, compression


def total_bytes(paths: Sequence[str]) -> int | None:
    """Return the bytes to read, for the progress bar; None if compression hides that number."""
    formats = [file_format(path) for path in paths]
    if any(compression or suffix == ".parquet" for suffix, compression in formats):
        return None
    return sum(Path(path).stat().st_size for path in paths)
