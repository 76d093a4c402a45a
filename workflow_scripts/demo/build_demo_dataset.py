"""Make the demo dataset: chats about the source and the help texts of the Python standard library.

The texts come from the running interpreter; nothing is downloaded. The same interpreter and
settings give the same file, byte for byte.

python -m workflow_scripts.demo.build_demo_dataset --settings '{"n_conversations": 115}'
    --conversations stdlib-help.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.demo import stdlib_chats, stdlib_long_chats
from workflow_scripts.settings import DemoDatasetSettings, settings_from_json

OUTPUT_VERSION = 5
logger = log.stage_logger("build_demo_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.generate`")
    parser.add_argument(
        "--conversations", type=Path, required=True, help="file to write, JSON Lines"
    )
    arguments = parser.parse_args(argv)

    settings = settings_from_json(DemoDatasetSettings, arguments.settings)
    make = {"mixed": stdlib_chats.make_chats, "long": stdlib_long_chats.make_long_chats}
    chats = make[settings.length](n_conversations=settings.n_conversations, seed=settings.seed)
    files.write_jsonl(arguments.conversations, chats)
    logger.info("wrote n_conversations=%d path=%s", len(chats), arguments.conversations)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
