"""The 4-bit base of training, dequantized as bitsandbytes does it, a slab of a weight at a time.

NF4: each block of 64 neighbouring weights is scaled by its largest, and each weight becomes the
nearest of 16 values; double quantization keeps these scales in 8 bits, as differences to their mean
over the whole tensor, in blocks of 256. So a slab wants the scales of the whole tensor first.

Source: arXiv:2305.14314 §3; bitsandbytes 0.50, `functional.quantize_4bit`, whose code does both
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import bitsandbytes.functional
import torch

from workflow_scripts.merge.tensor_names import QUANTIZATION_BLOCK, Part

SCALES_BLOCK = 256
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")


def is_quantized(part: Part) -> bool:
    """Whether training holds a parameter in NF4: the linear layers and experts, not embeddings,
    norms, routers and the output layer."""
    return bool(_LINEAR.fullmatch(part.parameter) or _EXPERTS.fullmatch(part.parameter))


def scales(slabs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The scale of every block of a tensor, after double quantization.

    Args:
        slabs: of the whole tensor, in its order, each but the last of whole blocks.
    Returns:
        (blocks,) float32.
    """
    largest = torch.cat([_largest(slab) for slab in slabs])
    mean = largest.mean()
    quantized, state = bitsandbytes.functional.quantize_blockwise(
        largest - mean, blocksize=SCALES_BLOCK
    )
    return bitsandbytes.functional.dequantize_blockwise(quantized, state).add_(mean)


def dequantized(slab: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Quantized to NF4 and back, in the slab's dtype.

    Args:
        slab: weights of whole blocks, in the dtype in which training quantized them.
        scales: of these blocks.
    """
    # In one row: bitsandbytes 0.50 gives back other values on a CPU with AVX-512 where a row is no
    # multiple of a block.
    packed, state = bitsandbytes.functional.quantize_4bit(
        slab.flatten(), blocksize=QUANTIZATION_BLOCK, quant_type="nf4"
    )
    state.absmax = scales
    return bitsandbytes.functional.dequantize_4bit(packed, state).view(slab.shape)


def _largest(slab: torch.Tensor) -> torch.Tensor:
    """(blocks,) float32: the largest magnitude of each."""
    flat = slab.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % QUANTIZATION_BLOCK))
    return flat.view(-1, QUANTIZATION_BLOCK).abs().amax(dim=1).float()
