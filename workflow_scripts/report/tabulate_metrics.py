"""Write one table of every measured figure of the runs.

python -m workflow_scripts.report.tabulate_metrics --metrics results/runs/*/metrics.json
    --table results/report/all_metrics.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from workflow_scripts import files, log
from workflow_scripts.handover.metrics import Metric, RunMetrics

OUTPUT_VERSION = 1
logger = log.stage_logger("tabulate_metrics")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--metrics", type=Path, nargs="+", required=True, help="metrics.json of each run"
    )
    parser.add_argument("--table", type=Path, required=True, help="to write: Parquet")
    arguments = parser.parse_args(argv)

    table = table_of(map(RunMetrics.read, arguments.metrics))
    files.write_parquet(arguments.table, table)
    logger.info("wrote n_metrics=%d path=%s", table.num_rows, arguments.table)


def table_of(runs: Iterable[RunMetrics]) -> pa.Table:
    """One row per metric: run, link (empty for the run as a whole), name, fields of `Metric`."""
    kinds = {"value": pa.float64(), "error": pa.float64(), "n": pa.int64()}
    names = ["run", "link", "name", *Metric.model_fields]
    rows = [
        {"run": one.run, "link": "" if link == "run" else link, "name": name, **metric.content()}
        for one in runs
        for link, by_name in one.links.items()
        for name, metric in by_name.items()
    ]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    return pa.Table.from_pylist(rows, schema=schema)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
