"""One table of every figure measured of the runs.

python -m workflow_scripts.report.tabulate_metrics --metrics results/runs/*/metrics.json
    --table results/report/all_metrics.parquet
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.report.metrics import Metric

OUTPUT_VERSION = 1
logger = log.stage_logger("tabulate_metrics")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--metrics", type=Path, nargs="+", required=True, help="of collect_metrics, a run each"
    )
    parser.add_argument("--table", type=Path, required=True, help="to write: Parquet")
    arguments = parser.parse_args(argv)

    rows = [row for path in arguments.metrics for row in rows_of(files.read_json(path))]
    write_table(rows, arguments.table)
    logger.info("wrote n_metrics=%d path=%s", len(rows), arguments.table)


def rows_of(metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The columns of `Metric`, of a run's `metrics.json`."""
    for link, by_name in metrics["links"].items():
        for name, rest in by_name.items():
            of_run = "" if link == "run" else link
            yield {"run": metrics["run"], "link": of_run, "name": name, **rest}


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A row a metric; the columns of `Metric`."""
    import pyarrow as pa

    kinds = {"value": pa.float64(), "error": pa.float64(), "n": pa.int64()}
    names = [field.name for field in dataclasses.fields(Metric)]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    files.write_parquet(path, pa.Table.from_pylist(rows, schema=schema))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
