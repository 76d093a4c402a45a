from __future__ import annotations

import hashlib
import json
import os
import stat

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.log import StageError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(texts, json_values, max_size=5)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@given(content=json_objects)
def test_json_reads_back_as_written_in_the_same_order(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    files.write_json(path, content)
    read = files.read_json(path)
    assert read == content
    assert list(read) == list(content)
    assert path.read_bytes().endswith(b"}\n")


@given(records=st.lists(json_objects, max_size=5))
def test_json_lines_has_one_record_per_line(records, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    files.write_jsonl(path, records)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == records


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_value_that_json_lacks_leaves_the_old_file_unchanged(tmp_path, value):
    path = tmp_path / "report.json"
    files.write_json(path, {"loss": 1.0})
    with pytest.raises((ValueError, TypeError)):
        files.write_json(path, {"loss": value})
    assert files.read_json(path) == {"loss": 1.0}
    assert names_in(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["a file is missing", "facts.json", "to fix:"]),
        (b'{"n": 1,\n}', ["a file is not JSON", "facts.json, line 2"]),
        (b"[1]", ["a file does not contain a JSON object", "facts.json", "list"]),
    ],
)
def test_a_json_file_that_cannot_be_used_is_a_stage_error(tmp_path, content, parts):
    path = tmp_path / "facts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError) as caught:
        files.read_json(path)
    for part in parts:
        assert part in str(caught.value)


def test_a_partly_written_file_does_not_exist(tmp_path):
    path = tmp_path / "deep" / "plan.parquet"
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half of")
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
        assert not path.exists()
        raise RuntimeError
    assert names_in(path.parent) == []


def test_an_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_an_old_folder_survives_a_failed_write(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError), files.atomic_folder(path) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert names_in(path) == ["old"]
    assert names_in(tmp_path) == ["checkpoint"]


def test_a_folder_replaces_the_previous_one_completely(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "stale").touch()
    with files.atomic_folder(path) as temporary:
        (temporary / "new").touch()
        assert names_in(path) == ["stale"]
    assert names_in(path) == ["new"]
    assert names_in(tmp_path) == ["checkpoint"]


def test_a_folder_is_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "outside").touch(mode=0o600)
    with files.atomic_folder(tmp_path / "checkpoint") as temporary:
        (temporary / "private").touch(mode=0o600)
        (temporary / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "ordinary").touch()
    (tmp_path / "ordinary_folder").mkdir()

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "checkpoint" / "private") == mode(tmp_path / "ordinary")
    assert mode(tmp_path / "checkpoint") == mode(tmp_path / "ordinary_folder")
    # The target of a link belongs to someone else.
    assert mode(tmp_path / "outside") == 0o600


@given(rows=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6))
def test_tables_read_back_as_written(rows, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    table = pa.table({"ids": pa.array(rows, type=pa.large_list(pa.int32()))})
    files.write_arrow(folder / "table.arrow", table)
    files.write_parquet(folder / "table.parquet", table)
    assert files.read_arrow(folder / "table.arrow") == table
    assert files.read_parquet(folder / "table.parquet")["ids"].to_pylist() == rows


@given(content=st.binary(max_size=200))
def test_sha256_is_that_of_the_bytes(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


@given(content=json_objects)
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(content):
    backwards = dict(reversed(content.items()))
    assert files.fingerprint(backwards) == files.fingerprint(content)
    assert len(files.fingerprint(content)) == 16


@given(one=json_objects, other=json_objects)
def test_fingerprints_differ_if_the_json_differs(one, other):
    is_same_text = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (files.fingerprint(one) == files.fingerprint(other)) == is_same_text


def test_copy_or_link_shares_the_bytes_on_one_file_system(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    target = tmp_path / "deep" / "target"
    files.copy_or_link(source, target)
    assert target.read_bytes() == b"weights"
    assert os.path.samefile(source, target)


def test_a_full_disk_is_reported_and_no_partial_file_stays(tmp_path):
    """/dev/full refuses every write like a full disk."""
    with pytest.raises(StageError, match="the disk is full") as caught:
        with files.atomic_file(tmp_path / "model.bin") as temporary:
            temporary.write_bytes(b"half")
            with open("/dev/full", "wb", buffering=0) as stream:
                stream.write(b"the other half")
    assert f"where:    {tmp_path / 'model.bin'}" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert names_in(tmp_path) == []

    with pytest.raises(StageError, match="the disk is full"):
        with files.atomic_folder(tmp_path / "merged") as folder:
            files.write_text(folder / "config.json", "{}")
            with open("/dev/full", "wb", buffering=0) as stream:
                stream.write(b"weights")
    assert names_in(tmp_path) == []


def test_other_write_errors_are_raised_unchanged(tmp_path):
    with pytest.raises(IsADirectoryError), files.atomic_folder(tmp_path / "merged") as folder:
        folder.write_text("a folder is no file")
    assert names_in(tmp_path) == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 587591\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>404</title></html>"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("weights.safetensors", POINTER, ["Git LFS pointer", "587591 bytes", "git lfs pull"]),
        ("chats.jsonl.gz", POINTER, ["Git LFS pointer", "where:"]),
        ("chats.jsonl", PAGE, ["a web page", "expected: a .jsonl file"]),
        ("wiki.raw", b"<HTML lang=en>", ["a web page", "download it again"]),
        ("config.json", b"", ["a file is empty"]),
    ],
)
def test_a_placeholder_for_a_file_is_named(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StageError) as caught:
        files.check_whole(path)
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.html", PAGE),
        ("chats.jsonl", b'{"text": "version https://git-lfs.github.com/spec/v1"}'),
        ("text.txt", b"The <html> element is the root of a page."),
        ("weights.bin", bytes(range(256))),
    ],
)
def test_files_that_only_resemble_placeholders_pass(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    files.check_whole(tmp_path / name)


def test_an_empty_file_may_be_valid_and_a_missing_one_is_left_to_its_reader(tmp_path):
    (tmp_path / "shard.jsonl").touch()
    files.check_whole(tmp_path / "shard.jsonl", may_be_empty=True)
    files.check_whole(tmp_path / "missing.json")
