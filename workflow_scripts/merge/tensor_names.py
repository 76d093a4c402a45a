"""Mapping from names of tensors in a checkpoint's files to parameters of the model.

Mixtral's files hold one tensor per expert and matrix, as its first release did; transformers 5
holds the experts of a layer in two tensors, and PEFT adapts these. Source: transformers 5.23,
conversion_mapping.py, "mixtral"; there w1 is the gate, w3 the matrix that it multiplies, w2 the
down projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

_EXPERT = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
_FUSED = {"1": ("gate_up_proj", 0), "2": ("down_proj", None), "3": ("gate_up_proj", 1)}
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.((self_attn|mlp)\.\w+_proj\.weight|mlp\.experts\.(gate_up|down)_proj)"
)
# Output layer → the embeddings that take its place in a model with tied embeddings.
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
# Four MiB in float32: the steps of work on one slab find it in the processor's cache.
SLAB_ELEMENTS = 2**20
# NF4 scales blocks of this many neighbouring weights; no slab cuts through a block.
QUANTIZATION_BLOCK = 64


class Part(NamedTuple):
    """A parameter of the model, or the part of it that one tensor in a file holds."""

    parameter: str
    """Name in the model."""
    expert: int | None = None
    """First index of a fused parameter (experts, out, in); None for any other parameter."""
    half: int | None = None
    """Half of the rows of `gate_up_proj`: 0 is the gate, 1 the up projection; None is all rows."""


class Slab(NamedTuple):
    """Neighbouring rows of one matrix: the unit of reading, computing and writing."""

    part: Part
    rows: slice
    """Rows of the part."""
    place: tuple[int | slice | EllipsisType, ...]
    """Index of the rows in the tensor of the file."""


def part(name: str) -> Part:
    """The part of the model that a tensor in a file holds.

    Args:
        name: of the tensor.
    """
    expert = _EXPERT.fullmatch(name)
    if expert:
        layer, number, matrix = expert.groups()
        fused, half = _FUSED[matrix]
        return Part(f"{layer}.mlp.experts.{fused}", int(number), half)
    return Part(name.replace(".block_sparse_moe.", ".mlp."))


def is_quantized_in_training(part: Part) -> bool:
    """True if 4-bit training holds the parameter in NF4: linear layers and experts, but not
    embeddings, norms, routers and the output layer."""
    return _QUANTIZED.fullmatch(part.parameter) is not None


def expert_parts(parameter: str, *, n_experts: int) -> Iterator[tuple[str, Part]]:
    """The modules that hold a fused parameter in files: name there and part, expert by expert."""
    layer, _, fused = parameter.partition(".mlp.experts.")
    for expert in range(n_experts):
        for matrix, (name, half) in _FUSED.items():
            if name == fused:
                module = f"{layer}.block_sparse_moe.experts.{expert}.w{matrix}"
                yield module, Part(parameter, expert, half)


def slabs(name: str, shape: Sequence[int]) -> Iterator[Slab]:
    """The slabs of a tensor, in the order of its data.

    Args:
        name: of the tensor in its file.
        shape: of the tensor; (experts, out, in) where a file holds the experts fused.
    """
    whole = part(name)
    if len(shape) == 3:
        for expert in range(shape[0]):
            for rows in _row_ranges(*shape[1:]):
                yield Slab(whole._replace(expert=expert), rows, (expert, rows))
    elif len(shape) == 2:
        for rows in _row_ranges(*shape):
            yield Slab(whole, rows, (rows,))
    else:
        yield Slab(whole, slice(None), (...,))


def _row_ranges(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, SLAB_ELEMENTS // max(1, n_columns))
    if n_columns % QUANTIZATION_BLOCK:
        step = max(1, step // QUANTIZATION_BLOCK) * QUANTIZATION_BLOCK
    for first in range(0, n_rows, step):
        yield slice(first, min(n_rows, first + step))
