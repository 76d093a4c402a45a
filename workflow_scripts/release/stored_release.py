"""Send a release to storage, file by file, except its SHA256SUMS.

Snakemake removes SHA256SUMS on storage before this runs and sends the new one afterwards, so a
release with SHA256SUMS is complete. A note lists the files that were sent: the next attempt
continues after them, and files of an earlier release are removed. Nothing here logs: a rule's
`run:` calls it within Snakemake, which knows the endpoint and the credentials.
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
    """Run `sending` in a separate thread, as Snakemake's thread has a running event loop."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(sending(*arguments))).result()


async def sending(
    release: Path, url: str, note: Path, remote: Callable[[str], Any], say: Callable[[str], None]
) -> None:
    """Send the files of a release, note each, and remove those of an earlier release.

    Args:
        url: folder on storage.
        note: JSON that lists the sent files, read and written.
        remote: turns a URL into a storage object of Snakemake's.
        say: called with one line per file.
    Raises:
        StageError: the release is not as it was packaged, or a file on storage differs.
        WorkflowError: storage refuses, or cannot be reached.
    """
    paths = released_files(release)
    digests = checksums(release / "SHA256SUMS")
    before = StoredRelease.read(note) if note.is_file() else None
    # A note about another folder says nothing about this one.
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
                "a file on storage differs from the file that was sent",
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
    """Size of an object in bytes; None if it does not exist."""
    return await remote.managed_size() if await remote.managed_exists() else None
