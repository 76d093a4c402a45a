"""Base + adapter, a slab at a time: for the files of a merged model, and for a model in memory.

Each weight is rounded once, to the 16-bit type of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import safetensors_stream
from workflow_scripts.merge.adapter import EMBEDDINGS, Adapter
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.tensor_names import Slab, part, slabs
from workflow_scripts.models.tensors import is_position_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merged_shape(base: BaseWeights, adapter: Adapter, name: str) -> tuple[int, ...]:
    """Of a tensor of the base's files in the merged model: embeddings may have grown."""
    lies = part(name)
    if lies.parameter in EMBEDDINGS and adapter.replaces(lies):
        return adapter.shape(lies)
    return base.shape(name)


def merged_dtype(name: str) -> torch.dtype:
    """Of a tensor in the merged model.

    Args:
        name: of its type in the base's file. A float32 base is rounded: what is merged is a 16-bit
            model.
    """
    dtype = safetensors_stream.DTYPES[name]
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def merged_slab(
    base: BaseWeights, adapter: Adapter, name: str, slab: Slab, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of a tensor of the base's files with the adapter's change made; several threads may ask
    at once.

    Args:
        dtype: of the merged model's tensor.
    """
    if adapter.replaces(slab.part):
        return adapter.stored(slab.part, slab.rows).to(dtype)
    weight = base.weight(name, slab)
    if slab.part.parameter in adapter.targets:
        weight = adapter.merged(slab.part, weight, slab.rows)
    # Of another type than the adapter's float32: memory of its own.
    return weight.to(dtype)


def overwrite(model: PreTrainedModel, base: BaseWeights, adapter: Adapter | None = None) -> None:
    """Put a base's weights, or those merged from it, into a loaded model of 16 or 32 bits.

    Args:
        adapter: None is the base alone, not rounded.
    """
    if adapter is not None and adapter.vocabulary_size not in (None, model.config.vocab_size):
        model.resize_token_embeddings(adapter.vocabulary_size, mean_resizing=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for header in base.headers.values():
        for name, entry in header.items():
            if is_position_table(name):
                continue  # in the file, but computed from config.json by the model
            shape = base.shape(name) if adapter is None else merged_shape(base, adapter, name)
            for slab in slabs(name, shape):
                if adapter is None:
                    weight = base.weight(name, slab)
                else:
                    dtype = merged_dtype(entry["dtype"])
                    weight = merged_slab(base, adapter, name, slab, dtype)
                with torch.no_grad():
                    target = parameters[slab.part.parameter].data
                    if slab.part.expert is not None:
                        target = target[slab.part.expert]
                    if slab.part.half is not None:
                        target = target.chunk(2)[slab.part.half]
                    (target[slab.rows] if target.dim() else target).copy_(weight)


def check_fit(checkpoint: Path, base: BaseWeights, adapter: Adapter) -> None:
    """Every weight that the adapter changes must be there, in its shape, and belong to itself
    alone; and the adapter must have all that its config names.

    Raises:
        StageError: the first that does not.
    """
    config: dict[str, Any] = files.read_json(checkpoint / "config.json")
    tied = EMBEDDINGS if config.get("tie_word_embeddings") else set()
    if tied & adapter.targets and not adapter.keeps_ties:
        raise StageError(
            "the base's embeddings are its output layer too, and the adapter trained one of them",
            where=f"{checkpoint / 'config.json'}, tie_word_embeddings",
            found="true",
            expected="ensure_weight_tying in the adapter's config",
        )
    missing = adapter.targets - base.parameters - (tied if tied & base.parameters else set())
    if missing:
        raise StageError(
            "the adapter does not fit the base model",
            where=checkpoint,
            found=f"no weight {', '.join(sorted(missing)[:10])}",
            expected="the model that the adapter was trained on",
        )
    adapter.check_complete(base.parameters)
    for header in base.headers.values():
        for name in header:
            shape = base.shape(name)
            for slab in slabs(name, shape):
                if slab.rows.start in (None, 0) and slab.part.parameter in adapter.targets:
                    adapter.check_shape(slab.part, shape[-2:])
    grown = adapter.vocabulary_size
    alone = (EMBEDDINGS & base.parameters) - adapter.targets
    if grown not in (None, config["vocab_size"]) and alone:
        raise StageError(
            "the adapter has more embeddings than the base, and not for both ends of the model",
            where=f"{checkpoint}, {', '.join(sorted(alone))}",
            found=f"{config['vocab_size']} rows",
            expected=f"{grown}, in the adapter",
            to_fix="save the adapter with both (PEFT: save_embedding_layers=True)",
        )
