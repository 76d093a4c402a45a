"""Package files at a pinned version: downloaded by pip, checked by SHA-256, not installed.

pip's configuration applies: a private index, or a folder of wheels on a machine without a network
(`PIP_NO_INDEX`, `PIP_FIND_LINKS`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from workflow_scripts import files
from workflow_scripts.log import StageError


@contextmanager
def downloaded(requirement: str, sha256: str, options: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the file that pip downloads for a requirement; it is deleted when the block ends.

    Args:
        requirement: `name==version`.
        sha256: expected SHA-256 of the file.
        options: further options of `pip download`.
    Raises:
        StageError: pip fails, or the file has another SHA-256.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, *options, requirement]
        if subprocess.run(command, check=False).returncode:
            raise StageError(
                f"{requirement} cannot be downloaded",
                found=" ".join(command),
                to_fix="see pip's message above",
            )
        (path,) = Path(folder).iterdir()
        found = files.sha256(path)
        if found != sha256:
            raise StageError(
                f"{requirement} is not the file that was tested",
                where=path.name,
                found=f"SHA-256 {found}",
                expected=f"SHA-256 {sha256}",
                to_fix="make the index that pip uses provide the published file",
            )
        yield path
