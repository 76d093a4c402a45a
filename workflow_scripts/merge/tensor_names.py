"""Where a tensor of a checkpoint's file lies in the model.

Mixtral's files keep each expert's matrices apart, as its first release did; transformers 5 holds
the experts of a layer in two tensors, and PEFT adapts these. Source: transformers 5.23,
conversion_mapping.py, "mixtral"; there w1 is the gate, w3 what it multiplies, w2 the way down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

_EXPERT = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
_FUSED = {"1": ("gate_up_proj", 0), "2": ("down_proj", None), "3": ("gate_up_proj", 1)}
# Four MiB in float32: what is done to a slab one after the other stays in the processor's cache.
SLAB_ELEMENTS = 2**20
# Quantization scales as many neighbouring weights together: a slab cuts none of them.
QUANTIZATION_BLOCK = 64


class Part(NamedTuple):
    """A parameter of the model, or what of it a tensor in a file holds."""

    parameter: str
    """Name in the model."""
    expert: int | None = None
    """First index of a fused parameter (experts, out, in); None is a parameter of its own."""
    half: int | None = None
    """0 the gate's, 1 the other half of the rows of `gate_up_proj`; None is all rows."""


class Slab(NamedTuple):
    """Neighbouring rows of one matrix: what is read, changed and written at a time."""

    part: Part
    rows: slice
    """Of the part."""
    place: tuple[int | slice | EllipsisType, ...]
    """Index of the rows in the tensor of the file."""


def part(name: str) -> Part:
    """What of the model a tensor in a file is, by its name."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        layer, number, matrix = expert.groups()
        fused, half = _FUSED[matrix]
        return Part(f"{layer}.mlp.experts.{fused}", int(number), half)
    return Part(name.replace(".block_sparse_moe.", ".mlp."))


def expert_parts(parameter: str, *, n_experts: int) -> Iterator[tuple[str, Part]]:
    """The modules that a fused parameter has in files, expert by expert, by their names there."""
    layer, _, fused = parameter.partition(".mlp.experts.")
    for expert in range(n_experts):
        for matrix, (name, half) in _FUSED.items():
            if name == fused:
                module = f"{layer}.block_sparse_moe.experts.{expert}.w{matrix}"
                yield module, Part(parameter, expert, half)


def slabs(name: str, shape: Sequence[int]) -> Iterator[Slab]:
    """A tensor of a file in slabs, in the order of its data.

    Args:
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
