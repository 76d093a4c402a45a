"""Collect every measured figure of a run, with its unit, error and source file.

python -m workflow_scripts.report.collect_metrics --chains results/runs/mistral/chain.json
    --metrics results/runs/mistral/metrics.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.chain import Chain
from workflow_scripts.handover.metrics import RunMetrics
from workflow_scripts.report import results
from workflow_scripts.report.metric_sources import measured_files, metrics_of

OUTPUT_VERSION = 5
logger = log.stage_logger("collect_metrics")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--metrics", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    (path,) = arguments.chains
    chain = Chain.read(path)
    asked = results.Asked(arguments.context, arguments.tasks, arguments.kinds)
    links = metrics_of(chain, asked)
    metrics = RunMetrics(
        run=chain.run,
        settings=chain.settings,
        links=links,
        files={file: files.sha256(Path(file)) for file in measured_files(chain, asked)},
    )
    metrics.write(arguments.metrics)
    n_metrics = sum(map(len, links.values()))
    logger.info("wrote n_metrics=%d path=%s", n_metrics, arguments.metrics)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
