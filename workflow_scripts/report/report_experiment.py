"""Write what one change does to a model, over several seeds: loss by position and recall of facts.

python -m workflow_scripts.report.report_experiment --runs '{"best-fit-0": {"packing": …}, …}'
    --positions results/runs/best-fit-0/evaluation/positions.json …
    --tsv experiment.tsv --markdown experiment.md --html experiment.html --figure experiment.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.context import RecallScores
from workflow_scripts.handover.scores import PositionScores
from workflow_scripts.report import tables
from workflow_scripts.report.arms import find_arms

OUTPUT_VERSION = 2
logger = log.stage_logger("report_experiment")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--runs", required=True, help="JSON: settings of each run")
    parser.add_argument(
        "--positions", nargs="+", type=Path, required=True, help="positions.json of each run"
    )
    parser.add_argument(
        "--recall", nargs="+", type=Path, default=[], help="recall.json of each run"
    )
    tables.add_arguments(parser)
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import experiment, figures

    runs = json.loads(arguments.runs)
    factors, arms = find_arms(runs)
    positions = {
        run: PositionScores.read(path) for run, path in zip(runs, arguments.positions, strict=True)
    }
    recall = {
        run: RecallScores.read(path)
        for run, path in zip(runs if arguments.recall else (), arguments.recall, strict=True)
    }
    experiment.check_same_questions(positions, recall)
    results = experiment.Results(factors, arms, positions, recall)
    experiment.table(results).write(
        tsv=arguments.tsv, markdown=arguments.markdown, html=arguments.html
    )
    figures.save(experiment.draw(results), arguments.figure)
    logger.info("wrote n_arms=%d n_seeds=%d path=%s", len(arms), results.n_seeds, arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
