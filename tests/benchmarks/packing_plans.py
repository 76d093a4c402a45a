"""Benchmark of packing: full rows, fast, and of even cost a step.

Ours, a best fit with a segment tree and TRL's `pack_dataset` on the same lengths, each in a process
of its own, in turn within every repetition. Then what balancing by cost is worth where 8 processes
share a step.

python -m tests.benchmarks.packing_plans --trl /path/to/a/folder/with/trl --repetitions 5

python -m tests.benchmarks.packing_plans --table tests/benchmarks/results/packing_plans.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import measured_command
from tests.benchmarks.document_lengths import chat_lengths, summary
from tests.benchmarks.machine import REPOSITORY, circumstances, version_in, versions
from tests.benchmarks.model_shapes import CONFIGS, shape_of
from tests.benchmarks.packing_plans_table import table
from workflow_scripts import files, log
from workflow_scripts.packing import balance, packing
from workflow_scripts.packing.cost import CostModel

logger = log.stage_logger("packing_plans")

RESULT = REPOSITORY / "tests/benchmarks/results/packing_plans.json"
PACKAGES = "numpy pyarrow datasets".split()
CASES = ((1_000_000, 4_096), (1_000_000, 32_768), (10_000_000, 4_096))  # documents, row_tokens
# Ten million documents are 33 GB of tokens, which TRL copies and a plan never touches.
MOST_DOCUMENTS_OF_TRL = 1_000_000
DOCUMENTS_A_BATCH = 10_000
BALANCED_ROW_TOKENS = 32_768
N_RANKS = 8
SUPERVISED_FRACTION = 0.5
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument(
        "--case",
        type=int,
        nargs=2,
        action="append",
        metavar=("DOCUMENTS", "ROW_TOKENS"),
        help=f"default: {' and '.join(f'{n} {tokens}' for n, tokens in CASES)}",
    )
    parser.add_argument("--balance-documents", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--trl", type=Path, help="folder to import it from; without, it is left out"
    )
    parser.add_argument(
        "--scratch", type=Path, help="room for 8 KB a document where TRL takes part"
    )
    parser.add_argument("--result", type=Path, default=RESULT, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return

    result: dict[str, Any] = {
        **circumstances(),
        "versions": versions(sys.executable, PACKAGES),
        "trl_version": version_in(arguments.trl, "trl") if arguments.trl else None,
        "cases": [],
    }
    for n_documents, row_tokens in arguments.case or CASES:
        with tempfile.TemporaryDirectory(prefix="packing.", dir=arguments.scratch) as scratch:
            result["cases"].append(
                measure_case(
                    Path(scratch), n_documents, row_tokens, arguments.repetitions, arguments.trl
                )
            )
        files.write_json(arguments.result, result)  # now, as the next may fail
    result["balance"] = measure_balance(arguments.balance_documents)
    files.write_json(arguments.result, result)
    logger.info("wrote %s", arguments.result)
    print(table(result))


def measure_case(
    scratch: Path, n_documents: int, row_tokens: int, n_repetitions: int, trl: Path | None
) -> dict[str, Any]:
    """Every contestant once a repetition over the same documents.

    Args:
        scratch: an empty folder.
        trl: folder of its package; None leaves it out.
    """
    lengths = chat_lengths(n_documents, seed=SEED)
    np.save(scratch / "lengths.npy", lengths)
    command = [sys.executable, "-m", "tests.benchmarks.packing_contestants"]
    command += ["--row-tokens", row_tokens, "--made", scratch / "made.json"]
    command += ["--lengths", scratch / "lengths.npy"]
    names = ["tramontane", "segment_tree"]
    if trl is not None and n_documents <= MOST_DOCUMENTS_OF_TRL:
        names.append("trl")
        write_tokens(scratch / "tokens" / "documents.arrow", lengths)
        command += ["--tokens", scratch / "tokens" / "documents.arrow"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, [REPOSITORY, trl]))),
        "HF_HOME": str(scratch / "hub_cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    contestants: dict[str, Any] = {name: [] for name in names}
    for _ in range(n_repetitions):
        for name in names:
            measurement = measured_command.measure(
                [*command, "--contestant", name],
                folder=REPOSITORY,
                environment=environment,
                log_file=scratch / f"{name}.log",
            )
            made = files.read_json(scratch / "made.json")
            run = {
                **made,
                "fill_fraction": made["n_tokens"] / (made["n_rows"] * row_tokens),
                "process": dataclasses.asdict(measurement),
            }
            contestants[name].append(run)
            logger.info(
                "packed contestant=%s n_documents=%d row_tokens=%d %s",
                name,
                n_documents,
                row_tokens,
                log.fields(run),
            )
            for cached in (scratch / "tokens").glob("cache-*"):
                cached.unlink()  # what datasets.map would take instead of packing again
    return {
        "row_tokens": row_tokens,
        "lengths": summary(lengths),
        "n_documents_cut_to_a_row": int((lengths > row_tokens).sum()),
        "contestants": contestants,
    }


def write_tokens(path: Path, lengths: np.ndarray) -> None:
    """Documents of these lengths as an Arrow stream with `input_ids`, which `datasets` maps."""
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    path.parent.mkdir(parents=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(lengths), DOCUMENTS_A_BATCH):
            ends = np.cumsum([0, *lengths[first : first + DOCUMENTS_A_BATCH]])
            tokens = pa.array(np.arange(ends[-1], dtype=np.int32))
            batch = pa.ListArray.from_arrays(pa.array(ends, type=pa.int32()), tokens)
            writer.write_batch(pa.record_batch([batch], schema=schema))


def measure_balance(n_documents: int) -> dict[str, Any]:
    """Rows of Mistral 7B over 8 ranks, in the sampler's order and in a random one."""
    lengths = chat_lengths(n_documents, seed=SEED)
    rows = packing.best_fit(
        packing.Pieces.whole(lengths), row_tokens=BALANCED_ROW_TOKENS, seed=SEED
    )
    n_documents_of_row = np.diff(rows.first_piece)
    windows = []
    for window in (CONFIGS["mistral-7b"]["sliding_window"], None):
        model = CostModel.of(shape_of({**CONFIGS["mistral-7b"], "sliding_window": window}))
        costs = model.training_flops(
            rows.n_tokens,
            SUPERVISED_FRACTION * rows.n_tokens,
            model.pairs(rows, crosses_documents=False),
        )
        orders = {
            "balanced": balance.order_rows(
                costs,
                n_ranks=N_RANKS,
                micro_batches_per_step=1,
                rows_per_micro_batch=1,
                seed=SEED,
            ),
            "random": random_order(len(rows)),
        }
        found: dict[str, Any] = {"sliding_window": window}
        for name, order in orders.items():
            whole = order[(order != balance.NO_ROW).all(axis=(1, 2, 3))]
            imbalance = balance.step_imbalance(costs, whole)
            step_documents = n_documents_of_row[whole].sum(axis=(1, 2, 3))
            step_tokens = rows.n_tokens[whole].sum(axis=(1, 2, 3))
            found[name] = {
                "n_steps": len(whole),
                "mean_step_imbalance": float(imbalance.mean()),
                "largest_step_imbalance": float(imbalance.max()),
                "spearman_document_length_with_step": spearman(step_tokens / step_documents),
            }
        windows.append(found)
    return {
        "shape": "mistral-7b",
        "row_tokens": BALANCED_ROW_TOKENS,
        "n_ranks": N_RANKS,
        "supervised_fraction": SUPERVISED_FRACTION,
        "n_rows": len(rows),
        "lengths": summary(lengths),
        "windows": windows,
    }


def random_order(n_rows: int) -> np.ndarray:
    """Every row once, shaped as by `order_rows`; what does not fill a step is left out."""
    order = np.random.default_rng(SEED).permutation(n_rows)
    return order[: n_rows // N_RANKS * N_RANKS].reshape(-1, 1, N_RANKS, 1)


def spearman(values: np.ndarray) -> float:
    """Rank correlation of values with their place in the sequence; equals share a mean rank."""
    _, kind, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[kind]
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
