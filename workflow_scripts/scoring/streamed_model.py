"""A transformers model whose weights pass through memory one parameter at a time.

The model is built without weights; hooks of accelerate fetch each parameter when its layer is
called and drop it afterwards. A 7B model is thus scored in float32 with the memory of its largest
tensor and of a batch's activations, on the CPU or on the GPU that trained it. Each pass reads every
weight, so documents are scored in batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor
from transformers import AutoModelForCausalLM

from workflow_scripts.handover.facts import RopeParameters
from workflow_scripts.models.checkpoint import default_device, model_config
from workflow_scripts.scoring.likelihood import Scores, by_document, losses
from workflow_scripts.scoring.pieces import Piece

# In float32 the activations of a 7B's widest layer take 0.12 MB per token, and the logits of a
# vocabulary of 131,072 tokens 0.5 MB.
BATCH_TOKENS = 2048


class WeightSource(Protocol):
    """Weights by the names of transformers' parameters: a mapping, or anything with `[]`."""

    def __getitem__(self, parameter: str, /) -> Tensor:
        """A parameter in float32."""
        ...


class StreamedModel:
    """A model in float32 whose weights are computed when they are needed.

    Args:
        checkpoint: folder whose config.json describes the model.
        weights: computes a parameter when it is needed.
        window: sliding window, keys; None is full causal attention.
        rope: `rope_parameters`; None means those of the config.
        vocabulary_size: rows of the embeddings; None means those of the config.
        device: name of a torch device; None is the first GPU, else the CPU.
    """

    def __init__(
        self,
        checkpoint: Path,
        weights: WeightSource,
        *,
        window: int | None,
        rope: RopeParameters | None = None,
        vocabulary_size: int | None = None,
        device: str | None = None,
    ) -> None:
        self._device = torch.device(device) if device else default_device()
        self._weights = weights
        config = model_config(checkpoint, window=window, rope=rope)
        config.vocab_size = vocabulary_size or config.vocab_size
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        # The only buffers of the family: computed from the config, not stored in a file.
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
        """(n_scored, vocabulary) float32 logits of each piece, on the CPU, in one pass over the
        weights."""
        longest = max(len(piece.input_ids) for piece in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, piece in zip(tokens, batch, strict=True):
            row[: len(piece.input_ids)] = torch.from_numpy(piece.input_ids.astype(np.int64))
        with torch.inference_mode():
            # Padding follows the text, where causal attention does not look: no mask is needed.
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
    """Group pieces of similar length.

    Args:
        n_tokens: most tokens in a batch, padding included; a longer piece is a batch by itself.
    """
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.input_ids)):
        if batch and (len(batch) + 1) * len(piece.input_ids) > n_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
