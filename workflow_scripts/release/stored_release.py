"""A release sent to storage, file by file, all but its SHA256SUMS.

Snakemake removes SHA256SUMS there before this runs and sends the new one after it: where it lies,
the release is whole. What was sent is noted here, so that a try after a broken one goes on, and a
file of the release before does not stay. Nothing here logs: a rule's `run:` calls it within
Snakemake, which knows the endpoint and the credentials.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workflow_scripts.handover.provenance import StoredRelease
from workflow_scripts.log import StageError
from workflow_scripts.release.release_folder import checksums, released_files


def send(*arguments: Any) -> None:
    """`sending`, done; in a thread of its own, as Snakemake's has a loop that runs already."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(sending(*arguments))).result()


async def sending(
    release: Path, url: str, note: Path, remote: Callable[[str], Any], say: Callable[[str], None]
) -> None:
    """
    Args:
        url: folder on storage.
        note: JSON of what was sent where, read and written.
        remote: a URL as a storage object of Snakemake's.
        say: takes a line for each file.
    Raises:
        StageError: the release is not as it was packaged, or storage has not what was sent.
        WorkflowError: storage refuses, or cannot be reached.
    """
    paths = released_files(release)
    digests = checksums(release / "SHA256SUMS")
    before = StoredRelease.read(note) if note.is_file() else None
    # What was sent to another folder says nothing about this one.
    sent = dict(before.files) if before and before.url == url else {}
    for path in paths:
        if path.name == "SHA256SUMS":
            continue
        there = remote(f"{url}/{path.name}")
        n_bytes = path.stat().st_size
        if sent.get(path.name) == digests[path.name] and await size(there) == n_bytes:
            say(f"there  {n_bytes:>15,}  {url}/{path.name}")
            continue
        there.set_local_path(path)
        await there.managed_store()
        if (found := await size(there)) != n_bytes:
            raise StageError(
                "a file on storage is not what was sent",
                where=f"{url}/{path.name}",
                found=f"{found} bytes",
                expected=f"{n_bytes}",
                to_fix="start again",
            )
        sent[path.name] = digests[path.name]
        StoredRelease(url=url, files=sent).write(note)
        say(f"sent   {n_bytes:>15,}  {url}/{path.name}")
    for name in sorted(sent.keys() - digests.keys()):
        there = remote(f"{url}/{name}")
        if await size(there) is not None:
            await there.managed_remove()
            say(f"removed                 {url}/{name}")
        del sent[name]
        StoredRelease(url=url, files=sent).write(note)


async def size(remote: Any) -> int | None:
    """Bytes of an object; None where there is none."""
    return await remote.managed_size() if await remote.managed_exists() else None
