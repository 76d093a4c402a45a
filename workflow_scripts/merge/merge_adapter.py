"""Merge an adapter or a full fine-tune into a 16-bit base: as published, or as 4-bit training saw
it.

Arithmetic is float32; each weight is rounded once, to the 16-bit type of the base. Only some rows
of one tensor are in memory at a time; no GPU is needed. The tensors of a full fine-tune replace the
base's. Where the facts stretch the base's positions, config.json says so too: the folder loads with
plain `from_pretrained`.

python -m workflow_scripts.merge.merge_adapter --checkpoint checkpoint/ --facts facts.json
    --tokenizer tokenizer/ --adapter adapter/ --merge-base original --merged merged/
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.merge import merge_base
from workflow_scripts.models.positions import stretched_config

OUTPUT_VERSION = 1
INDEX = "model.safetensors.index.json"
logger = log.stage_logger("merge_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument("--merge-base", default="original", help=merge_base.HELP)
    parser.add_argument("--merged", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)

    from workflow_scripts.merge import merged_folder, merged_weights
    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.base_weights import BaseWeights

    checkpoint, facts = arguments.checkpoint, Facts.read(arguments.facts)
    adapter = Adapter(arguments.adapter)
    base_name = merge_base.chosen(arguments.merge_base)
    base = BaseWeights(checkpoint, merge_base.nf4_dtype(base_name, arguments.adapter, checkpoint))
    merged_weights.check_fit(checkpoint, base, adapter)
    with files.atomic_folder(arguments.merged) as folder:
        n_bytes = merged_weights.write(base, adapter, folder)
        for name in ("config.json", "generation_config.json", INDEX):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
        correct_index(folder / INDEX, n_bytes)
        config = files.read_json(folder / "config.json")
        # MistralConfig would fill in a window of 4096 where the key is missing.
        merged = {"sliding_window": None} | stretched_config(config, facts)
        merged["vocab_size"] = adapter.vocabulary_size or config["vocab_size"]
        if merged != config:
            files.write_json(folder / "config.json", merged)
        merged_folder.complete(folder, arguments.tokenizer)
    logger.info(
        "merged base=%s n_adapted=%d size_bytes=%d path=%s",
        base_name,
        len(adapter.targets),
        n_bytes,
        arguments.merged,
    )


def correct_index(path: Path, n_bytes: int) -> None:
    """Correct the index's `total_size` where the merged model's size differs from the base's.

    Args:
        path: of the index; it need not exist.
    """
    if path.is_file():
        index = files.read_json(path)
        if index.get("metadata", {}).get("total_size", n_bytes) != n_bytes:
            index["metadata"]["total_size"] = n_bytes
            files.write_json(path, index)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
