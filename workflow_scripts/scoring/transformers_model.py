"""A transformers model as a source of logits: base, live adapter or merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from workflow_scripts import files
from workflow_scripts.handover.facts import RopeParameters
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import Precision, load_model

WEIGHTS = "adapter_model.safetensors"
# Logits of a block: 16 MiB in float32, which the allocator keeps for the next block.
BLOCK_ELEMENTS = 4 * 1024 * 1024


class TransformersModel:
    """A checkpoint that gives logits, with a live adapter if one is given.

    Args:
        checkpoint: folder of the model.
        window: its sliding window (facts.json).
        precision: of weights and arithmetic.
        rope: `rope_parameters` of facts.json.
        adapter: folder of train_adapter: PEFT's adapter, applied live, or the tensors of a full
            fine-tune.
        device: name of a torch device; None is the first GPU, else the CPU.
    """

    engine: Literal["transformers"] = "transformers"

    def __init__(
        self,
        checkpoint: Path,
        *,
        window: int | None,
        precision: Precision,
        rope: RopeParameters | None = None,
        adapter: Path | None = None,
        device: str | None = None,
    ) -> None:
        model = load_model(checkpoint, window=window, precision=precision, rope=rope, device=device)
        if adapter is not None:
            model = as_trained(model, adapter)
        self.model: Any = model.eval()

    def logit_blocks(self, input_ids: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        device = self.model.device
        with torch.inference_mode():
            tokens = torch.from_numpy(input_ids.astype("int64"))[None].to(device)
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state[0]
            wanted = hidden[torch.from_numpy(positions).to(device)]
            head = self.model.lm_head
            for block in wanted.split(max(1, BLOCK_ELEMENTS // head.weight.shape[0])):
                yield head(block.to(head.weight.dtype)).float().cpu()


def as_trained(model: Any, adapter: Path) -> Any:
    """A loaded base with what was trained.

    Args:
        adapter: folder of train_adapter.
    Raises:
        StageError: the tensors of a full fine-tune do not fit the model, or the model is quantized.
    """
    if not is_full_fine_tune(adapter):
        # PEFT takes three seconds to import, and most links do not need it.
        from peft import PeftModel

        resize_embeddings(model, adapter)
        return PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with safe_open(adapter / WEIGHTS, framework="pt") as trained, torch.no_grad():
        for name in trained.keys():
            tensor, parameter = trained.get_tensor(name), parameters.get(name)
            if (
                parameter is None
                or parameter.shape != tensor.shape
                or not parameter.is_floating_point()
            ):
                raise StageError(
                    "the trained weights do not fit the model",
                    where=f"{adapter / WEIGHTS}, {name}",
                    found=tuple(tensor.shape),
                    expected="no such weight"
                    if parameter is None
                    else f"{tuple(parameter.shape)}, {parameter.dtype}",
                    to_fix="take the model that was trained, in 16 or 32 bits",
                )
            parameter.copy_(tensor)
    return model


def is_full_fine_tune(adapter: Path) -> bool:
    """True if the folder holds the weights of a full fine-tune instead of an adapter."""
    return files.read_json(adapter / "adapter_config.json").get("method") == "full"


def resize_embeddings(model: Any, adapter: Path) -> None:
    """Give a model as many embeddings as the adapter holds, if training added tokens."""
    with safe_open(adapter / WEIGHTS, framework="pt") as stored:
        for name in stored.keys():
            if name.endswith("embed_tokens.weight"):
                n_rows = stored.get_slice(name).get_shape()[0]
                if n_rows != model.config.vocab_size:
                    model.resize_token_embeddings(n_rows, mean_resizing=False)
