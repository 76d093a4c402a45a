"""The packing plan on disk: rows of pieces, with their strategy and cost.

A row of the Parquet file is a row of training. The file does not say which rows share an optimizer
step: the sampler decides that, because it depends on the number of process ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from workflow_scripts import files
from workflow_scripts.packing.packing import Piece, Pieces, Rows


@dataclass(frozen=True)
class Plan:
    """Rows of training, in random order."""

    rows: Rows
    row_tokens: int
    """Length of a full row."""
    strategy: str
    """A name in `packing.STRATEGIES`."""
    n_supervised: np.ndarray
    """(rows,) int32, tokens the loss counts."""
    attention_pairs: np.ndarray
    """(rows,) int64, query-key pairs of each row, summed over the model's layers."""
    training_flops: np.ndarray
    """(rows,) float64, of `cost.CostModel`."""

    @property
    def crosses_documents(self) -> bool:
        """True if attention and positions continue across the documents of a row, as in generic
        training scripts."""
        return self.strategy == "concatenate"

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows.n_tokens.max(initial=1))

    @property
    def pads_rows(self) -> bool:
        """True if rows of a micro-batch are padded to the longest one."""
        return self.strategy == "none"


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as Parquet; row length and strategy are in the schema's metadata."""
    pieces = plan.rows.pieces
    columns = [
        pa.array(column, type=kind)
        for column, kind in (
            (pieces.document, pa.int64()),
            (pieces.start, pa.int32()),
            (pieces.length, pa.int32()),
            (pieces.n_context, pa.int32()),
        )
    ]
    table = pa.table(
        {
            "pieces": pa.LargeListArray.from_arrays(
                pa.array(plan.rows.first_piece, type=pa.int64()),
                pa.StructArray.from_arrays(columns, names=list(Piece._fields)),
            ),
            "n_tokens": pa.array(plan.rows.n_tokens, type=pa.int32()),
            "n_supervised_tokens": pa.array(plan.n_supervised, type=pa.int32()),
            "attention_pairs": pa.array(plan.attention_pairs, type=pa.int64()),
            "training_flops": pa.array(plan.training_flops, type=pa.float64()),
        }
    ).replace_schema_metadata({"row_tokens": str(plan.row_tokens), "strategy": plan.strategy})
    files.write_parquet(path, table)


def read_plan(path: Path) -> Plan:
    """Read a plan that `write_plan` wrote."""
    table = files.read_parquet(path)
    metadata = table.schema.metadata
    lists = table["pieces"].combine_chunks()
    structs = lists.flatten()
    columns = {name: structs.field(name).to_numpy() for name in Piece._fields}
    return Plan(
        rows=Rows(Pieces(**columns), np.asarray(lists.offsets, dtype=np.int64)),
        row_tokens=int(metadata[b"row_tokens"]),
        strategy=metadata[b"strategy"].decode(),
        n_supervised=table["n_supervised_tokens"].to_numpy(),
        attention_pairs=table["attention_pairs"].to_numpy(),
        training_flops=table["training_flops"].to_numpy(),
    )
