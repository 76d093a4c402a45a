"""The packing plan on disk: rows of pieces, what attention they were made for, what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.data.packing import Piece, Row, attention_pairs, attention_segments


@dataclass(frozen=True)
class Plan:
    """Rows of training, in their order."""

    rows: list[Row]
    row_tokens: int
    """Length of a full row."""
    crosses_documents: bool
    """Attention (and positions) run on over the documents of a row, as generic scripts have it."""


def write_plan(path: Path, plan: Plan, *, window: int | None, n_supervised: list[int]) -> None:
    """Write a plan as Parquet: a row a training row; strategy in the schema's metadata.

    Args:
        window: the model's, for the cost; None is full causal.
        n_supervised: supervised tokens of each row.
    """
    import pyarrow as pa

    piece = pa.struct([("document", pa.int64()), ("start", pa.int32()), ("length", pa.int32())])
    pairs = [
        sum(
            attention_pairs(length, window)
            for length in attention_segments(row, crosses_documents=plan.crosses_documents)
        )
        for row in plan.rows
    ]
    table = pa.table(
        {
            "pieces": pa.array(
                [[one._asdict() for one in row] for row in plan.rows], type=pa.list_(piece)
            ),
            "n_tokens": pa.array(
                [sum(one.length for one in row) for row in plan.rows], type=pa.int32()
            ),
            "n_supervised_tokens": pa.array(n_supervised, type=pa.int32()),
            "attention_pairs": pa.array(pairs, type=pa.int64()),
        }
    ).replace_schema_metadata(
        {
            "row_tokens": str(plan.row_tokens),
            "crosses_documents": str(plan.crosses_documents).lower(),
        }
    )
    files.write_parquet(path, table)


def read_plan(path: Path) -> Plan:
    """The plan that `write_plan` wrote."""
    table = files.read_parquet(path)
    metadata = table.schema.metadata
    rows = [
        [Piece(one["document"], one["start"], one["length"]) for one in pieces]
        for pieces in table["pieces"].to_pylist()
    ]
    return Plan(rows, int(metadata[b"row_tokens"]), metadata[b"crosses_documents"] == b"true")
