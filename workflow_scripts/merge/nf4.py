"""The 4-bit base of training, dequantized as bitsandbytes does it, one slab of a weight at a time.

NF4 scales each block of 64 neighbouring weights by its largest magnitude and rounds each weight to
the nearest of 16 values. Double quantization stores these scales in 8 bits, as differences from
their mean over the whole tensor, in blocks of 256. A slab therefore needs the scales of the whole
tensor first.

Source: arXiv:2305.14314 §3; bitsandbytes 0.50, `functional.quantize_4bit`, which does the
arithmetic here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)

from workflow_scripts.merge.tensor_names import QUANTIZATION_BLOCK

SCALES_BLOCK = 256


def scales(slabs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The scale of every block of a tensor, after double quantization.

    Args:
        slabs: of the whole tensor, in order; all but the last consist of whole blocks.
    Returns:
        (blocks,) float32.
    """
    largest = torch.cat([_largest(slab) for slab in slabs])
    mean = largest.mean()
    quantized, state = quantize_blockwise(largest - mean, blocksize=SCALES_BLOCK)
    return dequantize_blockwise(quantized, state).add_(mean)


def dequantized(slab: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A slab quantized to NF4 and dequantized, in its own dtype.

    Args:
        slab: weights in whole blocks, in the dtype in which training quantized them.
        scales: of these blocks.
    """
    # Flattened: on a CPU with AVX-512, bitsandbytes 0.50 returns other values where the length of a
    # row is not a multiple of the block.
    packed, state = quantize_4bit(slab.flatten(), blocksize=QUANTIZATION_BLOCK, quant_type="nf4")
    state.absmax = scales
    return dequantize_4bit(packed, state).view(slab.shape)


def _largest(slab: torch.Tensor) -> torch.Tensor:
    """(blocks,) float32: the largest magnitude of each block."""
    flat = slab.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % QUANTIZATION_BLOCK))
    return flat.view(-1, QUANTIZATION_BLOCK).abs().amax(dim=1).float()
