"""A transformers model whose weights pass through memory, one parameter at a time.

The model is built without weights; hooks of accelerate fetch each parameter when its layer is
called and drop it afterwards. So a 7B is scored in float32 with the memory of its largest tensor
and of a batch's activations, on the CPU or on whichever GPU trained it. Since each pass reads every
weight, documents are scored in batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workflow_scripts.handover.facts import RopeParameters
from workflow_scripts.models.checkpoint import default_device
from workflow_scripts.scoring.likelihood import Scores, by_document, losses
from workflow_scripts.scoring.pieces import Piece

if TYPE_CHECKING:
    from torch import Tensor

# Activations of a 7B's widest layer in float32 are 0.12 MB a token, the logits of 131,072 words
# 0.5 MB.
BATCH_TOKENS = 2048


class StreamedModel:
    """Scores in float32 with weights that are made when they are needed.

    Args:
        checkpoint: folder whose config.json says what model it is.
        weights: parameter → float32 tensor.
        window: sliding window, keys; None is full causal attention.
        rope: `rope_parameters`; None are those of the config.
        vocabulary_size: rows of the embeddings, where they are not the config's.
        device: name of a torch device; None is the first GPU, else the CPU.
    """

    def __init__(
        self,
        checkpoint: Path,
        weights: Mapping[str, Tensor],
        *,
        window: int | None,
        rope: RopeParameters | None = None,
        vocabulary_size: int | None = None,
        device: str | None = None,
    ) -> None:
        from accelerate.hooks import attach_align_device_hook
        from transformers import AutoModelForCausalLM

        from workflow_scripts.models.checkpoint import model_config

        self._device = torch.device(device) if device else default_device()
        self._weights = weights
        config = model_config(checkpoint, window=window, rope=rope)
        config.vocab_size = vocabulary_size or config.vocab_size
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        # The only buffers of the family: computed from the config, in no file.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        self._model: Any = model.eval()
        attach_align_device_hook(
            model.model,
            execution_device=self._device,
            offload=True,
            weights_map=weights,
            module_name="model",
        )

    def logits(self, batch: Sequence[Piece]) -> list[Tensor]:
        """(n_scored, vocabulary) float32 on the CPU of each piece, in one pass over the weights."""
        longest = max(len(piece.input_ids) for piece in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, piece in zip(tokens, batch, strict=True):
            row[: len(piece.input_ids)] = torch.from_numpy(piece.input_ids.astype(np.int64))
        with torch.inference_mode():
            # Padding stands behind the text, where causal attention never looks: no mask is needed.
            hidden = self._model.model(tokens.to(self._device), use_cache=False).last_hidden_state
            head = self._weights["lm_head.weight"].to(self._device)
            return [
                (states[torch.from_numpy(piece.scored - 1).to(self._device)] @ head.T).cpu()
                for states, piece in zip(hidden, batch, strict=True)
            ]

    def score(self, pieces: Sequence[Piece]) -> Scores:
        """Nats of every scored token, by document."""
        nats: dict[Piece, np.ndarray] = {}
        for batch in batches(pieces):
            nats.update(zip(batch, map(losses, self.logits(batch), batch), strict=True))
        return by_document(pieces, nats)


def batches(pieces: Sequence[Piece], n_tokens: int = BATCH_TOKENS) -> Iterator[list[Piece]]:
    """Pieces of like lengths together, at most so many tokens with their padding; a longer piece is
    a batch of its own."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.input_ids)):
        if batch and (len(batch) + 1) * len(piece.input_ids) > n_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
