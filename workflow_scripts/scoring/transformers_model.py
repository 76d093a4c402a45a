"""A transformers model as a source of logits: base, live adapter or merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.models.checkpoint import Precision, load_model

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Logits of a block: 16 MiB in float32, which the allocator keeps for the next block.
BLOCK_ELEMENTS = 4 * 1024 * 1024


class TransformersModel:
    """Scores with a checkpoint, with a live adapter on it where one is given.

    Args:
        checkpoint: folder of the model.
        window: its sliding window (facts.json).
        precision: of weights and arithmetic.
        adapter: folder of a PEFT adapter to apply live.
        device: name of a torch device; None is the first GPU, else the CPU.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        window: int | None,
        precision: Precision,
        adapter: Path | None = None,
        device: str | None = None,
    ) -> None:
        model = load_model(checkpoint, window=window, precision=precision, device=device)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
        self.model: Any = model.eval()

    def logit_blocks(self, input_ids: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        import torch

        device = self.model.device
        with torch.inference_mode():
            tokens = torch.from_numpy(input_ids.astype("int64"))[None].to(device)
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state[0]
            wanted = hidden[torch.from_numpy(positions).to(device)]
            head = self.model.lm_head
            for block in wanted.split(max(1, BLOCK_ELEMENTS // head.weight.shape[0])):
                yield head(block.to(head.weight.dtype)).float().cpu()
