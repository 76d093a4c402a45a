from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import assume, example, given, settings, strategies as st
from pyarrow import parquet

from workflow_scripts import files
from workflow_scripts.chats import chunks as chunks_of_files
from workflow_scripts.chats.chunks import read_chunks
from workflow_scripts.chats.conversations import parse
from workflow_scripts.chats.records import Record, parse_chunk
from workflow_scripts.log import StageError
from workflow_scripts.settings import ReadingSettings

MARK = "\ufeff".encode()


def read(path: Path, **options: int) -> list[Record]:
    chunks = read_chunks(path, **options)
    # Chunks are sent to other processes.
    sent = (pickle.loads(pickle.dumps(chunk)) for chunk in chunks)
    return [record for chunk in sent for record in parse_chunk(chunk)]


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content).to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def as_csv(rows: list[dict], **dialect: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        for row in rows
    )
    return text.getvalue().encode()


def as_parquet(rows: list[dict], **options: object) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def lines(rows: list, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


WRITE = {
    ".jsonl": lines,
    ".ndjson": lambda rows: lines(rows, "\r\n"),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".pretty.json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".lines.json": lines,
    ".concatenated.json": lambda rows: "\n".join(json.dumps(r, indent=1) for r in rows).encode(),
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, delimiter="\t"),
    ".parquet": as_parquet,
}

TEXTS = ['He said "[{]} é, 🎉"\n\nthen\tleft \\ ', "Ünter"]
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": f"{number}: {text}"}]
    for number, text in enumerate(TEXTS * 3)
]
SHAPES = {
    "messages": [{"messages": chat} for chat in CHATS],
    "sharegpt": [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]}
        for chat in CHATS
    ],
    "prompt_completion": [
        {"prompt": question["content"], "completion": answer["content"]}
        for question, answer in CHATS
    ],
    "alpaca": [
        {"instruction": question["content"], "input": "", "output": answer["content"]}
        for question, answer in CHATS
    ],
}


# Parquet is compressed inside.
FILES = [
    (suffix, compression)
    for suffix in WRITE
    for compression in COMPRESS
    if suffix != ".parquet" or not compression
]


@pytest.mark.parametrize(("suffix", "compression"), FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_chats_in_any_shape_and_file_give_the_same_messages(
    tmp_path, shape, suffix, compression
):
    path = tmp_path / f"chats{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](WRITE[suffix](SHAPES[shape])))
    records = read(path, records_per_chunk=4)
    found = [parse(record.content, ReadingSettings(), str).messages for record in records]
    assert found == CHATS
    assert all(json.loads(record.raw) == record.content for record in records)
    assert {record.source_file for record in records} == {str(path)}


NUMBERS = {
    ".jsonl": (b'{}\n\n \r\n{"a": 1}\r\n[2]', [1, 4, 5]),
    ".json": (b' [\n{},\n\n{"a": 1},\n[2]\n]\n', [1, 2, 3]),
    ".lines.json": (b'\n{}\n\n{"a": 1}\n[2]', [2, 4, 5]),
    ".concatenated.json": (b'\n{\n}\n{"a":\n1}\n\n[2]', [2, 4, 7]),
    ".csv": (b'a,b\n1,"x\ny"\n\n2,z\r\n3,"\r\n"\r\n4,', [2, 5, 6, 8]),
    ".parquet": (as_parquet([{"a": n} for n in range(5)]), [1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("suffix", NUMBERS)
def test_a_record_has_the_number_of_its_line_or_row(tmp_path, suffix):
    content, numbers = NUMBERS[suffix]
    path = tmp_path / f"numbers{suffix}"
    path.write_bytes(content)
    assert [record.source_line for record in read(path)] == numbers
    assert [record.source_line for record in read(path, records_per_chunk=2)] == numbers


BAD = [
    ("a.jsonl", b'{"a": 1', "not JSON", "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    ("a.jsonl", b"hello", "not JSON", "Expecting value: line 1 column 1 (char 0)"),
    ("a.jsonl", b"{} {}", "not JSON", "Extra data: line 1 column 4 (char 3)"),
    ("a.jsonl", b"[" * 99999, "not JSON", "nested too deeply"),
    ("a.jsonl", b'{"a": "caf\xe9"}', "not UTF-8", "invalid continuation byte at byte 11"),
    ("a.jsonl", b"\xff\xfe{\x00}\x00", "not UTF-8", "invalid start byte at byte 1"),
    ("a.json", b'[{"a": tru}, {}]', "not JSON", "Expecting value: line 1 column 7 (char 6)"),
    ("a.json", b'{\n"a": 1', "not JSON", "Expecting ',' delimiter: line 2 column 7 (char 8)"),
    ("a.json", b'["caf\xe9"]', "not UTF-8", "invalid continuation byte at byte 5"),
    ("a.csv", b"a,b\n1,2,3", "a row does not fit the header", "3 cells, 2 columns"),
    ("a.csv", b"a,b\n1", "a row does not fit the header", "1 cells, 2 columns"),
    ("a.csv", b"a\ncaf\xe9", "not UTF-8", ""),
]


@pytest.mark.parametrize(("name", "content", "reason", "detail"), BAD)
def test_a_broken_record_has_a_reason_and_its_text(tmp_path, name, content, reason, detail):
    path = tmp_path / name
    path.write_bytes(content)
    record = read(path)[0]
    assert record.content is None
    assert (record.rejection.reason, record.rejection.detail) == (reason, detail)
    assert record.raw
    record.raw.encode()
    assert ("caf\ufffd" in record.raw) == (b"caf\xe9" in content)


def test_values_that_only_python_accepts_as_json_are_kept(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'{"a": NaN}\n{"a": "\\ud83d"}\n{"a": 123456789012345678901234567890}\n')
    not_a_number, half, large = (record.content["a"] for record in read(path))
    assert not_a_number != not_a_number
    assert (half, large) == ("\ud83d", 123456789012345678901234567890)


def test_a_broken_element_does_not_affect_the_others(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b'[{"a": 1}, {"b": nope}, 3, "x]", [4}, {"c": "\\"}"}]')
    records = read(path)
    assert [record.content for record in records] == [{"a": 1}, None, 3, "x]", None, {"c": '"}'}]
    assert records[1].raw == '{"b": nope}'


def test_a_parquet_row_that_is_not_utf8_does_not_affect_the_others(tmp_path):
    broken = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "rows.parquet")
    first, second, third = read(tmp_path / "rows.parquet")
    assert [first.content, third.content] == [{"text": "a"}, {"text": "c"}]
    assert second.rejection.reason == "not UTF-8"
    assert "caf\ufffd" in second.raw


def test_null_fields_of_a_parquet_row_are_absent(tmp_path):
    rows = [
        {"messages": [{"role": "user", "weight": 1}, {"role": "user"}], "text": None},
        {"messages": None, "text": "a"},
    ]
    (tmp_path / "rows.parquet").write_bytes(as_parquet(rows))
    found = [record.content for record in read(tmp_path / "rows.parquet")]
    assert found == [{"messages": rows[0]["messages"]}, {"text": "a"}]


def test_a_value_outside_json_is_kept_and_becomes_text_in_the_raw_row(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(as_parquet([{"a": b"\x00", "at": 2**60}]))
    (record,) = read(tmp_path / "rows.parquet")
    assert record.content == {"a": b"\x00", "at": 2**60}
    assert json.loads(record.raw) == {"a": "b'\\x00'", "at": 2**60}


@pytest.mark.parametrize("suffix", [*WRITE, ".jsonl.gz", ".json.zst"])
def test_an_empty_file_has_no_records(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(as_parquet([]) if suffix == ".parquet" else b"")
    assert read(path) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_a_byte_order_mark_is_not_part_of_the_first_record(tmp_path, suffix):
    base, _, compression = suffix.partition(".gz")
    content = MARK + WRITE[base](SHAPES["prompt_completion"])
    path = tmp_path / f"marked{suffix}"
    path.write_bytes(gzip.compress(content) if ".gz" in suffix else content)
    assert [record.content for record in read(path)] == SHAPES["prompt_completion"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_several_compressed_parts_is_read_to_its_end(tmp_path, suffix):
    path = tmp_path / f"parts.jsonl{suffix}"
    parts = [
        lines([{"n": n} for n in range(start, start + 1000)]) for start in range(0, 9000, 1000)
    ]
    path.write_bytes(b"".join(map(COMPRESS[suffix], parts)))
    assert [record.content["n"] for record in read(path)] == list(range(9000))


PSEUDORANDOM = [{"n": n, "text": str((n * 7919**9) % 10**40)} for n in range(60_000)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".csv.gz", ".json.zst", ".parquet"])
def test_a_truncated_file_stops_with_the_number_of_records_read(tmp_path, suffix):
    base, _, compression = suffix[1:].partition(".")
    content = WRITE[f".{base}"](PSEUDORANDOM)
    whole = COMPRESS[f".{compression}" if compression else ""](content)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[:-100])
    with pytest.raises(StageError) as caught:
        read(path)
    message = str(caught.value)
    assert "cannot be read to its end" in message and f"{path}, after record " in message
    n_read = int(message.partition("after record ")[2].split()[0])
    assert n_read <= len(PSEUDORANDOM) and (n_read > 1000) == (base != "parquet")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("cut.json", b'[{"a": 1}, {"a": 2}', "the JSON array has no end"),
        ("no.jsonl.gz", b"plain text", "after record 0"),
        ("no.jsonl.zst", b"plain text", "after record 0"),
        ("no.parquet", b"plain text", "after record 0"),
        ("twice.csv", b"a,a\n1,2", "two columns of one name"),
    ],
)
def test_the_error_for_a_damaged_file_names_it(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError) as caught:
        read(tmp_path / name)
    assert part in str(caught.value) and name in str(caught.value)


def test_a_missing_file_is_a_stage_error(tmp_path):
    with pytest.raises(StageError) as caught:
        read(tmp_path / "nowhere.jsonl")
    for part in ("nowhere.jsonl", "No such file", "to fix:"):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_record_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(chunks_of_files, "RECORD_BYTES", 1000)
    monkeypatch.setattr(chunks_of_files, "BLOCK_BYTES", 100)
    path = tmp_path / f"long{suffix}"
    path.write_bytes(b'a\n"' * (suffix == ".csv") + b'["' * (suffix == ".json") + b"x" * 5000)
    with pytest.raises(StageError) as caught:
        read(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_chunks_are_bounded_in_records_and_in_bytes(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(chunks_of_files, "CHUNK_BYTES", 5000)
    path = tmp_path / f"many{suffix}"
    rows = [{"text": "x" * (1000 if n < 20 else 1)} for n in range(100)]
    path.write_bytes(WRITE[suffix](rows))
    chunks = list(read_chunks(path, records_per_chunk=30))
    assert max(len(chunk.numbers) for chunk in chunks) <= 30
    # The first records are long, and a few fill a chunk. For Parquet the mean size of a row counts.
    assert len(chunks[0].numbers) <= (30 if suffix == ".parquet" else 5)
    assert sum(len(chunk.numbers) for chunk in chunks) == 100
    again = list(read_chunks(path, records_per_chunk=30))
    assert again == chunks


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@example(values=[","], indent=None, is_ascii=True, block=1)
@given(
    values=st.lists(json_values, max_size=6),
    indent=st.none() | st.integers(0, 2),
    is_ascii=st.booleans(),
    block=st.integers(1, 40),
)
@settings(max_examples=200)
def test_an_array_is_cut_into_its_elements_wherever_the_blocks_end(values, indent, is_ascii, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_of_files, "BLOCK_BYTES", block)
        text = json.dumps(values, indent=indent, ensure_ascii=is_ascii).encode()
        found = list(chunks_of_files._values("a.json", io.BytesIO(text)))
    assert [number for number, _ in found] == list(range(1, len(values) + 1))
    assert [json.loads(text) for _, text in found] == values


objects = st.dictionaries(st.text(max_size=4), json_values, max_size=3)


@given(values=st.lists(objects, max_size=6), indent=st.integers(0, 2), block=st.integers(1, 40))
def test_consecutive_objects_are_separated(values, indent, block):
    texts = [json.dumps(value, indent=indent) for value in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_of_files, "BLOCK_BYTES", block)
        found = list(chunks_of_files._values("a.json", io.BytesIO("\n".join(texts).encode())))
    assert [json.loads(text) for _, text in found] == values
    n_lines = [0, *itertools.accumulate(text.count("\n") + 1 for text in texts)]
    assert [number for number, _ in found] == [1 + before for before in n_lines[: len(values)]]


@example(written=[b" <HTML>"])
@given(written=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)))
def test_every_line_that_is_not_blank_is_read_with_its_number(written, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    text = b"\n".join(written)
    # A web page is refused. Hypothesis finds in the code how one begins.
    assume(not text.removeprefix(MARK).lstrip().lower().startswith(files.HTML_STARTS))
    path.write_bytes(text)
    marked = written[:1] and written[0].startswith(MARK)
    expected = [written[0][3:], *written[1:]] if marked else written
    records = read(path, records_per_chunk=3)
    assert [record.source_line for record in records] == [
        number for number, line in enumerate(expected, start=1) if line.strip(b" \t\r\n")
    ]
    for record in records:
        line = expected[record.source_line - 1].strip(b" \t\r\n")
        assert record.raw == line.decode(errors="replace")
        assert (record.content is None) <= (record.rejection is not None or line == b"null")


cells = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2)


@given(rows=st.lists(cells, max_size=5))
def test_any_csv_cells_are_read_back(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    written = [{"a": one, "b": other} for one, other in rows]
    path.write_bytes(as_csv([*written, {"a": "end", "b": ""}]))
    assert [record.content for record in read(path)] == [*written, {"a": "end", "b": ""}]


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.zst"]
)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>rate limit</html>", "a web page"),
    ],
)
def test_a_stand_in_for_a_file_is_reported_before_it_is_read(tmp_path, suffix, content, part):
    path = tmp_path / f"chats{suffix}"
    path.write_bytes(content)
    with pytest.raises(StageError, match=part) as caught:
        list(read_chunks(path))
    assert str(path) in str(caught.value)
