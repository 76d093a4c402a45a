"""Merge what was trained into a base of 16 bits: as published, or as training in 4 bits had it.

Arithmetic is float32; each weight is rounded once, to the 16-bit type of the base. Memory is some
rows of one tensor, whatever the model; no GPU is needed. A full fine-tune's tensors take the place
of the base's. Where the facts stretch the base's positions, config.json says so too: the folder
loads with plain `from_pretrained`.

python -m workflow_scripts.merge.merge_adapter --checkpoint checkpoint/ --facts facts.json
    --tokenizer tokenizer/ --adapter adapter/ --merge-base original --merged merged/
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log, parallel
from workflow_scripts.handover.facts import Facts
from workflow_scripts.merge import merge_base
from workflow_scripts.models.positions import stretched_config

if TYPE_CHECKING:
    import torch

    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.safetensors_stream import Shapes

OUTPUT_VERSION = 1
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

    import torch

    from workflow_scripts.merge import merged_weights
    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.base_weights import BaseWeights

    adapter = Adapter(arguments.adapter)
    base_name = merge_base.chosen(arguments.merge_base)
    base = BaseWeights(
        arguments.checkpoint,
        merge_base.nf4_dtype(base_name, arguments.adapter, arguments.checkpoint),
    )
    merged_weights.check_fit(arguments.checkpoint, base, adapter)
    # A slab is one thread's: those of one product wait for each other (measured: 5 times the time
    # of one, on two busy cores).
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with files.atomic_folder(arguments.merged) as folder:
        n_bytes = merge_weights(base, adapter, folder, n_threads)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
            if (arguments.checkpoint / name).is_file():
                shutil.copyfile(arguments.checkpoint / name, folder / name)
        correct_index(folder / "model.safetensors.index.json", n_bytes)
        config = files.read_json(folder / "config.json")
        facts = Facts.read(arguments.facts)
        # Without the key MistralConfig would fill in a window of 4096.
        merged = {"sliding_window": None} | stretched_config(config, facts)
        merged["vocab_size"] = adapter.vocabulary_size or config["vocab_size"]
        if merged != config:
            files.write_json(folder / "config.json", merged)
        if not (folder / "generation_config.json").is_file():
            tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
            files.write_json(folder / "generation_config.json", tokens)
        for path in arguments.tokenizer.iterdir():
            shutil.copyfile(path, folder / path.name)
    logger.info(
        "merged base=%s n_adapted=%d size_bytes=%d path=%s",
        base_name,
        len(adapter.targets),
        n_bytes,
        arguments.merged,
    )


def correct_index(path: Path, n_bytes: int) -> None:
    """The index's `total_size`, where the merged model is of another size than the base."""
    if path.is_file():
        index = files.read_json(path)
        if index.get("metadata", {}).get("total_size", n_bytes) != n_bytes:
            index["metadata"]["total_size"] = n_bytes
            files.write_json(path, index)


def merge_weights(base: BaseWeights, adapter: Adapter, folder: Path, n_threads: int = 1) -> int:
    """Write each shard of the base with the adapter's changes made.

    Returns:
        Bytes of tensor data written.
    """
    from workflow_scripts.merge import merged_weights, safetensors_stream
    from workflow_scripts.merge.tensor_names import Slab, slabs

    names = [name for header in base.headers.values() for name in header]
    shown = log.progress(names, logger, total=len(names), unit="tensors")
    n_bytes = 0
    with ThreadPoolExecutor(n_threads) as pool:
        for shard, header in base.headers.items():
            shapes: Shapes = {
                name: (
                    list(merged_weights.merged_shape(base, adapter, name)),
                    merged_weights.merged_dtype(entry["dtype"]),
                )
                for name, entry in header.items()
            }

            def made(name: str, shapes: Shapes = shapes) -> Iterator[torch.Tensor]:
                next(shown)
                shape, dtype = shapes[name]

                def merged(slab: Slab) -> torch.Tensor:
                    return merged_weights.merged_slab(base, adapter, name, slab, dtype)

                return parallel.ahead(pool, merged, slabs(name, shape), n_ahead=2 * n_threads)

            n_bytes += safetensors_stream.write(folder / shard.name, shapes, made)
            logger.info("wrote shard=%s n_tensors=%d", shard.name, len(header))
    next(shown, None)  # ends the bar
    return n_bytes


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
