"""NEFTune on packed rows: uniform noise on the embeddings, scaled for each document separately.

The noise is at most alpha ÷ √(L·d), with L the tokens of the document and d the hidden size. Taking
L from the batch's shape would treat a row as one long document, with too little noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_noise(decoder: PreTrainedModel, *, alpha: float) -> None:
    """Add noise to the decoder's embeddings, in training mode only.

    The noise depends on the random state: restoring the state (resuming, the attention probe)
    reproduces it.

    Args:
        decoder: its forward pass must be given `cu_seq_lens_q`, (segments + 1,), of one flat row.
    Source: arXiv:2310.05914 §3.
    """
    bounds: list[torch.Tensor] = []

    def remember_segments(
        _: Any,
        __: Any,
        options: dict[str, Any],  # untyped: keyword arguments of any forward pass
    ) -> None:
        bounds[:] = [options["cu_seq_lens_q"]] if decoder.training else []

    def disturb(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not decoder.training:
            return embedded
        (of_row,) = bounds
        lengths = of_row.to(embedded.device).diff()
        # With `output_size` torch need not wait for the GPU.
        of_tokens = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])
        size = alpha * (of_tokens.float() * embedded.shape[2]).rsqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1).mul_(size[None, :, None])

    decoder.register_forward_pre_hook(remember_segments, with_kwargs=True)
    decoder.get_input_embeddings().register_forward_hook(disturb)
