"""Gather every figure measured of the runs: one JSON a run, one table for all of them.

python -m workflow_scripts.report.collect_metrics --runs '{"runs": …, "gguf_types": …}'
    --results results --metrics results/runs/*/metrics.json
    --table results/report/all_metrics.parquet
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.report.metrics import Metric, metrics_of
from workflow_scripts.report.results import Wanted

OUTPUT_VERSION = 3
logger = log.stage_logger("collect_metrics")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--runs", required=True, help="JSON of the runs and GGUF types")
    parser.add_argument("--results", type=Path, required=True, help="folder of all results")
    parser.add_argument(
        "--metrics", type=Path, nargs="+", required=True, help="to write: JSON, a run each"
    )
    parser.add_argument("--table", type=Path, required=True, help="to write: Parquet")
    arguments = parser.parse_args(argv)

    wanted = Wanted.read(arguments.runs)
    found = []
    for path, (run, settings) in zip(arguments.metrics, wanted.runs.items(), strict=True):
        metrics = metrics_of(run, wanted, arguments.results)
        files.write_json(path, {"run": run, "settings": settings, "links": by_link(metrics)})
        found += metrics
    write_table(found, arguments.table)
    logger.info("wrote n_metrics=%d path=%s", len(found), arguments.table)


def by_link(metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """Link → name → the rest; what is of the run as a whole under `run`."""
    links: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        rest = dataclasses.asdict(metric)
        for key in ("run", "link", "name"):
            del rest[key]
        links.setdefault(metric.link or "run", {})[metric.name] = rest
    return links


def write_table(metrics: Sequence[Metric], path: Path) -> None:
    """A row a metric; the columns of `Metric`."""
    import pyarrow as pa

    kinds = {"value": pa.float64(), "error": pa.float64(), "n": pa.int64()}
    names = [field.name for field in dataclasses.fields(Metric)]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    rows = [dataclasses.asdict(metric) for metric in metrics]
    files.write_parquet(path, pa.Table.from_pylist(rows, schema=schema))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
