from __future__ import annotations

import io
import json
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st
from pyarrow import parquet

from tests import hub_server
from tests.hub_server import NOBODY_LISTENS, Repository
from workflow_scripts import files
from workflow_scripts.chats import hub_dataset
from workflow_scripts.chats.chunks import read_chunks
from workflow_scripts.chats.records import parse_chunk

STAGE = "workflow_scripts.chats.fetch_dataset"
OLD, NEW, BARE, LOST = (digit * 40 for digit in "abcd")


def chats(name, n):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{name} {number}?"},
                {"role": "assistant", "content": f"«{number}»"},
            ]
        }
        for number in range(n)
    ]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(rows):
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


# The values of one field have different types, so `datasets` stores each message as JSON.
MIXED = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Größe?"}]},
            {"role": "assistant", "content": None, "weight": 1},
        ]
    },
    {"messages": [{"role": "user", "content": "plain", "extra": {"deep": [1, "two", None]}}]},
    {"messages": None},
]
CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: train_sft, path: en/train.parquet}
  - {split: test_sft, path: en/test.parquet}
- config_name: fr
  data_files: [{split: train_sft, path: fr/train.parquet}]
---
"""
REPOSITORIES = {
    "datasets/owner/Chats": Repository(
        {
            OLD: {"train.jsonl": json_lines(chats("old", 5))},
            NEW: {"train.jsonl": json_lines(chats("new", 6))},
            BARE: {"LICENSE": b"free"},
        },
        names={"main": NEW},
    ),
    "datasets/owner/tables": Repository(
        {
            OLD: {
                "README.md": CARD,
                "en/train.parquet": parquet_bytes(chats("en", 3)),
                "en/test.parquet": parquet_bytes(chats("test", 2)),
                "fr/train.parquet": parquet_bytes(chats("fr", 4)),
            }
        }
    ),
    "datasets/owner/mixed": Repository({OLD: {"train.jsonl": json_lines(MIXED)}}),
    "datasets/owner/broken": Repository({OLD: {"train.jsonl": b'{"messages": [}\n'}}),
    "datasets/owner/gated": Repository({OLD: {"train.jsonl": b"{}"}}, is_gated=True),
    "datasets/owner/script": Repository({OLD: {"script.py": b"", "train.jsonl": b"{}"}}),
}


class Fetched(NamedTuple):
    done: object
    rows: Path
    manifest: Path

    @property
    def content(self):
        return parquet.read_table(self.rows).to_pylist()


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving(REPOSITORIES) as serving:
        yield serving.address


@pytest.fixture(scope="module")
def home(hub, run_stage, tmp_path_factory):
    """HF_HOME, filled while the Hub answered; the latest dataset in it is the new one."""
    folder = tmp_path_factory.mktemp("home")
    for revision in (OLD, NEW):
        done = run_stage(
            STAGE,
            *("--settings", json.dumps({"hub": "owner/Chats", "revision": revision})),
            *("--rows", folder / revision / "rows.parquet"),
            *("--manifest", folder / revision / "manifest.json"),
            HF_HOME=str(folder),
            **hub_server.environment(hub),
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def fetch(run_stage, tmp_path):
    def run(*, endpoint=NOBODY_LISTENS, offline=False, home=tmp_path / "home", **settings):
        rows, manifest = tmp_path / "out" / "rows.parquet", tmp_path / "out" / "manifest.json"
        done = run_stage(
            STAGE,
            *("--settings", json.dumps({"hub": "owner/Chats", "revision": OLD, **settings})),
            *("--rows", rows, "--manifest", manifest),
            HF_HOME=str(home),
            **hub_server.environment(endpoint, offline=offline),
        )
        return Fetched(done, rows, manifest)

    return run


def refused(fetched, *parts):
    assert fetched.done.returncode == 1, fetched.done.stderr
    message = fetched.done.stderr[fetched.done.stderr.index("fetch_dataset: ") :]
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert not fetched.rows.exists() and not fetched.manifest.exists()


def test_help_explains_without_the_libraries(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "HF_TOKEN" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"datasets", "pyarrow", "huggingface_hub"})


def test_a_source_of_files_has_nothing_to_fetch(fetch):
    refused(fetch(hub=None, revision=None, files=["chats.jsonl"]), "no dataset to fetch")


def test_a_pinned_split_is_written_with_what_it_came_from(home, fetch, hub):
    fetched = fetch(endpoint=hub)
    assert fetched.done.returncode == 0, fetched.done.stderr
    assert "WARNING" not in fetched.done.stderr
    assert fetched.content == chats("old", 5)
    assert files.read_json(fetched.manifest) == {
        "hub": "owner/Chats",
        "revision": OLD,
        "commit": OLD,
        "subset": "default",
        "split": "train",
        "n_rows": 5,
        "columns": ["messages"],
        "datasets_version": datasets.__version__,
        "sha256": files.sha256(fetched.rows),
    }
    # Another download, with another cache, gives the same bytes.
    assert fetched.rows.read_bytes() == (home / OLD / "rows.parquet").read_bytes()


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_the_cache_of_that_commit_gives_the_same_bytes(home, fetch, offline):
    fetched = fetch(home=home, offline=offline)
    assert fetched.done.returncode == 0, fetched.done.stderr
    assert "WARNING fetch_dataset: used the cache" in fetched.done.stderr
    for path in (fetched.rows, fetched.manifest):
        assert path.read_bytes() == (home / OLD / path.name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"revision": LOST},
            ["not in the cache at this revision", f"owner/Chats/{LOST}", "by this command"],
        ),
        ({"revision": "main"}, ["offline", "found:    main", "40 hexadecimal digits"]),
        ({"subset": "en"}, ["the cache has no such subset", "found:    en", "one of default"]),
        ({"split": "test"}, ["no such split", "found:    test", "one of train"]),
    ],
)
def test_a_missing_cache_is_not_replaced_by_another(home, fetch, settings, parts):
    refused(fetch(home=home, offline=True, **settings), *parts)


def test_an_unreachable_hub_and_an_empty_cache_end_with_a_remedy(fetch, tmp_path):
    refused(fetch(), f"nothing in {tmp_path}/home", "refused", "on a machine with a connection")


def test_a_branch_is_resolved_with_a_warning(fetch, hub):
    fetched = fetch(endpoint=hub, revision="main")
    assert fetched.done.returncode == 0, fetched.done.stderr
    assert f"WARNING fetch_dataset: resolved hub=owner/Chats revision=main commit={NEW}" in (
        fetched.done.stderr
    )
    assert fetched.content == chats("new", 6)
    manifest = files.read_json(fetched.manifest)
    assert (manifest["revision"], manifest["commit"]) == ("main", NEW)


def test_a_subset_and_a_split_of_parquet_files_are_fetched_alone(fetch, hub):
    fetched = fetch(endpoint=hub, hub="owner/tables", subset="en", split="test_sft")
    assert fetched.done.returncode == 0, fetched.done.stderr
    assert fetched.content == chats("test", 2)
    assert files.read_json(fetched.manifest)["subset"] == "en"


def test_messages_of_different_shapes_reach_the_reader_as_published(fetch, hub):
    fetched = fetch(endpoint=hub, hub="owner/mixed")
    assert fetched.done.returncode == 0, fetched.done.stderr
    (chunk,) = read_chunks(fetched.rows)
    texts = [record.content.get("messages") for record in parse_chunk(chunk)]
    assert [text and json.loads(text) for text in texts] == [row["messages"] for row in MIXED]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"hub": "owner/gated"}, ["gated", "datasets/owner/gated", "licence", "HF_TOKEN"]),
        ({"hub": "owner/nobody"}, ["not on the Hub, or is private", "spelling"]),
        ({"revision": "v9"}, ["no such revision", "datasets.<name>.revision", "found:    v9"]),
        ({"hub": "owner/tables", "subset": "de"}, ["no such subset", "de", "one of en, fr"]),
        ({"hub": "owner/tables"}, ["no such subset", "null, and there are several", "en, fr"]),
        (
            {"hub": "owner/tables", "subset": "en"},
            ["no such split", "found:    train\n", "one of train_sft, test_sft"],
        ),
        ({"hub": "owner/script"}, ["loading script", "script.py", "refs/convert/parquet"]),
        ({"hub": "owner/broken"}, ["cannot make a table", "datasets/owner/broken", "`files`"]),
        # Here `datasets` alone would take the latest dataset in its cache, of another revision.
        ({"revision": BARE}, ["cannot make a table", "data files", "set `files`"]),
    ],
)
def test_the_error_for_an_unusable_dataset_has_a_remedy(home, fetch, hub, settings, parts):
    refused(fetch(endpoint=hub, home=home, **settings), *parts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(st.lists(json_values, max_size=3), min_size=1, max_size=9))
def test_a_json_column_is_written_as_one_text_per_value(tmp_path_factory, values):
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    rows = datasets.Dataset.from_dict({"messages": values}, features=features)
    hub_dataset.write_rows(path, rows)
    texts = parquet.read_table(path)["messages"].to_pylist()
    assert [json.loads(text) for text in texts] == values


def test_bytes_do_not_depend_on_the_chunks_of_the_cache(tmp_path):
    # Long enough for several pages; a writer ends a page where its input ends.
    rows = chats("cut " * 300, hub_dataset.ROWS_PER_GROUP + 904)
    parts = [datasets.Dataset.from_list(rows[at : at + 700]) for at in range(0, len(rows), 700)]
    whole, pieces = tmp_path / "whole.parquet", tmp_path / "pieces.parquet"
    hub_dataset.write_rows(whole, datasets.Dataset.from_list(rows))
    hub_dataset.write_rows(pieces, datasets.concatenate_datasets(parts))
    assert whole.read_bytes() == pieces.read_bytes()
    assert parquet.read_table(whole).to_pylist() == rows
    assert parquet.ParquetFile(whole).num_row_groups == 2
