"""URLs of files on remote storage (`s3://bucket/chats.jsonl`), for Snakemake's storage plugins.

The Snakefile calls these functions before the first job, so they log nothing and import no plugin.
"""

from __future__ import annotations

import importlib.util
import re

from workflow_scripts.log import StageError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
# Scheme → plugin, if their names differ.
PLUGINS = {"gs": "gcs", "https": "http"}
GLOB = re.compile(r"[*?\[{]")


def is_url(name: str) -> bool:
    """True if a name is a URL of remote storage, not a local path."""
    return bool(SCHEME.match(name))


def check_one_file(url: str) -> None:
    """
    Raises:
        StageError: the URL is a glob or a folder; a plugin cannot list it before the first job.
    """
    if GLOB.search(url) or url.endswith("/"):
        raise StageError(
            "globs and folders are not supported on remote storage",
            where=url,
            expected="the URL of one file",
            to_fix="name each file",
        )


def plugin(url: str) -> str:
    """Return the name of the storage plugin for a URL: `s3`.

    Raises:
        StageError: the plugin is not installed.
    """
    scheme = SCHEME.match(url)
    assert scheme is not None, url  # `is_url`
    name = PLUGINS.get(scheme[1], scheme[1])
    if importlib.util.find_spec(f"snakemake_storage_plugin_{name.replace('-', '_')}") is None:
        package = f"snakemake-storage-plugin-{name}"
        lock = "--no-deps -r requirements-cluster.lock" if name == "s3" else package
        raise StageError(
            "the storage plugin for a URL is not installed",
            where=url,
            expected=package,
            to_fix=f"pip install {lock}",
        )
    return name
