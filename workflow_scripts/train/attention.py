"""Attention over a packed row: same segment ∩ causal ∩ window, without ever making the row's mask.

A micro-batch is one flat row of tokens; `cu_seq_lens` say where its segments begin and end. On CUDA
PyTorch's varlen kernel takes them as they are; elsewhere each segment goes through SDPA by itself,
which is exactly equal and, on a CPU, cheaper than a dense mask.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "tramontane_packed"


def register() -> str:
    """Make the packed attention known to transformers.

    No mask function is registered beside it: transformers then makes no mask at all.

    Returns:
        The name for `attn_implementation`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        query: (1, heads, tokens, head_dim).
        key: (1, kv_heads, tokens, head_dim), as is `value`.
        attention_mask: None; the segments say all.
        scaling: factor on the scores.
        cu_seq_lens_q: (segments + 1,) int32, first token of each segment and the end of the last.
        max_length_q: tokens of the longest segment.
        sliding_window: keys a query sees, itself included; None is full causal.
    Returns:
        (1, tokens, heads, head_dim), and None for the weights, which are never made.
    Raises:
        ValueError: a mask was given, the batch is not flat, or dropout is wanted.
    """
    if attention_mask is not None or query.shape[0] != 1 or dropout:
        raise ValueError(
            "packed attention takes one flat row, no mask and no dropout; found"
            f" batch {query.shape[0]}, mask {attention_mask is not None}, dropout {dropout}"
        )
    if query.is_cuda:
        output = _varlen(
            query, key, value, cu_seq_lens_q, max_length_q, window=sliding_window, scale=scaling
        )
    else:
        bounds = cu_seq_lens_q.tolist()
        output = by_segment(query, key, value, bounds, window=sliding_window, scale=scaling)
    return output, None


def by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Each segment through SDPA alone; shapes as `packed_attention`.

    A segment longer than the window goes a window of queries at a time, each with the keys it can
    reach: the work grows with length × window, not with length².
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        stretch = end - start if window is None else window
        for first in range(start, end, stretch):
            last = min(end, first + stretch)
            first_key = start if window is None else max(start, first - window + 1)
            mask = None
            if first_key < first:
                queries = torch.arange(first, last, device=query.device)
                keys = torch.arange(first_key, last, device=query.device)
                tokens_back = queries[:, None] - keys[None, :]
                mask = (tokens_back >= 0) & (tokens_back < window)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, first:last],
                    key[:, :, first_key:last],
                    value[:, :, first_key:last],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=True,
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """PyTorch's FlashAttention varlen kernel; shapes as `packed_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    flat_query, flat_key, flat_value = (part[0].transpose(0, 1) for part in (query, key, value))
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),
    }
    if _varlen_takes_gqa():
        options["enable_gqa"] = True
    else:  # torch 2.11
        groups = query.shape[1] // key.shape[1]
        flat_key = flat_key.repeat_interleave(groups, dim=1)
        flat_value = flat_value.repeat_interleave(groups, dim=1)
    output = varlen_attn(
        flat_query,
        flat_key.contiguous(),
        flat_value.contiguous(),
        bounds,
        bounds,
        longest,
        longest,
        **options,
    )
    return output[None]


@cache
def _varlen_takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
