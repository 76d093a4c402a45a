"""One packer, once, in a process of its own: what it made, and how long the call took.

python -m tests.benchmarks.packing_contestants --contestant tramontane --lengths lengths.npy
    --row-tokens 4096 --made made.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.resident_memory import resident_bytes
from workflow_scripts import files, log

CONTESTANTS = ("tramontane", "segment_tree", "trl")
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--lengths", type=Path, required=True, help="npy of tokens a document")
    parser.add_argument("--tokens", type=Path, help="Arrow stream of the documents, for trl")
    parser.add_argument("--row-tokens", type=int, required=True)
    parser.add_argument("--made", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.contestant == "trl":
        made = pack_with_trl(arguments.tokens, arguments.row_tokens)
    else:
        made = plan(arguments.contestant, arguments.lengths, arguments.row_tokens)
    # From here: a sampler outside may have looked for the last time before the peak.
    files.write_json(arguments.made, {**made, "peak_memory_bytes": resident_bytes("VmHWM")})


def plan(contestant: str, lengths_file: Path, row_tokens: int) -> dict[str, Any]:
    """A plan of rows; longer documents are cut to a row beforehand, as TRL does."""
    import numpy as np

    from tests.benchmarks import segment_tree
    from workflow_scripts.packing import packing

    lengths = np.minimum(np.load(lengths_file), row_tokens)
    started = time.perf_counter()
    if contestant == "tramontane":
        pieces = packing.Pieces.whole(lengths)
        n_rows = len(packing.best_fit(pieces, row_tokens=row_tokens, seed=SEED))
    else:
        _, n_rows = segment_tree.best_fit_decreasing(lengths, row_tokens=row_tokens)
    call = time.perf_counter() - started
    return {
        "n_rows": n_rows,
        "n_tokens": int(lengths.sum(dtype=np.int64)),
        "call_duration_seconds": call,
    }


def pack_with_trl(tokens: Path, row_tokens: int) -> dict[str, Any]:
    """TRL's packed dataset, its default strategy; the time includes the copying of every token."""
    import pyarrow.compute as compute
    from datasets import Dataset
    from trl import pack_dataset

    documents = Dataset.from_file(str(tokens))
    started = time.perf_counter()
    packed = pack_dataset(documents, row_tokens, strategy="bfd")
    call = time.perf_counter() - started
    n_tokens = sum(
        int(compute.sum(compute.list_value_length(chunk)).as_py())
        for chunk in packed.data["input_ids"].chunks
    )
    return {"n_rows": len(packed), "n_tokens": n_tokens, "call_duration_seconds": call}


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
