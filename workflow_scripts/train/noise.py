"""NEFTune on packed rows: uniform noise on the embeddings of training, a document at a time.

The noise of a token is ±alpha ÷ √(L·d), L tokens of its document, d the hidden size. With L from
the batch's shape a row of many documents would count as one, and have less noise than each alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_noise(decoder: PreTrainedModel, *, alpha: float) -> None:
    """Noise on what the decoder embeds, in training mode alone.

    The random state decides the noise: who puts the state back (resuming, the attention probe)
    gets the same again.

    Args:
        decoder: whose forward pass is given `cu_seq_lens_q`, (segments + 1,), of one flat row.
    Source: arXiv:2310.05914 §3.
    """
    bounds: list[torch.Tensor] = []

    def remember_segments(
        _: Any,
        __: Any,
        options: dict[str, Any],  # untyped: of any forward pass, as torch hands them over
    ) -> None:
        bounds[:] = [options["cu_seq_lens_q"]] if decoder.training else []

    def disturb(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not decoder.training:
            return embedded
        (of_row,) = bounds
        lengths = of_row.to(embedded.device).diff()
        # The number is known beforehand, so the GPU need not be asked.
        of_tokens = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])
        size = alpha * (of_tokens.float() * embedded.shape[2]).rsqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1).mul_(size[None, :, None])

    decoder.register_forward_pre_hook(remember_segments, with_kwargs=True)
    decoder.get_input_embeddings().register_forward_hook(disturb)
