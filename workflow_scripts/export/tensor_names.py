"""Where a tensor of a checkpoint's file lies in the model.

Mixtral's files keep each expert's matrices apart, as its first release did; transformers 5 holds
the experts of a layer in two tensors, and PEFT adapts these. Source: transformers 5.23,
conversion_mapping.py, "mixtral"; there w1 is the gate, w3 what it multiplies, w2 the way down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_EXPERT = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
_FUSED = {"1": ("gate_up_proj", 0), "2": ("down_proj", None), "3": ("gate_up_proj", 1)}


class Part(NamedTuple):
    """A parameter of the model, or what of it a tensor in a file holds."""

    parameter: str
    """Name in the model."""
    expert: int | None = None
    """First index of a fused parameter (experts, out, in); None is a parameter of its own."""
    half: int | None = None
    """0 the gate's, 1 the other half of the rows of `gate_up_proj`; None is all rows."""


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
