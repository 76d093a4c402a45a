"""The files of a release, and a check that they are as they were packaged.

Nothing here logs: the Snakefile imports it.
"""

from __future__ import annotations

import re
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.log import StageError

LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def checksums(sums: Path) -> dict[str, str]:
    """File → SHA-256, from a SHA256SUMS file."""
    return {
        match[2]: match[1]
        for match in map(LINE.fullmatch, sums.read_text(encoding="utf-8").splitlines())
        if match
    }


def released_files(release: Path) -> list[Path]:
    """A release's files, after a check that each is as it was packaged.

    Raises:
        StageError: a file is missing, was changed, or does not belong to the release.
    """
    sums = release / "SHA256SUMS"
    if not sums.is_file():
        raise StageError(
            "this is not a release folder", where=release, to_fix="snakemake makes it: target `all`"
        )
    listed = checksums(sums)
    # Snakemake keeps a hidden file in every folder that it made.
    there = {path.name for path in release.iterdir() if not path.name.startswith(".")}
    if differing := sorted(there - {sums.name} ^ listed.keys()):
        raise StageError(
            "the release's files are not those it was packaged with",
            where=release,
            found=", ".join(differing),
            to_fix="snakemake -R package_release",
        )
    for name, digest in listed.items():
        if files.sha256(release / name) != digest:
            raise StageError(
                "a file of the release was changed",
                where=release / name,
                expected=f"sha256 {digest}",
                to_fix="snakemake -R package_release",
            )
    return [release / name for name in sorted(listed)] + [sums]
