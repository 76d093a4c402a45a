from __future__ import annotations

import subprocess
import sys

import pytest

from workflow_scripts.chats import sources
from workflow_scripts.log import StageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.csv.gz", "notes.txt", ".hidden.jsonl", "deep/c.parquet"):
        path = tmp_path / "chats" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (tmp_path / "chats" / ".git").mkdir()
    (tmp_path / "chats" / ".git" / "d.json").touch()
    (tmp_path / "e[1].json").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["chats"], ["chats/a.csv.gz", "chats/b.jsonl", "chats/deep/c.parquet"]),
        (["./chats/"], ["chats/a.csv.gz", "chats/b.jsonl", "chats/deep/c.parquet"]),
        (["chats/*.jsonl"], ["chats/b.jsonl"]),
        (["chats/**/*.p*"], ["chats/deep/c.parquet"]),
        (["**/*.*[lvz]"], ["chats/a.csv.gz", "chats/b.jsonl"]),
        (["e[1].json"], ["e[1].json"]),
        (["chats/.hidden.jsonl"], ["chats/.hidden.jsonl"]),
        (
            ["chats/b.jsonl", "chats", "chats/../chats/b.jsonl"],
            ["chats/b.jsonl", "chats/a.csv.gz", "chats/deep/c.parquet"],
        ),
        ([], []),
    ],
)
def test_patterns_name_files_once_and_in_order(folder, patterns, expected):
    assert sources.expand(patterns) == expected


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("nowhere.jsonl", ["matches no file", "nowhere.jsonl", ".jsonl"]),
        ("chats/*.json", ["matches no file", "chats/*.json"]),
        ("chats/.git/*.csv", ["matches no file"]),
        ("chats/notes.txt", ["format is unknown", "notes.txt", ".parquet", ".zst"]),
        ("chats/n*", ["format is unknown", "notes.txt"]),
    ],
)
def test_a_pattern_without_readable_files_is_an_error(folder, pattern, parts):
    with pytest.raises(StageError) as caught:
        sources.expand(["chats", pattern])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.JSONL", (".jsonl", None)),
        ("a.b.json.GZ", (".json", "gzip")),
        ("a.tsv.zst", (".tsv", "zstd")),
        ("a.parquet", (".parquet", None)),
    ],
)
def test_the_name_shows_the_format(name, expected):
    assert sources.file_format(name) == expected


@pytest.mark.parametrize("name", ["a", "a.gz", "a.xlsx", "a.parquet.gz", "a.json.bz2", ".json"])
def test_other_names_have_no_format(name):
    with pytest.raises(StageError):
        sources.file_format(name)


def test_the_snakefile_can_name_files_without_loading_arrow():
    code = (
        "import sys; from workflow_scripts.chats import sources; sources.expand(['data']);"
        " print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "workflow_scripts.chats.sources" in imported
    assert imported.isdisjoint({"numpy", "pyarrow", "pydantic", "mistral_common"})
