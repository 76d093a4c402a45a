"""Read chats, keep the usable ones, reject the rest with a reason, and split them by a stable hash.

Writes one table per split, `rejected.parquet` (source, file, line, reason, detail, the record as
read) and a report with counts. Duplicates, and training conversations that overlap with held-out
text, are rejected too. The dataset is read in chunks and never held in memory; scratch files keep
the texts until the whole dataset has been read. The output is the same, byte for byte, for any
number of processes.

python -m workflow_scripts.chats.clean_dataset --source chats data/chats.jsonl --settings '{}'
    --clean clean/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.settings import CleanDatasetSettings, settings_from_json

OUTPUT_VERSION = 3
logger = log.stage_logger("clean_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--source",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FILE"),
        help="name of a source and its files; once for each source",
    )
    parser.add_argument(
        "--fetched",
        nargs=2,
        action="append",
        default=[],
        metavar=("URL", "FILE"),
        help="local copy of a source file that is a URL; once for each",
    )
    parser.add_argument(
        "--evaluation-files", nargs="*", default=[], help="text that training must not contain"
    )
    parser.add_argument("--settings", required=True, help="JSON: `cleaning`, and `sources` by name")
    parser.add_argument("--processes", type=int, default=1, help="number of processes")
    parser.add_argument("--clean", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(CleanDatasetSettings, arguments.settings)

    from workflow_scripts.chats import dataset

    logger.info("started %s settings=%s", log.versions("ftfy", "rensa"), arguments.settings)
    fetched = dict(arguments.fetched)
    report = dataset.clean(
        [
            dataset.SourceFile(source, name, fetched.get(name, name))
            for source, *names in arguments.source
            for name in names
        ],
        settings,
        evaluation_files=arguments.evaluation_files,
        n_processes=arguments.processes,
        folder=arguments.clean,
    )
    logger.info("cleaned %s", log.fields(report.content()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
