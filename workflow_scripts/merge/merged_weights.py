"""Base + adapter, one slab at a time: for the files of a merged model, and for a model in memory.

Each weight is rounded once, to the 16-bit type of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from workflow_scripts import files, log, parallel
from workflow_scripts.log import StageError
from workflow_scripts.merge import safetensors_stream
from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.adapter_config import EMBEDDINGS
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.tensor_names import Slab, part, slabs

logger = log.stage_logger("merge_adapter")


def merged_shape(base: BaseWeights, adapter: Adapter, name: str) -> tuple[int, ...]:
    """Shape of a base tensor in the merged model: embeddings may have grown."""
    where = part(name)
    if where.parameter in EMBEDDINGS & adapter.whole:
        return adapter.shape(where)
    return base.shape(name)


def merged_dtype(base: BaseWeights, name: str) -> torch.dtype:
    """Type of a base tensor in the merged model; a float32 base becomes bfloat16."""
    dtype = safetensors_stream.DTYPES[base.entries[name].dtype]
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def merged_slab(base: BaseWeights, adapter: Adapter, name: str, slab: Slab) -> torch.Tensor:
    """Merged rows of a base tensor; later calls do not overwrite them. Thread-safe."""
    dtype = merged_dtype(base, name)
    if slab.part.parameter in adapter.whole:
        return adapter.stored(slab.part, slab.rows).to(dtype)
    weight = base.weight(name, slab)
    if slab.part.parameter in adapter.targets:
        weight = adapter.merged(slab.part, weight, slab.rows)
    # The adapter reuses its memory, which is float32: `to` copies from it.
    return weight.to(dtype)


def write(base: BaseWeights, adapter: Adapter, folder: Path) -> int:
    """Write the shards of the merged model, named as the base's.

    Returns:
        Bytes of tensor data written.
    """
    # One thread per slab: several threads on one product wait for each other (measured: 5 times the
    # time of one, on two busy cores).
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shown = log.progress(list(base.entries), logger, total=len(base.entries), unit="tensors")
    n_bytes = 0
    with ThreadPoolExecutor(n_threads) as pool:

        def merged(name: str) -> Iterator[torch.Tensor]:
            next(shown)
            return parallel.ahead(
                pool,
                lambda slab: merged_slab(base, adapter, name, slab),
                slabs(name, merged_shape(base, adapter, name)),
                n_ahead=2 * n_threads,
            )

        for shard in dict.fromkeys(entry.path for entry in base.entries.values()):
            shapes = {
                name: (list(merged_shape(base, adapter, name)), merged_dtype(base, name))
                for name, entry in base.entries.items()
                if entry.path == shard
            }
            n_bytes += safetensors_stream.write(folder / shard.name, shapes, merged)
            logger.info("wrote shard=%s n_tensors=%d", shard.name, len(shapes))
    next(shown, None)  # ends the bar
    return n_bytes


def check_fit(checkpoint: Path, base: BaseWeights, adapter: Adapter) -> None:
    """Check that the base has every weight that the adapter changes, in its shape and not tied to
    another, and that the adapter has all that its config names.

    Args:
        checkpoint: folder of the base model.
    Raises:
        StageError: the first fault that is found.
    """
    config = files.read_json(checkpoint / "config.json")
    tied = EMBEDDINGS if config.get("tie_word_embeddings") else set()
    if tied & adapter.targets and not adapter.keeps_ties:
        raise StageError(
            "the base's embeddings are its output layer too, and the adapter trained one of them",
            where=f"{checkpoint / 'config.json'}, tie_word_embeddings",
            found="true",
            expected="ensure_weight_tying in the adapter's config",
        )
    parameters = base.parameters.keys()
    missing = adapter.targets - parameters - (tied if tied & parameters else set())
    if missing:
        raise StageError(
            "the adapter does not fit the base model",
            where=checkpoint,
            found=f"no weight {', '.join(sorted(missing)[:10])}",
            expected="the model that the adapter was trained on",
        )
    adapter.check_complete(set(parameters))
    for name in base.entries:
        shape = base.shape(name)
        for slab in slabs(name, shape):
            if slab.rows.start in (None, 0) and slab.part.parameter in adapter.targets:
                adapter.check_shape(slab.part, shape[-2:])
    n_rows = adapter.vocabulary_size
    untrained = (EMBEDDINGS & parameters) - adapter.targets
    if n_rows not in (None, config["vocab_size"]) and untrained:
        raise StageError(
            "the adapter has more embeddings than the base, but not at both ends of the model",
            where=f"{checkpoint}, {', '.join(sorted(untrained))}",
            found=f"{config['vocab_size']} rows",
            expected=f"{n_rows}, in the adapter",
            to_fix="save the adapter with both (PEFT: save_embedding_layers=True)",
        )
