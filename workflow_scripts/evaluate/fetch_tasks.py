"""Bring the data of tasks from the Hub into the cache of `datasets` (HF_HOME), before any job
requests a GPU. On a cluster this runs where `snakemake` was started: jobs may have no connection.

python -m workflow_scripts.evaluate.fetch_tasks --settings '{"names": ["mmlu"]}' --fetched f.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import harness_package
from workflow_scripts.handover.tasks import FetchedTasks
from workflow_scripts.settings import TaskSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("fetch_tasks")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.tasks`")
    parser.add_argument("--fetched", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(TaskSettings, arguments.settings)
    harness_package.check_installed()

    from workflow_scripts.evaluate import harness

    manager = harness.manager_of(settings)
    tasks = tuple(task for name in settings.names for task in harness.fetch(name, manager))
    FetchedTasks(tasks=tasks).write(arguments.fetched)
    logger.info("fetched n_tasks=%d path=%s", len(tasks), arguments.fetched)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
