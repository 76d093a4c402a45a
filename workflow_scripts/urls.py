"""Files on storage (`s3://bucket/chats.jsonl`) that Snakemake's storage plugins fetch and send.

Nothing here logs: the Snakefile asks this before the first job. No plugin is imported.
"""

from __future__ import annotations

import importlib.util
import re

from workflow_scripts.log import StageError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
# Scheme → plugin, where they differ.
PLUGINS = {"gs": "gcs", "https": "http"}
GLOB = re.compile(r"[*?\[{]")


def is_url(name: str) -> bool:
    """Whether a name stands for a file on storage, not for one of this machine."""
    return bool(SCHEME.match(name))


def check_one_file(url: str) -> None:
    """
    Raises:
        StageError: a glob or a folder, which a plugin cannot list before the first job.
    """
    if GLOB.search(url) or url.endswith("/"):
        raise StageError(
            "globs and folders are not listed on storage",
            where=url,
            expected="the URL of one file",
            to_fix="name each file",
        )


def plugin(url: str) -> str:
    """The storage plugin for a URL: `s3`.

    Raises:
        StageError: it is not installed.
    """
    scheme = SCHEME.match(url)
    assert scheme is not None, url  # `is_url`
    name = PLUGINS.get(scheme[1], scheme[1])
    if importlib.util.find_spec(f"snakemake_storage_plugin_{name.replace('-', '_')}") is None:
        package = f"snakemake-storage-plugin-{name}"
        lock = "--no-deps -r requirements-cluster.lock" if name == "s3" else package
        raise StageError(
            "the storage plugin of a URL is not installed",
            where=url,
            expected=package,
            to_fix=f"pip install {lock}",
        )
    return name
