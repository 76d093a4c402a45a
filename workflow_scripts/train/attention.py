"""Attention over a packed row: same segment ∩ causal ∩ window, without building the row's mask.

A micro-batch is one flat row of tokens; `cu_seq_lens` gives the bounds of its segments, which
PyTorch's varlen kernel takes directly. Where the kernel does not run (a CPU, float32, a GPU older
than Ampere), each segment goes through SDPA separately, which computes the same. Either way memory
grows with the tokens and time with tokens × window.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "tramontane_packed"
# Queries per band of keys. Forward and backward of one document of 4,096 tokens, window
# 512, a CPU thread: 230 ms with 64, 197 with 128, 246 with 256, 390 with 512; window 8: 45, 60, 96.
BAND_QUERIES = 128


def register() -> str:
    """Register the packed attention with transformers.

    The mask function that is registered with it passes on a mask that hides tokens, which
    `packed_attention` then refuses. Without one, transformers would silently drop the mask.

    Returns:
        The name for `attn_implementation`.
    """
    # Not at the top: the doctor tries this attention where transformers may be missing.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
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
        module: the layer, for its model's dtype.
        query: (1, heads, tokens, head_dim).
        key: (1, kv_heads, tokens, head_dim), as is `value`.
        attention_mask: must be None; the segments replace it.
        scaling: factor on the scores.
        cu_seq_lens_q: (segments + 1,) int32, the first token of each segment and the row's end.
        max_length_q: tokens of the longest segment.
        sliding_window: keys a query of this layer sees, itself included; None is full causal.
    Returns:
        (1, tokens, heads, head_dim), and None for the attention weights.
    Raises:
        ValueError: a mask or dropout was given, or the batch is not one flat row.
    """
    if attention_mask is not None or query.shape[0] != 1 or dropout:
        raise ValueError(
            "packed attention takes one flat row, no mask and no dropout; found"
            f" batch {query.shape[0]}, mask {attention_mask is not None}, dropout {dropout}"
        )
    dtype = _kernel_dtype(module, query)
    if dtype is None:
        output = by_segment(query, key, value, cu_seq_lens_q, window=sliding_window, scale=scaling)
        return output, None
    output = _varlen(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        cu_seq_lens_q,
        max_length_q,
        window=sliding_window,
        scale=scaling,
    )
    return output.to(query.dtype), None


# If compiled, every new packing would be compiled again.
@torch.compiler.disable
def by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Run each segment through SDPA; shapes as in `packed_attention`."""
    # Split, not sliced: the gradient of a slice is as long as the row. Grouped key heads, not
    # repeated ones: a fifth faster with windows. One call for all segments of equal length would
    # save a tenth at 32 segments of 128 tokens, but the lengths of chats differ.
    lengths = cu_seq_lens.diff().tolist()
    segments = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        _attend(*segment, scale=scale)
        if window is None or segment[0].shape[2] <= window
        else _banded(*segment, window=window, scale=scale)
        for segment in segments
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None
) -> Tensor:
    """SDPA with grouped key heads; causal if no mask is given."""
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def _banded(query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float) -> Tensor:
    """Attention of one segment longer than the window; shapes as in SDPA.

    The first `window` queries need only a causal mask. The others form a batch of bands of
    `BAND_QUERIES` queries, each with its own stretch of keys, so that one small mask serves all.
    """
    first = _attend(query[:, :, :window], key[:, :, :window], value[:, :, :window], scale=scale)
    n_keys = BAND_QUERIES + window - 1
    positions = torch.arange(n_keys, device=query.device)
    tokens_back = positions[:BAND_QUERIES, None] + window - 1 - positions  # (query, key)
    band = (tokens_back >= 0) & (tokens_back < window)
    outputs = [first]
    n_bands, n_rest = divmod(query.shape[2] - window, BAND_QUERIES)
    end = query.shape[2] - n_rest
    if n_bands:
        queries = query[0, :, window:end].unflatten(1, (n_bands, BAND_QUERIES)).transpose(0, 1)
        keys, values = (
            part[0, :, 1:end].unfold(1, n_keys, BAND_QUERIES).permute(1, 0, 3, 2)
            for part in (key, value)
        )
        output = _attend(queries, keys, values, scale=scale, mask=band)
        outputs.append(output.transpose(0, 1).flatten(1, 2)[None])
    if n_rest:
        keys, values = (part[:, :, end - window + 1 :] for part in (key, value))
        mask = band[:n_rest, : n_rest + window - 1]
        outputs.append(_attend(query[:, :, end:], keys, values, scale=scale, mask=mask))
    return torch.cat(outputs, dim=2)


def _kernel_dtype(module: Any, query: Tensor) -> torch.dtype | None:
    """Type that the varlen kernel is to compute in; None where it does not run.

    The kernel takes only 16-bit types. Queries may arrive as float32 from float32 norms or
    adapters although the model computes in 16 bits.
    """
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    dtype = query.dtype
    if dtype == torch.float32:
        is_autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_autocast else module.config.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """PyTorch's FlashAttention varlen kernel; shapes as in `packed_attention`."""
    options = varlen_options(varlen_parameters(), window=window, scale=scale)
    if "enable_gqa" not in options:
        n_groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(n_groups, dim=1) for part in (key, value))
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    # A tuple only if more than the output is requested.
    output: Any = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, **options
    )
    return output[None]


@cache
def varlen_parameters() -> frozenset[str]:
    """Names of the parameters of this torch's `varlen_attn`."""
    return frozenset(inspect.signature(varlen_attn).parameters)


class VarlenOptions(TypedDict):
    """Keyword arguments of `varlen_attn`."""

    scale: float
    window_size: tuple[int, int]
    """Keys seen to the left and to the right of the query's own position; −1 is all of them."""
    enable_gqa: NotRequired[bool]


def varlen_options(
    parameters: frozenset[str], *, window: int | None, scale: float
) -> VarlenOptions:
    """Keyword arguments of `varlen_attn`.

    Args:
        parameters: names in its signature; torch 2.11 added `scale` and `window_size`, 2.12
            `enable_gqa`.
        window: keys a query sees, itself included; None is full causal.
    Raises:
        StageError: the kernel of this torch has no window.
    """
    if "window_size" not in parameters:
        raise StageError(
            "this version of PyTorch has no packed attention with a window",
            where="torch.nn.attention.varlen.varlen_attn",
            found=f"torch {torch.__version__}, without window_size",
            expected="torch 2.11 or newer",
            to_fix="install the versions of requirements.lock",
        )
    options: VarlenOptions = {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),
    }
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return options
