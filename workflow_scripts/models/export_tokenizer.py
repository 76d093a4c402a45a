"""Export a base model's tokenizer for all later stages and for the release.

It writes the original file, a `tokenizer.json` made from it, and the official chat template. The
data stages depend on this folder and not on the weights, so changed weights do not render again.

python -m workflow_scripts.models.export_tokenizer --checkpoint results/models/m/checkpoint
    --tokenizer results/models/m/tokenizer
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from workflow_scripts import files, log
from workflow_scripts.settings import TokenizerVersion

OUTPUT_VERSION = 2
logger = log.stage_logger("export_tokenizer")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--version",
        default="",
        choices=["", *get_args(TokenizerVersion)],
        help="version of tokenizer and chat format; empty reads it from the files",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)

    from workflow_scripts.models import exported_tokenizer

    with files.atomic_folder(arguments.tokenizer) as folder:
        version = exported_tokenizer.export(arguments.checkpoint, folder, arguments.version or None)
        names = sorted(path.name for path in folder.iterdir())
    logger.info("wrote version=%s files=%s", version, ",".join(names))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
