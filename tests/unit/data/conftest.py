"""Chats taken through the data stages once, for the tests of the stages after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from workflow_scripts import files
from workflow_scripts.data import clean_dataset, render_chats
from workflow_scripts.data.stdlib_chats import make_chats


class Prepared(NamedTuple):
    conversations: Path
    clean: Path
    tokens: Path


@pytest.fixture(scope="session")
def prepared(tokenizer_v3, tmp_path_factory) -> Prepared:
    """A hundred demo chats: as JSON Lines, cleaned, and rendered with the v3 tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    paths = Prepared(folder / "chats.jsonl", folder / "clean", folder / "tokens")
    files.write_jsonl(paths.conversations, make_chats(n_conversations=100, seed=0))
    settings = json.dumps({"validation_fraction": 0.2, "test_fraction": 0.2})
    clean_dataset.main(
        ["--files", str(paths.conversations), "--settings", settings, "--clean", str(paths.clean)]
    )
    render_chats.main(
        ["--clean", str(paths.clean), "--tokenizer", str(tokenizer_v3), "--settings", "{}"]
        + ["--tokens", str(paths.tokens)]
    )
    return paths
