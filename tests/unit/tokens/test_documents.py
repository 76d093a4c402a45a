from __future__ import annotations

import logging

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.chats.rejections import check_rejected
from workflow_scripts.log import StageError
from workflow_scripts.tokens.documents import Documents, documents_schema

logger = logging.getLogger("test_documents")


@st.composite
def document_rows(draw):
    rows = []
    for number in range(draw(st.integers(0, 6))):
        input_ids = draw(st.lists(st.integers(0, 131_071), min_size=1, max_size=12))
        cuts = draw(st.lists(st.integers(0, len(input_ids)), unique=True, max_size=6).map(sorted))
        spans = cuts[: len(cuts) // 2 * 2]
        rows.append(
            {
                "id": f"document {number}",
                "input_ids": input_ids,
                "supervised_spans": spans,
                "n_tokens": len(input_ids),
                "n_supervised_tokens": sum(spans[1::2]) - sum(spans[::2]),
                "n_copies": draw(st.integers(1, 5)),
            }
        )
    return rows


@given(rows=document_rows(), cuts=st.lists(st.integers(0, 6), max_size=4).map(sorted))
def test_documents_read_back_as_written(rows, cuts, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "documents.arrow"
    schema = documents_schema()
    # Several batches, some of them empty, as in a larger file.
    parts = [rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    table = pa.concat_tables(pa.Table.from_pylist(part, schema=schema) for part in parts)
    files.write_arrow(path, table)
    documents = Documents(path)
    assert len(documents) == len(rows)
    assert documents.ids == [row["id"] for row in rows]
    assert documents.lengths.tolist() == [row["n_tokens"] for row in rows]
    assert documents.n_supervised.tolist() == [row["n_supervised_tokens"] for row in rows]
    assert documents.n_copies.tolist() == [row["n_copies"] for row in rows]
    for document, row in zip(documents, rows, strict=True):
        assert document.id == row["id"]
        assert document.input_ids.tolist() == row["input_ids"]
        starts, ends = row["supervised_spans"][::2], row["supervised_spans"][1::2]
        spans = list(zip(starts, ends, strict=True))
        assert document.is_supervised.tolist() == [
            any(start <= at < end for start, end in spans) for at in range(row["n_tokens"])
        ]
        assert document.is_supervised.sum() == row["n_supervised_tokens"]


def test_a_document_past_the_end_is_an_index_error(tmp_path):
    files.write_arrow(tmp_path / "d.arrow", pa.Table.from_pylist([], schema=documents_schema()))
    with pytest.raises(IndexError):
        Documents(tmp_path / "d.arrow")[0]


def test_opening_a_file_reads_no_token(tmp_path):
    """Tokens stay in the mapped file; only columns of numbers are copied."""
    rows = [
        {
            "id": str(at),
            "input_ids": [at] * 100_000,
            "supervised_spans": [0, 1],
            "n_tokens": 100_000,
        }
        | {"n_supervised_tokens": 1, "n_copies": 1}
        for at in range(40)
    ]
    table = pa.Table.from_pylist(rows, schema=documents_schema())
    files.write_arrow(tmp_path / "d.arrow", table)
    del table
    before = pa.total_allocated_bytes()
    documents = Documents(tmp_path / "d.arrow")
    assert documents[39].input_ids[-1] == 39
    assert pa.total_allocated_bytes() - before < 100_000


@given(n_read=st.integers(0, 60), n_bad=st.integers(0, 60), limit=st.floats(0, 1))
def test_rejections_stop_a_stage_only_above_the_limit(n_read, n_bad, limit):
    problems = [f"chats.jsonl:{number}: no turn" for number in range(1, min(n_bad, n_read) + 1)]
    try:
        check_rejected(problems, logger, n_read=n_read, limit=limit, key="cleaning.limit")
    except StageError as error:
        assert len(problems) > limit * n_read
        shown = [problem for problem in problems if f" {problem}\n" in str(error)]
        assert shown == problems[:10]
        assert f"{len(problems)} of {n_read} conversations" in str(error)
        assert "(cleaning.limit)" in str(error)
    else:
        assert len(problems) <= limit * n_read


def test_rejections_beyond_the_listed_ones_are_counted():
    with pytest.raises(StageError, match="30 of 100 conversations"):
        check_rejected(["a: b"], logger, n_rejected=30, n_read=100, limit=0.2, key="limit")


def test_every_rejection_is_logged(caplog):
    problems = [f"chats.jsonl:{number}: no turn" for number in range(30)]
    check_rejected(problems, logger, n_read=100, limit=0.5, key="limit")
    assert [record.getMessage() for record in caplog.records] == [
        f"rejected {problem}" for problem in problems
    ]
