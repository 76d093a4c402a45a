"""Rank the runs of every sweep by validation scores, to find the best values of a recipe.

python -m workflow_scripts.report.report_sweep
    --sweeps '{"rates": {"recipe": "rates", "runs": {"rates.1e-4": {"learning_rate": 1e-4}, …}}}'
    --scores results/runs/rates.1e-4/evaluation/validation.json …
    --manifests results/runs/rates.1e-4/adapter/training_manifest.json …
    --tsv sweep.tsv --markdown sweep.md --html sweep.html --figure sweep.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.report import tables

OUTPUT_VERSION = 2
logger = log.stage_logger("report_sweep")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--sweeps", required=True, help="JSON: recipe, runs and values by sweep")
    parser.add_argument(
        "--scores", nargs="+", type=Path, default=[], help="validation.json of each run"
    )
    parser.add_argument(
        "--manifests", nargs="+", type=Path, default=[], help="training_manifest.json of each run"
    )
    tables.add_arguments(parser)
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import figures, sweep

    sweeps = json.loads(arguments.sweeps)
    runs = [run for one in sweeps.values() for run in one["runs"]]
    files = dict(zip(runs, zip(arguments.scores, arguments.manifests, strict=True), strict=True))
    ranked = [
        sweep.read_sweep(name, one["recipe"], one["runs"], files) for name, one in sweeps.items()
    ]
    if not ranked:
        raise log.StageError(
            "there is no sweep to report",
            where="--sweeps",
            to_fix="set `sweep: true` and a list of values in a recipe, and use it in a run",
        )
    sweep.table(ranked).write(tsv=arguments.tsv, markdown=arguments.markdown, html=arguments.html)
    figures.save(sweep.draw(ranked), arguments.figure)
    for one in ranked:
        logger.info(
            "ranked sweep=%s n_runs=%d best=%s n_ties=%d",
            *(one.name, len(one.runs), one.best.name, len(one.ties())),
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
