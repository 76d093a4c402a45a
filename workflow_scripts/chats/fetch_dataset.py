"""Fetch one split of a Hugging Face Hub dataset at one commit, as Parquet.

`datasets` prepares it in its cache (HF_DATASETS_CACHE), in one folder per commit. Without a
connection, or with HF_HUB_OFFLINE=1, the copy that an earlier run left in the cache is used. Set
HF_TOKEN for gated datasets, HF_HOME and HF_ENDPOINT as usual.

python -m workflow_scripts.chats.fetch_dataset
    --settings '{"hub": "owner/name", "revision": "<commit>", "subset": null, "split": "train"}'
    --rows results/data/d/hub/s/rows.parquet --manifest results/data/d/hub/s/manifest.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.origin import HubRows
from workflow_scripts.log import StageError
from workflow_scripts.settings import SourceSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("fetch_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of the source: hub, revision, …")
    parser.add_argument(
        "--rows", type=Path, required=True, help="file to write: the split, Parquet"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="file to write: its origin")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(SourceSettings, arguments.settings)
    if settings.hub is None or settings.revision is None:
        raise StageError("no dataset to fetch", where="--settings, hub", found=settings.hub)

    import datasets

    from workflow_scripts.chats.hub_dataset import HubDataset, write_rows

    logger.info("started %s settings=%s", log.versions("datasets"), arguments.settings)
    fetched = HubDataset.locate(settings.hub, settings.revision)
    subset, rows = fetched.read(settings.subset, settings.split)
    write_rows(arguments.rows, rows)
    manifest = HubRows(
        hub=settings.hub,
        revision=settings.revision,
        commit=fetched.commit,
        subset=subset,
        split=settings.split,
        n_rows=len(rows),
        columns=tuple(rows.column_names),
        datasets_version=datasets.__version__,
        sha256=files.sha256(arguments.rows),
    )
    manifest.write(arguments.manifest)
    logger.info("wrote path=%s %s", arguments.rows, log.fields(manifest.content()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
