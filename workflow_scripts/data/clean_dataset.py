"""Read chats, keep the usable ones, reject the rest with a reason, and split by a stable hash.

Writes one table a split, `rejected.parquet` (file, line, reason, raw text) and a report with
counts.

python -m workflow_scripts.data.clean_dataset --files data/chats.jsonl --settings '{}' --clean
clean/
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.data import conversations
from workflow_scripts.data.documents import SPLITS, check_rejected
from workflow_scripts.settings import CleaningSettings, settings_from_json

if TYPE_CHECKING:
    import pyarrow as pa

OUTPUT_VERSION = 1
logger = log.stage_logger("clean_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="JSON Lines to read")
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.cleaning`")
    parser.add_argument("--clean", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(CleaningSettings, arguments.settings)

    import pyarrow as pa

    kept: dict[str, list[dict]] = {split: [] for split in SPLITS}
    rejected: list[dict] = []
    seen: set[str] = set()
    for path in arguments.files:
        for record in conversations.read_records(path):
            try:
                messages, group = conversations.parse_messages(record)
                conversation_id = conversations.conversation_id(messages)
                if conversation_id in seen:
                    raise conversations.Rejected("duplicate")
                key = split_key(messages, group, settings.split_by)
            except conversations.Rejected as reason:
                rejected.append(
                    {
                        "source_file": record.source_file,
                        "source_line": record.source_line,
                        "reason": str(reason),
                        "raw": record.raw,
                    }
                )
                continue
            seen.add(conversation_id)
            split = conversations.choose_split(
                key,
                validation_fraction=settings.validation_fraction,
                test_fraction=settings.test_fraction,
            )
            kept[split].append(
                {
                    "id": conversation_id,
                    "messages": messages,
                    "source_file": record.source_file,
                    "source_line": record.source_line,
                }
            )

    reasons = Counter(row["reason"] for row in rejected)
    n_kept = {f"n_{split}": len(rows) for split, rows in kept.items()}
    report = {
        "n_read": sum(n_kept.values()) + len(rejected),
        **n_kept,
        "n_rejected": len(rejected),
        "rejected_by_reason": dict(reasons.most_common()),
    }
    for split, rows in kept.items():
        table = pa.Table.from_pylist(rows, schema=clean_schema())
        files.write_parquet(arguments.clean / f"{split}.parquet", table)
    files.write_parquet(
        arguments.clean / "rejected.parquet",
        pa.Table.from_pylist(rejected, schema=rejected_schema()),
    )
    # Duplicates are not damage: a dataset of many copies is clean once they are gone.
    damaged = [row for row in rejected if row["reason"] != "duplicate"]
    check_rejected(
        [f"{row['source_file']}:{row['source_line']}: {row['reason']}" for row in damaged],
        logger,
        n_read=report["n_read"],
        limit=settings.max_rejected_fraction,
        key="datasets.<name>.cleaning.max_rejected_fraction",
    )
    if not kept["train"]:
        raise log.StageError(
            "no conversation is left for training",
            where=", ".join(map(str, arguments.files)),
            found=log.fields(report),
            to_fix="see the reasons in rejected.parquet",
        )
    files.write_json(arguments.clean / "cleaning_report.json", report)
    logger.info("cleaned %s", log.fields(report))


def split_key(messages: list[dict[str, str]], group: str | None, split_by: str) -> str:
    """What is hashed to choose a conversation's split.

    Raises:
        Rejected: the split is by group and the record has none.
    """
    if split_by == "group":
        if group is None:
            raise conversations.Rejected("no `group` to split by")
        return group
    return next(message["content"] for message in messages if message["role"] == "user")


def clean_schema() -> pa.Schema:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.list_(message)),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
        ]
    )


def rejected_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("reason", pa.string()),
            ("raw", pa.string()),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
