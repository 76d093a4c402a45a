"""Merge what was trained into the original 16-bit weights, tensor by tensor.

Arithmetic is float32; each weight is rounded once, to the 16-bit type of the base. Memory is one
tensor, whatever the model. A full fine-tune's tensors take the place of the base's. Where the facts
stretch the base's positions, config.json says so too: the folder loads with plain
`from_pretrained`.

python -m workflow_scripts.export.merge_adapter --checkpoint checkpoint/ --facts facts.json
    --tokenizer tokenizer/ --adapter adapter/ --merged merged/
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files, log
from workflow_scripts.models import checkpoint as checkpoints

if TYPE_CHECKING:
    from workflow_scripts.export.adapter import Adapter

OUTPUT_VERSION = 1
logger = log.stage_logger("merge_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, help="model facts: positions, where stretched")
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
        if arguments.facts:
            config = files.read_json(folder / "config.json")
            stretched = stretched_config(config, files.read_json(arguments.facts))
            if stretched != config:
                files.write_json(folder / "config.json", stretched)
        for path in arguments.tokenizer.iterdir():
            shutil.copyfile(path, folder / path.name)
    logger.info(
        "merged n_adapted=%d size_bytes=%d path=%s", len(adapter.targets), n_bytes, arguments.merged
    )


def stretched_config(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json with the positions it was trained with.

    Args:
        config: of the base.
        facts: of `read_facts`.
    """
    if not facts.get("rope_scaling"):
        return config
    # transformers 5 keeps all of it in rope_parameters; an older key beside it would win.
    kept = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling")}
    is_dynamic = facts["rope_parameters"]["rope_type"] == "dynamic"
    return kept | {
        "rope_parameters": facts["rope_parameters"],
        # Dynamic NTK is reckoned from the context of the base, which it has nowhere else.
        "max_position_embeddings": (
            config["max_position_embeddings"] if is_dynamic else facts["context_tokens"]
        ),
        # A null, as Mixtral has it, stops transformers' YaRN and dynamic NTK.
        "head_dim": facts["head_dim"],
    }


def merge_weights(checkpoint: Path, adapter: Adapter, folder: Path) -> int:
    """Write each shard of the base with the adapter's changes made.

    Returns:
        Bytes of tensor data written.
    Raises:
        StageError: the adapter changes a weight that the base does not have, or has in another
            shape.
    """
    import torch
    from safetensors import safe_open

    from workflow_scripts.export import safetensors_stream
    from workflow_scripts.export.tensor_names import part

    shards = checkpoints.weight_files(checkpoint)
    headers = {shard: safetensors_stream.read_header(shard) for shard in shards}
    parts = {name: part(name) for header in headers.values() for name in header}
    check_fit(checkpoint, adapter, {place.parameter for place in parts.values()})
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
                if parts[name].parameter in adapter.targets:
                    tensor = adapter.merged(parts[name], tensor)
                return tensor.to(shapes[name][1])

            n_bytes += safetensors_stream.write(folder / shard.name, shapes, merged_tensor)
        logger.info("wrote shard=%s n_tensors=%d", shard.name, len(header))
    return n_bytes


def check_fit(checkpoint: Path, adapter: Adapter, parameters: set[str]) -> None:
    """Every weight that the adapter changes must be there, and belong to itself alone.

    Args:
        parameters: of the base, by their names in the model.
    """
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    if not files.read_json(checkpoint / "config.json").get("tie_word_embeddings"):
        tied = set()
    if tied & adapter.targets and not adapter.keeps_ties:
        raise log.StageError(
            "the base's embeddings are its output layer too, and the adapter trained one of them",
            where=f"{checkpoint / 'config.json'}, tie_word_embeddings",
            found="true",
            expected="ensure_weight_tying in the adapter's config",
        )
    missing = adapter.targets - parameters - (tied if tied & parameters else set())
    if missing:
        raise log.StageError(
            "the adapter does not fit the base model",
            where=checkpoint,
            found=f"no weight {', '.join(sorted(missing)[:10])}",
            expected="the model that the adapter was trained on",
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
