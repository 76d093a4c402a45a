"""Merge an adapter into the original 16-bit weights, tensor by tensor.

Arithmetic is float32; each weight is rounded once, to the 16-bit type of the base. Memory is one
tensor, whatever the model. The folder loads with plain `from_pretrained`.

python -m workflow_scripts.export.merge_adapter --checkpoint checkpoint/ --tokenizer tokenizer/
    --adapter adapter/ --merged merged/
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.models import checkpoint as checkpoints

OUTPUT_VERSION = 1
logger = log.stage_logger("merge_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument("--merged", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)

    from workflow_scripts.export.adapter import Adapter

    adapter = Adapter(arguments.adapter)
    with files.atomic_folder(arguments.merged) as folder:
        n_bytes = merge_weights(arguments.checkpoint, adapter, folder)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
            if (arguments.checkpoint / name).is_file():
                shutil.copyfile(arguments.checkpoint / name, folder / name)
        for path in arguments.tokenizer.iterdir():
            shutil.copyfile(path, folder / path.name)
    logger.info(
        "merged n_adapted=%d size_bytes=%d path=%s", len(adapter.targets), n_bytes, arguments.merged
    )


def merge_weights(checkpoint: Path, adapter, folder: Path) -> int:
    """Write each shard of the base with the adapter's deltas added.

    Returns:
        Bytes of tensor data written.
    Raises:
        StageError: the adapter names a weight that the base does not have.
    """
    import torch
    from safetensors import safe_open

    from workflow_scripts.export import safetensors_stream

    shards = checkpoints.weight_files(checkpoint)
    headers = {shard: safetensors_stream.read_header(shard) for shard in shards}
    missing = adapter.targets - {name for header in headers.values() for name in header}
    if missing:
        raise log.StageError(
            "the adapter does not fit the base model",
            where=checkpoint,
            found=f"no weight {', '.join(sorted(missing)[:10])}",
            expected="the model that the adapter was trained on",
        )
    n_bytes = 0
    for shard, header in headers.items():
        shapes = {}
        for name, entry in header.items():
            dtype = safetensors_stream.DTYPES[entry["dtype"]]
            # A float32 base is rounded too: what is merged is a 16-bit model.
            if dtype in (torch.float32, torch.float64):
                dtype = torch.bfloat16
            shapes[name] = (entry["shape"], dtype)
        with safe_open(shard, framework="pt") as base:

            def merged_tensor(name: str, base=base, shapes=shapes) -> torch.Tensor:
                tensor = base.get_tensor(name)
                if name in adapter.targets:
                    tensor = tensor.float().add_(adapter.delta(name))
                return tensor.to(shapes[name][1])

            n_bytes += safetensors_stream.write(folder / shard.name, shapes, merged_tensor)
        logger.info("wrote shard=%s n_tensors=%d", shard.name, len(header))
    return n_bytes


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
