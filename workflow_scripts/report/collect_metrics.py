"""Gather every figure measured of a run, with its unit, error and place.

python -m workflow_scripts.report.collect_metrics --run mistral
    --runs '{"runs": …, "gguf_types": …}' --results results
    --metrics results/runs/mistral/metrics.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.metrics import RunMetrics
from workflow_scripts.report.metrics import measured_files, metrics_of
from workflow_scripts.report.results import Wanted

OUTPUT_VERSION = 4
logger = log.stage_logger("collect_metrics")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--runs", required=True, help="JSON of the runs and GGUF types")
    parser.add_argument("--results", type=Path, required=True, help="folder of all results")
    parser.add_argument("--metrics", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    wanted = Wanted.read(arguments.runs)
    links = metrics_of(arguments.run, wanted, arguments.results)
    metrics = RunMetrics(
        run=arguments.run,
        settings=wanted.runs[arguments.run],
        links=links,
        files={
            file: files.sha256(arguments.results / file)
            for file in measured_files(arguments.run, wanted)
        },
    )
    metrics.write(arguments.metrics)
    n_metrics = sum(map(len, links.values()))
    logger.info("wrote n_metrics=%d path=%s", n_metrics, arguments.metrics)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
