"""What a merge is compared with: PEFT's, and copying the same files. Each syncs what it wrote.

python -m tests.benchmarks.merge_contestants --contestant peft --checkpoint base/
    --adapter adapter/ --merged merged/
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.models.checkpoint_files import weight_files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--contestant", choices=["peft", "copy"], required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--merged", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    arguments.merged.mkdir()
    if arguments.contestant == "peft":
        merge_by_peft(arguments.checkpoint, arguments.adapter, arguments.merged)
    else:
        copy(weight_files(arguments.checkpoint), arguments.merged)
    for path in arguments.merged.iterdir():
        sync(path)


def merge_by_peft(checkpoint: Path, adapter: Path, merged: Path) -> None:
    """As PEFT's documentation does it, in the base's own type, on the CPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map={"": "cpu"})
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    model.save_pretrained(merged, max_shard_size="2GB")


def copy(shards: Sequence[Path], merged: Path) -> None:
    """By coreutils; `--reflink=never`, as a reference to the same blocks writes nothing."""
    program = shutil.which("cp")
    assert program
    subprocess.run([program, "--reflink=never", *map(str, shards), str(merged)], check=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
