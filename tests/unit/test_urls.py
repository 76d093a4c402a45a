from __future__ import annotations

import re

import pytest

from workflow_scripts import urls
from workflow_scripts.chats import sources
from workflow_scripts.log import StageError


@pytest.mark.parametrize(
    ("name", "is_url"),
    [
        ("s3://bucket/chats.jsonl", True),
        ("gs://bucket/chats.jsonl", True),
        ("data/chats.jsonl", False),
        ("./s3/chats.jsonl", False),
        ("~/chats://.jsonl", False),
    ],
)
def test_a_url_begins_with_a_scheme(name, is_url):
    assert urls.is_url(name) is is_url


@pytest.mark.parametrize("url", ["s3://bucket/*.jsonl", "s3://bucket/folder/", "s3://b/[ab].csv"])
def test_globs_and_folders_on_storage_are_refused(url):
    with pytest.raises(StageError, match="not supported on remote storage") as error:
        sources.expand([url])
    assert url in str(error.value)


def test_a_file_on_storage_is_accepted_if_its_format_is_known():
    assert sources.expand(["s3://bucket/a.jsonl.gz"]) == ["s3://bucket/a.jsonl.gz"]
    with pytest.raises(StageError, match="format is unknown"):
        sources.expand(["s3://bucket/folder"])


def test_a_scheme_finds_its_plugin_or_the_package_to_install():
    assert urls.plugin("s3://bucket/chats.jsonl") == "s3"
    with pytest.raises(StageError, match=re.escape("pip install snakemake-storage-plugin-gcs")):
        urls.plugin("gs://bucket/chats.jsonl")
    with pytest.raises(StageError, match="snakemake-storage-plugin-rucio"):
        urls.plugin("rucio://scope/chats.jsonl")
